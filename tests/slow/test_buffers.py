"""Buffers move in the forward pass: what counts is their value before the first one of an inner loop."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from _buffers import backward, network, statistics, wrap
from torch import Tensor, nn

from torch_gradmatch import Fish, GradMatch


@pytest.mark.parametrize("forwards", [1, 3], ids=["one forward", "gradient accumulation"])
def test_the_slow_buffers_are_from_before_the_first_forward(forwards: int):
    model = network()
    optimizer = wrap(model, inner_steps=2)
    before = statistics(model)
    for step in range(2):
        for i in range(forwards):
            backward(model, 10 * step + i)
        if step == 1:
            after = statistics(model)
        optimizer.step()
    for name in ("1.running_mean", "1.running_var"):
        expected = before[name] + 0.25 * (after[name] - before[name])
        torch.testing.assert_close(statistics(model)[name], expected)
    assert model[1].num_batches_tracked == 2 * forwards  # an integer buffer takes the latest value


def test_latest_keeps_what_the_inner_loop_left():
    model = network()
    optimizer = wrap(model, inner_steps=1, buffers="latest")
    backward(model, 0)
    after = statistics(model)
    optimizer.step()
    torch.testing.assert_close(statistics(model), after, rtol=0, atol=0)


@pytest.mark.parametrize("buffers", ["interpolate", "latest"])
def test_rollback_restores_every_buffer_even_before_a_step(buffers: str):
    model = network()
    optimizer = wrap(model, buffers=buffers)
    before = statistics(model)
    for steps in (0, 1, 3):
        for i in range(steps):
            backward(model, i)
            optimizer.step()
        backward(model, 9)
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
        optimizer.rollback()
        torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("surgery", ["load_state_dict", "in place", "new tensor"])
def test_surgery_between_inner_loops_is_honoured(surgery: str):
    model = network()
    optimizer = wrap(model, inner_steps=1)
    backward(model, 0)
    optimizer.step()
    new = torch.tensor([5.0, 6.0, 7.0])
    if surgery == "load_state_dict":
        model.load_state_dict(model.state_dict() | {"1.running_mean": new})
    elif surgery == "in place":
        model[1].running_mean.copy_(new)
    else:
        model[1].running_mean = new.clone()
    backward(model, 1)
    moved = model[1].running_mean.clone()
    optimizer.step()
    torch.testing.assert_close(model[1].running_mean, new + 0.25 * (moved - new))


def test_a_module_in_evaluation_mode_keeps_what_the_user_put_there():
    model = network()
    optimizer = wrap(model, inner_steps=1)
    model[1].eval()
    model[1].running_mean.fill_(5.0)
    backward(model, 0)
    optimizer.step()
    assert model[1].running_mean.tolist() == [5.0, 5.0, 5.0]


def test_validation_between_steps_moves_nothing():
    model = network()
    optimizer = wrap(model, inner_steps=2)
    for step in range(2):
        model.eval()
        with torch.no_grad():
            model(torch.randn(4, 2))
        model.train()
        if step == 0:
            before = statistics(model)
        backward(model, step)
        after = statistics(model)
        optimizer.step()
    expected = before["1.running_mean"] + 0.25 * (after["1.running_mean"] - before["1.running_mean"])
    torch.testing.assert_close(model[1].running_mean, expected)


def test_a_constant_mask_of_infinities_survives():
    model = network()
    model.register_buffer("mask", torch.full((2, 2), -float("inf")).triu(1))
    optimizer = wrap(model, inner_steps=1)
    backward(model, 0)
    optimizer.step()
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
    optimizer = wrap(model, inner_steps=1)
    backward(model, 0)
    optimizer.step()
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
    backward(model, 0)
    optimizer.step()
    optimizer.interpolate()
    assert model[0].mean.tolist() == [0.125, 0.125]
    assert model[0].seen.tolist() == [1.0]  # another shape: the latest value
    backward(model, 1)
    optimizer.step()
    optimizer.rollback()
    assert model[0].mean.tolist() == [0.125, 0.125]
    assert model[0].seen.tolist() == [1.0]


def test_meta_dtype_keeps_buffers_moving_in_low_precision():
    def run(meta_dtype: torch.dtype | None) -> float:
        model = nn.Module()
        model.register_buffer("level", torch.ones((), dtype=torch.bfloat16))
        model.weight = nn.Parameter(torch.zeros(1))

        def forward(_: Tensor) -> Tensor:
            model.level += 0.0625
            return model.weight

        model.forward = forward
        optimizer = wrap(model, inner_steps=1, meta_dtype=meta_dtype)
        optimizer.method.meta_lr = 0.01
        for _ in range(200):
            backward(model, 0)
            optimizer.step()
        return model.level.item()

    assert run(None) == 1.0
    assert run(torch.float32) == pytest.approx(1.0 + 200 * 0.01 * 0.0625, abs=0.02)


def test_a_call_of_a_submodule_or_wrapper_is_seen():
    model = network()
    optimizer = wrap(model, inner_steps=1)
    before = statistics(model)
    model[1](torch.randn(4, 3)).sum().backward()
    optimizer.rollback()
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_functional_call_is_left_alone(transform: str):
    """Inside torch.func the module holds somebody else's buffers."""
    model = network()
    optimizer = wrap(model, inner_steps=1)
    buffers = statistics(model)
    x = torch.randn(3, 8, 2)

    def loss(weights: dict[str, Tensor], held: dict[str, Tensor], batch: Tensor) -> Tensor:
        return torch.func.functional_call(model, (weights, held), (batch,)).square().mean()

    weights = {name: p.detach() for name, p in model.named_parameters()}
    if transform == "grad":
        torch.func.grad(loss)(weights, {k: v.clone() for k, v in buffers.items()}, x[0])
    else:
        many = {k: torch.stack([v] * 3) for k, v in buffers.items()}
        torch.func.vmap(loss, in_dims=(None, 0, 0))(weights, many, x)
    torch.testing.assert_close(statistics(model), buffers, rtol=0, atol=0)
    backward(model, 0)
    optimizer.rollback()
    torch.testing.assert_close(statistics(model), buffers, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
@pytest.mark.filterwarnings("default")  # what the compiler warns of is not ours
def test_a_compiled_model_gives_the_same_buffers(how: str):
    """The hooks leave no trace in the graph; loading a checkpoint after wrapping is still honoured."""
    results = []
    for compiled in (False, True):
        model = network()
        optimizer = wrap(model, inner_steps=2)
        model.load_state_dict(model.state_dict() | {"1.running_mean": torch.tensor([1.0, 2.0, 3.0])})
        called = model
        if compiled and how == "torch.compile":
            called = torch.compile(model, backend="eager", fullgraph=True)
        elif compiled:
            model.compile(backend="eager", fullgraph=True)
        for seed in range(5):
            optimizer.zero_grad()
            backward(called, seed)
            optimizer.step()
        optimizer.rollback()
        results.append(statistics(model) | dict(model.named_parameters()))
    torch.testing.assert_close(results[1], results[0])


def test_batch_norm_made_lazily_is_followed_once_it_exists():
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyBatchNorm1d(momentum=0.5), nn.Linear(3, 1))
    optimizer = GradMatch(torch.optim.SGD(model[0].parameters(), lr=0.01), Fish(0.25, inner_steps=1, model=model))
    backward(model, 0)
    optimizer.step()
    before = model[1].running_mean.clone()
    backward(model, 1)
    moved = model[1].running_mean.clone()
    optimizer.step()
    torch.testing.assert_close(model[1].running_mean, before + 0.25 * (moved - before))


