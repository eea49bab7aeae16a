"""Several optimizers wrapped as one, beside the loop that steps each of them by hand; in float64, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from _models import assert_identical
from _several import (
    DOMAINS,
    Batch,
    Beside,
    every_inner_state,
    everything,
    fish,
    loss_of,
    make_batches,
    make_model,
    matrices,
    members,
    muon_and_adamw,
    poisoned,
    rest,
    train,
)
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish, compare

# ------------------------------------------------------------------------------------------------------------- steps


@every_inner_state
@pytest.mark.parametrize("by", ["step", "meta_step"])
def test_fish_is_the_loop_over_both_by_hand(inner_state: str, by: str):
    both = Beside(inner_state, track_alignment=True)
    for seed in range(4):
        if by == "step":
            for batch in make_batches(seed=seed):
                both.step(batch)
        else:
            both.optimizer.meta_step(lambda batch: loss_of(both.model, batch), make_batches(seed=seed))
            for batch in make_batches(seed=seed):
                both.step_by_hand(batch)
            both.check()
    assert both.optimizer.last_meta_step is not None
    assert both.optimizer.last_meta_step.cosine is not None


@pytest.mark.parametrize(
    "method", [lambda _: SmoothFish(1.0, 0.1), lambda model: IDGM(model, 0.5, "variance")], ids=["SmoothFish", "IDGM"]
)
def test_the_other_methods_are_one_step_of_each_on_the_direction(method: Callable[[nn.Module], Any]):
    """Bit for bit beside the direction that a single optimizer is handed."""
    both = Beside()
    optimizer = GradMatch(members(both.optimizer), method(both.model))
    finder = GradMatch(SGD([*matrices(both.twin), *rest(both.twin)], lr=0.0), method(both.twin))
    for seed in range(4):
        optimizer.meta_step(lambda batch: loss_of(both.model, batch), make_batches(seed=seed))
        finder.meta_step(lambda batch: loss_of(both.twin, batch), make_batches(seed=seed))
        for one in both.optimizers:
            one.step()
        both.check()


def test_a_tuple_is_a_list_and_shown_whole():
    both = tuple(muon_and_adamw(make_model()))
    optimizer = GradMatch(both, fish())
    assert members(optimizer) == list(both)
    assert repr(optimizer) == f"GradMatch(\n{both[0]!r}\n{both[1]!r},\n{fish()!r}\n)"


@pytest.mark.filterwarnings("ignore:the inner optimizer's state held NaN")
def test_slow_weights_are_those_of_both_and_rollback_resets_both_if_they_diverged():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    train(optimizer, model, make_batches())
    slow = copy.deepcopy(model.state_dict())
    train(optimizer, model, make_batches(2))
    fast = copy.deepcopy(model.state_dict())
    with optimizer.slow_weights():
        assert_identical(model.state_dict(), slow)
    assert_identical(model.state_dict(), fast)
    with pytest.raises(RuntimeError, match="the inner loop diverged"):
        train(optimizer, model, poisoned(make_batches())[2:])
    optimizer.rollback()
    assert_identical(model.state_dict(), slow)
    assert all(not one.state for one in members(optimizer))
    train(optimizer, model, make_batches())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_reaches_all(set_to_none: bool):
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    loss_of(model, make_batches()[0]).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    gradients = [p.grad for p in model.parameters()]
    assert all(g is None if set_to_none else g is not None and not g.any() for g in gradients)


def test_a_closure_is_evaluated_once_before_all_steps():
    both, calls = Beside(), []
    for batch in make_batches(2 * DOMAINS):

        def closure(batch: Batch = batch) -> Tensor:
            assert torch.is_grad_enabled()
            calls.append(copy.deepcopy(both.model.state_dict()))
            both.optimizer.zero_grad()
            loss = loss_of(both.model, batch)
            loss.backward()
            return loss

        before = copy.deepcopy(both.twin.state_dict())
        with torch.no_grad():
            returned = both.optimizer.step(closure)
        assert torch.equal(returned.detach(), loss_of(both.twin, batch).detach())
        assert_identical(calls[-1], before)
        both.step_by_hand(batch)
        both.check()
    assert len(calls) == 2 * DOMAINS


@pytest.mark.parametrize(("unscale", "fused"), [("by step", True), ("before, to clip", False)])
def test_a_step_that_overflowed_is_skipped_by_both_and_counts(unscale: str, fused: bool):
    both = Beside(build=lambda m: [Muon(matrices(m), lr=0.05), AdamW(rest(m), lr=0.02, fused=fused)])
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for index, batch in enumerate(make_batches(3 * DOMAINS)):
        overflows = index == 4
        both.optimizer.zero_grad()
        scaler.scale(loss_of(both.model, batch) * (float("inf") if overflows else 1.0)).backward()
        if unscale != "by step":
            scaler.unscale_(both.optimizer)
        scaler.step(both.optimizer)
        scaler.update()
        both.step_by_hand(batch, skipped=overflows)
        both.check()
        assert both.optimizer.inner_step == (index + 1) % DOMAINS
        assert not hasattr(both.optimizer.optimizer, "found_inf")
    assert scaler.get_scale() == 2.0**9


def schedule_free_and_sgd(model: nn.Module, place: int) -> list[Optimizer]:
    both = [pytorch_optimizer.ScheduleFreeAdamW(matrices(model), lr=0.05), SGD(rest(model), lr=0.1)]
    return both[::-1] if place else both


@pytest.mark.parametrize("place", [0, 1])
def test_schedule_free_beside_sgd_is_refused_where_its_state_would_be_carried(place: int):
    """Under a method without an inner loop a step is one of ordinary training."""
    model = make_model()
    with pytest.raises(ValueError, match=r'ScheduleFreeAdamW keeps points .*inner_state="reset".*SmoothFish'):
        GradMatch(schedule_free_and_sgd(model, place), fish())
    both = Beside("reset", lambda m: schedule_free_and_sgd(m, place))
    optimizer = GradMatch(members(both.optimizer), SmoothFish(1.0, 0.1))
    for modes in (members(optimizer), both.optimizers):
        modes[place].train()
    for batch in make_batches(4):
        train(optimizer, both.model, [batch])
        both.twin.zero_grad()
        loss_of(both.twin, batch).backward()
        for one in both.optimizers:
            one.step()
        both.check()
    for modes in (members(optimizer), both.optimizers):
        modes[place].eval()
    both.check()


def test_compare_takes_a_list():
    model, batches = make_model(), make_batches()
    methods = {"Fish": Fish(), "SmoothFish": SmoothFish(1.0, 0.1)}
    found = compare(model, loss_of, batches, methods, muon_and_adamw(model), rounds=2, orders=2, show=False)
    assert found["Fish"].error is None
    assert "Muon with AdamW" in str(found)
    with pytest.raises(ValueError, match="needs a closure"):
        compare(model, loss_of, batches, optimizer=[torch.optim.LBFGS(model.parameters())])


# ---------------------------------------------------------------------------------------------- what is in the list

WRONG_LISTS: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "nothing": (lambda _: [], ValueError, "optimizer is an empty list: pass at least one"),
    "twice": (lambda m: [muon_and_adamw(m)[0]] * 2, ValueError, r"optimizer\[1\] is in the list twice"),
    "shared": (
        lambda m: [Muon(matrices(m)), AdamW([*rest(m), matrices(m)[1]])],
        ValueError,
        r"optimizer\[0\] and optimizer\[1\] hold the same parameter, number 3 of .*of shape \(5, 6\)",
    ),
    "SAM": (
        lambda m: [SGD(rest(m), lr=0.1), pytorch_optimizer.SAM(matrices(m), SGD, lr=0.1)],
        ValueError,
        r"\[1\], a SAM, needs a closure.*by itself",
    ),
    "no-groups": (
        lambda m: [pytorch_optimizer.SafeFP16Optimizer(SGD(matrices(m), lr=0.1)), SGD(rest(m), lr=0.1)],
        TypeError,
        r"optimizer\[0\] .* no param_groups, so it is no whole optimizer",
    ),
}


@pytest.mark.parametrize(("listed", "error", "message"), WRONG_LISTS.values(), ids=WRONG_LISTS)
def test_what_is_no_list_of_disjoint_optimizers_is_refused(listed: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        GradMatch(listed(make_model()))


def test_groups_are_added_to_one_of_them():
    optimizer = GradMatch(muon_and_adamw(make_model()))
    extra = {"params": [nn.Parameter(torch.zeros(3, dtype=torch.float64))]}
    for refused in (
        lambda: optimizer.add_param_group(extra),
        lambda: optimizer.optimizer.add_param_group(extra),
        lambda: setattr(optimizer, "param_groups", []),
    ):
        with pytest.raises(RuntimeError, match=r"2 optimizers are wrapped as one.*optimizers\[0\]\.add_param_group"):
            refused()
    assert len(optimizer.param_groups) == 2


def test_a_parameter_that_joins_a_second_optimizer_later_is_refused_before_anything_moves():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    train(optimizer, model, make_batches(1))
    before = copy.deepcopy(model.state_dict())
    members(optimizer)[1].add_param_group({"params": [matrices(model)[1]]})
    with pytest.raises(ValueError, match=r"optimizer\[0\] and optimizer\[1\] hold the same parameter, number 3"):
        train(optimizer, model, make_batches(1))
    assert_identical(model.state_dict(), before)
    assert len(members(optimizer)[0].param_groups) == 1


class Scaled(nn.Module):
    """A model with a parameter more, of which its optimizers learn late."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.model = make_model()
        self.extra = nn.Parameter(torch.linspace(0.5, 1.5, 4, dtype=torch.float64).reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x * self.extra.flatten())


