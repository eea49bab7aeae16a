"""Several optimizers wrapped as one: overflowing and failing steps, after which none has moved."""

from __future__ import annotations

import copy

import pytest
from _models import assert_identical
from _several import (
    DOMAINS,
    ByHand,
    assert_same,
    fish,
    loss_of,
    make_batches,
    make_model,
    matrices,
    muon_and_adamw,
    rest,
    train,
)
from torch.amp import GradScaler
from torch.optim import AdamW, Muon

from torch_gradmatch import GradMatch


@pytest.mark.parametrize(("unscale", "fused"), [("by step", True), ("before, to clip", False)])
def test_a_step_that_overflowed_is_skipped_by_both_and_counts(unscale: str, fused: bool):
    model, reference = make_model(), make_model()
    optimizer = GradMatch([Muon(matrices(model), lr=0.05), AdamW(rest(model), lr=0.02, fused=fused)], fish())
    hand = ByHand(reference, [Muon(matrices(reference), lr=0.05), AdamW(rest(reference), lr=0.02, fused=fused)])
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for index, batch in enumerate(make_batches(3 * DOMAINS)):
        overflows = index == 4
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        scaler.scale(loss * float("inf") if overflows else loss).backward()
        if unscale != "by step":
            scaler.unscale_(optimizer)
        before = copy.deepcopy(model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        hand.step(batch, skipped=overflows)
        assert optimizer.inner_step == (index + 1) % DOMAINS
        if overflows:
            assert_identical(dict(model.state_dict()), dict(before))
        assert_same(model, optimizer, reference, hand.optimizers)
        assert not hasattr(optimizer.optimizer, "found_inf")
    assert scaler.get_scale() == 2.0**9


@pytest.mark.filterwarnings("ignore:the inner optimizer's state held NaN")
def test_rollback_of_an_inner_loop_that_diverged_resets_both():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    batches = make_batches(DOMAINS)
    slow = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="the inner loop diverged"):
        train(optimizer, model, [*batches[:2], (batches[2][0] * float("nan"), batches[2][1])])
    optimizer.rollback()
    assert_identical(dict(model.state_dict()), dict(slow))
    assert all(not one.state for one in optimizer.optimizer.optimizers)  # type: ignore[attr-defined]
    train(optimizer, model, batches)
