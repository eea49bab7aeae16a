"""Several optimizers wrapped as one: schedulers, groups that join in the middle, hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from _feature_training import through_file
from _models import assert_identical
from _several import (
    DOMAINS,
    INNER_STATES,
    ByHand,
    Scaled,
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
from torch.optim import SGD, Muon, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR

from torch_gradmatch import GradMatch


def each(optimizers: Sequence[Optimizer]) -> list[Any]:
    muon, adamw = optimizers
    return [OneCycleLR(muon, max_lr=0.1, total_steps=15), CosineAnnealingLR(adamw, T_max=7)]


def one_cycle(optimizers: Sequence[Optimizer]) -> list[Any]:
    peaks = zip(optimizers, (0.1, 0.04), strict=True)
    return [OneCycleLR(one, max_lr=peak, total_steps=15, cycle_momentum=False) for one, peak in peaks]


SCHEDULES: dict[str, tuple[Callable[[Any], list[Any]], Callable[[Any], list[Any]]]] = {
    "each": (lambda o: each(o.optimizer.optimizers), each),
    "one-cycle": (lambda o: [OneCycleLR(o, max_lr=[0.1, 0.04], total_steps=15, cycle_momentum=False)], one_cycle),
    "of-several": (
        lambda o: [OneCycleLR(o.optimizer, max_lr=[0.1, 0.04], total_steps=15, cycle_momentum=False)],
        one_cycle,
    ),
    "cosine": (lambda o: [CosineAnnealingLR(o, T_max=7)], lambda os: [CosineAnnealingLR(one, T_max=7) for one in os]),
    "lambdas": (
        lambda o: [LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.9**t])],
        lambda os: [LambdaLR(os[0], lambda t: 1 / (1 + t)), LambdaLR(os[1], lambda t: 0.9**t)],
    ),
    "whole-and-one": (
        lambda o: [ExponentialLR(o, 0.9), OneCycleLR(o.optimizer.optimizers[1], max_lr=0.05, total_steps=15)],
        lambda os: [ExponentialLR(os[0], 0.9), ExponentialLR(os[1], 0.9), OneCycleLR(os[1], 0.05, total_steps=15)],
    ),
}


@pytest.mark.parametrize(
    ("schedule", "inner_state"), [("one-cycle", "carry"), *((name, "reset") for name in SCHEDULES)]
)
def test_schedulers_of_each_and_of_the_whole(schedule: str, inner_state: str):
    of_whole, by_hand = SCHEDULES[schedule]
    model, reference = make_model(), make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish(inner_state))
    hand = ByHand(reference, muon_and_adamw(reference), INNER_STATES[inner_state][1])
    schedulers, plain = of_whole(optimizer), by_hand(hand.optimizers)
    for batch in make_batches(14):
        train(optimizer, model, [batch], lambda: [scheduler.step() for scheduler in schedulers])
        hand.train([batch], lambda: [scheduler.step() for scheduler in plain])
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [group["lr"] for one in hand.optimizers for group in one.param_groups]
        assert_same(model, optimizer, reference, hand.optimizers)


def test_momentum_is_cycled_where_all_call_it_the_same():
    model = make_model()
    mixed = GradMatch(muon_and_adamw(model))
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        OneCycleLR(mixed, max_lr=0.1, total_steps=10)
    optimizer = GradMatch([Muon(matrices(model)), SGD(rest(model), lr=0.1, momentum=0.5)])
    OneCycleLR(optimizer, max_lr=0.1, total_steps=10, max_momentum=0.75)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.75, 0.75]


@pytest.mark.parametrize("inner_state", ["carry", "reset"])
def test_a_scheduler_that_a_hook_steps(inner_state: str):
    """It changes the learning rate within the step of the whole, where otherwise only counters change."""
    model, reference = make_model(), make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish(inner_state))
    hand = ByHand(reference, muon_and_adamw(reference), INNER_STATES[inner_state][1])
    for optimizers in (optimizer.optimizer.optimizers, hand.optimizers):  # type: ignore[attr-defined]
        scheduler = ExponentialLR(optimizers[0], 0.9)
        optimizers[0].register_step_post_hook(lambda *_, scheduler=scheduler: scheduler.step())
    for batch in make_batches(3 * DOMAINS):
        train(optimizer, model, [batch])
        hand.step(batch)
        assert_same(model, optimizer, reference, hand.optimizers)


def test_a_scheduler_that_a_hook_steps_and_a_meta_step_that_fails():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    muon = optimizer.optimizer.optimizers[0]  # type: ignore[attr-defined]
    scheduler = ExponentialLR(muon, 0.9)
    muon.register_step_post_hook(lambda *_: scheduler.step())
    batches = make_batches(DOMAINS)
    optimizer.meta_step(lambda batch: loss_of(model, batch), batches)
    poisoned = [*batches[:2], (batches[2][0] * float("nan"), batches[2][1])]
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="nan"):
        optimizer.meta_step(lambda batch: loss_of(model, batch), poisoned)
    assert_identical(everything(model, optimizer), before)
    optimizer.meta_step(lambda batch: loss_of(model, batch), batches)


@pytest.mark.parametrize(("place", "inner_state"), [(0, "carry"), (1, "reset")])
def test_a_group_may_join_one_of_them_in_the_middle(place: int, inner_state: str):
    model, reference = (Scaled((2, 2) if place == 0 else (4,)) for _ in range(2))
    optimizer = GradMatch(muon_and_adamw(model.model), fish(inner_state))
    hand = ByHand(reference, muon_and_adamw(reference.model), INNER_STATES[inner_state][1])
    for index, batch in enumerate(make_batches(4 * DOMAINS)):
        if index == DOMAINS + 1:
            optimizer.optimizer.optimizers[place].add_param_group({"params": [model.extra], "lr": 0.03})  # type: ignore[attr-defined]
            hand.optimizers[place].add_param_group({"params": [reference.extra], "lr": 0.03})
            assert len(optimizer.param_groups) == 3
        train(optimizer, model, [batch])
        hand.step(batch)
        assert_same(model, optimizer, reference, hand.optimizers)
        if index == DOMAINS + 1:
            assert_identical(through_file(optimizer.state_dict()), optimizer.state_dict())
            optimizer.load_state_dict(through_file(optimizer.state_dict()))


def test_hooks_on_the_wrapper_on_the_whole_and_on_each():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    whole = optimizer.optimizer
    muon, adamw = whole.optimizers  # type: ignore[attr-defined]
    seen: list[str] = []
    for name, one in (("wrapper", optimizer), ("whole", whole), ("muon", muon), ("adamw", adamw)):
        one.register_step_pre_hook(lambda *_, name=name: seen.append(f"before {name}"))
        one.register_step_post_hook(lambda *_, name=name: seen.append(f"after {name}"))
    train(optimizer, model, make_batches(1))
    inside = ["before muon", "after muon", "before adamw", "after adamw"]
    once = ["before wrapper", "before whole", *inside, "after whole", "after wrapper"]
    assert seen == once
    optimizer.rollback()
    seen.clear()
    optimizer.meta_step(lambda batch: loss_of(model, batch), make_batches(DOMAINS))
    assert seen == once * DOMAINS


@pytest.mark.parametrize("on", ["wrapper", "member"])
def test_hooks_on_checkpoints(on: str):
    optimizer = GradMatch(muon_and_adamw(make_model()), fish())
    one = {"wrapper": optimizer, "member": optimizer.optimizer.optimizers[1]}[on]  # type: ignore[attr-defined]
    seen: list[str] = []
    one.register_state_dict_pre_hook(lambda _: seen.append("saving"))
    one.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    one.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    one.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saving", "saved", "loading", "loaded"]
