"""Optimizers of many habits, of our own where the habit is rare."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer


class CountsInGroup(Optimizer):
    """Adds ``step`` to its groups in the first step, as the optimizers of several collections do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first = "step" not in group
            group["step"] = 1 if first else group["step"] + 1
            for p in group["params"]:
                if first:
                    self.state[p]["sum"] = torch.zeros_like(p)
                self.state[p]["sum"] += p.grad
                p -= group["lr"] / group["step"] * self.state[p]["sum"]


class CountsInDefaults(Optimizer):
    """Keeps an estimate and a counter in the defaults, as learning-rate-free optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1, d0: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "d0": d0, "d": d0, "k": 0, "train_mode": False})

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["z"] = p.clone()
            group["k"] += 1
            group["d"] = group["d"] * 0.5
            group["history"] = torch.tensor([float(group["k"])])
            for p in group["params"]:
                p -= group["lr"] * group["d"] * p.grad


class Averaging(Optimizer):
    """SGD whose steps become shorter by a count of its own, and that keeps the average of its gradients."""

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
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 / self.steps_taken)
                    p -= group["lr"] / self.steps_taken * average


class NeedsAModel(Averaging):
    """The same, but no other like it can be built, nor copied in pieces: it locks."""

    def __init__(self, params: Any, model: nn.Module, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.lock = memoryview(b"cannot be copied")


class CountsOutOfSight(SGD):
    """SGD whose steps become shorter by a count that no reset finds."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.counting = SimpleNamespace(number=0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.counting.number += 1
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] / self.counting.number * p.grad
