"""Small forms of the networks that people train, each with a loss and a batch of each of three domains."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _models import FeatureNet, loss_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Case:
    """A model in double precision, ``loss(model, batch)`` and three batches."""

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    batches: list[Any]


def mean_squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).abs().square().mean()


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def regression(*shape: int, targets: int = 2, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Three domains with inputs of the given shape; each has another scale and mean."""
    return [
        (torch.randn(shape, dtype=dtype) * (1 + 0.3 * d) + 0.5 * d, torch.randn(shape[0], targets, dtype=dtype))
        for d in range(3)
    ]


# ------------------------------------------------------------------------------------------------- networks


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.norm(self.convolution(x))) + self.shortcut(x)


class SequenceClassifier(nn.Module):
    """Embedding, positions, ``nn.TransformerEncoder``, the mean over tokens, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(6, 8) * 0.1)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.position).mean(dim=1))


class CausalLanguageModel(nn.Module):
    """Called as those of HuggingFace: ``model(input_ids=..., attention_mask=..., labels=...).loss``; tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.project = nn.Linear(8, 24)
        self.dropout = nn.Dropout(0.1)
        self.output = nn.Linear(8, 9, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.project(hidden).chunk(3, -1))
        causal = torch.ones(input_ids.shape[1], input_ids.shape[1]).tril().bool()
        allowed = (causal & attention_mask.bool()[:, None, None, :]) | torch.eye(len(causal)).bool()
        attended = nn.functional.scaled_dot_product_attention(query, key, value, allowed).transpose(1, 2).flatten(2)
        logits = self.output(hidden + self.dropout(attended))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers = kind(4, 5, num_layers=2, batch_first=True, dropout=0.3, bidirectional=True)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


class Checkpointed(nn.Module):
    """The first half is evaluated again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 6), nn.Tanh())
        self.second = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))


class OwnWeightNorm(nn.Module):
    """Weight normalization in elementary operations, for ``parametrize.register_parametrization``."""

    def forward(self, magnitude: Tensor, direction: Tensor) -> Tensor:
        return magnitude * direction / direction.norm(dim=1, keepdim=True)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.norm(dim=1, keepdim=True), weight


class ComplexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 5, dtype=torch.complex128) * 0.5)
        self.bias = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(5, 2, dtype=torch.complex128) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first + self.bias) @ self.second


class ReverseGradient(torch.autograd.Function):
    """The layer of domain-adversarial training, written as its papers' code has it, without ``setup_context``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return -0.5 * cotangent


class Adversarial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.label = nn.Linear(6, 1)
        self.domain = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return torch.cat([self.label(features), torch.tanh(self.domain(ReverseGradient.apply(features)))], dim=1)


def two_layers(*between: nn.Module, width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), *between, nn.Tanh(), nn.Linear(width, 2)).double()


# ---------------------------------------------------------------------------------------------------- cases


def regression_of(model: nn.Module) -> Case:
    return Case(model, mean_squared_error, regression(7, 4))


def batch_norm_1d() -> Case:
    return regression_of(two_layers(nn.BatchNorm1d(6)))


def batch_norm_cumulative() -> Case:
    return regression_of(two_layers(nn.BatchNorm1d(6, momentum=None)))


def batch_norm_eval() -> Case:
    model = two_layers(nn.BatchNorm1d(6))
    for x, _ in regression(7, 4):
        model(x)
    return regression_of(model.eval())


def resnet() -> Case:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    model = nn.Sequential(nn.Conv2d(3, 2, 3, 1, 1), Residual(2, 2, 1), Residual(2, 4, 2), *head).double()
    return Case(model, mean_squared_error, regression(4, 3, 8, 8, targets=3))


def dropout() -> Case:
    return regression_of(two_layers(nn.Dropout(0.4)))


