"""``with optimizer.slow_weights():`` holds the slow weights inside the block and nothing else ever after."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _models import FeatureNet, assert_identical, loss_of, make_batches
from torch import nn
from torch.optim import SGD, Adam

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish


def feature_net(dtype: torch.dtype = torch.float64) -> FeatureNet:
    return FeatureNet(torch.Generator().manual_seed(0), dtype=dtype)


def train(
    model: nn.Module, optimizer: GradMatch, count: int, seed: int = 1, dtype: torch.dtype = torch.float64
) -> None:
    for batch in make_batches(torch.Generator().manual_seed(seed), count, dtype=dtype):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp64": (torch.float64, {}),
    "reset, tracked": (torch.float64, {"inner_state": "reset", "track_alignment": True}),
    "buffers keep the latest": (torch.float64, {"buffers": "latest"}),
    "bf16 with fp32 slow weights": (torch.bfloat16, {"meta_dtype": torch.float32}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_block_shows_the_slow_weights_and_leaves_no_trace(case: str):
    """Four inner steps in a loop. A run with blocks everywhere is the run without, bit for bit."""
    dtype, settings = CASES[case]
    runs = []
    for looks in (False, True):
        model = feature_net(dtype)
        optimizer = GradMatch(Adam(model.parameters(), lr=0.05), Fish(0.3, inner_steps=4, model=model, **settings))
        train(model, optimizer, 4, dtype=dtype)  # a first meta-iteration
        slow = copy.deepcopy(model.state_dict())
        for step in range(6):
            train(model, optimizer, 1, seed=step, dtype=dtype)
            if step == 3:
                slow = copy.deepcopy(model.state_dict())
            if looks:
                fast = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                with optimizer.slow_weights():
                    assert_identical(model.state_dict(), slow)
                    if optimizer.inner_step == 0:
                        continue  # there what the block does stays
                    loss_of(model, make_batches(torch.Generator().manual_seed(9), 1, dtype=dtype)[0])  # moves buffers
                    with torch.no_grad():
                        model.out.weight.fill_(7.0)  # lost
                assert_identical((model.state_dict(), optimizer.state_dict()), fast)
        train(model, optimizer, 5, seed=20, dtype=dtype)
        runs.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
    assert_identical(runs[1], runs[0])


@pytest.mark.parametrize("method", [Fish(), SmoothFish(1.0, 0.1), "IDGM"], ids=["Fish", "SmoothFish", "IDGM"])
def test_where_there_is_no_inner_loop_nothing_changes_and_nothing_is_lost(method: Any):
    model = feature_net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), IDGM(model, 0.1) if method == "IDGM" else method)
    with optimizer.slow_weights(), torch.no_grad():
        model.out.weight.fill_(7.0)
    assert bool((model.out.weight == 7.0).all())


def nested(optimizer: GradMatch, model: nn.Module, slow: dict[str, Any]) -> None:
    with optimizer.slow_weights():
        with optimizer.slow_weights():
            assert_identical(model.state_dict(), slow)
        assert_identical(model.state_dict(), slow)
        raise ZeroDivisionError


def test_an_exception_in_the_block_passes_and_the_fast_weights_are_back():
    """Also after a block in a block, which has nothing more to do."""
    model = feature_net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fish(model=model))
    slow = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1)
    fast = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        nested(optimizer, model, slow)
    assert_identical(model.state_dict(), fast)
    train(model, optimizer, 1)
    assert optimizer.inner_step == 2


CALLS: dict[str, Any] = {
    "step()": lambda optimizer, _: optimizer.step(),
    "interpolate()": lambda optimizer, _: optimizer.interpolate(),
    "rollback()": lambda optimizer, _: optimizer.rollback(),
    "meta_step()": lambda optimizer, model: optimizer.meta_step(
        lambda b: loss_of(model, b), make_batches(torch.Generator(), 2)
    ),
    "state_dict()": lambda optimizer, _: optimizer.state_dict(),
    "load_state_dict()": lambda optimizer, _: optimizer.load_state_dict(SAVED),
}
SAVED: dict[str, Any] = {}


@pytest.mark.parametrize("call", CALLS)
def test_what_the_block_cannot_do_right_is_refused_and_changes_nothing(call: str):
    model = feature_net()
    optimizer = GradMatch(Adam(model.parameters(), lr=0.1), Fish(model=model))
    SAVED.update(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with optimizer.slow_weights(), pytest.raises(RuntimeError, match=r"inside slow_weights\(\).*Leave the block first"):
        CALLS[call](optimizer, model)
    assert_identical((model.state_dict(), optimizer.state_dict()), before)


def test_averaging_in_the_middle_of_an_inner_loop():
    """``swa_utils.AveragedModel`` of the slow weights is that of a run which averages between two loops."""
    averages = []
    for inside in (False, True):
        model = feature_net()
        optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fish(0.5, inner_steps=2, model=model))
        averaged = torch.optim.swa_utils.AveragedModel(model)
        for seed in range(3):
            train(model, optimizer, 2, seed=seed)
            if inside:
                train(model, optimizer, 1, seed=7)
                with optimizer.slow_weights():
                    averaged.update_parameters(model)
                optimizer.rollback()
            else:
                averaged.update_parameters(model)
        averages.append(averaged.state_dict())
    assert_identical(averages[1], averages[0])
