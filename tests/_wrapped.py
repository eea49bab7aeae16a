"""Optimizers of many habits: of a collection that people use, and our own where the habit is rare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

Build = Callable[[list[Tensor]], Optimizer]


class Averaging(Optimizer):
    """SGD that keeps the average of its iterates, under whatever name, and pulls towards it."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.steps_taken = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps_taken": self.steps_taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps_taken = state_dict["steps_taken"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "steps_taken"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.steps_taken += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("polyak", p.clone())
                    p -= group["lr"] / self.steps_taken * p.grad
                    average.lerp_(p, 1 / (self.steps_taken + 1))
                    p.lerp_(average, 0.1)


class NeedsAModel(Averaging):
    """The same, but no other like it can be built, nor copied in pieces: it locks."""

    def __init__(self, params: Any, model: nn.Module, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.lock = memoryview(b"cannot be copied")


class Hiding(Averaging):
    """The same, but the averages are in a list of the object."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.averages = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p, average in zip(parameters, self.averages, strict=True):
            p -= 0.1 * p.grad
            average.lerp_(p, 0.5)
            p.lerp_(average, 0.1)


class Counting:
    """Counts out of sight."""

    def __init__(self) -> None:
        self.number = 0


class CountsOutOfSight(SGD):
    """SGD whose steps become shorter by a count that no reset finds."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.counting = Counting()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.counting.number += 1
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] / self.counting.number * p.grad


def training(optimizer: Optimizer) -> Optimizer:
    optimizer.train()
    return optimizer


ITERATES: dict[str, tuple[Build, tuple[str, ...]]] = {
    "ScheduleFreeSGD": (lambda p: training(pytorch_optimizer.ScheduleFreeSGD(p, lr=0.5, momentum=0.8)), ("z",)),
    "ScheduleFreeAdamW": (lambda p: training(pytorch_optimizer.ScheduleFreeAdamW(p, lr=0.05)), ("z",)),
    "ScheduleFreeWrapper": (
        lambda p: training(pytorch_optimizer.ScheduleFreeWrapper(SGD(p, lr=0.3, momentum=0.5), momentum=0.8)),
        ("z",),
    ),
    "Lookahead": (lambda p: pytorch_optimizer.Lookahead(SGD(p, lr=0.2, momentum=0.5), k=2), ("slow_params",)),
    "Ranger": (lambda p: pytorch_optimizer.Ranger(p, lr=0.05), ("slow_buffer",)),
    "Prodigy": (lambda p: pytorch_optimizer.Prodigy(p, lr=0.5), ("p0",)),
    "Averaging": (Averaging, ("polyak",)),
}


def adam_with_decay(params: list[Tensor]) -> Optimizer:
    return Adam(params, lr=0.1, weight_decay=0.5)


PLAIN: dict[str, Build] = {
    "SGD": lambda p: SGD(p, lr=0.1),
    "SGD-momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.3),
    "Adam": adam_with_decay,
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, t0=2),  # averages, for nobody but the user
    "Muon": lambda p: torch.optim.Muon(p, lr=0.1),
    "Lamb": lambda p: pytorch_optimizer.Lamb(p, lr=0.1),
    "LARS": lambda p: pytorch_optimizer.LARS(p, lr=0.1),
    "StableSPAM": lambda p: pytorch_optimizer.StableSPAM(p, lr=0.1),
}
