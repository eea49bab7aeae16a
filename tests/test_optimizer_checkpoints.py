"""GradMatch: copies by deepcopy and pickle, checkpoints, and state dicts that are refused."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from _feature_training import batches, feature_net, snapshot, through_file, train
from _models import FeatureNet, assert_identical, loss_of
from torch import Tensor, nn
from torch.optim import Adam

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

# By name, how the inner state is treated, and what the optimizer is built with.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam": ("reset", {"lr": 0.05, "amsgrad": True}),
    "SGD": ("carry", {"lr": 0.1, "momentum": 0.9}),
    "LBFGS": ("carry", {"lr": 0.1, "max_iter": 3}),
}


def built(name: str, model: nn.Module) -> GradMatch[Fish]:
    inner_state, options = OPTIONS[name]
    method = Fish(0.3, inner_steps=4, inner_state=inner_state, model=model, track_alignment=True)
    return GradMatch(getattr(torch.optim, name)(model.parameters(), **options), method)


def through(how: str, name: str, model: FeatureNet, optimizer: GradMatch[Fish]) -> tuple[FeatureNet, GradMatch[Fish]]:
    if how == "deepcopy":
        return copy.deepcopy((model, optimizer))
    if how == "pickle":
        return pickle.loads(pickle.dumps((model, optimizer)))
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other = feature_net(seed=99)
    resumed = built(name, other)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    return other, resumed


def advance(model: nn.Module, optimizer: GradMatch[Fish], some: list[tuple[Any, ...]]) -> None:
    for batch in some:

        def closure(batch: tuple[Any, ...] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "file"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_copy_continues_bit_for_bit(name: str, how: str):
    """In the middle of the second inner loop; and the original goes on undisturbed."""
    model = feature_net()
    optimizer = built(name, model)
    data = batches(11)
    advance(model, optimizer, data[:5])
    twin_model, twin = through(how, name, model, optimizer)
    assert twin.optimizer is not optimizer.optimizer
    assert twin.param_groups is twin.optimizer.param_groups
    assert twin.param_groups[0]["params"][0] is next(twin_model.parameters())
    advance(model, optimizer, data[5:])
    advance(twin_model, twin, data[5:])
    assert_identical(twin_model.state_dict(), model.state_dict())
    assert_identical(twin.state_dict(), optimizer.state_dict())
    assert twin.last_meta_step is not None
    if how == "file":  # what is measured in an inner loop is not carried over
        assert twin.last_meta_step.cosine is None
    else:
        assert_identical(vars(twin.last_meta_step), vars(optimizer.last_meta_step))


# ---------------------------------------------------------------------------------------------------- what it holds


def one_step(method: Fish) -> tuple[nn.Parameter, GradMatch[Fish]]:
    w = nn.Parameter(torch.ones(2))
    optimizer = GradMatch(Adam([w], lr=0.5), method)
    w.grad = torch.ones(2)
    optimizer.step()
    return w, optimizer


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_it_is_the_wrapped_optimizers_with_one_more_entry(inner_steps: int):
    w, optimizer = one_step(Fish(0.5, inner_steps=inner_steps))
    state = optimizer.state_dict()
    own = state.pop("gradmatch")
    assert set(own) >= {"method", "shapes", "inner_step", "is_open", "slow_weights", "slow_buffers", "counters"}
    assert set(own["slow_weights"]) == (set() if inner_steps == 1 else {0})
    if inner_steps == 1:
        assert_identical(state, optimizer.optimizer.state_dict())
    plain = Adam([w])
    plain.load_state_dict(state)
    assert_identical(plain.state_dict()["state"][0], optimizer.optimizer.state_dict()["state"][0])


@pytest.mark.parametrize("meta_dtype", [None, torch.float64])
def test_what_has_nothing_of_ours_counts_as_saved_between_two_inner_loops(meta_dtype: torch.dtype | None):
    w, optimizer = one_step(Fish(0.5, meta_dtype=meta_dtype))
    state = optimizer.optimizer.state_dict()
    told = pytest.warns(UserWarning, match="digits of the slow weights") if meta_dtype else nullcontext()
    with told:
        optimizer.load_state_dict(state)
    assert optimizer.inner_step == 0
    optimizer.rollback()
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.5))
    assert_identical(optimizer.optimizer.state_dict()["state"], state["state"])


def test_what_lost_our_entry_in_the_middle_of_an_inner_loop_is_refused_in_words():
    """As torch.distributed.checkpoint loses it, which stumbles over the key that says so already when it saves."""
    _, optimizer = one_step(Fish(0.5))
    state = optimizer.state_dict()
    assert any("save between two inner loops" in key for key in state["state"] if isinstance(key, str))
    del state["gradmatch"]
    with pytest.raises(ValueError, match=r"in the middle of an inner loop.*save between two inner loops"):
        optimizer.load_state_dict(state)
    optimizer.interpolate()
    assert set(optimizer.state_dict()["state"]) == {0}


def test_loading_copies_the_slow_weights():
    w, optimizer = one_step(Fish(0.5))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    state["gradmatch"]["slow_weights"][0].fill_(5.0)
    optimizer.rollback()
    assert w.tolist() == [1.0, 1.0]


# ----------------------------------------------------------------------------------------------------------- refused

OWN = "gradmatch"


def edited(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    place: Any = state
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return state


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((OWN,), 7, "'gradmatch' or its 'shapes' are missing or malformed"),
        ((OWN, "method"), "IDGM", "saved by method 'IDGM'; this optimizer uses Fish"),
        ((OWN, "shapes"), [[2, 3]], "'shapes' are missing or malformed"),
        ((OWN, "shapes", 50), [2], "of another model: parameter 50 does not exist here"),
        ((OWN, "shapes", 1), [7], r"parameter 1 has shape \[7\] in the state dict and \[0, 3\] here"),
        ((OWN, "inner_step"), KeyError, "'inner_step' is missing"),
        ((OWN, "inner_step"), -1, "inner_step should be an integer of at least 0"),
        ((OWN, "inner_step"), 9, "saved after 9 inner steps but inner_steps=4"),
        ((OWN, "is_open"), False, "not open|lacks the slow weights"),
        ((OWN, "is_open"), None, "'is_open' is missing or malformed"),
        ((OWN, "slow_weights"), {}, "lacks the slow weights"),
        ((OWN, "slow_weights"), None, "slow weights of parameters are missing or malformed"),
        ((OWN, "slow_weights", 0), 3.0, "slow weights? of parameter 0.* should be a tensor"),
        ((OWN, "slow_weights", 0), torch.zeros(2), r"slow weights? of parameter 0.* has shape \(2,\)"),
        ((OWN, "slow_weights", 78), torch.zeros(2), "78.* does not exist here"),
        ((OWN, "slow_buffers", "norm.running_mean"), torch.zeros(1), r"norm\.running_mean' has shape"),
        ((OWN, "slow_buffers", "norm.running_mean"), KeyError, r"lacks the slow value of buffer 'norm.running_mean'"),
        ((OWN, "counters"), KeyError, "'counters' is missing or malformed"),
        (("param_groups",), KeyError, "cannot load the state dict"),
        (("param_groups", 0, "params"), [0], "cannot load the state dict"),
        (("state",), None, "cannot load the state dict"),
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


def test_another_methods_state_dict_is_refused():
    model = nn.Linear(4, 2)
    optimizer = GradMatch(Adam(model.parameters()), Fish(0.5))
    with pytest.raises(TypeError, match="got list"):
        optimizer.load_state_dict([])
    for method in (SmoothFish(1.0, 0.1), IDGM(model)):
        with pytest.raises(ValueError, match=f"saved by method 'Fish'; this optimizer uses {type(method).__name__}"):
            GradMatch(Adam(model.parameters()), method).load_state_dict(optimizer.state_dict())


class Picky(Adam):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        raise KeyError("exp_avg")


def test_a_state_the_wrapped_optimizer_refuses_changes_nothing():
    picky = GradMatch(Picky(nn.Linear(2, 2).parameters()), Fish(0.5))
    groups = picky.param_groups
    with pytest.raises(ValueError, match="wrapped Picky cannot load"):
        picky.load_state_dict(picky.state_dict())
    assert picky.param_groups is groups
