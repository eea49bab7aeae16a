"""Buffers move in the forward pass: what counts is their value before the first one of an inner loop."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from _models import assert_identical
from torch import Tensor, nn

from torch_gradmatch import Fish, GradMatch, SmoothFish, ops


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 1))


def wrap(model: nn.Module, **settings: Any) -> GradMatch:
    return GradMatch(torch.optim.SGD(model.parameters(), lr=0.01), Fish(0.25, model=model, **settings))


def backward(model: nn.Module, seed: int) -> None:
    model(torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


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


# ------------------------------------------------------------------------- whose a forward pass in training mode is


def interpolated(before: Tensor, after: Tensor) -> Tensor:
    return before + 0.25 * (after - before)


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


# --------------------------------------------------------------------------------------------- once, and all or nothing


@pytest.mark.parametrize("settings", [{}, {"buffers": "latest"}], ids=["interpolate", "latest"])
@pytest.mark.parametrize("first_to_close", [0, 1])
def test_two_optimizers_that_follow_one_model_move_its_buffers_once(first_to_close: int, settings: dict[str, Any]):
    model = network()
    optimizers = [
        GradMatch(torch.optim.SGD(model[i].parameters(), lr=0.01), Fish(0.25, model=model, **settings)) for i in (0, 2)
    ]
    for seed in range(3):
        before = statistics(model)
        for step in range(2):
            backward(model, 10 * seed + step)
            for optimizer in optimizers:
                optimizer.step()
        moved = statistics(model)
        optimizers[first_to_close].interpolate()
        optimizers[1 - first_to_close].interpolate()
        name = "1.running_mean"
        expected = moved[name] if settings else interpolated(before[name], moved[name])
        torch.testing.assert_close(statistics(model)[name], expected)


def test_of_two_optimizers_the_longer_inner_loop_leaves_the_buffers_to_the_shorter_also_when_resumed():
    finals = []
    for resumed in (False, True):
        model = network()
        methods = [Fish(0.25, inner_steps=steps, model=model) for steps in (2, 4)]
        optimizers = [
            GradMatch(torch.optim.SGD(model[i].parameters(), lr=0.01), method)
            for i, method in zip((0, 2), methods, strict=True)
        ]
        expected = statistics(model)["1.running_mean"]
        for step in range(4):
            backward(model, step)
            moved = statistics(model)["1.running_mean"]
            for optimizer in optimizers:
                optimizer.step()
            if step % 2:
                expected = interpolated(expected, moved)
                if step == 1:
                    torch.testing.assert_close(statistics(model)["1.running_mean"], expected)
            if resumed and step == 2:
                saved = copy.deepcopy((model.state_dict(), [o.state_dict() for o in optimizers]))
                model.load_state_dict(saved[0])
                for optimizer, state in zip(optimizers, saved[1], strict=True):
                    optimizer.load_state_dict(state)
        torch.testing.assert_close(statistics(model)["1.running_mean"], expected)
        finals.append(model.state_dict())
    torch.testing.assert_close(finals[1], finals[0], rtol=0, atol=0)


def test_parameters_and_buffers_go_through_one_call(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    interpolate_ = ops.interpolate_
    monkeypatch.setattr(ops, "interpolate_", lambda s, f, w: (calls.append(len(s)), interpolate_(s, f, w)))
    model = network()
    optimizer = wrap(model, inner_steps=1)
    backward(model, 0)
    optimizer.step()
    assert calls == [6 + 2]


def test_an_interpolation_that_fails_leaves_weights_and_buffers_for_another_try(monkeypatch: pytest.MonkeyPatch):
    model = network()
    optimizer = wrap(model)
    before = copy.deepcopy(model.state_dict())
    backward(model, 0)
    optimizer.step()
    fast = copy.deepcopy(model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(ops, "interpolate_", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError):
            optimizer.interpolate()
    torch.testing.assert_close(model.state_dict(), fast, rtol=0, atol=0)
    assert optimizer.inner_step == 1
    optimizer.interpolate()
    for name in ("0.weight", "1.running_mean"):
        torch.testing.assert_close(model.state_dict()[name], interpolated(before[name], fast[name]))


def test_a_failing_meta_step_restores_the_buffers_of_when_it_was_called():
    model = network()
    optimizer = wrap(model)
    backward(model, 0)  # a forward pass with gradients that leads to no step
    before = statistics(model)

    def fails(x: Tensor) -> Tensor:
        model(x)
        raise KeyError("label")

    with pytest.raises(KeyError):
        optimizer.meta_step(fails, [torch.randn(4, 2)])
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


def test_wide_slow_buffers_are_saved_between_inner_loops():
    """A BatchNorm in bf16 whose slow statistics are in fp32: the resumed run is the uninterrupted one, bit for bit."""

    def build() -> tuple[nn.Module, GradMatch]:
        model = network().bfloat16()
        return model, wrap(model, inner_steps=1, meta_dtype=torch.float32)

    def train(model: nn.Module, optimizer: GradMatch, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            x = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed)).bfloat16()
            model(x).square().mean().backward()
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert saved[1]["state"][0]["slow_buffer:1.running_mean"].dtype == torch.float32
    train(model, optimizer, range(3, 6))
    resumed_model, resumed = build()
    resumed_model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(resumed_model, resumed, range(3, 6))
    assert_identical(resumed_model.state_dict(), model.state_dict())
    assert_identical(resumed.state_dict(), optimizer.state_dict())


def test_surgery_on_a_wide_slow_buffer_is_honoured_where_it_happened():
    model = network().bfloat16()
    optimizer = wrap(model, inner_steps=1, meta_dtype=torch.float32)
    for meta_iteration in range(3):
        model(torch.randn(8, 2).bfloat16()).square().mean().backward()
        moved = statistics(model)["1.running_mean"].float()
        optimizer.step()
        if meta_iteration == 1:
            slow = optimizer.state_dict()["state"][0]["slow_buffer:1.running_mean"].clone()
            assert not torch.equal(slow, slow.bfloat16().float())
            model[1].running_mean[1] = slow[1] = 3.0
    now = optimizer.state_dict()["state"][0]["slow_buffer:1.running_mean"]
    torch.testing.assert_close(now, interpolated(slow, moved), rtol=1e-6, atol=0.0)


def test_another_model_is_refused():
    model, other = network(), network()
    with pytest.raises(ValueError, match=r"model should hold the parameters .*Sequential has none of them"):
        GradMatch(torch.optim.SGD(model.parameters(), lr=0.01), Fish(model=other))
    with pytest.raises(ValueError, match="Is it another one, or a copy"):
        GradMatch(torch.optim.SGD(model.parameters(), lr=0.01), Fish(model=copy.deepcopy(model)))


# --------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_a_range_that_begins_at_infinity_takes_its_latest_value(nonfinite: str):
    """As an observer's for quantization: there is no way half between infinity and a number."""

    class Observer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("largest", torch.tensor(-float("inf")))

        def forward(self, x: Tensor) -> Tensor:
            self.largest.copy_(torch.maximum(self.largest, x.detach().max()))
            return x

    model = nn.Sequential(Observer(), nn.Linear(2, 1))
    optimizer = wrap(model, inner_steps=1, nonfinite=nonfinite)
    model(torch.tensor([[1.0, 4.0]])).sum().backward()
    optimizer.step()
    assert model[0].largest.item() == 4.0


def test_a_buffer_that_becomes_nan_is_named():
    model = network()
    optimizer = wrap(model)
    before = copy.deepcopy(model.state_dict())
    backward(model, 0)
    optimizer.step()
    model[1].running_var[0] = float("nan")
    with pytest.raises(RuntimeError, match=r"the buffer '1.running_var' holds NaN or infinity.*call rollback\(\)"):
        optimizer.interpolate()
    optimizer.rollback()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


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