def test_hooks_go_when_the_optimizer_goes():
    model = network()
    optimizer = wrap(model)
    assert any(module._forward_pre_hooks for module in model.modules())
    del optimizer
    gc.collect()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not model._load_state_dict_post_hooks


def test_copies_of_copies_do_not_gather_hooks():
    model = network()
    optimizer = wrap(model)
    for _ in range(3):
        model, optimizer = copy.deepcopy((model, optimizer))
    assert len(model[1]._forward_pre_hooks) == 1
    assert len(model._load_state_dict_post_hooks) == 1
    before = statistics(model)
    backward(model, 0)
    optimizer.rollback()
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


def test_two_optimizers_may_follow_one_model():
    model = network()
    first = GradMatch(torch.optim.SGD(model[0].parameters(), lr=0.01), Fish(0.25, model=model))
    second = GradMatch(torch.optim.SGD(model[2].parameters(), lr=0.01), Fish(0.25, model=model, buffers="latest"))
    before = statistics(model)
    backward(model, 0)
    moved = statistics(model)
    first.step()
    second.step()
    second.interpolate()
    torch.testing.assert_close(statistics(model), moved)
    first.rollback()
    torch.testing.assert_close(statistics(model), before)


def test_an_aborted_meta_step_restores_the_buffers():
    model = network()
    optimizer = wrap(model)
    before = statistics(model)

    def interrupted(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        if x[0, 0] > 0:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.meta_step(interrupted, [-torch.ones(4, 2), torch.ones(4, 2)])
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)
    assert optimizer.inner_step == 0


