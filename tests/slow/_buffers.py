"""A network with BatchNorm under Fish."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_gradmatch import Fish, GradMatch

MEAN = "1.running_mean"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 1))


def wrap(model: nn.Module, **settings: Any) -> GradMatch[Fish]:
    return GradMatch(torch.optim.SGD(model.parameters(), lr=0.01), Fish(0.25, model=model, **settings))


def batch(seed: int) -> Tensor:
    return torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, seed: int) -> None:
    model(batch(seed)).square().mean().backward()


def step(model: nn.Module, optimizer: GradMatch[Fish], seed: int) -> dict[str, Tensor]:
    """One step of a user's loop; returns the buffers as the forward pass has left them."""
    optimizer.zero_grad()
    backward(model, seed)
    moved = statistics(model)
    optimizer.step()
    return moved


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def interpolated(before: Tensor, after: Tensor) -> Tensor:
    return before + 0.25 * (after - before)