@pytest.mark.parametrize(("place", "inner_state", "shape"), [(0, "carry", (2, 2)), (1, "reset", (4,))])
def test_a_group_may_join_one_of_them_in_the_middle(place: int, inner_state: str, shape: tuple[int, ...]):
    both = Beside(inner_state, lambda m: muon_and_adamw(m.model), lambda: Scaled(shape))
    for index, batch in enumerate(make_batches(4 * DOMAINS)):
        if index == DOMAINS + 1:
            for model, optimizers in ((both.model, members(both.optimizer)), (both.twin, both.optimizers)):
                optimizers[place].add_param_group({"params": [model.extra], "lr": 0.03})
            assert len(both.optimizer.param_groups) == 3
        both.step(batch)
        if index == DOMAINS + 1:
            both.optimizer.load_state_dict(both.optimizer.state_dict())


# ---------------------------------------------------------------------------------------------- schedulers and hooks


SCHEDULES: dict[str, tuple[Callable[[Any], list[Any]], Callable[[Any], list[Any]]]] = {
    "of-the-whole": (
        lambda o: [OneCycleLR(o.optimizer, max_lr=[0.1, 0.04], total_steps=15, cycle_momentum=False)],
        lambda os: [
            OneCycleLR(one, max_lr=peak, total_steps=15, cycle_momentum=False)
            for one, peak in zip(os, (0.1, 0.04), strict=True)
        ],
    ),
    "of-the-wrapper-and-one": (
        lambda o: [ExponentialLR(o, 0.9), OneCycleLR(members(o)[1], max_lr=0.05, total_steps=15)],
        lambda os: [ExponentialLR(os[0], 0.9), ExponentialLR(os[1], 0.9), OneCycleLR(os[1], 0.05, total_steps=15)],
    ),
}


