"""GradMatch as a torch.optim.Optimizer: shared groups, hooks, schedulers, scaler, closures, edge table."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from _feature_training import batches, feature_net, snapshot, through_file, train
from _models import assert_identical, loss_of
from _wrapped import CountsInDefaults
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, lr_scheduler

from torch_gradmatch import Fish, GradMatch

# ------------------------------------------------------------------------------------------ a real, shared optimizer


def test_is_an_optimizer_with_the_wrapped_groups_and_defaults():
    model = nn.Linear(2, 2)
    wrapped = Adam(model.parameters(), lr=0.3)
    optimizer = GradMatch(wrapped)
    assert isinstance(optimizer, Optimizer)
    assert isinstance(optimizer.method, Fish)
    assert optimizer.param_groups is wrapped.param_groups
    assert optimizer.defaults is wrapped.defaults
    assert len(wrapped.param_groups) == 1
    optimizer.param_groups[0]["lr"] = 0.7
    assert wrapped.param_groups[0]["lr"] == 0.7


@pytest.mark.parametrize("loaded", ["wrapper", "wrapped"])
def test_groups_are_still_shared_after_load_state_dict(loaded: str):
    model = nn.Linear(2, 2)
    wrapped = Adam(model.parameters())
    optimizer = GradMatch(wrapped)
    target = optimizer if loaded == "wrapper" else wrapped
    state = target.state_dict()
    state["param_groups"][0]["lr"] = 0.25
    target.load_state_dict(state)
    assert optimizer.param_groups is wrapped.param_groups
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["params"][0] is model.weight


def test_assigning_groups_assigns_the_wrapped_optimizers():
    optimizer = GradMatch(SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    groups = [dict(optimizer.param_groups[0], lr=5.0)]
    optimizer.param_groups = groups
    assert optimizer.optimizer.param_groups is groups


@pytest.mark.parametrize("meta_dtype", [None, torch.float64])
def test_the_state_is_the_wrapped_optimizers_and_nothing_of_ours_is_in_it(meta_dtype: torch.dtype | None):
    model = feature_net()
    plain, wrapped = Adam(model.parameters()), Adam(model.parameters())
    method = Fish(0.5, inner_steps=3, model=model, track_alignment=True, meta_dtype=meta_dtype)
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
    optimizer = GradMatch(SGD([nn.Parameter(torch.zeros(1))], lr=1.0), Fish(0.5))
    for name, value in (("method", Fish(1.0)), ("optimizer", SGD([nn.Parameter(torch.zeros(1))], lr=1.0))):
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
        GradMatch(SGD([nn.Parameter(torch.ones(1))], lr=0.1)).train()


def test_add_param_group_reaches_the_wrapped_optimizer_and_its_defaults():
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    wrapped = SGD([first], lr=0.5, momentum=0.9)
    optimizer = GradMatch(wrapped, Fish(1.0, inner_steps=2))
    first.grad = torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [second]})
    assert wrapped.param_groups[1]["momentum"] == 0.9
    second.grad = torch.ones(3)
    optimizer.step()
    assert second.tolist() == [-0.5] * 3


def test_zero_grad_passes_on_set_to_none():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = GradMatch(SGD([parameter], lr=1.0))
    parameter.grad = torch.ones(2)
    optimizer.zero_grad(set_to_none=False)
    assert parameter.grad.tolist() == [0.0, 0.0]
    optimizer.zero_grad()
    assert parameter.grad is None


def test_hooks_of_both_fire_once_per_step():
    parameter = nn.Parameter(torch.zeros(1))
    wrapped = SGD([parameter], lr=1.0)
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=2))
    calls: list[tuple[str, float]] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(("before", parameter.item())))
    optimizer.register_step_post_hook(lambda *_: calls.append(("after", parameter.item())))
    wrapped.register_step_post_hook(lambda *_: calls.append(("wrapped", parameter.item())))
    parameter.grad = torch.ones(1)
    optimizer.step()
    optimizer.step()
    assert calls == [
        ("before", 0.0), ("wrapped", -1.0), ("after", -1.0),
        ("before", -1.0), ("wrapped", -2.0), ("after", -1.0),
    ]  # fmt: skip


def test_state_dict_hooks_fire():
    optimizer = GradMatch(SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: dict(state, note=1))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "note"})
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load"))
    state = optimizer.state_dict()
    assert state["note"] == 1
    optimizer.load_state_dict(state)
    assert calls == ["save", "load"]


def test_wrapping_the_wrong_thing_is_refused():
    parameter = nn.Parameter(torch.zeros(1))
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, already built \(got the class SGD\)"):
        GradMatch(SGD)
    with pytest.raises(TypeError, match=r"optimizer\[0\] should be a torch.optim.Optimizer.* \(got Parameter\)"):
        GradMatch([parameter])
    with pytest.raises(TypeError, match="already"):
        GradMatch(GradMatch(SGD([parameter], lr=1.0)))
    with pytest.raises(TypeError, match="got the class Fish"):
        GradMatch(SGD([parameter], lr=1.0), Fish)


def test_repr_shows_the_wrapped_optimizer_and_the_method():
    text = repr(GradMatch(SGD([nn.Parameter(torch.zeros(1))], lr=0.125), Fish(0.25)))
    assert "SGD" in text
    assert "0.125" in text
    assert "meta_lr=0.25" in text


# ----------------------------------------------------------------------------------------- schedulers, scaler, closures

SCHEDULERS: dict[str, Any] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 2), lr_scheduler.LinearLR(o)]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
}


def test_table_holds_every_scheduler_of_torch():
    classes = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert classes - {"LRScheduler"} == set(SCHEDULERS)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_drives_the_wrapped_optimizer(name: str):
    """The learning rates (and momenta) of a plain optimizer under the same scheduler, across resets."""
    histories = []
    for wrap in (False, True):
        model = nn.Linear(2, 1)
        optimizer: Optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        if wrap:
            optimizer = GradMatch(optimizer, Fish(0.5, inner_steps=3, inner_state="reset"))
        scheduler = SCHEDULERS[name](optimizer)
        history = []
        for _ in range(8):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            group = optimizer.param_groups[0]
            history.append((group["lr"], group["momentum"]))
        histories.append(history)
    assert histories[0] == histories[1]
    assert len(set(histories[0])) > 1


def test_a_scheduler_may_hold_the_wrapped_optimizer_instead():
    model = nn.Linear(2, 1)
    wrapped = SGD(model.parameters(), lr=1.0)
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=2))
    scheduler = lr_scheduler.StepLR(wrapped, 1, gamma=0.5)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_closure_result_is_returned():
    parameter = nn.Parameter(torch.tensor([3.0]))
    optimizer = GradMatch(SGD([parameter], lr=0.5), Fish(1.0, inner_steps=1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert isinstance(loss, Tensor)
    assert loss.item() == 9.0
    assert parameter.item() == 0.0


def test_a_closure_that_a_grad_scaler_passes_on_is_refused_and_not_dropped():
    parameter = nn.Parameter(torch.ones(1))
    optimizer = GradMatch(SGD([parameter], lr=0.5), Fish(1.0))
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
    parameter = nn.Parameter(torch.ones(2))
    optimizer = GradMatch(SGD([parameter], lr=0.5), Fish(0.5, inner_steps=1, meta_dtype=torch.float64))
    with torch.inference_mode():
        optimizer.state_dict()
        optimizer.zero_grad()
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert parameter.tolist() == [0.75, 0.75]


# --------------------------------------------------------------------------------------------------------- edge table


def test_interpolate_without_an_inner_step_says_what_to_call():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = GradMatch(SGD([parameter], lr=1.0))
    with pytest.raises(RuntimeError, match=r"call step\(\) first"):
        optimizer.interpolate()
    parameter.grad = torch.ones(1)
    optimizer.step()
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


@pytest.mark.parametrize("when", ["before", "half way"])
def test_a_step_that_raises_can_be_rolled_back_exactly(when: str):
    """Some parameters moved, then the step failed: the state stays loadable and rollback restores everything."""
    model = feature_net()

    class Failing(SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if not self.fails:
                return super().step(closure)
            if when == "half way":
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(1.0)
            raise MemoryError("half way")

    wrapped = Failing(model.parameters(), lr=0.1)
    optimizer = GradMatch(wrapped, Fish(0.5, model=model))
    start = copy.deepcopy(model.state_dict())
    for steps in (0, 2):
        train(model, optimizer, batches(steps))
        wrapped.fails = True
        with pytest.raises(MemoryError):
            train(model, optimizer, batches(1))
        wrapped.fails = False
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
    parameter = nn.Parameter(torch.ones(2))
    optimizer = GradMatch(Adam([parameter], lr=0.1), Fish(0.5))
    parameter.grad = torch.tensor([1.0, float("nan")])
    optimizer.step()
    with pytest.warns(RuntimeWarning, match="held NaN or infinity"):
        optimizer.rollback()
    assert parameter.tolist() == [1.0, 1.0]
    parameter.grad = torch.ones(2)
    optimizer.step()
    optimizer.interpolate()
    assert parameter.isfinite().all()


def test_rollback_keeps_a_healthy_inner_state():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = GradMatch(Adam([parameter], lr=0.1), Fish(0.5))
    parameter.grad = torch.ones(2)
    optimizer.step()
    optimizer.rollback()
    assert optimizer.optimizer.state[parameter]["step"] == 1


def test_nonfinite_ignore_does_not_look():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = GradMatch(SGD([parameter], lr=1.0), Fish(0.5, inner_steps=1, nonfinite="ignore"))
    parameter.grad = torch.tensor([float("nan")])
    optimizer.step()
    assert parameter.isnan().all()


def test_sums_that_overflow_are_not_mistaken_for_divergence():
    parameter = nn.Parameter(torch.full((4,), 3e38))
    optimizer = GradMatch(SGD([parameter], lr=1.0), Fish(0.5, inner_steps=1))
    parameter.grad = torch.zeros(4)
    optimizer.step()
    assert parameter.isfinite().all()


def test_the_graph_of_an_interpolated_parameter_is_stale():
    """Backward through a graph built before an interpolation raises instead of giving wrong gradients."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = GradMatch(SGD([parameter], lr=0.0), Fish(0.5, inner_steps=1))
    loss = parameter.square().sum()
    parameter.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
