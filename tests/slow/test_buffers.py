"""Buffers move in the forward pass: what counts is their value before the first one of an inner loop."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.utils.checkpoint
from _buffers import MEAN, backward, batch, interpolated, network, statistics, step, wrap
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from torch_gradmatch import Fish, GradMatch


@pytest.mark.parametrize("forwards", [1, 3], ids=["one forward", "gradient accumulation"])
@pytest.mark.parametrize("zero_grad", [True, False], ids=["zero_grad", "as wrapped"])
def test_the_slow_buffers_are_from_before_the_first_forward(zero_grad: bool, forwards: int):
    model = network()
    optimizer = wrap(model, inner_steps=2)
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


def test_a_closure_that_makes_the_first_gradients_is_the_first_forward():
    model = network()
    optimizer = wrap(model, inner_steps=1)
    model[1].running_mean.fill_(5.0)
    moved: dict[str, Tensor] = {}

    def closure() -> None:
        backward(model, 0)
        moved.update(statistics(model))

    optimizer.step(closure)
    torch.testing.assert_close(model[1].running_mean, interpolated(torch.full((3,), 5.0), moved[MEAN]))


# -------------------------------------------------------------------------- between two inner loops they are the user's


@pytest.mark.parametrize("run", ["loop", "meta_step"])
@pytest.mark.parametrize("surgery", ["load_state_dict", "in place", "new tensor", "update_bn"])
def test_surgery_between_inner_loops_is_honoured(surgery: str, run: str):
    model = network()
    optimizer = wrap(model, inner_steps=1)
    step(model, optimizer, 0)
    new = torch.tensor([5.0, 6.0, 7.0])
    if surgery == "load_state_dict":
        model.load_state_dict(model.state_dict() | {MEAN: new})
    elif surgery == "in place":
        model[1].running_mean.copy_(new)
    elif surgery == "new tensor":
        model[1].running_mean = new.clone()
    else:
        torch.optim.swa_utils.update_bn([batch(5) + 10.0], model)
    before = statistics(model)
    if run == "loop":
        moved = step(model, optimizer, 1)
    else:
        moved = {}
        optimizer.meta_step(lambda x: (model(x).square().mean(), moved.update(statistics(model)))[0], [batch(1)])
    torch.testing.assert_close(statistics(model)[MEAN], interpolated(before[MEAN], moved[MEAN]))


@pytest.mark.parametrize("order", ["teacher first", "student first"])
def test_a_teacher_by_functional_call_leaves_the_models_buffers_alone(order: str):
    """Whose forward pass moves the teacher's buffers, in training mode, as the module has no others for a while."""
    model = network()
    optimizer = wrap(model)
    teacher = {name: torch.full_like(t, 90) for name, t in model.state_dict().items()}

    def teach() -> None:
        torch.func.functional_call(model, teacher, (batch(7),))

    for ends in (optimizer.rollback, optimizer.interpolate, optimizer.interpolate):
        before = statistics(model)
        optimizer.zero_grad()
        if order == "teacher first":
            teach()
        backward(model, 0)
        if order == "student first":
            teach()
        moved = statistics(model)
        optimizer.step()
        ends()
        expected = before[MEAN] if ends == optimizer.rollback else interpolated(before[MEAN], moved[MEAN])
        torch.testing.assert_close(statistics(model)[MEAN], expected)
    assert teacher["1.num_batches_tracked"] == 93  # it moved


def test_a_checkpoint_from_between_two_inner_loops_is_resumed_in_the_middle_of_one():
    results = []
    for interrupted in (False, True):
        model = network()
        optimizer = wrap(model, inner_steps=2)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        if interrupted:
            step(model, optimizer, 0)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        for seed in (1, 2):
            step(model, optimizer, seed)
        results.append(model.state_dict())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ kinds of models


def test_a_constant_mask_of_infinities_survives():
    model = network()
    model.register_buffer("mask", torch.full((2, 2), -float("inf")).triu(1))
    step(model, wrap(model, inner_steps=1), 0)
    assert torch.equal(model.mask, torch.full((2, 2), -float("inf")).triu(1))


