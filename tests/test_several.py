"""Several optimizers wrapped as one, beside the loop that steps each of them by hand; in float64, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_optimizer
import torch
from _models import assert_identical
from _several import (
    DOMAINS,
    INNER_STATES,
    Batch,
    ByHand,
    assert_same,
    every_inner_state,
    fish,
    loss_of,
    make_batches,
    make_model,
    matrices,
    muon_and_adamw,
    rest,
    train,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish, compare

# ------------------------------------------------------------------------------------------------------------- steps


@every_inner_state
@pytest.mark.parametrize("by", ["step", "meta_step"])
def test_fish_is_the_loop_over_both_by_hand(inner_state: str, by: str):
    model, reference = make_model(), make_model()
    method = fish(inner_state, track_alignment=True)
    optimizer = GradMatch(muon_and_adamw(model), method)
    hand = ByHand(reference, muon_and_adamw(reference), INNER_STATES[inner_state][1])
    batches = make_batches(4 * DOMAINS)
    for begin in range(0, len(batches), DOMAINS):
        group = batches[begin : begin + DOMAINS]
        if by == "meta_step":
            optimizer.meta_step(lambda batch: loss_of(model, batch), group)
            hand.train(group)
            assert_same(model, optimizer, reference, hand.optimizers)
        else:
            for batch in group:
                train(optimizer, model, [batch])
                hand.step(batch)
                assert_same(model, optimizer, reference, hand.optimizers)
    assert optimizer.last_meta_step is not None
    assert optimizer.last_meta_step.cosine is not None


@pytest.mark.parametrize("kind", [SmoothFish, IDGM])
def test_the_other_methods_are_one_step_of_each_on_the_direction(kind: type[Any]):
    """Bit for bit beside the direction that a single optimizer is handed."""
    model, reference = make_model(), make_model()
    methods = [SmoothFish(1.0, 0.1) if kind is SmoothFish else IDGM(m, 0.5, "variance") for m in (model, reference)]
    optimizer = GradMatch(muon_and_adamw(model), methods[0])
    optimizers = muon_and_adamw(reference)
    finder = GradMatch(SGD([*matrices(reference), *rest(reference)], lr=0.0), methods[1])
    batches = make_batches(4 * DOMAINS)
    for begin in range(0, len(batches), DOMAINS):
        group = batches[begin : begin + DOMAINS]
        optimizer.meta_step(lambda batch: loss_of(model, batch), group)
        finder.meta_step(lambda batch: loss_of(reference, batch), group)
        for one in optimizers:
            one.step()
        assert_same(model, optimizer, reference, optimizers)


def test_step_of_a_method_without_inner_loop_is_ordinary_training():
    model, reference = make_model(), make_model()
    optimizer = GradMatch(muon_and_adamw(model), SmoothFish(1.0, 0.1))
    optimizers = muon_and_adamw(reference)
    batches = make_batches(4)
    train(optimizer, model, batches)
    for batch in batches:
        for one in optimizers:
            one.zero_grad()
        loss_of(reference, batch).backward()
        for one in optimizers:
            one.step()
    assert_same(model, optimizer, reference, optimizers)


@settings(deadline=None, max_examples=25)
@given(
    owners=st.lists(st.integers(0, 2), min_size=6, max_size=6).filter(lambda owners: len(set(owners)) > 1),
    inner_state=st.sampled_from(["carry", "reset"]),
    build=st.sampled_from(
        [
            lambda p: Adam(p, lr=0.05),
            lambda p: SGD(p, lr=0.1, momentum=0.9),
            lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
            lambda p: torch.optim.NAdam(p, lr=0.05),
        ]
    ),
    steps=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_however_the_parameters_are_shared_out_it_is_one_optimizer(owners, inner_state, build, steps, seed):
    """What treats every element by itself does not know which optimizer holds it."""
    model, reference = make_model(seed), make_model(seed)
    shares = [[p for p, owner in zip(model.parameters(), owners, strict=True) if owner == i] for i in set(owners)]
    several = GradMatch([build(share) for share in shares], fish(inner_state))
    one = GradMatch(build(list(reference.parameters())), fish(inner_state))
    batches = make_batches(steps, seed)
    train(several, model, batches)
    train(one, reference, batches)
    assert_identical(dict(model.named_parameters()), dict(reference.named_parameters()))


def test_a_list_of_one_and_a_tuple_are_lists():
    model, reference = make_model(), make_model()
    batches = make_batches(2 * DOMAINS)
    optimizer = GradMatch([Adam(model.parameters(), lr=0.05)], fish("reset"))
    train(optimizer, model, batches)
    train(GradMatch(Adam(reference.parameters(), lr=0.05), fish("reset")), reference, batches)
    assert_identical(dict(model.named_parameters()), dict(reference.named_parameters()))
    members = muon_and_adamw(model)
    assert GradMatch(tuple(members)).optimizer.optimizers == members  # type: ignore[attr-defined]


def test_rollback_and_slow_weights_are_those_of_both():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    batches = make_batches(DOMAINS + 2)
    train(optimizer, model, batches[:DOMAINS])
    slow = copy.deepcopy(model.state_dict())
    train(optimizer, model, batches[DOMAINS:])
    fast = copy.deepcopy(model.state_dict())
    with optimizer.slow_weights():
        assert_identical(dict(model.state_dict()), dict(slow))
    assert_identical(dict(model.state_dict()), dict(fast))
    optimizer.rollback()
    assert_identical(dict(model.state_dict()), dict(slow))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_reaches_all(set_to_none: bool):
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    loss_of(model, make_batches(1)[0]).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    gradients = [p.grad for p in model.parameters()]
    assert all(g is None if set_to_none else g is not None and not g.any() for g in gradients)


def test_a_closure_is_evaluated_once_before_all_steps():
    model, reference = make_model(), make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish(track_alignment=True))
    hand = ByHand(reference, muon_and_adamw(reference))
    calls = []
    for batch in make_batches(2 * DOMAINS):

        def closure(batch: Batch = batch) -> Tensor:
            assert torch.is_grad_enabled()
            calls.append(copy.deepcopy(model.state_dict()))
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        before = dict(copy.deepcopy(reference.state_dict()))
        with torch.no_grad():
            returned = optimizer.step(closure)
        assert torch.equal(returned.detach(), loss_of(reference, batch).detach())
        hand.step(batch)
        assert_identical(dict(calls[-1]), before)
        assert_same(model, optimizer, reference, hand.optimizers)
    assert len(calls) == 2 * DOMAINS
    assert optimizer.last_meta_step is not None
    assert optimizer.last_meta_step.cosine is not None


# ----------------------------------------------------------------------------------------------------------- refused


def sam(parameters: Any) -> Optimizer:
    return pytorch_optimizer.SAM(parameters, SGD, lr=0.1)


@pytest.mark.parametrize(
    ("listed", "error", "message"),
    [
        (lambda _: [], ValueError, "optimizer is an empty list: pass at least one"),
        (lambda m: [*muon_and_adamw(m), None], TypeError, r"optimizer\[2\] should be .*already built \(got NoneType\)"),
        (lambda m: [AdamW], TypeError, r"optimizer\[0\] should be .*already built \(got the class AdamW\)"),
        (lambda m: [muon_and_adamw(m)[0]] * 2, ValueError, r"optimizer\[1\] is in the list twice"),
        (lambda m: [GradMatch(AdamW(rest(m)))], TypeError, "GradMatch.*wrap .* once"),
        (
            lambda m: [Muon(matrices(m)), AdamW([*rest(m), matrices(m)[1]])],
            ValueError,
            r"optimizer\[0\] and optimizer\[1\] hold the same parameter, number 3 of .*of shape \(5, 6\)",
        ),
        (lambda m: [Muon(matrices(m)), torch.optim.LBFGS(rest(m))], ValueError, r"\[1\], a LBFGS, needs a closure"),
        (lambda m: [sam(matrices(m)), AdamW(rest(m))], ValueError, r"\[0\], a SAM, needs a closure.*by itself"),
        (
            lambda m: [SGD(matrices(m), lr=0.1), pytorch_optimizer.AliG(rest(m))],
            ValueError,
            r"\[1\], a AliG, needs a closure",
        ),
        pytest.param(
            lambda m: [pytorch_optimizer.SafeFP16Optimizer(SGD(matrices(m), lr=0.1)), SGD(rest(m), lr=0.1)],
            TypeError,
            r"optimizer\[0\] .* no param_groups, so it is no whole optimizer",
        ),
    ],
    ids=[
        "nothing",
        "None",
        "class",
        "twice",
        "GradMatch",
        "shared-matrix",
        "LBFGS",
        "SAM",
        "AliG",
        "no-groups",
    ],
)
def test_what_is_no_list_of_disjoint_optimizers_is_refused(listed: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        GradMatch(listed(make_model()))


def test_groups_are_added_to_one_of_them():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model))
    extra = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    for refused in (
        lambda: optimizer.add_param_group({"params": [extra]}),
        lambda: optimizer.optimizer.add_param_group({"params": [extra]}),
        lambda: setattr(optimizer, "param_groups", []),
    ):
        with pytest.raises(RuntimeError, match=r"2 optimizers are wrapped as one.*optimizers\[0\]\.add_param_group"):
            refused()
    assert len(optimizer.param_groups) == 2


# ----------------------------------------------------------------------------- frozen parameters, schedule-free, repr


@pytest.mark.parametrize("frozen", ["one of each", "all matrices", "the rest"])
def test_frozen_parameters_stay(frozen: str):
    model, reference = make_model(), make_model()
    for one in (model, reference):
        of = {"one of each": [matrices(one)[1], rest(one)[0]], "all matrices": matrices(one), "the rest": rest(one)}
        for p in of[frozen]:
            p.requires_grad_(False)
    optimizer = GradMatch(muon_and_adamw(model), fish(track_alignment=True))
    hand = ByHand(reference, muon_and_adamw(reference))
    for batch in make_batches(2 * DOMAINS):
        train(optimizer, model, [batch])
        hand.step(batch)
        assert_same(model, optimizer, reference, hand.optimizers)
    for p, start in zip(model.parameters(), make_model().parameters(), strict=True):
        assert torch.equal(p, start) is not p.requires_grad


def schedule_free_and_sgd(model: nn.Module, place: int) -> list[Optimizer]:
    both = [pytorch_optimizer.ScheduleFreeAdamW(matrices(model), lr=0.05), SGD(rest(model), lr=0.1)]
    return both[::-1] if place else both


@pytest.mark.parametrize("place", [0, 1])
def test_schedule_free_beside_sgd_is_refused_where_its_state_would_be_carried(place: int):
    model, reference = make_model(), make_model()
    with pytest.raises(ValueError, match=r'ScheduleFreeAdamW keeps points .*inner_state="reset".*SmoothFish'):
        GradMatch(schedule_free_and_sgd(model, place), fish())
    GradMatch(schedule_free_and_sgd(model, place), fish("reset"))
    optimizer = GradMatch(schedule_free_and_sgd(model, place), SmoothFish(1.0, 0.1))
    optimizers = schedule_free_and_sgd(reference, place)
    optimizer.optimizer.optimizers[place].train()  # type: ignore[attr-defined]
    optimizers[place].train()  # type: ignore[attr-defined]
    for batch in make_batches(4):
        train(optimizer, model, [batch])
        for p in reference.parameters():
            p.grad = None
        loss_of(reference, batch).backward()
        for one in optimizers:
            one.step()
        assert_same(model, optimizer, reference, optimizers)
    optimizer.optimizer.optimizers[place].eval()  # type: ignore[attr-defined]
    optimizers[place].eval()  # type: ignore[attr-defined]
    assert_same(model, optimizer, reference, optimizers)


def test_repr_shows_all():
    model = make_model()
    members = muon_and_adamw(model)
    assert repr(GradMatch(members, fish())) == f"GradMatch(\n{members[0]!r}\n{members[1]!r},\n{fish()!r}\n)"


def test_a_parameter_that_joins_a_second_optimizer_later_is_refused_before_anything_moves():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    train(optimizer, model, make_batches(1))
    first, second = optimizer.optimizer.optimizers  # type: ignore[attr-defined]
    before = copy.deepcopy(model.state_dict())
    second.add_param_group({"params": [matrices(model)[1]]})
    with pytest.raises(ValueError, match=r"optimizer\[0\] and optimizer\[1\] hold the same parameter, number 3"):
        train(optimizer, model, make_batches(1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(first.param_groups) == 1


def test_compare_takes_a_list():
    model, batches = make_model(), make_batches(DOMAINS)
    methods = {"Fish": Fish(), "SmoothFish": SmoothFish(1.0, 0.1)}
    found = compare(model, loss_of, batches, methods, muon_and_adamw(model), rounds=2, orders=2, show=False)
    assert found["Fish"].error is None
    assert "Muon with AdamW" in str(found)
    with pytest.raises(ValueError, match="needs a closure"):
        compare(model, loss_of, batches, optimizer=[torch.optim.LBFGS(model.parameters())])
