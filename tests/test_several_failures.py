"""Several optimizers wrapped as one: overflowing and failing steps, after which none has moved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _models import assert_identical
from _several import (
    DOMAINS,
    META_LR,
    Batch,
    ByHand,
    assert_same,
    everything,
    fish,
    loss_of,
    make_batches,
    make_model,
    matrices,
    muon_and_adamw,
    rest,
    train,
)
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import AdamW, Muon

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish


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


@pytest.mark.parametrize("kind", [Fish, SmoothFish, IDGM])
def test_meta_step_with_a_scaler_is_meta_step_without(kind: type[Any]):
    models, reports = [make_model(), make_model()], []
    for model, scaler in zip(models, (None, GradScaler("cpu", init_scale=2.0**10)), strict=True):
        method = {Fish: Fish(META_LR), SmoothFish: SmoothFish(1.0, 2.0**-3), IDGM: IDGM(model, 0.5, "variance")}[kind]
        optimizer = GradMatch(muon_and_adamw(model), method)
        for seed in range(3):
            batches = make_batches(DOMAINS, seed)
            reports.append(optimizer.meta_step(lambda b, m=model: loss_of(m, b), batches, scaler=scaler))
    assert_identical(dict(models[0].named_parameters()), dict(models[1].named_parameters()))
    assert torch.equal(reports[2].losses, reports[5].losses)


# ---------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("inner_state", ["carry", "reset"])
@pytest.mark.parametrize("how", ["nan", "raises", "second step raises"])
def test_a_meta_step_of_fish_that_fails_restores_both(how: str, inner_state: str):
    model, reference = make_model(), make_model()
    batches = make_batches(2 * DOMAINS)
    optimizer, beside = (GradMatch(muon_and_adamw(m), fish(inner_state)) for m in (model, reference))
    optimizer.meta_step(lambda batch: loss_of(model, batch), batches[:DOMAINS])
    beside.meta_step(lambda batch: loss_of(reference, batch), batches[:DOMAINS])
    before, calls = everything(model, optimizer), []

    def failing(batch: Batch) -> Tensor:
        calls.append(batch)
        if len(calls) == DOMAINS and how == "raises":
            raise RuntimeError("no such file")
        return loss_of(model, batch) * (float("nan") if len(calls) == DOMAINS and how == "nan" else 1.0)

    def refuse(*_: Any) -> None:
        if len(calls) == DOMAINS:
            raise RuntimeError("no such file")

    adamw = optimizer.optimizer.optimizers[1]  # type: ignore[attr-defined]
    hook = adamw.register_step_pre_hook(refuse if how == "second step raises" else lambda *_: None)
    with pytest.raises(ValueError if how == "nan" else RuntimeError, match="nan" if how == "nan" else "no such file"):
        optimizer.meta_step(failing, batches[DOMAINS:])
    hook.remove()
    assert_identical(everything(model, optimizer), before)
    optimizer.meta_step(lambda batch: loss_of(model, batch), batches[DOMAINS:])
    beside.meta_step(lambda batch: loss_of(reference, batch), batches[DOMAINS:])
    assert_identical(everything(model, optimizer), everything(reference, beside))


@pytest.mark.parametrize("kind", [SmoothFish, IDGM])
def test_a_meta_step_of_the_others_that_fails_changes_neither(kind: type[Any]):
    model = make_model()
    method = SmoothFish(1.0, 0.1) if kind is SmoothFish else IDGM(model, 0.5, "variance")
    optimizer = GradMatch(muon_and_adamw(model), method)
    batches = make_batches(DOMAINS)
    optimizer.meta_step(lambda batch: loss_of(model, batch), batches)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="nan"):
        optimizer.meta_step(lambda b: loss_of(model, b) * (float("nan") if b is batches[2] else 1.0), batches)
    assert_identical(everything(model, optimizer), before)


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
