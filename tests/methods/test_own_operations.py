"""What the methods add to the work of the model and the wrapped optimizer: few operations, however many tensors.

Around the S inner steps of Fish there are at most 40 for 159 parameters and 53 BatchNorms (DESIGN section 7).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from _operations import count, waits
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

DOMAINS = 3
LAYERS = (3, 53)  # of three parameters and three buffers each


def network(layers: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.Tanh()) for _ in range(layers)]
    return nn.Sequential(*(module for layer in parts for module in layer)).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.randn(DOMAINS, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1e-3)


def loop(model: nn.Module, optimizer: Optimizer, data: list[Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()


FISH: dict[str, tuple[torch.dtype, dict[str, Any], int]] = {
    "fp32": (torch.float32, {}, 40),
    "bf16 with fp32 slow weights": (torch.bfloat16, {"meta_dtype": torch.float32}, 40),
    "buffers keep the latest": (torch.float32, {"buffers": "latest"}, 40),
    "reset": (torch.float32, {"inner_state": "reset"}, 40),
    "tracked": (torch.float32, {"track_alignment": True}, 40 + 13 * DOMAINS),
}


@pytest.mark.parametrize(("case", "run"), [("fp32", "loop"), ("tracked", "loop"), *((c, "meta_step") for c in FISH)])
def test_fish(case: str, run: str):
    """Beyond the same inner steps without a wrapper, in a later meta-iteration."""
    dtype, settings, most = FISH[case]
    found = []
    for layers in LAYERS:
        model, data = network(layers, dtype), batches(dtype)
        optimizer = GradMatch(sgd(model), Fish(0.5, inner_steps=DOMAINS, model=model, **settings))
        inner = partial(loop, model, sgd(model), data)
        work = partial(loop, model, optimizer, data)
        if run == "meta_step":
            work = partial(optimizer.meta_step, partial(loss_of, model), data)
        for _ in range(2):  # allocates what stays, and sets up where it lies
            work()
            inner()
        found.append(count(work) - count(inner))
    assert found[0] == found[1]
    assert 0 < found[0].total() <= most, found[0]


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_fish_waits_once_and_once_for_each_loss_that_it_checks(nonfinite: Any):
    model, data = network(3), batches()
    optimizer = GradMatch(sgd(model), Fish(0.5, DOMAINS, model=model, nonfinite=nonfinite, track_alignment=True))
    with waits() as in_loop:
        loop(model, optimizer, data)
    with waits() as in_meta_step:
        optimizer.meta_step(partial(loss_of, model), data)
    checked = nonfinite == "raise"
    assert in_loop == ["tolist"] * checked
    assert in_meta_step == (["item"] * DOMAINS + ["tolist"]) * checked


# What is evaluated again, for a first derivative; None for a second derivative of each domain.
DIRECTIONS: dict[str, tuple[Callable[[nn.Module], Any], list[int] | None]] = {
    "SmoothFish": (lambda m: SmoothFish(2.0, 1e-3, m), [1, 2]),
    "SmoothFish, walk": (lambda m: SmoothFish(1.0, 1e-3, m), []),
    "SmoothFish, symmetric": (lambda m: SmoothFish(1e-3, 1e-3, m, symmetric=True), [1, 2, 1, 0]),
    "IDGM": (lambda m: IDGM(m, 1e-3, "inner_product"), None),
    "IDGM, tracked": (lambda m: IDGM(m, track_alignment=True), None),
}


def derivatives(model: nn.Module, data: list[Tensor], again: list[int] | None) -> None:
    """The same derivatives by plain autograd."""
    leaves = list(model.parameters())
    vector = [torch.ones_like(p) for p in leaves]
    # Under IDGM the last domain's graph is kept from the first pass.
    for x in data[:-1] if again is None else [*data, *(data[i] for i in again)]:
        model.zero_grad()
        loss_of(model, x).backward()
    for x in data if again is None else ():
        graph = torch.autograd.grad(loss_of(model, x), leaves, create_graph=True)
        torch.autograd.grad(graph, leaves, vector, allow_unused=True)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_one_direction(name: str):
    """All is counted here, the model's operations too: what grows by the layer is theirs, and so many for each."""
    method, again = DIRECTIONS[name]
    found = []
    for layers in LAYERS:
        model, data = network(layers), batches()
        optimizer = GradMatch(sgd(model), method(model))
        step = partial(optimizer.meta_step, partial(loss_of, model), data)
        for _ in range(2):  # in these a loss is evaluated once more, to see whether it is the same
            step()
        of_step = count(optimizer.optimizer.step)
        making_ones = count(lambda m=model: [torch.ones_like(p) for p in m.parameters()])
        found.append(count(step) - count(partial(derivatives, model, data, again)) - of_step - making_ones)
    assert found[0] == found[1]
    most = 48 + 7 * (name == "IDGM, tracked")  # the agreement of each domain with the rest
    assert 0 < found[0].total() <= most * DOMAINS, found[0]  # with torch 2.13 at most 133, and 153
