"""Buffers move in the forward pass: what counts is their value before the first one of an inner loop."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from _models import assert_identical
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.optim import SGD
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from torch_gradmatch import Fish, GradMatch, SmoothFish, ops

MEAN = "1.running_mean"
INFINITY = float("inf")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 1))


class Holds(nn.Module):
    """Replaces its buffer by what a function makes of it in every forward pass."""

    def __init__(self, value: Tensor, update: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        self.value = self.update(self.value, x)
        return x


def wrap(model: nn.Module, **settings: Any) -> GradMatch[Fish]:
    return GradMatch(SGD(model.parameters(), lr=0.01), Fish(0.25, model=model, **settings))


def made(**settings: Any) -> tuple[nn.Sequential, GradMatch[Fish]]:
    model = network()
    return model, wrap(model, **settings)


def batch(seed: int) -> Tensor:
    return torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, seed: int) -> None:
    model(batch(seed).to(next(model.parameters()).dtype)).square().mean().backward()


def step(model: nn.Module, optimizer: GradMatch[Fish], seed: int) -> dict[str, Tensor]:
    """One step of a user's loop; returns the buffers as the forward pass has left them."""
    optimizer.zero_grad()
    backward(model, seed)
    moved = statistics(model)
    optimizer.step()
    return moved


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def interpolated(before: Tensor, after: Tensor) -> Tensor:
    return before + 0.25 * (after - before)


@pytest.mark.parametrize("forwards", [1, 3], ids=["one forward", "gradient accumulation"])
@pytest.mark.parametrize("zero_grad", [True, False], ids=["zero_grad", "as wrapped"])
def test_the_slow_buffers_are_from_before_the_first_forward(zero_grad: bool, forwards: int):
    model, optimizer = made(inner_steps=2)
    before = statistics(model)
    for inner_step in range(2):
        if zero_grad:
            optimizer.zero_grad()  # the second, in the middle of the loop, changes nothing
        for i in range(forwards):
            backward(model, 10 * inner_step + i)
        after = statistics(model)
        optimizer.step()
    for name in (MEAN, "1.running_var"):
        torch.testing.assert_close(statistics(model)[name], interpolated(before[name], after[name]))
    assert model[1].num_batches_tracked == 2 * forwards  # an integer buffer takes the latest value


# -------------------------------------------------------------------------- between two inner loops they are the user's


NEW = torch.tensor([5.0, 6.0, 7.0])
SURGERY: dict[str, Callable[[nn.Sequential], Any]] = {
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict() | {MEAN: NEW}),
    "in place": lambda model: model[1].running_mean.copy_(NEW),
    "new tensor": lambda model: setattr(model[1], "running_mean", NEW.clone()),
    "update_bn": lambda model: update_bn([batch(5) + 10.0], model),
}


@pytest.mark.parametrize("run", ["loop", "closure", "meta_step"])
@pytest.mark.parametrize("surgery", SURGERY)
def test_surgery_between_inner_loops_is_honoured(surgery: str, run: str):
    model, optimizer = made(inner_steps=1)
    step(model, optimizer, 0)
    SURGERY[surgery](model)
    before, moved = statistics(model), {}
    if run == "loop":
        moved = step(model, optimizer, 1)
    elif run == "closure":
        optimizer.step(lambda: (backward(model, 1), moved.update(statistics(model)))[1])
    else:
        optimizer.meta_step(lambda x: (model(x).square().mean(), moved.update(statistics(model)))[0], [batch(1)])
    torch.testing.assert_close(statistics(model)[MEAN], interpolated(before[MEAN], moved[MEAN]))


@pytest.mark.parametrize("teacher_is_first", [True, False], ids=["teacher first", "student first"])
def test_a_teacher_by_functional_call_leaves_the_models_buffers_alone(teacher_is_first: bool):
    """Whose forward pass moves the teacher's buffers, in training mode, as the module has no others for a while."""
    model, optimizer = made()
    teacher = {name: torch.full_like(t, 90) for name, t in model.state_dict().items()}
    for ends in (optimizer.rollback, optimizer.interpolate, optimizer.interpolate):
        before = statistics(model)
        optimizer.zero_grad()
        for teaches in (teacher_is_first, not teacher_is_first):
            if teaches:
                torch.func.functional_call(model, teacher, (batch(7),))
            else:
                backward(model, 0)
        moved = statistics(model)
        optimizer.step()
        ends()
        expected = before[MEAN] if ends == optimizer.rollback else interpolated(before[MEAN], moved[MEAN])
        torch.testing.assert_close(statistics(model)[MEAN], expected)
    assert teacher["1.num_batches_tracked"] == 93  # it moved


def test_a_checkpoint_from_between_two_inner_loops_is_resumed_in_the_middle_of_one():
    results = []
    for interrupted in (False, True):
        model, optimizer = made(inner_steps=2)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        if interrupted:
            step(model, optimizer, 0)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        step(model, optimizer, 1)
        step(model, optimizer, 2)
        results.append(model.state_dict())
    assert_identical(results[1], results[0])


