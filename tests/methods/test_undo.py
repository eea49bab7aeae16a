"""A meta_step that fails: what it restores, and that its error says so. One NaN loss costs nothing, on any device."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from _feature_training import batches, feature_net, snapshot
from _models import assert_identical, loss_of
from _second_order import EVERY, nothing_changes
from torch import Tensor, nn
from torch.optim import SGD, Adam

from torch_gradmatch import Fish, GradMatch, SmoothFish

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.05, "amsgrad": True},
    "Adagrad": {"lr": 0.1},
    "NAdam": {"lr": 0.01},
    "Rprop": {"lr": 0.01},
    "LBFGS": {"lr": 0.1, "max_iter": 3},
}
METHODS: dict[str, Callable[[nn.Module], Any]] = EVERY | {
    "Fish, reset": lambda m: Fish(0.5, model=m, inner_state="reset"),
    "Fish, tracked": lambda m: Fish(0.5, model=m, track_alignment=True),
    "Fish without model": lambda _: Fish(0.5),
    "SmoothFish-walk without model": lambda _: SmoothFish(1.0, 0.1),
    "SmoothFish-symmetric without model": lambda _: SmoothFish(0.1, 0.1, symmetric=True),
}
ERRORS: dict[str, type[BaseException]] = {"raises": KeyError, "interrupts": KeyboardInterrupt}


def spoiled(model: nn.Module, index: int, how: str) -> Callable[[Any], Tensor]:
    """A loss that fails in one domain."""

    def loss_fn(batch: Any) -> Tensor:
        loss = loss_of(model, batch)
        if batch[2] != index:
            return loss
        if how in ERRORS:
            raise ERRORS[how]
        return loss * float(how)

    return loss_fn


CASES = [  # where a method can fail, by an optimizer with tensors and counters in its state
    *itertools.product(["Adam"], METHODS, [0, 2], ["nan", "raises"]),
    # what an optimizer keeps, in a method that takes its steps before the failure
    *itertools.product(sorted(set(OPTIMIZERS) - {"Adam"}), ["Fish", "Fish, reset"], [2], ["raises"]),
    *itertools.product(["LBFGS"], ["SmoothFish", "IDGM"], [1], ["inf", "interrupts"]),
    ("SGD", "Fish", 1, "interrupts"),
    ("SGD", "SmoothFish-walk", 2, "inf"),  # not the walk's fault: it is infinite before it, too
]


@pytest.mark.parametrize(("name", "method", "index", "how"), CASES)
def test_everything_is_as_before_the_call(name: str, method: str, index: int, how: str):
    """Also the moments that the steps before the failure moved; and training goes on as if nothing had been."""
    results = []
    for fails in (False, True):
        model = feature_net()
        wrapped = getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
        optimizer = GradMatch(wrapped, METHODS[method](model))
        optimizer.meta_step(partial(loss_of, model), batches(3))
        if fails:
            with nothing_changes(model, optimizer), pytest.raises(ERRORS.get(how, ValueError)) as raised:
                optimizer.meta_step(spoiled(model, index, how), batches(3, seed=2))
            assert optimizer.inner_step == 0
            note = "\n".join(raised.value.__notes__)
            assert "meta_step() failed" in note
            assert "as before the call" in note
            assert "buffers" in note or optimizer.method.model is None
            if how not in ERRORS:
                assert f"the loss of batch {index} is {how}: nothing was changed" in str(raised.value)
        optimizer.meta_step(partial(loss_of, model), batches(3, seed=3))
        results.append((dict(model.named_parameters()), optimizer.state_dict()))
    assert_identical(results[1], results[0])


@pytest.mark.parametrize(
    ("name", "method", "evaluations"),
    [
        *(("Adam", "SmoothFish", n) for n in (3, 5)),
        *(("Adam", "SmoothFish-symmetric", n) for n in (3, 5, 7)),
        *(("Adam", "IDGM", n) for n in (3, 4)),
        *(("LBFGS", method, 11) for method in ("IDGM", "SmoothFish")),  # which by then has moved the parameters
    ],
)
def test_an_evaluation_that_is_interrupted_when_each_has_been_once_changes_nothing(
    name: str, method: str, evaluations: int
):
    model, count = feature_net(), itertools.count()
    wrapped = getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
    optimizer = GradMatch(wrapped, METHODS[method](model))
    before = copy.deepcopy(model.state_dict())

    def loss_fn(batch: Any) -> Tensor:
        loss = loss_of(model, batch)
        if next(count) == evaluations:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.meta_step(loss_fn, batches(3))
    assert_identical(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())
    if name == "Adam":  # no line search has begun
        assert not wrapped.state
        optimizer.meta_step(partial(loss_of, model), batches(3))


def test_what_a_scheduler_set_on_the_way_is_not_restored():
    model = feature_net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fish(0.5, model=model))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    with pytest.raises(ValueError, match="batch 2 is nan"):
        optimizer.meta_step(spoiled(model, 2, "nan"), batches(3))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)
    assert scheduler.last_epoch == 2


def test_an_optimizer_that_replaces_its_state_gets_the_same_tensors_back():
    class Replacing(SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p -= 0.1 * p.grad
                    self.state[p]["mean"] = self.state[p].get("mean", 0) + p.grad
                    self.state[p]["seen"] = [*self.state[p].get("seen", ()), float(p.grad.sum())]

    model = feature_net()
    wrapped = Replacing(model.parameters(), lr=0.1)
    optimizer = GradMatch(wrapped, Fish(0.5, model=model))
    optimizer.meta_step(partial(loss_of, model), batches(3))
    held = {p: entry["mean"] for p, entry in wrapped.state.items()}
    with nothing_changes(model, optimizer), pytest.raises(ValueError, match="batch 2 is nan"):
        optimizer.meta_step(spoiled(model, 2, "nan"), batches(3))
    assert all(wrapped.state[p]["mean"] is tensor for p, tensor in held.items())


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_a_state_that_began_in_the_failed_call_is_gone_and_if_it_is_not_the_error_says_so(nonfinite: Any):
    model = feature_net()
    wrapped = Adam(model.parameters(), lr=0.05)
    optimizer = GradMatch(wrapped, Fish(0.5, model=model, nonfinite=nonfinite))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError) as raised:
        optimizer.meta_step(spoiled(model, 2, "raises"), batches(3))
    assert_identical(model.state_dict(), before)
    if nonfinite == "raise":
        assert not wrapped.state
        optimizer.meta_step(partial(loss_of, model), batches(3))
    else:
        assert wrapped.state[model.out.weight]["step"] == 2
        assert raised.value.__notes__[-1].endswith("; the wrapped optimizer's state is that after 2 inner steps")


def test_divergence_found_at_the_end_is_undone_too():
    """All losses are finite, and the last step leads to infinity."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = GradMatch(SGD(model.parameters(), lr=10.0, momentum=0.9), Fish(0.5))

    def loss_fn(slope: float) -> Tensor:
        return ((model.weight - model.weight.detach()) * slope).sum()

    optimizer.meta_step(loss_fn, [1.0, 2.0])
    with nothing_changes(model, optimizer), pytest.raises(RuntimeError, match="the inner loop diverged"):
        optimizer.meta_step(loss_fn, [1.0, 3e38])


