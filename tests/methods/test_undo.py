"""A meta_step that fails: what it restores, and that its error says so. One NaN loss costs nothing, on any device."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _feature_training import batches, feature_net
from _models import assert_identical, loss_of
from _second_order import METHODS as ALL_METHODS
from _second_order import MORE_METHODS
from torch import Tensor, nn
from torch.optim import SGD, Adam

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.05, "amsgrad": True},
    "Adagrad": {"lr": 0.1},
    "NAdam": {"lr": 0.01},
    "Rprop": {"lr": 0.01},
    "LBFGS": {"lr": 0.1, "max_iter": 3},
}
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "Fish": lambda m: Fish(0.5, model=m),
    "Fish, reset": lambda m: Fish(0.5, model=m, inner_state="reset"),
    "Fish, tracked": lambda m: Fish(0.5, model=m, track_alignment=True),
    "Fish without model": lambda _: Fish(0.5),
    "SmoothFish": lambda m: SmoothFish(1.0, 0.1, m),
    "SmoothFish without model": lambda _: SmoothFish(1.0, 0.1),
    "SmoothFish, gamma 2": lambda m: SmoothFish(2.0, 0.1, m),
    "SmoothFish, symmetric": lambda m: SmoothFish(0.1, 0.1, m, symmetric=True),
    "SmoothFish, symmetric, without model": lambda _: SmoothFish(0.1, 0.1, symmetric=True),
    "IDGM": lambda m: IDGM(m, 0.1, "variance"),
    **MORE_METHODS,
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


def everything(model: nn.Module, optimizer: GradMatch) -> Any:
    """All that a failed call puts back. Buffers only of a model that the method knows: others nobody has copied."""
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    values = dict(model.named_parameters()) if optimizer.method.model is None else model.state_dict()
    return copy.deepcopy((values, optimizer.state_dict(), gradients, optimizer.param_groups[0]["lr"]))


CASES = [  # where a method can fail, by an optimizer with tensors and counters in its state
    *itertools.product(["Adam"], METHODS, [0, 2], ["nan", "raises"]),
    # what an optimizer keeps, in a method that takes its steps before the failure
    *itertools.product(sorted(set(OPTIMIZERS) - {"Adam"}), ["Fish", "Fish, reset"], [2], ["raises"]),
    *itertools.product(["LBFGS"], ["SmoothFish", "IDGM"], [1], ["inf", "interrupts"]),
    ("SGD", "Fish", 1, "interrupts"),
]


@pytest.mark.parametrize(("name", "method", "index", "how"), CASES)
def test_everything_is_as_before_the_call(name: str, method: str, index: int, how: str):
    """Also the moments that the steps before the failure moved; and training goes on as if nothing had been."""
    results = []
    for fails in (False, True):
        model = feature_net()
        wrapped = getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
        optimizer = GradMatch(wrapped, METHODS[method](model))
        optimizer.meta_step(lambda b, m=model: loss_of(m, b), batches(3))
        if fails:
            for p in model.parameters():
                p.grad = torch.full_like(p, 7.0)  # the user's, to be kept
            kept = [p.grad for p in model.parameters()]
            before = everything(model, optimizer)
            with pytest.raises(ERRORS.get(how, ValueError)) as raised:
                optimizer.meta_step(spoiled(model, index, how), batches(3, seed=2))
            assert_identical(everything(model, optimizer), before)
            assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
            assert optimizer.inner_step == 0
            note = "\n".join(raised.value.__notes__)
            assert "meta_step() failed" in note
            assert "as before the call" in note
            assert "buffers" in note or optimizer.method.model is None
            if how not in ERRORS:
                assert f"the loss of batch {index} is {how}: nothing was changed" in str(raised.value)
        optimizer.meta_step(lambda b, m=model: loss_of(m, b), batches(3, seed=3))
        results.append(everything(model, optimizer))
    assert_identical(results[1], results[0])


def test_counters_in_the_groups_are_restored_and_what_a_scheduler_set_is_not():
    class Counting(SGD):
        """Counts its steps in its groups, as some optimizers do."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
            return super().step(closure)

    model = feature_net()
    optimizer = GradMatch(Counting(model.parameters(), lr=0.1), Fish(0.5, model=model))
    optimizer.meta_step(lambda b: loss_of(model, b), batches(3))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    handle = optimizer.register_step_post_hook(lambda *_: scheduler.step())
    with pytest.raises(ValueError, match="batch 2 is nan"):
        optimizer.meta_step(spoiled(model, 2, "nan"), batches(3))
    handle.remove()
    group = optimizer.param_groups[0]
    assert group["k"] == 3
    assert group["lr"] == pytest.approx(0.1 * 0.5**2)  # as the scheduler says: it has counted two steps
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
    optimizer.meta_step(lambda b: loss_of(model, b), batches(3))
    held = {p: entry["mean"] for p, entry in wrapped.state.items()}
    before = copy.deepcopy(wrapped.state_dict())
    with pytest.raises(ValueError, match="batch 2 is nan"):
        optimizer.meta_step(spoiled(model, 2, "nan"), batches(3))
    assert_identical(wrapped.state_dict(), before)
    assert all(wrapped.state[p]["mean"] is tensor for p, tensor in held.items())