# ------------------------------------------------------------------------------------------------------ kinds of models


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_a_mask_of_infinities_survives_and_a_range_that_begins_at_infinity_takes_its_latest_value(nonfinite: str):
    """As an observer's for quantization: there is no way half between infinity and a number."""
    observer = Holds(torch.tensor(-INFINITY), lambda largest, x: largest.copy_(torch.maximum(largest, x.max())))
    model = nn.Sequential(observer, nn.Linear(2, 1))
    model.register_buffer("mask", torch.full((2, 2), -INFINITY).triu(1))
    mask = model.mask.clone()
    step(model, wrap(model, inner_steps=1, nonfinite=nonfinite), 0)
    assert observer.value == batch(0).max()
    assert torch.equal(model.mask, mask)


def test_a_buffer_shared_by_two_modules_is_interpolated_once():
    shared = torch.zeros(())
    first, second = (Holds(shared, lambda total, _: total.add_(1.0)) for _ in range(2))
    model = nn.Sequential(first, nn.Linear(2, 1), second)
    step(model, wrap(model, inner_steps=1), 0)
    assert first.value is second.value
    assert first.value.item() == 0.25 * 2.0


def test_a_buffer_that_the_forward_pass_replaces():
    mean = Holds(torch.zeros(2), lambda mean, _: 0.5 * mean + 0.5)
    seen = Holds(torch.zeros(0), lambda seen, _: torch.cat([seen, torch.ones(1)]))
    model = nn.Sequential(mean, seen, nn.Linear(2, 1))
    optimizer = wrap(model)
    for ends in (optimizer.interpolate, optimizer.rollback):
        step(model, optimizer, 0)
        ends()
        assert mean.value.tolist() == [0.125, 0.125]
        assert seen.value.tolist() == [1.0]  # another shape: the latest value


def test_batch_norm_made_lazily_is_followed_once_it_exists():
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyBatchNorm1d(momentum=0.5), nn.Linear(3, 1))
    optimizer = GradMatch(SGD(model[0].parameters(), lr=0.01), Fish(0.25, inner_steps=1, model=model))
    step(model, optimizer, 0)
    before = model[1].running_mean.clone()
    moved = step(model, optimizer, 1)
    torch.testing.assert_close(model[1].running_mean, interpolated(before, moved[MEAN]))


@pytest.mark.filterwarnings("default")  # what the compiler warns of is not ours
def test_a_compiled_model_gives_the_same_buffers():
    results = []
    for compiled in (False, True):
        model, optimizer = made()
        called = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        SURGERY["load_state_dict"](model)
        for seed in range(3):
            step(called, optimizer, seed)
        optimizer.interpolate()
        model[1].running_mean.fill_(5.0)
        optimizer.meta_step(lambda x, m=called: m(x).square().mean(), [batch(0), batch(1)])
        step(called, optimizer, 4)
        optimizer.rollback()
        results.append(model.state_dict())
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("call", ["loop", "meta_step"])
def test_reentrant_checkpointing_is_followed(call: str):
    model, optimizer = made()
    before, moved = statistics(model), {}
    optimizer.register_step_pre_hook(lambda *_: moved.update(statistics(model)))

    def loss_fn(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=True).square().mean()

    x = batch(0).requires_grad_()
    if call == "loop":
        loss_fn(x).backward()
        optimizer.step()
        optimizer.interpolate()
    else:
        optimizer.meta_step(loss_fn, [x])
    assert moved["1.num_batches_tracked"] == 2  # the second time in the backward pass
    torch.testing.assert_close(statistics(model)[MEAN], interpolated(before[MEAN], moved[MEAN]))


# --------------------------------------------------------------------------------------- the model stays what it was


def test_nothing_is_left_in_the_model():
    model, optimizer = made()
    optimizer.meta_step(lambda x: model(x).square().mean(), [batch(0), batch(1)])
    step(model, optimizer, 2)
    for module in model.modules():
        assert not any(value for name, value in vars(module).items() if "hook" in name)
    assert not any(value for name, value in vars(global_hooks).items() if name.startswith("_global_") and value)
    assert b"torch_gradmatch" not in pickle.dumps(model)
    with pytest.warns(DeprecationWarning, match="script"):
        torch.jit.script(model)


def test_a_copy_of_the_model_is_not_followed_and_one_with_the_optimizer_is():
    model, optimizer = made()
    before = statistics(model)
    alone = copy.deepcopy(model)
    other, its_optimizer = copy.deepcopy((model, optimizer))
    step(other, its_optimizer, 0)
    backward(alone, 0)
    assert_identical(statistics(model), before)
    its_optimizer.rollback()
    assert_identical(statistics(other), before)


