"""Small models of several kinds and batches of S domains for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Activation = Callable[[], nn.Module]


def mlp(*widths: int, activation: Activation = nn.ReLU) -> nn.Module:
    """Layers of these widths, the first the input's."""
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        layers += [nn.Linear(narrow, wide), activation()]
    return nn.Sequential(*layers[:-1])


def cdsprites(activation: Activation = nn.ReLU) -> nn.Module:
    """The network of ``examples/cdsprites.py`` at 32 pixels."""
    layers: list[nn.Module] = []
    for narrow, wide in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(narrow, wide, kernel_size=4, stride=2, padding=1), activation()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 2))


class _Residual(nn.Module):
    """He et al., 2016: two convolutions around which the input goes."""

    def __init__(self, narrow: int, wide: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation()
        self.convs = nn.Sequential(
            nn.Conv2d(narrow, wide, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            activation(),
            nn.Conv2d(wide, wide, 3, padding=1, bias=False),
            nn.BatchNorm2d(wide),
        )
        self.around: nn.Module = nn.Identity()
        if stride > 1 or narrow != wide:
            self.around = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.convs(x) + self.around(x))


def resnet18(activation: Activation = nn.ReLU, width: int = 16) -> nn.Module:
    """ResNet-18 with the stem for 32 pixels, a quarter as wide as the original: BatchNorm, 62 parameter tensors."""
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), activation()]
    channels = width
    for stage in range(4):
        wide = width * 2**stage
        layers += [_Residual(channels, wide, 1 if stage == 0 else 2, activation), _Residual(wide, wide, 1, activation)]
        channels = wide
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Transformer(nn.Module):
    """Two encoder layers with dropout 0.1."""

    def __init__(self, activation: Activation = nn.ReLU) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=256, activation=activation(), batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


@dataclass(frozen=True)
class Network:
    """A model, and the shape and classes of one domain's batch; an activation other than ReLU goes to ``make``."""

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    classes: int

    def batches(self, domains: int, size: int | None = None) -> list[Batch]:
        """Draw S batches; each domain has inputs about another mean."""
        shape = self.shape if size is None else (size, *self.shape[1:])
        return [
            (torch.randn(shape) + 0.5 * torch.randn(shape[1:]), torch.randint(self.classes, shape[:1]))
            for _ in range(domains)
        ]


NETWORKS = {
    "MLP": Network(partial(mlp, 784, 256, 256, 10), (64, 784), 10),
    "CdSprites CNN": Network(cdsprites, (32, 3, 32, 32), 2),
    "ResNet-18/4": Network(resnet18, (8, 3, 32, 32), 10),
    "Transformer": Network(Transformer, (16, 32, 64), 10),
}
