"""GradMatch as a torch.optim.Optimizer: shared groups, hooks, schedulers, scaler, copies, checkpoints, edge table."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import pytorch_optimizer
import torch
from _layout import numbers_of, with_numbers
from _models import FeatureNet, assert_identical, loss_of, make_batches
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, lr_scheduler

from torch_gradmatch import Fish, GradMatch, SmoothFish
from torch_gradmatch.wrapped.several import SeveralOptimizers


def feature_net(seed: int = 0) -> FeatureNet:
    return FeatureNet(torch.Generator().manual_seed(seed))


def batches(count: int, seed: int = 1) -> list[tuple[Any, ...]]:
    return make_batches(torch.Generator().manual_seed(seed), count)


def train(model: nn.Module, optimizer: Optimizer, steps: list[tuple[Any, ...]]) -> None:
    for batch in steps:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def snapshot(model: nn.Module, optimizer: GradMatch) -> Any:
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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


def test_nothing_is_written_into_the_wrapped_state():
    model = feature_net()
    plain, wrapped = Adam(model.parameters()), Adam(model.parameters())
    optimizer = GradMatch(
        wrapped, Fish(0.5, inner_steps=3, model=model, track_alignment=True, meta_dtype=torch.float64)
    )
    train(model, plain, batches(4))
    train(model, optimizer, batches(4))
    for parameter, entry in wrapped.state.items():
        assert set(entry) == set(plain.state[parameter])
    assert optimizer.state[model.out.weight]["slow"].shape == model.out.weight.shape
    assert model.frozen.weight not in optimizer.state  # a frozen parameter costs no slow copy


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
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer .*got the class SGD"):
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


@pytest.mark.parametrize("inner_state", ["carry", "reset"])
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_drives_the_wrapped_optimizer(name: str, inner_state: str):
    """The learning rates (and momenta) of a plain optimizer under the same scheduler, also across resets."""
    histories = []
    for wrap in (False, True):
        model = nn.Linear(2, 1)
        optimizer: Optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        if wrap:
            optimizer = GradMatch(optimizer, Fish(0.5, inner_steps=3, inner_state=inner_state))
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


def test_a_step_that_grad_scaler_skips_counts_and_moves_nothing():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = GradMatch(SGD([parameter], lr=1.0), Fish(0.5, inner_steps=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counts = []
    for slope in (1.0, float("inf"), 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale((parameter * slope).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        counts.append(optimizer.inner_step)
    assert counts == [1, 0, 1, 0]
    assert parameter.item() == -0.5 - 1.0  # half of one unscaled step, then half of two


@pytest.mark.parametrize("wrapped_class", [SGD, Adam], ids=["SGD", "Adam"])
def test_grad_scaler_with_a_fused_optimizer(wrapped_class: Any):
    """Fused optimizers unscale by themselves for a GradScaler; wrapped ones get gradients unscaled already."""
    finals = []
    for wrap in (False, True):
        parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer: Optimizer = wrapped_class([parameter], lr=0.1, fused=True)
        if wrap:
            optimizer = GradMatch(optimizer, Fish(1.0, inner_steps=2))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(parameter.square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        finals.append(parameter.detach())
    torch.testing.assert_close(finals[1], finals[0])


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


# --------------------------------------------------------------------------------------------- copies and checkpoints


def copies_by_deepcopy(model: nn.Module, optimizer: GradMatch) -> tuple[nn.Module, GradMatch]:
    return copy.deepcopy((model, optimizer))


def copies_by_pickle(model: nn.Module, optimizer: GradMatch) -> tuple[nn.Module, GradMatch]:
    return pickle.loads(pickle.dumps((model, optimizer)))


def copies_by_file(model: nn.Module, optimizer: GradMatch) -> tuple[nn.Module, GradMatch]:
    new_model = feature_net(seed=99)
    kind = type(optimizer.optimizer)
    method = copy.copy(optimizer.method)
    if isinstance(method, Fish) and method.model is not None:
        method.model = new_model
    new = GradMatch(kind(new_model.parameters(), **OPTIONS[kind.__name__]), method)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    new_model.load_state_dict(saved["model"])
    new.load_state_dict(saved["optimizer"])
    return new_model, new


OPTIONS: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 0.05, "amsgrad": True},
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "LBFGS": {"lr": 0.1, "max_iter": 3},
    "Adagrad": {"lr": 0.1},
}


@pytest.mark.parametrize("copier", [copies_by_deepcopy, copies_by_pickle, copies_by_file])
@pytest.mark.parametrize("inner_state", ["carry", "reset"])
@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("steps", [0, 2, 4, 5])
def test_a_copy_continues_bit_for_bit(steps: int, name: str, inner_state: str, copier: Any):
    """In the middle of an inner loop of four steps and at its end; and the original goes on undisturbed."""

    def advance(model: nn.Module, optimizer: GradMatch, some: list[tuple[Any, ...]]) -> None:
        for batch in some:

            def closure(batch: tuple[Any, ...] = batch) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            optimizer.step(closure)

    model = feature_net()
    wrapped = getattr(torch.optim, name)(model.parameters(), **OPTIONS[name])
    method = Fish(0.3, inner_steps=4, inner_state=inner_state, model=model, track_alignment=True)
    optimizer = GradMatch(wrapped, method)
    data = batches(11)
    advance(model, optimizer, data[:steps])
    twin_model, twin = copier(model, optimizer)
    assert twin.optimizer is not wrapped
    assert twin.param_groups is twin.optimizer.param_groups
    assert next(iter(twin.param_groups[0]["params"])) is next(iter(twin_model.parameters()))
    advance(model, optimizer, data[steps:])
    advance(twin_model, twin, data[steps:])
    assert_identical(twin_model.state_dict(), model.state_dict())
    assert_identical(twin.state_dict(), optimizer.state_dict())
    assert (twin.last_meta_step is None) == (optimizer.last_meta_step is None)
    if optimizer.last_meta_step is not None and twin.last_meta_step is not None:
        assert_identical(vars(twin.last_meta_step), vars(optimizer.last_meta_step))


def test_copying_the_model_alone_does_not_copy_the_optimizer():
    model = feature_net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fish(0.5, model=model))
    twin = copy.deepcopy(model)
    hooks = [hook for module in twin.modules() for hook in module._forward_pre_hooks.values()]
    assert hooks
    assert all(hook.owner is None for hook in hooks)
    pickle.loads(pickle.dumps(model))
    loss_of(twin, batches(1)[0]).backward()  # moves the twin's buffers, not ours
    train(model, optimizer, batches(1))
    optimizer.rollback()
    assert_identical(model.state_dict(), feature_net().state_dict())


def test_a_plain_optimizer_reads_the_state_and_ours_says_how_to_read_a_plain_one():
    model = nn.Linear(2, 2)
    optimizer = GradMatch(Adam(model.parameters()), Fish(0.5, inner_steps=2))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2)).sum().backward()
        optimizer.step()
    plain = Adam(model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    kept = {i: {k: v for k, v in entry.items() if k != "slow"} for i, entry in plain.state_dict()["state"].items()}
    assert_identical(kept, optimizer.optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=r"optimizer\.optimizer\.load_state_dict"):
        optimizer.load_state_dict(Adam(model.parameters()).state_dict())
    with pytest.raises(ValueError, match=r"optimizer\.optimizer\.load_state_dict"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
    wrapped_again = GradMatch(plain, Fish(0.5, inner_steps=2))
    assert wrapped_again.inner_step == 0
    assert_identical(plain.state_dict()["state"], optimizer.optimizer.state_dict()["state"])  # without ours


def edited(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """``("numbers", ...)`` is a path in what the groups' text says."""
    state = copy.deepcopy(state)
    if path == ("numbers",):
        for group in state["param_groups"]:
            group["gradmatch"] = value
        return state
    numbers = numbers_of(state)
    place: Any = {**state, "numbers": numbers}
    for key in path[:-1]:
        place = place[key]
    if path[0] != "numbers" and len(path) == 1:
        place = state
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return with_numbers(state, numbers) if path[0] == "numbers" else state


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("numbers",), "", "no 'gradmatch' entry"),
        (("numbers",), None, "no 'gradmatch' entry"),
        (("numbers",), "{", "'gradmatch' in the state dict's groups is malformed"),
        (("numbers",), 7, "'gradmatch' in the state dict's groups is malformed"),
        (("numbers",), "[1]", "'gradmatch' in the state dict's groups is malformed"),
        (("numbers", "places"), KeyError, "'gradmatch' in the state dict's groups is malformed"),
        (("numbers", "places", "slow"), [[0]], "'gradmatch' in the state dict's groups is malformed"),
        (("numbers", "places", "slow"), [[0, 78]], "holds 'slow' of parameter .*, which does not exist here"),
        (("numbers", "version"), 5, "format version 5"),
        (("numbers", "version"), "1", "version should be an integer"),
        (("numbers", "method"), "IDGM", "method 'IDGM'"),
        (("numbers", "shapes"), KeyError, "'shapes' is missing"),
        (("numbers", "shapes", 1), [7], r"parameter 1 has shape \[7\] in the state dict and \[0, 3\] here"),
        (("numbers", "inner_step"), KeyError, "'inner_step' is missing"),
        (("numbers", "inner_step"), -1, "inner_step should be an integer of at least 0"),
        (("numbers", "inner_step"), 9, "saved after 9 inner steps but inner_steps=4"),
        (("numbers", "is_open"), False, "not open"),
        (("state", 0, "slow"), KeyError, "lacks the slow weights of parameter 0"),
        (("state", 0, "slow"), 3.0, "should be a tensor"),
        (("state", 0, "slow"), torch.zeros(2), r"parameter 0 has shape \(2,\)"),
        (("state", 0, "slow_buffer:norm.running_mean"), torch.zeros(1), r"norm\.running_mean' has shape"),
        (("numbers", "held_buffers"), 7, "'held_buffers' is missing or malformed"),
        (("numbers", "held_buffers", 0), "other", "lacks the slow copy of buffer 'other'"),
        (("numbers", "left_buffers"), ["other"], "lacks the slow copy of buffer 'other'"),
        (("numbers", "held"), None, "'held' is missing or malformed"),
        (("numbers", "held", 0), [50, 51], "lacks the slow weights of parameter 50"),
        (("numbers", "held_iterates"), [], "'held_iterates' is malformed"),
        (("numbers", "alignment"), 3, "'gradmatch' in the state dict's groups is malformed"),
        (("numbers", "alignment"), {}, "'gradmatch' in the state dict's groups is malformed"),
        (("state", 2, "alignment_units"), torch.zeros(1), "alignment's 'unit_sums' does not fit"),
        (("state", 2, "alignment_sums"), KeyError, "lacks 'alignment_sums' of parameter 2"),
        (("numbers", "counters"), KeyError, "'counters' is missing or malformed"),
        # Found by the soak's damaged checkpoints.
        (("numbers", "held_buffers"), KeyError, "'held_buffers' is missing"),
        (("numbers", "left_buffers"), KeyError, "'left_buffers' is missing"),
        (("numbers", "held_iterates"), KeyError, "'held_iterates' is missing"),
        (("numbers", "counters"), [{}], "'counters' should be names"),
        (("numbers", "held_buffers"), [["norm"]], "the state dict is malformed"),
        (("numbers", "places", "slow"), [[0, 10**12]], "holds 'slow' of parameter .*, which does not exist here"),
        (("numbers", "held"), [[-(10**12), 10**12]], "lacks the slow weights of parameter -1000000000000"),
        (("numbers", "held", 0), [3, 1], "'gradmatch' in the state dict's groups is malformed"),
        (("numbers", "places", "slow"), [[0, 3], [2, 5]], "'gradmatch' in the state dict's groups is malformed"),
        (("param_groups", 0, 7), 1, "group 0 of the state dict has an entry 7, which is no name"),
        (("param_groups", 0, "params", 2), torch.ones(2), "should have its parameters by number or by name"),
        (("numbers", "alignment", "squares", 0), [0.0, "float64", 7], "alignment's 'squares' is malformed"),
        (("numbers", "alignment", "squares", 0), [10**400, "float64"], "alignment's 'squares' is malformed"),
        (("numbers", "alignment", "squares", 0), [0.0, "zeros"], "alignment's 'squares' is malformed"),
        (("param_groups",), torch.ones(2), "'param_groups' is missing"),
        (("param_groups", 0, "gradmatch"), torch.ones(2), "'gradmatch' in the state dict's groups is malformed"),
        (("state", 1), [torch.zeros(1)], "state of parameter 1 should be a dictionary"),
        (("state", 0, "slow"), torch.ones(2, 3).to_sparse(), "'slow' of 0 should be a dense tensor with values"),
        (("state", 0, "slow"), torch.ones(2, 3, device="meta"), "'slow' of 0 should be a dense tensor with values"),
        (("state", 0, "slow"), torch.ones(2, 3, dtype=torch.cfloat), "'slow' of 0 should be real"),
        (
            ("state", 2, "alignment_sums"),
            torch.ones(6, 4).to_sparse(),
            "'alignment_sums' of 2 should be a dense tensor",
        ),
        (("param_groups",), KeyError, "'param_groups' is missing"),
        (("param_groups",), [{"gradmatch": ""}], "no 'gradmatch' entry"),
        (("param_groups",), [], "0 parameter groups and this optimizer 1"),
        (("param_groups", 0, "params"), [0], "group 0 has 1 parameters in the state dict and"),
        (("state",), None, "'state' is missing"),
    ],
)
def test_a_bad_state_dict_names_the_mismatch_and_changes_nothing(path: tuple[Any, ...], value: Any, message: str):
    model = feature_net()
    optimizer = GradMatch(Adam(model.parameters()), Fish(0.5, inner_steps=4, model=model, track_alignment=True))
    train(model, optimizer, batches(6))
    bad = edited(optimizer.state_dict(), path, value)
    train(model, optimizer, batches(1, seed=2))
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    assert_identical(snapshot(model, optimizer), before)
    train(model, optimizer, batches(1))


