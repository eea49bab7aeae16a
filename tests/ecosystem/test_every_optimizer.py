"""Every optimizer of torch, pytorch_optimizer, schedulefree and timm under Fish, also saved, copied and failing.

The laws that ``tests/methods/test_every_optimizer.py`` has for the first two libraries hold for all.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _optimizer_laws import (
    Algorithm1,
    assert_same,
    check_cannot,
    check_carry,
    check_list,
    check_reset,
    check_reset_in_training,
    check_wrapping,
    domains,
    equal,
    has_modes,
    meta_step,
    walk,
    wrapped,
)
from _optimizers import CANNOT, MODULES, NOT_RESET, process_group, recipes
from torch import nn

from torch_gradmatch.slow.inner_state import KEEPS_POINTS

RECIPES = recipes(*MODULES)
NAMES = [name for name in RECIPES if name not in CANNOT]
POINTS = [name for name in NAMES if RECIPES[name].cls.__name__ in KEEPS_POINTS or has_modes(RECIPES[name])]
# What a class loses, or cannot load, in a checkpoint of its own; the plain loop shows it, too.
LOSSY = {
    "torch.NAdam": "keeps a product in single precision that load_state_dict casts",
    "pytorch_optimizer.QHAdam": "keeps numbers in single precision that load_state_dict casts",
    "pytorch_optimizer.Kron": "keeps factors in single precision that load_state_dict casts",
    "timm.Adahessian": "does not save its generator",
}
NO_COPY = {  # likewise, deep copies of model and optimizer together
    "pytorch_optimizer.Magma": "keeps its state by the id() of a parameter, and a copy of it has another",
    "timm.Adahessian": "keeps attributes at the parameters, which copies of parameters do not have",
    "pytorch_optimizer.ScheduleFreeWrapper": "its __getstate__ leaves out what its __setstate__ needs",
    "pytorch_optimizer.ScheduleFreeWrapper(Adam)": "its __getstate__ leaves out what its __setstate__ needs",
}
UNSAFE = {  # with torch.load(weights_only=True), because of a deque or an object
    f"pytorch_optimizer.{name}" for name in ("AdaShift", "Conda", "SCION", "SCIONLight", "ScalableShampoo")
}
every_optimizer = pytest.mark.parametrize("name", NAMES)
# Carried where that is possible, else reset, unless it is built with its points.
every_fish = pytest.mark.parametrize(
    ("name", "inner_state"),
    [
        (name, "reset" if name in POINTS else "carry")
        for name in NAMES
        if not name.startswith("pytorch_optimizer.Lookahead")
    ],
)


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Provide a process group of one for the optimizers that ask for one."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    with process_group(name in RECIPES and RECIPES[name].distributed):
        yield


def test_the_list_of_those_that_keep_points_names_all_and_no_others():
    check_list(RECIPES[name] for name in NAMES)
    assert {each.cls.__name__ for each in RECIPES.values()} >= KEEPS_POINTS


@every_optimizer
def test_carry_is_refused_where_an_interpolation_would_be_undone_and_else_is_algorithm_1(name: str):
    check_carry(RECIPES[name])


@every_optimizer
def test_reset_is_algorithm_1_with_a_new_optimizer_each_time(name: str):
    check_reset(RECIPES[name])


@pytest.mark.parametrize("name", POINTS)
def test_reset_refuses_an_optimizer_in_training_whose_points_it_would_return_to(name: str):
    check_reset_in_training(RECIPES[name])


@every_optimizer
def test_wrapping_leaves_the_optimizer_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    check_wrapping(RECIPES[name], monkeypatch)


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_wrapped_says_so(name: str):
    check_cannot(RECIPES[name])


@every_fish
def test_a_failed_meta_step_leaves_no_trace(name: str, inner_state: str):
    recipe = RECIPES[name]
    if recipe.loop in ("graph", "pair") or name == "pytorch_optimizer.Magma":
        pytest.skip("has no meta_step" if recipe.loop != "plain" else NOT_RESET[name])
    reference = Algorithm1(recipe, inner_state)
    model, optimizer = wrapped(recipe, inner_state)
    reference.meta_iteration(domains(0), by_meta_step=True)
    meta_step(model, optimizer, domains(0))
    before = copy.deepcopy(model)
    bad = domains(1)
    bad[1][1].fill_(float("nan"))
    with pytest.raises(ValueError, match="batch 1 is nan"):
        meta_step(model, optimizer, bad)
    assert equal(model, before)
    for i in range(2, 4):
        reference.meta_iteration(domains(i), by_meta_step=True)
        meta_step(model, optimizer, domains(i))
        assert_same(model, reference.model, f"meta-iteration {i}")


# --------------------------------------------------------------------------------------------- checkpoints and copies


def through_file(state: Any, name: str) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=name not in UNSAFE)


def loaded(name: str, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    """Return a new model and optimizer with the state of another."""
    new_model = RECIPES[name].new_model(seed=1)
    new = RECIPES[name].build(new_model)
    new_model.load_state_dict(model.state_dict())
    new.load_state_dict(through_file(optimizer.state_dict(), name))
    return new_model, new


def deep_copied(_: str, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    return copy.deepcopy((model, optimizer))


def survives(name: str, copier: Callable[[str, nn.Module, Any], tuple[nn.Module, Any]]) -> bool:
    """Return whether the class, without us, goes on after a copy was made as if nothing had happened."""
    recipe = RECIPES[name]
    model = recipe.new_model()
    optimizer = recipe.build(model)
    walk(recipe, model, optimizer, domains(0))
    try:
        new_model, new = copier(name, model, optimizer)
        for batch in [*domains(1), *domains(2)]:
            walk(recipe, model, optimizer, [batch])
            walk(recipe, new_model, new, [batch])
    except (AttributeError, RuntimeError):
        return False
    return equal(new_model, model)


@every_fish
def test_resumes_in_the_middle_of_an_inner_loop(name: str, inner_state: str):
    recipe = RECIPES[name]
    model, optimizer = wrapped(recipe, inner_state)
    walk(recipe, model, optimizer, [*domains(0), *domains(1)[:2]])
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, name)
    if name in LOSSY:
        assert not survives(name, loaded), f"{name} is lossy no more"
        return
    new_model, new = wrapped(recipe, inner_state, seed=1)
    new_model.load_state_dict(saved["model"])
    new.load_state_dict(saved["optimizer"])
    for batch in [*domains(1)[2:], *domains(2), *domains(3)]:
        walk(recipe, model, optimizer, [batch])
        walk(recipe, new_model, new, [batch])
        assert equal(new_model, model)
    assert new.inner_step == 0


@every_fish
def test_a_deep_copy_goes_its_own_way(name: str, inner_state: str):
    recipe = RECIPES[name]
    model, optimizer = wrapped(recipe, inner_state)
    walk(recipe, model, optimizer, [*domains(0), *domains(1)[:2]])
    if name in NO_COPY:
        assert not survives(name, deep_copied), f"{name} can be copied now"
        return
    new_model, new = copy.deepcopy((model, optimizer))
    for m, o in ((new_model, new), (model, optimizer)):
        walk(recipe, m, o, [*domains(1)[2:], *domains(2)])
        assert o.inner_step == 0
    assert equal(new_model, model)
    expected = Algorithm1(recipe, inner_state)
    for i in range(3):
        expected.meta_iteration(domains(i))
    assert_same(model, expected.model, "a copy was made")


def test_the_lists_of_exceptions_name_optimizers():
    assert {*CANNOT, *LOSSY, *NO_COPY, *UNSAFE} <= set(RECIPES)


@pytest.mark.parametrize("name", ["pytorch_optimizer.Ranger", "schedulefree.SGDScheduleFree", "timm.Lookahead"])
def test_the_methods_of_the_wrapped_optimizer_are_within_reach(name: str):
    _, optimizer = wrapped(RECIPES[name], "reset")
    for method in ("eval", "train", "sync_lookahead", "compute_hutchinson_hessian"):
        assert hasattr(optimizer, method) == hasattr(optimizer.optimizer, method)
    with pytest.raises(AttributeError, match="no_such_method"):
        optimizer.no_such_method  # noqa: B018