@pytest.mark.parametrize(("of_whole", "by_hand"), SCHEDULES.values(), ids=SCHEDULES)
def test_schedulers_of_each_and_of_the_whole(of_whole: Callable[[Any], Any], by_hand: Callable[[Any], Any]):
    both = Beside("reset")
    schedulers = [*of_whole(both.optimizer), *by_hand(both.optimizers)]
    for batch in make_batches(14):
        both.step(batch)
        for scheduler in schedulers:
            scheduler.step()
        rates = [group["lr"] for group in both.optimizer.param_groups]
        assert rates == [group["lr"] for one in both.optimizers for group in one.param_groups]


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
    """It changes the learning rate within the step of the whole; a meta_step that fails puts it back."""
    both = Beside(inner_state)
    for optimizers in (members(both.optimizer), both.optimizers):
        scheduler = ExponentialLR(optimizers[0], 0.9)
        optimizers[0].register_step_post_hook(lambda *_, scheduler=scheduler: scheduler.step())
    for batch in make_batches(3 * DOMAINS):
        both.step(batch)
    both.optimizer.meta_step(lambda batch: loss_of(both.model, batch), make_batches())
    before = everything(both.model, both.optimizer)
    with pytest.raises(ValueError, match="nan"):
        both.optimizer.meta_step(lambda batch: loss_of(both.model, batch), poisoned(make_batches()))
    assert_identical(everything(both.model, both.optimizer), before)


def test_hooks_on_the_wrapper_on_the_whole_and_on_each():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    seen: list[str] = []
    hooked = {"wrapper": optimizer, "whole": optimizer.optimizer, "muon": members(optimizer)[0]}
    for name, one in {**hooked, "adamw": members(optimizer)[1]}.items():
        one.register_step_pre_hook(lambda *_, name=name: seen.append(f"before {name}"))
        one.register_step_post_hook(lambda *_, name=name: seen.append(f"after {name}"))
    train(optimizer, model, make_batches(1))
    inside = ["before muon", "after muon", "before adamw", "after adamw"]
    once = ["before wrapper", "before whole", *inside, "after whole", "after wrapper"]
    assert seen == once
    optimizer.rollback()
    seen.clear()
    optimizer.meta_step(lambda batch: loss_of(model, batch), make_batches())
    assert seen == once * DOMAINS