def test_a_parameter_seen_for_the_first_time_in_the_failed_call_has_no_state_afterwards():
    model = feature_net()
    wrapped = Adam(model.parameters(), lr=0.05)
    optimizer = GradMatch(wrapped, Fish(0.5, model=model))
    with pytest.raises(KeyError):
        optimizer.meta_step(spoiled(model, 2, "raises"), batches(3))
    assert not wrapped.state
    optimizer.meta_step(lambda b: loss_of(model, b), batches(3))


def test_with_nonfinite_ignore_the_error_says_that_the_optimizers_state_moved():
    model = feature_net()
    wrapped = Adam(model.parameters(), lr=0.05)
    optimizer = GradMatch(wrapped, Fish(0.5, model=model, nonfinite="ignore"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError) as raised:
        optimizer.meta_step(spoiled(model, 2, "raises"), batches(3))
    assert_identical(model.state_dict(), before)
    assert wrapped.state[model.out.weight]["step"] == 2
    assert raised.value.__notes__[-1].endswith("; the wrapped optimizer's state is that after 2 inner steps")


def test_divergence_found_at_the_end_is_undone_too():
    """All losses are finite, and the last step leads to infinity."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = GradMatch(SGD([parameter], lr=10.0, momentum=0.9), Fish(0.5))

    def loss_fn(slope: float) -> Tensor:
        return ((parameter - parameter.detach()) * slope).sum()

    optimizer.meta_step(loss_fn, [1.0, 2.0])
    before = copy.deepcopy((parameter.detach(), optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="the inner loop diverged"):
        optimizer.meta_step(loss_fn, [1.0, 3e38])
    assert_identical((parameter.detach(), optimizer.state_dict()), before)


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
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MemoryError) as raised:
        optimizer.meta_step(lambda b: loss_of(model, b), batches(3))
    assert all(p.grad is None for p in model.parameters())
    assert_identical(model.state_dict(), before)
    (note,) = raised.value.__notes__
    restored, left = note.split("; ")
    assert "parameters, .grad, the model's buffers" in restored
    assert left == "the wrapped optimizer's state is what its step left"


def test_losses_are_checked_before_each_step_so_that_no_device_waits_for_the_end():
    """What a GPU does, simulated: nothing is looked at before the backward pass, which may fill ``.grad`` with NaN."""
    model = feature_net()
    wrapped = Adam(model.parameters(), lr=0.05)
    optimizer = GradMatch(wrapped, Fish(0.5))
    seen: list[bool] = []
    wrapped.register_step_pre_hook(
        lambda *_: seen.append(all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None))
    )
    backward_ran: list[Any] = []

    def loss_fn(batch: Any) -> Tensor:
        loss = spoiled(model, 1, "nan")(batch)
        loss.register_hook(backward_ran.append)
        return loss

    with pytest.raises(ValueError, match="batch 1 is nan"):
        optimizer.meta_step(loss_fn, batches(3))
    assert seen == [True]
    assert len(backward_ran) == 2


# ------------------------------------------------------------------------------------- mistakes in what it is given


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_loss_fn_that_calls_backward_is_refused(method: str):
    model = feature_net()
    optimizer = GradMatch(Adam(model.parameters(), lr=0.1), ALL_METHODS[method](model))
    loss_of(model, batches(1)[0]).backward()
    before = everything(model, optimizer)

    def training_step(batch: Any) -> Tensor:
        loss = loss_of(model, batch)
        loss.backward(retain_graph=batch[2] == 1)
        return loss

    with pytest.raises(RuntimeError, match=r"loss_fn called backward\(\)"):
        optimizer.meta_step(training_step, batches(2))
    assert_identical(everything(model, optimizer), before)
    optimizer.meta_step(lambda b: loss_of(model, b), batches(2))


def test_a_loss_fn_that_differentiates_for_itself_is_fine():
    """A gradient penalty by ``autograd.grad`` leaves ``.grad`` alone."""
    model = feature_net()

    def penalized(batch: Any) -> Tensor:
        x, _, domain = batch
        x = x.clone().requires_grad_()
        out = model(x, domain).sum()
        return out + torch.autograd.grad(out, x, create_graph=True)[0].square().sum()

    assert GradMatch(SGD(model.parameters(), lr=0.1)).meta_step(penalized, batches(2)).losses.shape == (2,)


def test_swapped_arguments_are_named():
    w = nn.Parameter(torch.zeros(()))
    optimizer = GradMatch(SGD([w], lr=0.1))
    loss_fn = lambda x: (w - x).square()  # noqa: E731
    with pytest.raises(TypeError, match=r"loss_fn should be a function .*\(got list, the batches.*swapped"):
        optimizer.meta_step([1.0, 2.0], loss_fn)
    with pytest.raises(TypeError, match=r"loss_fn should be a function .*\(got Tensor\)"):
        optimizer.meta_step(loss_fn(1.0), [1.0, 2.0])
