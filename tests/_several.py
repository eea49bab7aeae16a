"""A model that Muon and AdamW share: both wrapped as one, and beside them a loop that steps each by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from _models import assert_identical
from _optimizers import matrices
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from torch_gradmatch import Fish, GradMatch

META_LR = 0.25  # a power of two: then every way to interpolate rounds alike
DOMAINS = 3
Batch = tuple[Tensor, Tensor]


def make_model(seed: int = 0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return model


def rest(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() != 2]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    return [Muon(matrices(model), lr=0.05), AdamW(rest(model), lr=0.02)]


def make_batches(count: int = DOMAINS, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((8, 4), (8, 2))
    return [tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes) for _ in range(count)]  # type: ignore[misc]


def poisoned(batches: list[Batch]) -> list[Batch]:
    return [*batches[:2], (batches[2][0] * float("nan"), batches[2][1])]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def train(optimizer: Any, model: nn.Module, batches: Sequence[Batch], after_step: Any = lambda: None) -> None:
    """The plain loop of a user."""
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        after_step()


def forget(optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.state.clear()


# What Fish is told, and what that does by hand before every inner loop.
INNER_STATES: dict[str, tuple[Any, Callable[[Sequence[Optimizer]], None]]] = {
    "carry": ("carry", lambda _: None),
    "reset": ("reset", forget),
    "callable": (lambda whole: forget(whole.optimizers[:1]), lambda optimizers: forget(optimizers[:1])),
}
every_inner_state = pytest.mark.parametrize("inner_state", INNER_STATES)


def fish(inner_state: str = "carry", **others: Any) -> Fish:
    return Fish(META_LR, inner_steps=DOMAINS, inner_state=INNER_STATES[inner_state][0], **others)


def members(optimizer: GradMatch[Any]) -> list[Any]:
    return optimizer.optimizer.optimizers  # type: ignore[attr-defined]


def everything(model: nn.Module, optimizer: GradMatch[Any]) -> Any:
    """Copies of all that may change."""
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), optimizer.inner_step)), gradients


class Beside:
    """A wrapped list of optimizers, and a twin of the model under Algorithm 1 that knows each of them."""

    def __init__(
        self,
        inner_state: str = "carry",
        build: Callable[[Any], list[Optimizer]] = muon_and_adamw,
        make: Callable[[], nn.Module] = make_model,
        **settings: Any,
    ) -> None:
        self.model, self.twin = make(), make()
        self.optimizer = GradMatch(build(self.model), fish(inner_state, **settings))
        self.optimizers = build(self.twin)
        self.begin = INNER_STATES[inner_state][1]
        self.slow: dict[Tensor, Tensor] = {}
        self.steps = 0

    def step(self, batch: Batch) -> None:
        train(self.optimizer, self.model, [batch])
        self.step_by_hand(batch)
        self.check()

    def step_by_hand(self, batch: Batch, *, skipped: bool = False) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss_of(self.twin, batch).backward()
        if self.steps == 0:
            self.begin(self.optimizers)
        for p in self.twin.parameters():
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

    def check(self) -> None:
        """Parameters and all optimizers' states are bit for bit the same."""
        assert_identical(self.model.state_dict(), self.twin.state_dict(), "parameters")
        wrapped = [one.state_dict() for one in members(self.optimizer)]
        assert_identical(wrapped, [one.state_dict() for one in self.optimizers], "optimizers")
