"""Whose a forward pass in training mode is: of the inner loop, between two, or of a model that nobody told of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from _buffers import backward, interpolated, network, statistics, wrap
from torch import Tensor, nn

from torch_gradmatch import Fish, GradMatch, SmoothFish


@pytest.mark.parametrize("run", ["loop", "meta_step"])
def test_update_bn_between_two_meta_iterations_is_honoured(run: str):
    model = network()
    optimizer = wrap(model, inner_steps=1)
    backward(model, 0)
    optimizer.step()
    data = list(torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(5)) + 10.0)
    torch.optim.swa_utils.update_bn(data, model)
    updated = statistics(model)
    if run == "loop":
        backward(model, 1)
        moved = statistics(model)
        optimizer.step()
    else:
        moved = {}
        optimizer.meta_step(lambda x: (model(x).square().mean(), moved.update(statistics(model)))[0], data[:1])
    name = "1.running_mean"
    torch.testing.assert_close(statistics(model)[name], interpolated(updated[name], moved[name]))


def test_a_training_mode_forward_without_gradients_is_the_users():
    model = network()
    optimizer = wrap(model)
    with torch.no_grad():
        model(torch.full((4, 2), 3.0) + torch.rand(4, 2))
    users = statistics(model)
    backward(model, 0)
    optimizer.step()
    optimizer.rollback()
    torch.testing.assert_close(statistics(model), users, rtol=0, atol=0)


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("order", ["teacher first", "student first", "teacher alone"])
def test_a_teacher_by_functional_call_leaves_the_models_buffers_alone(order: str, gradients: bool):
    """Whose forward pass moves the teacher's buffers, in training mode, as the module has no others for a while."""
    model = network()
    optimizer = wrap(model)
    before = statistics(model)
    teacher = {name: torch.full_like(t, 90) for name, t in model.state_dict().items()}

    def teach() -> None:
        with torch.set_grad_enabled(gradients):
            torch.func.functional_call(model, teacher, (torch.randn(8, 2),))

    for _ in range(2):
        if order != "student first":
            teach()
        if order != "teacher alone":
            backward(model, 0)
            optimizer.step()
        if order == "student first":
            teach()
    assert teacher["1.num_batches_tracked"] == 92  # it moved
    moved = statistics(model)
    if order == "teacher alone":
        torch.testing.assert_close(moved, before, rtol=0, atol=0)
    optimizer.rollback()
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)
    for _ in range(2):  # another inner loop is as good as the first
        teach()
        backward(model, 1)
        optimizer.step()
        moved = statistics(model)
        optimizer.interpolate()
        torch.testing.assert_close(
            statistics(model)["1.running_mean"], interpolated(before["1.running_mean"], moved["1.running_mean"])
        )
        before = statistics(model)


def test_a_teacher_and_a_new_buffer_of_the_users():
    model = network()
    optimizer = wrap(model, inner_steps=1)
    model[1].running_mean = torch.tensor([5.0, 6.0, 7.0])
    torch.func.functional_call(model, {n: t.clone() for n, t in model.state_dict().items()}, (torch.randn(8, 2),))
    before = statistics(model)
    backward(model, 0)
    moved = statistics(model)
    optimizer.step()
    name = "1.running_mean"
    torch.testing.assert_close(statistics(model)[name], interpolated(before[name], moved[name]))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("zero_grad", [True, False])
def test_update_bn_of_a_compiled_model_is_honoured_or_warned_of(zero_grad: bool):
    model = network()
    optimizer = wrap(model, inner_steps=1)
    compiled = torch.compile(model, backend="eager")
    backward(compiled, 0)
    optimizer.step()
    torch.optim.swa_utils.update_bn([torch.full((4, 2), 3.0) + torch.rand(4, 2)], compiled)
    updated = statistics(model)
    if zero_grad:
        optimizer.zero_grad()
    backward(compiled, 1)
    moved = statistics(model)
    if zero_grad:
        optimizer.step()
        name = "1.running_mean"
        torch.testing.assert_close(statistics(model)[name], interpolated(updated[name], moved[name]))
    else:
        with pytest.warns(RuntimeWarning, match=r"Call optimizer.zero_grad\(\) before the forward pass"):
            optimizer.step()


def test_reentrant_checkpointing_is_warned_of():
    model = network()
    optimizer = wrap(model)
    x = torch.randn(8, 2, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="use_reentrant=False"):
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("how", ["whole, not reentrant", "meta_step, reentrant"])
def test_checkpointing_is_followed(how: str):
    model = network()
    optimizer = wrap(model)
    before = statistics(model)

    def loss_fn(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=how.endswith(", reentrant")).square().mean()

    x = torch.randn(8, 2, requires_grad=True)
    if how.startswith("whole"):
        loss_fn(x).backward()
        optimizer.step()
        optimizer.rollback()
        torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)
    else:
        moved: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(lambda *_: moved.update(statistics(model)))
        optimizer.meta_step(loss_fn, [x])
        name = "1.running_mean"
        torch.testing.assert_close(statistics(model)[name], interpolated(before[name], moved[name]))


# ------------------------------------------------------------------------------------------- without being told of them


def nan_after_first(model: nn.Module) -> Any:
    def loss_fn(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        return loss * float("nan") if x[0, 0] > 5 else loss

    return loss_fn


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["plain", "compiled", "replacing", "later"])
@pytest.mark.parametrize("method", ["Fish", "SmoothFish"])
def test_one_nan_loss_restores_buffers_of_any_module_that_ran(method: str, kind: str):
    class Replaces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return x

    model = nn.Sequential(Replaces(), network()) if kind == "replacing" else network()
    optimizer = GradMatch(
        torch.optim.SGD(model.parameters(), lr=0.01), {"Fish": Fish(), "SmoothFish": SmoothFish(1.0, 0.1)}[method]
    )
    good, bad = torch.rand(4, 2), torch.rand(4, 2) + 10
    called = torch.compile(model, backend="eager") if kind == "compiled" else model
    if kind in ("replacing", "later"):  # modules known from an earlier meta-iteration
        optimizer.meta_step(nan_after_first(called), [good, good])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the loss of batch 1 is nan"):
        optimizer.meta_step(nan_after_first(called), [good, bad])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not torch.nn.modules.module._global_forward_pre_hooks
