"""A model that two optimizers share, Muon and AdamW, and the loop that steps each of them by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from _models import assert_identical
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from torch_gradmatch import Fish, GradMatch

META_LR = 0.25  # a power of two: then every way to interpolate rounds alike
DOMAINS = 3
Batch = tuple[Tensor, Tensor]
By = Callable[[Sequence[Optimizer]], object]  # what happens at the start of every inner loop


def make_model(seed: int = 0, *, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return model


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 2]


def rest(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() != 2]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    return [Muon(matrices(model), lr=0.05), AdamW(rest(model), lr=0.02)]


def make_batches(count: int, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((8, 4), (8, 2))
    return [tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes) for _ in range(count)]  # type: ignore[misc]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def train(
    optimizer: GradMatch[Any], model: nn.Module, batches: Sequence[Batch], after_step: Any = lambda: None
) -> None:
    """The plain loop of a user."""
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        after_step()


class ByHand:
    """Algorithm 1 in a loop that knows each of the optimizers. ``begin`` is called before every inner loop."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], begin: By = lambda _: None) -> None:
        self.model, self.optimizers, self.begin = model, optimizers, begin
        self.slow: dict[Tensor, Tensor] = {}
        self.steps = 0

    def step(self, batch: Batch, *, skipped: bool = False) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss_of(self.model, batch).backward()
        self.walk(skipped=skipped)

    def walk(self, *, skipped: bool = False) -> None:
        if self.steps == 0:
            self.begin(self.optimizers)
        for p in self.model.parameters():
            if p not in self.slow:
                self.slow[p] = p.detach().clone()
        for optimizer in self.optimizers if not skipped else ():
            optimizer.step()
        self.steps += 1
        if self.steps == DOMAINS:
            with torch.no_grad():
                for p, slow in self.slow.items():
                    p.copy_(slow + META_LR * (p - slow))
            self.slow, self.steps = {}, 0

    def train(self, batches: Sequence[Batch], after_step: Any = lambda: None) -> None:
        for batch in batches:
            self.step(batch)
            after_step()


def forget_all(optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.state.clear()


def forget_first(optimizers: Sequence[Optimizer]) -> None:
    optimizers[0].state.clear()


def forget_first_of_wrapped(optimizer: Any) -> None:
    forget_first(optimizer.optimizers)


INNER_STATES: dict[str, tuple[Any, By]] = {
    "carry": ("carry", lambda _: None),
    "reset": ("reset", forget_all),
    "callable": (forget_first_of_wrapped, forget_first),
}
every_inner_state = pytest.mark.parametrize("inner_state", INNER_STATES)


def fish(inner_state: str = "carry", **others: Any) -> Fish:
    return Fish(META_LR, inner_steps=DOMAINS, inner_state=INNER_STATES[inner_state][0], **others)


def assert_same(model: nn.Module, optimizer: GradMatch[Any], reference: nn.Module, optimizers: Any) -> None:
    assert_identical(dict(model.named_parameters()), dict(reference.named_parameters()), "parameters")
    wrapped = optimizer.optimizer.optimizers  # type: ignore[attr-defined]
    assert_identical([o.state_dict() for o in wrapped], [o.state_dict() for o in optimizers], "optimizers")


def everything(model: nn.Module, optimizer: GradMatch[Any]) -> Any:
    """Copies of all that may change."""
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), optimizer.inner_step)), gradients


class Scaled(nn.Module):
    """A model with a parameter more, of which its optimizers learn late."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.model = make_model()
        self.extra = nn.Parameter(torch.linspace(0.5, 1.5, 4, dtype=torch.float64).reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x * self.extra.flatten())