def test_what_validation_moves_by_hand_is_the_users():
    """An evaluation-mode forward pass does not begin an inner loop, so what follows it is still surgery."""
    model = network()
    optimizer = wrap(model, inner_steps=1)
    model.eval()
    model(torch.randn(4, 2))
    model[1].running_mean.fill_(5.0)
    model.train()
    backward(model, 0)
    moved = model[1].running_mean.clone()
    optimizer.step()
    torch.testing.assert_close(model[1].running_mean, 5.0 + 0.25 * (moved - 5.0))


def test_our_hook_runs_before_the_users_own():
    model = network()

    def shift(module: nn.Module, _: Any) -> None:
        module.running_mean.add_(1.0)

    model[1].register_forward_pre_hook(shift)
    optimizer = wrap(model)
    before = statistics(model)
    backward(model, 0)
    optimizer.rollback()
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


def test_rollback_between_inner_loops_undoes_no_surgery():
    model = network()
    optimizer = wrap(model, inner_steps=1)
    backward(model, 0)
    optimizer.step()
    model[1].running_mean.fill_(5.0)
    optimizer.rollback()
    assert model[1].running_mean.tolist() == [5.0, 5.0, 5.0]


@pytest.mark.filterwarnings("default")
def test_meta_step_of_a_compiled_model_honours_any_surgery():
    results = []
    for compiled in (False, True):
        model = network()
        optimizer = wrap(model)
        called = torch.compile(model, backend="eager") if compiled else model
        for _ in range(2):
            model[1].running_mean.fill_(5.0)
            batches = list(torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0)))
            optimizer.meta_step(lambda x, m=called: m(x).square().mean(), batches)
        results.append(statistics(model))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.filterwarnings("default")
def test_a_compiled_model_goes_back_to_a_checkpoint_between_inner_loops():
    """Taken between two inner loops, loaded in the middle of one: what the model holds then is what counts."""
    results = []
    for compiled in (False, True):
        model = network()
        optimizer = wrap(model, inner_steps=2)
        called = torch.compile(model, backend="eager") if compiled else model
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        backward(model, 0)  # not compiled: the hook copies the buffers
        optimizer.step()
        model.load_state_dict(saved[0] | {"1.running_mean": torch.tensor([1.0, 2.0, 3.0])})
        optimizer.load_state_dict(saved[1])
        for seed in (1, 2):
            backward(called, seed)
            optimizer.step()
        results.append(statistics(model))
    torch.testing.assert_close(results[1], results[0])