def test_of_two_optimizers_only_one_may_walk_with_the_buffers_of_a_model():
    model = network()
    first, second = (GradMatch(SGD(model[i].parameters(), lr=0.01), Fish(0.25, model=model)) for i in (0, 2))
    step(model, first, 0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"another GradMatch with the same model= .* GradMatch\(\[first, second\]"):
        second.step()
    assert_identical(model.state_dict(), before)
    first.interpolate()
    step(model, second, 1)
    second.rollback()
    step(model, first, 2)
    del first  # who forgets one in the middle of a loop is not locked out
    step(model, second, 3)


def test_another_model_is_refused():
    model, other = network(), network()
    with pytest.raises(ValueError, match=r"model should hold the parameters .*Sequential has none of them"):
        GradMatch(SGD(model.parameters(), lr=0.01), Fish(model=other))
    with pytest.raises(ValueError, match="Is it another one, or a copy"):
        GradMatch(SGD(model.parameters(), lr=0.01), Fish(model=copy.deepcopy(model)))


# ----------------------------------------------------------------------------------------------------- all or nothing


def test_weights_and_buffers_are_interpolated_by_one_call_and_stay_if_it_fails():
    model, optimizer = made()
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, 0)
    fast = copy.deepcopy(model.state_dict())
    with patch.object(ops, "interpolate_", side_effect=MemoryError) as failing, pytest.raises(MemoryError):
        optimizer.interpolate()
    ((slow, _, weight),) = (call.args for call in failing.call_args_list)
    assert (len(slow), weight) == (6 + 2, 0.25)
    assert_identical(model.state_dict(), fast)
    assert optimizer.inner_step == 1
    optimizer.interpolate()
    for name in ("0.weight", MEAN):
        torch.testing.assert_close(model.state_dict()[name], interpolated(before[name], fast[name]))


@pytest.mark.parametrize("method", ["Fish", "SmoothFish"])
def test_a_failing_meta_step_restores_the_buffers_of_when_it_was_called(method: str):
    """Also one that every forward pass replaces; what else is restored: ``tests/methods/test_undo.py``."""
    model = nn.Sequential(Holds(torch.zeros(()), lambda seen, _: seen + 1), *network())
    built = Fish(0.25, model=model) if method == "Fish" else SmoothFish(1.0, 0.1, model)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.01), built)
    model(batch(0)).sum().backward()  # a forward pass with gradients that leads to no step
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="batch 1 is nan"):
        optimizer.meta_step(lambda x: model(x).square().mean() * x.max().clamp(max=1), [batch(1), batch(2) * torch.nan])
    assert_identical(model.state_dict(), before)
    assert optimizer.inner_step == 0


def test_a_buffer_that_becomes_nan_is_named():
    model, optimizer = made()
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, 0)
    model[1].running_var[0] = float("nan")
    with pytest.raises(RuntimeError, match=r"the buffer '1.running_var' holds NaN or infinity.*call rollback\(\)"):
        optimizer.interpolate()
    optimizer.rollback()
    assert_identical(model.state_dict(), before)


# --------------------------------------------------------------------------------------- slow buffers of more digits


def in_bf16(inner_steps: int = 1) -> tuple[nn.Sequential, GradMatch[Fish]]:
    model = network().bfloat16()
    return model, wrap(model, inner_steps=inner_steps, meta_dtype=torch.float32)


def slow_buffers(optimizer: GradMatch[Fish]) -> dict[str, Tensor]:
    return copy.deepcopy(optimizer.state_dict()["gradmatch"]["slow_buffers"])


def test_zero_grad_keeps_the_digits_of_slow_buffers():
    """What it copies anew between two inner loops is what the copy before rounds to."""
    found = []
    for zeroed_by_us in (True, False):
        model, optimizer = in_bf16(inner_steps=3)
        for seed in range(60):
            (optimizer if zeroed_by_us else optimizer.optimizer).zero_grad()
            backward(model, seed)
            optimizer.step()
        found.append(slow_buffers(optimizer))
    assert found[0][MEAN].dtype is torch.float32
    assert_identical(found[0], found[1])


def test_wide_slow_buffers_are_saved_between_inner_loops():
    (model, optimizer), (resumed_model, resumed) = in_bf16(), in_bf16()
    for seed in range(3):
        step(model, optimizer, seed)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(resumed_model, resumed, seed)
    assert_identical(resumed_model.state_dict(), model.state_dict())
    assert_identical(resumed.state_dict(), optimizer.state_dict())


def test_surgery_on_a_wide_slow_buffer_is_honoured_where_it_happened():
    model, optimizer = in_bf16()
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    before = slow_buffers(optimizer)[MEAN]
    assert not torch.equal(before, before.bfloat16().float())
    model[1].running_mean[1] = before[1] = 3.0
    moved = step(model, optimizer, 2)[MEAN].float()
    slow = slow_buffers(optimizer)[MEAN]
    torch.testing.assert_close(slow, interpolated(before, moved), rtol=1e-6, atol=0.0)
    assert torch.equal(model[1].running_mean, slow.bfloat16())