class FailingStep(SGD):
    """Moves the parameters and fails."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p += 1.0
        raise MemoryError("no memory")


class FailingSearch(FailingStep):
    """The same, and cannot do without a closure."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        super().step(closure)


@pytest.mark.parametrize("method", ["SmoothFish", "IDGM"])
@pytest.mark.parametrize("kind", [FailingStep, FailingSearch])
def test_a_step_that_fails_half_way_is_told_of(kind: type[SGD], method: str):
    """All is as before but the optimizer's state, of which there is no copy."""
    model = feature_net()
    optimizer = GradMatch(kind(model.parameters(), lr=0.1), METHODS[method](model))
    before = snapshot(model, optimizer)
    with pytest.raises(MemoryError) as raised:
        optimizer.meta_step(partial(loss_of, model), batches(3))
    assert all(p.grad is None for p in model.parameters())
    assert_identical(snapshot(model, optimizer), before)
    (note,) = raised.value.__notes__
    restored, left = note.split("; ")
    assert "parameters, .grad, the model's buffers" in restored
    assert left == "the wrapped optimizer's state is what its step left"


def test_losses_are_checked_before_each_step_so_that_no_device_waits_for_the_end():
    """What a GPU does, simulated: nothing is looked at before the backward pass, which may fill ``.grad`` with NaN."""
    model, steps_on, backward_ran = feature_net(), list[Any](), list[Any]()
    wrapped = Adam(model.parameters(), lr=0.05)
    optimizer = GradMatch(wrapped, Fish(0.5))
    wrapped.register_step_pre_hook(lambda *_: steps_on.append(model.out.weight.grad.isfinite().all().item()))

    def loss_fn(batch: Any) -> Tensor:
        loss = spoiled(model, 1, "nan")(batch)
        loss.register_hook(backward_ran.append)
        return loss

    with pytest.raises(ValueError, match="batch 1 is nan"):
        optimizer.meta_step(loss_fn, batches(3))
    assert steps_on == [True]
    assert len(backward_ran) == 2