def mixup() -> Case:
    """Draws from torch, numpy and Python."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        weight = float(np.random.beta(0.4, 0.4))  # noqa: NPY002  as mixup's public implementations do
        order = torch.randperm(len(x))
        noise = random.random()
        mixed = weight * x + (1 - weight) * x[order] + noise
        return weight * (model(mixed) - y).square().mean() + (1 - weight) * (model(mixed) - y[order]).square().mean()

    return Case(two_layers(nn.Dropout(0.2)), loss, regression(7, 4))


def transformer() -> Case:
    batches = [(torch.randint(0, 11, (5, 6)), torch.randint(0, 3, (5,))) for _ in range(3)]
    return Case(SequenceClassifier().double(), cross_entropy, batches)


def transformer_eval() -> Case:
    case = transformer()
    case.model.eval()
    return case


def language_model() -> Case:
    """Its batches are no ``dict``, as HuggingFace's ``BatchEncoding`` is none."""

    def batch(size: int, length: int) -> UserDict[str, Tensor]:
        tokens = torch.randint(0, 9, (size, length))
        mask = (torch.arange(length) < torch.randint(3, length + 1, (size, 1))).long()
        return UserDict({"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)})

    batches = [batch(3, 5), batch(5, 7), batch(2, 4)]
    return Case(CausalLanguageModel().double(), lambda model, batch: model(**batch).loss, batches)


def unequal_batches() -> Case:
    """Dictionaries within lists, of batches of several sizes."""

    def loss(model: nn.Module, batch: list[dict[str, Tensor]]) -> Tensor:
        return torch.stack([mean_squared_error(model, (views["x"], views["y"])) for views in batch]).mean()

    sizes = zip((2, 9, 5), regression(9, 4), strict=True)
    batches = [[{"x": x[:size] + shift, "y": y[:size]} for shift in (0, 1)] for size, (x, y) in sizes]
    return Case(two_layers(nn.BatchNorm1d(6)), loss, batches)


def lstm() -> Case:
    return Case(Recurrent(nn.LSTM).double(), mean_squared_error, regression(5, 3, 4))


def gru() -> Case:
    return Case(Recurrent(nn.GRU).double(), mean_squared_error, regression(5, 3, 4))


def sparse_embedding() -> Case:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, y = batch
        return (torch.tanh(model(tokens)).prod(dim=1) - y).square().mean()

    model = nn.Embedding(8, 3, sparse=True).double()
    return Case(model, loss, [(torch.randint(0, 8, (6, 2)), torch.randn(6, 3).double()) for _ in range(3)])


def features() -> Case:
    """Weights tied, frozen, empty, unused, or used by one domain."""
    model = FeatureNet(torch.Generator().manual_seed(0))
    batches = [(x, y, d) for d, (x, y) in enumerate(regression(5, 4, targets=1))]
    return Case(model, loss_of, batches)


def with_first_layer(change: Callable[[nn.Module], Any]) -> Case:
    model = two_layers()
    change(model[0])
    return regression_of(model)


def spectral_normalized() -> Case:
    return with_first_layer(parametrizations.spectral_norm)


def spectral_normalized_by_hook() -> Case:
    return with_first_layer(spectral_norm)


def weight_normalized() -> Case:
    return with_first_layer(lambda layer: parametrize.register_parametrization(layer, "weight", OwnWeightNorm()))


def weight_normalized_by_torch() -> Case:
    """The same function with the same names and values as ``weight_normalized``."""
    return with_first_layer(parametrizations.weight_norm)


def pruned() -> Case:
    return with_first_layer(lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5))


def checkpointed() -> Case:
    return regression_of(Checkpointed().double())


def gradient_reversal() -> Case:
    return regression_of(Adversarial().double())


def stop_gradient() -> Case:
    """A target computed by the model itself and detached, as in self-distillation."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (model(x) - y).square().mean() + (model(x) - model(x.flip(0)).detach()).square().mean()

    return Case(two_layers(), loss, regression(7, 4))


def complex_numbers() -> Case:
    return Case(ComplexNet(), mean_squared_error, regression(6, 4, dtype=torch.complex128))


PLAIN = [batch_norm_1d, batch_norm_cumulative, resnet, mixup, transformer, transformer_eval]
PLAIN += [language_model, unequal_batches, lstm, sparse_embedding, features, weight_normalized, pruned, checkpointed]
PLAIN += [complex_numbers]
# Of these the gradient holds something fixed that moves with the parameters, or is not the gradient of any function:
# finite differences of it are another direction.
WITHOUT_DIFFERENCES = [spectral_normalized, spectral_normalized_by_hook, gradient_reversal, stop_gradient]
WITHOUT_FORWARD = [sparse_embedding, checkpointed, spectral_normalized, spectral_normalized_by_hook, gradient_reversal]


def make(build: Callable[[], Case], seed: int = 0) -> Case:
    """Build a case; always the same one."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also prints the stack, for devices not yet in use
    return build()
