"""Ordinary training of a small network, and copies of all that it changes."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from _models import FeatureNet, loss_of, make_batches
from torch import nn
from torch.optim import Optimizer

from torch_gradmatch import GradMatch


def feature_net(seed: int = 0) -> FeatureNet:
    return FeatureNet(torch.Generator().manual_seed(seed))


def batches(count: int, seed: int = 1) -> list[tuple[Any, ...]]:
    return make_batches(torch.Generator().manual_seed(seed), count)


def train(model: nn.Module, optimizer: Optimizer, steps: list[tuple[Any, ...]]) -> None:
    for batch in steps:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def snapshot(model: nn.Module, optimizer: GradMatch) -> Any:
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