def test_another_models_state_dict_is_refused():
    optimizers = [GradMatch(Adam(nn.Linear(size, 2).parameters()), Fish(0.5)) for size in (3, 4)]
    with pytest.raises(ValueError, match=r"parameter 0 has shape \[2, 3\] in the state dict and \[2, 4\] here"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    with pytest.raises(TypeError, match="got list"):
        optimizers[1].load_state_dict([])


def adams(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Whose state dicts look alike."""
    p = list(model.parameters())
    return {
        "SGD": SGD(p, lr=0.1),
        "Adam": Adam(p),
        "AdamW": torch.optim.AdamW(p),
        "NAdam": torch.optim.NAdam(p),
        "their AdamW": pytorch_optimizer.AdamP(p),
        "SAM over SGD": pytorch_optimizer.SAM(p, SGD, lr=0.1),
        "SAM over Adam": pytorch_optimizer.SAM(p, Adam, lr=0.1),
        "Lookahead": pytorch_optimizer.Lookahead(SGD(p, lr=0.1)),
        "several": SeveralOptimizers([SGD(p[:1], lr=0.1), Adam(p[1:])]),
        "several, swapped": SeveralOptimizers([Adam(p[:1]), SGD(p[1:], lr=0.1)]),
    }


@pytest.mark.parametrize("other", adams(nn.Linear(2, 2)))
@pytest.mark.parametrize("name", adams(nn.Linear(2, 2)))
def test_a_state_dict_of_another_class_is_refused_always(name: str, other: str):
    model = nn.Linear(2, 2)
    saved, optimizer = (GradMatch(adams(model)[n], SmoothFish(1.0, 0.1)) for n in (name, other))
    if name == other:
        optimizer.load_state_dict(saved.state_dict())
        return
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"is of .* and this optimizer wraps .*: build the same"):
        optimizer.load_state_dict(saved.state_dict())
    assert_identical(optimizer.state_dict(), before)


def test_a_class_of_the_script_is_the_same_when_the_script_is_imported():
    model = nn.Linear(2, 2)

    def optimizer_of(module: str, name: str = "Own") -> GradMatch[Fish]:
        own = type(name, (SGD,), {"__module__": module})
        return GradMatch(own(model.parameters(), lr=0.1), Fish(0.5))

    state = optimizer_of("__main__").state_dict()
    for module in ("__main__", "__mp_main__", "train", "project.train"):
        optimizer_of(module).load_state_dict(state)
    for other in (optimizer_of("train", "Other"), GradMatch(SGD(model.parameters(), lr=0.1), Fish(0.5))):
        with pytest.raises(ValueError, match=r"is of __main__\.Own and this optimizer wraps"):
            other.load_state_dict(state)


def test_a_state_the_wrapped_optimizer_refuses_changes_nothing():
    model = nn.Linear(2, 2)

    class Picky(Adam):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            raise KeyError("exp_avg")

    picky = GradMatch(Picky(model.parameters()), Fish(0.5))
    state = picky.state_dict()
    groups = picky.param_groups
    with pytest.raises(ValueError, match="wrapped Picky cannot load"):
        picky.load_state_dict(state)
    assert picky.param_groups is groups


def test_loading_copies_the_slow_weights():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = GradMatch(SGD([parameter], lr=1.0), Fish(0.5))
    parameter.grad = torch.ones(1)
    optimizer.step()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    state["state"][0]["slow"].fill_(5.0)
    optimizer.rollback()
    assert parameter.item() == 0.0


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


BAD_LOSSES: dict[str, tuple[Any, type[Exception], str]] = {
    "vector": (lambda loss: loss * torch.ones(3, dtype=loss.dtype), ValueError, r"for batch 1 it has shape \(3,\)"),
    "nan": (lambda loss: loss * float("nan"), ValueError, "batch 1 is nan"),
    "inf": (lambda loss: loss + float("inf"), ValueError, "batch 1 is inf"),
    "float": (lambda loss: loss.item(), TypeError, "batch 1 it returned float"),
    "none": (lambda _: None, TypeError, "batch 1 it returned NoneType"),
    "detached": (lambda loss: loss.detach(), ValueError, "batch 1 does not depend"),
}


@pytest.mark.parametrize("bad", sorted(BAD_LOSSES))
def test_a_bad_loss_in_meta_step_leaves_parameters_and_buffers_as_they_were(bad: str):
    spoil, error, message = BAD_LOSSES[bad]
    model = feature_net()
    optimizer = GradMatch(Adam(model.parameters()), Fish(0.5, model=model))
    optimizer.meta_step(lambda b: loss_of(model, b), batches(3))
    before = copy.deepcopy(model.state_dict())

    def loss_fn(batch: tuple[Any, ...]) -> Any:
        loss = loss_of(model, batch)
        return spoil(loss) if batch[2] == 1 else loss

    with pytest.raises(error, match=message):
        optimizer.meta_step(loss_fn, batches(3))
    assert_identical(model.state_dict(), before)
    assert optimizer.inner_step == 0
    optimizer.rollback()  # nothing left to undo
    assert_identical(model.state_dict(), before)
    optimizer.meta_step(lambda b: loss_of(model, b), batches(3))


def test_empty_or_too_few_batches_are_refused():
    model = feature_net()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Fish(0.5, inner_steps=3))
    with pytest.raises(ValueError, match="batches is empty"):
        optimizer.meta_step(lambda b: loss_of(model, b), [])
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


@pytest.mark.parametrize("surgery", ["load_state_dict", "data", "in place"])
def test_weight_surgery_between_meta_iterations_is_honoured(surgery: str):
    model = nn.Linear(2, 1, bias=False)
    optimizer = GradMatch(SGD(model.parameters(), lr=1.0), Fish(0.5, inner_steps=1))
    model.weight.grad = torch.ones(1, 2)
    optimizer.step()
    new = torch.full((1, 2), 7.0)
    if surgery == "load_state_dict":
        model.load_state_dict({"weight": new})
    elif surgery == "data":
        model.weight.data = new
    else:
        model.weight.data.copy_(new)
    optimizer.step()
    assert model.weight.tolist() == [[6.5, 6.5]]


def test_unfreezing_in_the_middle_of_an_inner_loop():
    frozen, free = nn.Parameter(torch.ones(1), requires_grad=False), nn.Parameter(torch.ones(1))
    optimizer = GradMatch(SGD([frozen, free], lr=1.0), Fish(0.5, inner_steps=2))
    free.grad = torch.ones(1)
    optimizer.step()
    frozen.requires_grad_()
    frozen.grad = torch.ones(1)
    optimizer.step()
    assert frozen.item() == 0.5
    assert free.item() == 0.0


def test_the_graph_of_an_interpolated_parameter_is_stale():
    """Backward through a graph built before an interpolation raises instead of giving wrong gradients."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = GradMatch(SGD([parameter], lr=0.0), Fish(0.5, inner_steps=1))
    loss = parameter.square().sum()
    parameter.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_frozen_parameter_with_a_left_over_gradient_moves_and_is_interpolated():
    """torch's optimizers look at the gradient only; so must the slow weights."""
    parameter = nn.Parameter(torch.ones(1), requires_grad=False)
    parameter.grad = torch.ones(1)
    optimizer = GradMatch(SGD([parameter], lr=1.0), Fish(0.5, inner_steps=1))
    optimizer.step()
    assert parameter.item() == 0.5


def test_slow_weights_kept_for_their_digits_do_not_open_an_inner_loop_when_loaded():
    """Between two inner loops a state dict holds wider slow weights, and surgery after loading still counts."""
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = GradMatch(SGD([parameter], lr=0.0), Fish(0.5, inner_steps=1, meta_dtype=torch.float32))
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = through_file(optimizer.state_dict())
    assert state["state"][0]["slow"].dtype == torch.float32
    optimizer.load_state_dict(state)
    with torch.no_grad():
        parameter.fill_(3.0)
    optimizer.rollback()
    assert parameter.tolist() == [3.0, 3.0]
    optimizer.step()
    assert parameter.tolist() == [3.0, 3.0]
