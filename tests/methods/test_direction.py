"""GradMatch around the methods that hand it a direction: errors, states, copies, optimizers, schedules, hooks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import _networks as networks
import pytest
import torch
from _models import assert_identical
from _networks import make
from _second_order import (
    DIRECTIONS,
    GAMMA,
    METHODS,
    MORE_METHODS,
    nothing_changes,
    train,
)
from torch import Tensor, nn
from torch.optim import AdamW, lr_scheduler

from torch_gradmatch import IDGM, GradMatch

# --------------------------------------------------------------------------------------------------------------- errors


WRONG_LOSSES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "vector": (lambda value: value.expand(3), ValueError, r"batch 2{} it has shape \(3,\)"),
    "float": (lambda value: float(value.detach()), TypeError, r"batch 2{} it returned float"),
    "none": (lambda _: None, TypeError, r"batch 2{} it returned NoneType"),
    "nan": (lambda value: value * float("nan"), ValueError, r"the loss of batch 2{} is nan: nothing was changed"),
    "infinite": (lambda value: value / 0.0, ValueError, r"batch 2{} is inf"),
    "detached": (lambda value: value.detach(), ValueError, r"batch 2{} does not depend"),
}


@pytest.mark.parametrize(
    ("method", "wrong"),
    [(m, w) for m in ("IDGM", "SmoothFish", "Fish", "VREx", "Fishr") for w in WRONG_LOSSES],
)
def test_a_wrong_loss_is_named_and_nothing_changes(method: str, wrong: str):
    spoil, error, message = WRONG_LOSSES[wrong]
    case = make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters()), (METHODS | MORE_METHODS)[method](case.model))

    def loss(batch: Any) -> Any:
        value = case.loss(case.model, batch)
        return spoil(value) if batch is case.batches[2] else value

    with nothing_changes(case.model, optimizer), pytest.raises(error, match=message.format("")):
        optimizer.meta_step(loss, case.batches)
    named = dict(zip(("north", "south", 7), case.batches, strict=True))
    with nothing_changes(case.model, optimizer), pytest.raises(error, match=message.format(r" \(domain 7\)")):
        optimizer.meta_step(loss, named)


@pytest.mark.parametrize("method", ["IDGM", "SmoothFish"])
def test_a_loss_that_fails_while_lbfgs_has_moved_the_parameters(method: str):
    case = make(networks.batch_norm_eval)
    optimizer = GradMatch(
        torch.optim.LBFGS(case.model.parameters(), lr=0.1, max_iter=4), DIRECTIONS[method](case.model)
    )
    before = copy.deepcopy(case.model.state_dict())
    calls = []

    def loss(batch: Any) -> Tensor:
        calls.append(batch)
        if len(calls) > 11:  # beyond the first evaluation by any method
            raise MemoryError
        return case.loss(case.model, batch)

    with pytest.raises(MemoryError):
        optimizer.meta_step(loss, case.batches)
    assert_identical(case.model.state_dict(), before)


# ------------------------------------------------------------------------------------------------ GradMatch around them


@pytest.mark.parametrize("method", ["IDGM", "SmoothFish"])
def test_there_is_no_inner_loop(method: str):
    case, twin = make(networks.batch_norm_1d), make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters()), DIRECTIONS[method](case.model))
    plain = AdamW(twin.model.parameters())
    train(case, optimizer)
    twin.model.load_state_dict(case.model.state_dict())
    plain.load_state_dict(copy.deepcopy(optimizer.optimizer.state_dict()))
    with nothing_changes(case.model, optimizer):
        optimizer.rollback()
        with pytest.raises(RuntimeError, match=r"has no inner loop .*: call meta_step"):
            optimizer.interpolate()
    for (network, opt), index in itertools.product(((case, optimizer), (twin, plain)), range(3)):
        opt.zero_grad()
        network.loss(network.model, network.batches[index]).backward()
        opt.step()
    assert_identical(case.model.state_dict(), twin.model.state_dict())
    assert optimizer.inner_step == 0


def test_sparse_adam_refuses_the_dense_direction_and_nothing_changes():
    case = make(networks.sparse_embedding)
    optimizer = GradMatch(torch.optim.SparseAdam(case.model.parameters()), IDGM(case.model, GAMMA))
    with nothing_changes(case.model, optimizer), pytest.raises(RuntimeError, match="does not support dense gradients"):
        train(case, optimizer, 1)


@pytest.mark.parametrize("method", ["IDGM", "Fish"])
def test_schedulers_count_meta_iterations(method: str):
    case = make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters(), lr=0.01), METHODS[method](case.model))
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=8)
    expected = lr_scheduler.OneCycleLR(AdamW([nn.Parameter(torch.zeros(1))], lr=0.01), max_lr=0.01, total_steps=8)
    for _ in range(5):
        train(case, optimizer, 1)
        scheduler.step()
        expected.optimizer.step()
        expected.step()
        assert optimizer.optimizer.param_groups[0]["lr"] == expected.get_last_lr()[0]
