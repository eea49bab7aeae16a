"""GradMatch: copies by deepcopy and pickle, checkpoints, and state dicts that are refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import pytorch_optimizer
import torch
from _feature_training import batches, feature_net, snapshot, through_file, train
from _layout import numbers_of, with_numbers
from _models import assert_identical, loss_of
from torch import Tensor, nn
from torch.optim import SGD, Adam

from torch_gradmatch import Fish, GradMatch, SmoothFish
from torch_gradmatch.wrapped.several import SeveralOptimizers


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
