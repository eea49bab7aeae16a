"""``with optimizer.slow_weights():`` holds the slow weights inside the block and nothing else ever after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from _feature_training import snapshot
from _models import FeatureNet, assert_identical, loss_of, make_batches
from torch import nn
from torch.optim import Adam

from torch_gradmatch import Fish, GradMatch

SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp64": (torch.float64, {}),
    "reset, tracked": (torch.float64, {"inner_state": "reset", "track_alignment": True}),
    "buffers keep the latest": (torch.float64, {"buffers": "latest"}),
    "bf16 with fp32 slow weights": (torch.bfloat16, {"meta_dtype": torch.float32}),
}


def build(dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[FeatureNet, GradMatch[Fish]]:
    model = FeatureNet(torch.Generator().manual_seed(0), dtype=dtype)
    return model, GradMatch(Adam(model.parameters(), lr=0.05), Fish(0.3, model=model, **settings))


def train(
    model: nn.Module, optimizer: GradMatch[Fish], count: int, seed: int = 1, dtype: torch.dtype = torch.float64
) -> None:
    for batch in make_batches(torch.Generator().manual_seed(seed), count, dtype=dtype):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("case", SETTINGS)
def test_the_block_shows_the_slow_weights_and_leaves_no_trace(case: str):
    """Four inner steps in a loop. A run with blocks everywhere is the run without, bit for bit."""
    dtype, settings = SETTINGS[case]
    runs = []
    for looks in (False, True):
        model, optimizer = build(dtype, inner_steps=4, **settings)
        train(model, optimizer, 4, dtype=dtype)  # a first meta-iteration
        slow = copy.deepcopy(model.state_dict())
        for step in range(6):
            train(model, optimizer, 1, seed=step, dtype=dtype)
            if step == 3:
                slow = copy.deepcopy(model.state_dict())
            if looks:
                fast = snapshot(model, optimizer)
                with optimizer.slow_weights():
                    assert_identical(model.state_dict(), slow)
                    if optimizer.inner_step == 0:
                        continue  # there what the block does stays
                    loss_of(model, make_batches(torch.Generator().manual_seed(9), 1, dtype=dtype)[0])  # moves buffers
                    with torch.no_grad():
                        model.out.weight.fill_(7.0)  # lost
                assert_identical(snapshot(model, optimizer), fast)
        train(model, optimizer, 5, seed=20, dtype=dtype)
        runs.append(snapshot(model, optimizer))
    assert_identical(runs[1], runs[0])


def test_an_exception_in_the_block_passes_and_the_fast_weights_are_back():
    """Also after a block in a block, which has nothing more to do."""
    model, optimizer = build()
    slow = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1)
    fast = snapshot(model, optimizer)

    def nested() -> None:
        with optimizer.slow_weights():
            with optimizer.slow_weights():
                assert_identical(model.state_dict(), slow)
            assert_identical(model.state_dict(), slow)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        nested()
    assert_identical(snapshot(model, optimizer), fast)
    train(model, optimizer, 1)
    assert optimizer.inner_step == 2


CALLS: dict[str, Callable[[GradMatch[Fish], nn.Module], Any]] = {
    "step()": lambda optimizer, _: optimizer.step(),
    "interpolate()": lambda optimizer, _: optimizer.interpolate(),
    "rollback()": lambda optimizer, _: optimizer.rollback(),
    "meta_step()": lambda optimizer, model: optimizer.meta_step(
        partial(loss_of, model), make_batches(torch.Generator(), 2)
    ),
    "state_dict()": lambda optimizer, _: optimizer.state_dict(),
    "load_state_dict()": lambda optimizer, _: optimizer.load_state_dict(build()[1].state_dict()),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_the_block_cannot_do_right_is_refused_and_changes_nothing(call: str):
    model, optimizer = build()
    train(model, optimizer, 2)
    before = snapshot(model, optimizer)
    with optimizer.slow_weights(), pytest.raises(RuntimeError, match=r"inside slow_weights\(\).*Leave the block first"):
        CALLS[call](optimizer, model)
    assert_identical(snapshot(model, optimizer), before)