def test_a_buffer_shared_by_two_modules_is_interpolated_once():
    class Counter(nn.Module):
        def __init__(self, shared: Tensor) -> None:
            super().__init__()
            self.register_buffer("total", shared)

        def forward(self, x: Tensor) -> Tensor:
            self.total += 1.0
            return x

    shared = torch.zeros(())
    model = nn.Sequential(Counter(shared), nn.Linear(2, 1), Counter(shared))
    step(model, wrap(model, inner_steps=1), 0)
    assert model[0].total is model[2].total
    assert model[0].total.item() == 0.25 * 2.0


def test_a_buffer_that_the_forward_pass_replaces():
    class Replaces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(2))
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.5 * self.mean + 0.5
            self.seen = torch.cat([self.seen, torch.ones(1)])
            return x

    model = nn.Sequential(Replaces(), nn.Linear(2, 1))
    optimizer = wrap(model)
    for ends in (optimizer.interpolate, optimizer.rollback):
        step(model, optimizer, 0)
        ends()
        assert model[0].mean.tolist() == [0.125, 0.125]
        assert model[0].seen.tolist() == [1.0]  # another shape: the latest value


def test_batch_norm_made_lazily_is_followed_once_it_exists():
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyBatchNorm1d(momentum=0.5), nn.Linear(3, 1))
    optimizer = GradMatch(torch.optim.SGD(model[0].parameters(), lr=0.01), Fish(0.25, inner_steps=1, model=model))
    step(model, optimizer, 0)
    before = model[1].running_mean.clone()
    moved = step(model, optimizer, 1)
    torch.testing.assert_close(model[1].running_mean, interpolated(before, moved[MEAN]))


@pytest.mark.filterwarnings("default")  # what the compiler warns of is not ours
def test_a_compiled_model_gives_the_same_buffers():
    results = []
    for compiled in (False, True):
        model = network()
        optimizer = wrap(model)
        called = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        model.load_state_dict(model.state_dict() | {MEAN: torch.tensor([1.0, 2.0, 3.0])})
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
    model = network()
    optimizer = wrap(model)
    before, moved = statistics(model), {}
    optimizer.register_step_pre_hook(lambda *_: moved.update(statistics(model)))

    def loss_fn(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True).square().mean()

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
    model = network()
    optimizer = wrap(model)
    optimizer.meta_step(lambda x: model(x).square().mean(), [batch(0), batch(1)])
    step(model, optimizer, 2)
    for module in model.modules():
        assert not any(value for name, value in vars(module).items() if "hook" in name)
    assert not any(value for name, value in vars(global_hooks).items() if name.startswith("_global_") and value)
    assert b"torch_gradmatch" not in pickle.dumps(model)
    with pytest.warns(DeprecationWarning, match="script"):
        torch.jit.script(model)


def test_a_copy_of_the_model_is_not_followed_and_one_with_the_optimizer_is():
    model = network()
    optimizer = wrap(model)
    before = statistics(model)
    alone = copy.deepcopy(model)
    other, its_optimizer = copy.deepcopy((model, optimizer))
    step(other, its_optimizer, 0)
    backward(alone, 0)
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)
    its_optimizer.rollback()
    torch.testing.assert_close(statistics(other), before, rtol=0, atol=0)


def test_of_two_optimizers_only_one_may_walk_with_the_buffers_of_a_model():
    model = network()
    first, second = (
        GradMatch(torch.optim.SGD(model[i].parameters(), lr=0.01), Fish(0.25, model=model)) for i in (0, 2)
    )
    step(model, first, 0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"another GradMatch with the same model= .* GradMatch\(\[first, second\]"):
        second.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    first.interpolate()
    step(model, second, 1)
    second.rollback()
    step(model, first, 2)
    del first  # who forgets one in the middle of a loop is not locked out
    step(model, second, 3)
