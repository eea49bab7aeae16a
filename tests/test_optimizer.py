"""GradMatch as a torch.optim.Optimizer: shared groups, hooks, schedulers, scaler, closures, edge table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _feature_training import batches, feature_net, snapshot, through_file, train
from _models import assert_identical, loss_of
from _wrapped import CountsInDefaults
from torch import nn
from torch.optim import SGD, Adam, Optimizer, lr_scheduler

from torch_gradmatch import Fish, GradMatch


def sgd(start: Any = (0.0,), lr: float = 1.0) -> SGD:
    return SGD([nn.Parameter(torch.tensor(start))], lr=lr)


def step(optimizer: GradMatch[Any], *gradients: float) -> nn.Parameter:
    """Take a step on a gradient, by element or the same for all; return the first parameter."""
    parameter: nn.Parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.tensor(gradients).expand_as(parameter).clone()
    optimizer.step()
    return parameter


# ------------------------------------------------------------------------------------------ a real, shared optimizer


def test_is_an_optimizer_with_the_wrapped_groups_and_defaults():
    wrapped = Adam(nn.Linear(2, 2).parameters(), lr=0.3)
    optimizer = GradMatch(wrapped)
    assert isinstance(optimizer, Optimizer)
    assert isinstance(optimizer.method, Fish)
    assert optimizer.param_groups is wrapped.param_groups
    assert optimizer.defaults is wrapped.defaults
    assert len(wrapped.param_groups) == 1
    groups = [dict(optimizer.param_groups[0], lr=5.0)]
    optimizer.param_groups = groups
    assert wrapped.param_groups is groups


def test_groups_are_still_shared_after_the_wrapped_optimizer_has_loaded_a_state_dict():
    model = nn.Linear(2, 2)
    wrapped = Adam(model.parameters())
    optimizer = GradMatch(wrapped)
    state = wrapped.state_dict()
    state["param_groups"][0]["lr"] = 0.25
    wrapped.load_state_dict(state)
    assert optimizer.param_groups is wrapped.param_groups
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["params"][0] is model.weight


def test_the_state_is_the_wrapped_optimizers_and_nothing_of_ours_is_in_it():
    model = feature_net()
    plain, wrapped = Adam(model.parameters()), Adam(model.parameters())
    method = Fish(0.5, inner_steps=3, model=model, track_alignment=True, meta_dtype=torch.float64)
    optimizer = GradMatch(wrapped, method)
    train(model, plain, batches(4))
    train(model, optimizer, batches(4))
    assert optimizer.state is wrapped.state
    assert wrapped.state_dict().keys() == plain.state_dict().keys()
    assert {p: set(entry) for p, entry in wrapped.state.items()} == {p: set(e) for p, e in plain.state.items()}
    assert [set(group) for group in wrapped.param_groups] == [set(group) for group in plain.param_groups]
    optimizer.state = {}
    assert wrapped.state == {}


def test_neither_the_method_nor_the_optimizer_can_be_replaced():
    optimizer = GradMatch(sgd(), Fish(0.5))
    for name, value in (("method", Fish(1.0)), ("optimizer", sgd())):
        with pytest.raises(AttributeError, match=f"{name} cannot be replaced: change a setting, optimizer.method"):
            setattr(optimizer, name, value)
    assert optimizer.method.meta_lr == 0.5


def test_methods_of_the_wrapped_optimizer_can_be_called_and_nothing_else():
    wrapped = CountsInDefaults([nn.Parameter(torch.ones(1))])
    optimizer = GradMatch(wrapped)
    optimizer.train()
    assert wrapped.param_groups[0]["train_mode"]
    for name in ("nothing", "_numel", "counters", "eval"):
        assert not hasattr(optimizer, name)
    with pytest.raises(AttributeError, match="'GradMatch' object has no attribute 'train'"):
        GradMatch(sgd()).train()


def test_hooks_of_both_fire_once_per_step():
    wrapped = sgd()
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=2))
    (parameter,) = wrapped.param_groups[0]["params"]
    calls: list[tuple[str, float]] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(("before", parameter.item())))
    optimizer.register_step_post_hook(lambda *_: calls.append(("after", parameter.item())))
    wrapped.register_step_post_hook(lambda *_: calls.append(("wrapped", parameter.item())))
    for _ in range(2):
        step(optimizer, 1.0)
    assert calls == [
        ("before", 0.0), ("wrapped", -1.0), ("after", -1.0),
        ("before", -1.0), ("wrapped", -2.0), ("after", -1.0),
    ]  # fmt: skip


def test_state_dict_hooks_fire():
    optimizer = GradMatch(sgd())
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: dict(state, note=1))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "note"})
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load"))
    state = optimizer.state_dict()
    assert state["note"] == 1
    optimizer.load_state_dict(state)
    assert calls == ["save", "load"]


@pytest.mark.parametrize(
    ("wrapped", "message"),
    [
        ((SGD,), r"torch\.optim\.Optimizer, already built \(got the class SGD\)"),
        (([nn.Parameter(torch.zeros(1))],), r"optimizer\[0\] should be a torch.optim.Optimizer.* \(got Parameter\)"),
        ((GradMatch(sgd()),), "already: wrap plain optimizers once"),
        (([GradMatch(sgd())],), "already: wrap plain optimizers once"),
        ((sgd(), Fish), "got the class Fish"),
    ],
    ids=["class", "no optimizer", "twice", "twice in a list", "class of a method"],
)
def test_wrapping_the_wrong_thing_is_refused(wrapped: tuple[Any, ...], message: str):
    with pytest.raises(TypeError, match=message):
        GradMatch(*wrapped)


# ----------------------------------------------------------------------------------------- schedulers, scaler, closures

# Of torch's all that differ in what they ask of an optimizer: its defaults, momentum, or others of its schedulers.
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 2), lr_scheduler.LinearLR(o)]),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step))], milestones=[3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_the_wrapped_optimizer(name: str):
    """The learning rates (and momenta) of a plain optimizer under the same scheduler, across resets."""
    histories: list[list[tuple[float, float]]] = [[], []]
    for history in histories:
        optimizer: Any = SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        if history is histories[1]:
            optimizer = GradMatch(optimizer, Fish(0.5, inner_steps=3, inner_state="reset"))
        scheduler = SCHEDULERS[name](optimizer)
        for _ in range(8):
            step(optimizer, 1.0)
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            history.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
    assert histories[0] == histories[1]
    assert len(set(histories[0])) > 1


def test_a_closure_that_a_grad_scaler_passes_on_is_refused_and_not_dropped():
    optimizer = GradMatch(sgd((1.0,)), Fish(1.0))
    (parameter,) = optimizer.param_groups[0]["params"]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter.sum()).backward()
    with pytest.raises(RuntimeError, match=r"call scaler.step\(optimizer\) without one"):
        scaler.step(optimizer, lambda: parameter.sum())
    assert parameter.item() == 1.0
    assert optimizer.inner_step == 0


def test_a_step_of_no_length_on_gradients_of_zero_counts():
    """Which is what torch.distributed.checkpoint does before it loads, by step(closure=None)."""
    parameter = nn.Parameter(torch.ones(1))
    optimizer = GradMatch(Adam([parameter], lr=0.0), Fish(0.5, inner_steps=3))
    parameter.grad = torch.zeros(1)
    optimizer.step(closure=None)
    assert optimizer.inner_step == 0
    optimizer.optimizer.state.clear()
    optimizer.step()
    assert optimizer.inner_step == 1


def test_saving_in_inference_mode_before_the_first_step_is_in_nobodys_way():
    optimizer = GradMatch(sgd((1.0, 1.0), lr=0.5), Fish(0.5, inner_steps=1, meta_dtype=torch.float64))
    with torch.inference_mode():
        optimizer.state_dict()
        optimizer.zero_grad()
    assert step(optimizer, 1.0).tolist() == [0.75, 0.75]


# --------------------------------------------------------------------------------------------------------- edge table


def test_interpolate_without_an_inner_step_says_what_to_call():
    optimizer = GradMatch(sgd())
    with pytest.raises(RuntimeError, match=r"call step\(\) first"):
        optimizer.interpolate()
    parameter = step(optimizer, 1.0)
    optimizer.interpolate()
    with pytest.raises(RuntimeError, match=r"call step\(\) first"):
        optimizer.interpolate()
    assert parameter.item() == -0.5


def test_meta_step_in_the_middle_of_a_manual_loop_says_what_to_call():
    model = feature_net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1))
    train(model, optimizer, batches(1))
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"interpolate\(\) or rollback\(\)"):
        optimizer.meta_step(lambda b: loss_of(model, b), batches(3))
    assert_identical(snapshot(model, optimizer), before)


def test_other_than_inner_steps_batches_are_refused():
    model = feature_net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fish(0.5, inner_steps=3))
    with pytest.raises(ValueError, match=r"2 batches but Fish\(inner_steps=3\)"):
        optimizer.meta_step(lambda b: loss_of(model, b), batches(2))
    optimizer.meta_step(lambda b: loss_of(model, b), iter(batches(3)))


class FailsHalfWay(SGD):
    fails = False

    def step(self, closure: Any = None) -> Any:
        if not self.fails:
            return super().step(closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1.0)
        raise MemoryError("half way")


def test_a_step_that_raises_can_be_rolled_back_exactly():
    """Some parameters moved, then the step failed: the state stays loadable and rollback restores everything."""
    model = feature_net()
    wrapped = FailsHalfWay(model.parameters(), lr=0.1)
    optimizer = GradMatch(wrapped, Fish(0.5, model=model))
    start = copy.deepcopy(model.state_dict())
    for steps in (0, 2):
        wrapped.fails = False
        train(model, optimizer, batches(steps))
        wrapped.fails = True
        with pytest.raises(MemoryError):
            train(model, optimizer, batches(1))
        assert optimizer.inner_step == steps
        optimizer.load_state_dict(through_file(optimizer.state_dict()))
        optimizer.rollback()
        assert_identical(model.state_dict(), start)
        assert optimizer.inner_step == 0


def test_a_diverged_inner_loop_is_refused_and_recovers():
    model = feature_net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fish(0.5, inner_steps=2, model=model))
    start = copy.deepcopy(model.state_dict())
    data = batches(2)
    train(model, optimizer, data[:1])
    optimizer.param_groups[0]["lr"] = float("inf")
    with pytest.raises(RuntimeError, match=r"after 2 inner steps .* number 2 of shape \(6, 4\)\..* call rollback\(\)"):
        train(model, optimizer, data[1:])
    with pytest.raises(RuntimeError, match="all 2 inner steps were taken"):
        optimizer.step()
    optimizer.rollback()
    assert_identical(model.state_dict(), start)
    optimizer.param_groups[0]["lr"] = 0.1
    train(model, optimizer, data)
    assert optimizer.inner_step == 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_diverged_parameter_is_named_where_names_are_known():
    model = nn.Linear(2, 1)
    optimizer = GradMatch(SGD(model.named_parameters(), lr=0.1), Fish(0.5, inner_steps=1))
    model.bias.grad = torch.tensor([float("nan")])
    with pytest.raises(RuntimeError, match=r"1 parameters hold NaN or infinity, the first is 'bias' of shape \(1,\)"):
        optimizer.step()


def test_rollback_resets_an_inner_state_that_no_step_could_recover_from():
    optimizer = GradMatch(Adam([nn.Parameter(torch.ones(2))], lr=0.1), Fish(0.5))
    parameter = step(optimizer, 1.0, float("nan"))
    with pytest.warns(RuntimeWarning, match="held NaN or infinity"):
        optimizer.rollback()
    assert parameter.tolist() == [1.0, 1.0]
    step(optimizer, 1.0)
    optimizer.interpolate()
    assert parameter.isfinite().all()


def test_nonfinite_ignore_does_not_look():
    optimizer = GradMatch(sgd(), Fish(0.5, inner_steps=1, nonfinite="ignore"))
    assert step(optimizer, float("nan")).isnan().all()


def test_sums_that_overflow_are_not_mistaken_for_divergence():
    optimizer = GradMatch(sgd([3e38] * 4), Fish(0.5, inner_steps=1))
    assert step(optimizer, 0.0).isfinite().all()


def test_the_graph_of_an_interpolated_parameter_is_stale():
    """Backward through a graph built before an interpolation raises instead of giving wrong gradients."""
    optimizer = GradMatch(sgd((1.0, 1.0), lr=0.0), Fish(0.5, inner_steps=1))
    loss = optimizer.param_groups[0]["params"][0].square().sum()
    step(optimizer, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
