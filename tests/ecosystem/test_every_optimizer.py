"""Every optimizer of torch, pytorch_optimizer, schedulefree and timm under Fish, also saved, copied and failing.

The laws that ``tests/methods/test_every_optimizer.py`` has for the first two libraries hold for all.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import _optimizer_laws as laws
import pytest
import torch
from _optimizer_laws import Algorithm1, assert_same, domains, equal, has_modes, meta_step, walk, wrapped
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
# Carried where that is possible, else reset, unless it is built with its points.
FISH = {
    name: "reset" if name in POINTS else "carry" for name in NAMES if not name.startswith("pytorch_optimizer.Lookahead")
}
every_fish = pytest.mark.parametrize("name", FISH)


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Provide a process group of one for the optimizers that ask for one."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    with process_group(name in RECIPES and RECIPES[name].distributed):
        yield


def test_the_lists_name_all_and_no_others():
    laws.check_list(RECIPES[name] for name in NAMES)
    assert {each.cls.__name__ for each in RECIPES.values()} >= KEEPS_POINTS
    assert {*CANNOT, *LOSSY, *NO_COPY, *UNSAFE} <= set(RECIPES)


@pytest.mark.parametrize(
    ("check", "name"),
    [
        *((check, name) for check in (laws.check_carry, laws.check_reset) for name in NAMES),
        *((laws.check_reset_in_training, name) for name in POINTS),
        *((laws.check_cannot, name) for name in CANNOT),
    ],
)
def test_what_is_refused_and_else_is_algorithm_1(check: Callable[[Any], None], name: str):
    check(RECIPES[name])


@pytest.mark.parametrize("name", NAMES)
def test_wrapping_leaves_the_optimizer_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    laws.check_wrapping(RECIPES[name], monkeypatch)


@every_fish
def test_a_failed_meta_step_leaves_no_trace(name: str):
    recipe = RECIPES[name]
    if recipe.loop in ("graph", "pair") or name == "pytorch_optimizer.Magma":
        pytest.skip("has no meta_step" if recipe.loop != "plain" else NOT_RESET[name])
    reference = Algorithm1(recipe, FISH[name])
    model, optimizer = wrapped(recipe, FISH[name])
    bad = domains(1)
    bad[1][1].fill_(float("nan"))
    for i, batches in enumerate((domains(0), bad, domains(2), domains(3))):
        if batches is bad:
            before = copy.deepcopy(model)
            with pytest.raises(ValueError, match="batch 1 is nan"):
                meta_step(model, optimizer, bad)
            assert equal(model, before)
        else:
            reference.meta_iteration(batches, by_meta_step=True)
            meta_step(model, optimizer, batches)
            assert_same(model, reference.model, f"meta-iteration {i}")


# --------------------------------------------------------------------------------------------- checkpoints and copies


def loaded(name: str, model: nn.Module, optimizer: Any, new: tuple[nn.Module, Any]) -> tuple[nn.Module, Any]:
    """Load the state of a model and its optimizer, from a file, into new ones."""
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    for each, state in zip(new, torch.load(file, weights_only=name not in UNSAFE), strict=True):
        each.load_state_dict(state)
    return new


def survives(name: str, copied: Callable[[nn.Module, Any], tuple[nn.Module, Any]]) -> bool:
    """Return whether the class, without us, goes on after a copy was made as if nothing had happened."""
    recipe = RECIPES[name]
    model = recipe.new_model()
    optimizer = recipe.build(model)
    walk(recipe, model, optimizer, domains(0))
    try:
        new_model, new = copied(model, optimizer)
        for batch in [*domains(1), *domains(2)]:
            walk(recipe, model, optimizer, [batch])
            walk(recipe, new_model, new, [batch])
    except (AttributeError, RuntimeError):
        return False
    return equal(new_model, model)


def in_the_middle(name: str) -> tuple[nn.Module, Any]:
    """Return a model and its optimizer in the second inner loop."""
    model, optimizer = wrapped(RECIPES[name], FISH[name])
    walk(RECIPES[name], model, optimizer, [*domains(0), *domains(1)[:2]])
    return model, optimizer


@every_fish
def test_resumes_in_the_middle_of_an_inner_loop(name: str):
    recipe = RECIPES[name]
    if name in LOSSY:
        new_model = recipe.new_model(seed=1)
        new = new_model, recipe.build(new_model)
        assert not survives(name, lambda model, optimizer: loaded(name, model, optimizer, new)), "is lossy no more"
        return
    model, optimizer = in_the_middle(name)
    new_model, new_optimizer = loaded(name, model, optimizer, wrapped(recipe, FISH[name], seed=1))
    for batch in [*domains(1)[2:], *domains(2), *domains(3)]:
        walk(recipe, model, optimizer, [batch])
        walk(recipe, new_model, new_optimizer, [batch])
        assert equal(new_model, model)
    assert new_optimizer.inner_step == 0


@every_fish
def test_a_deep_copy_goes_its_own_way(name: str):
    recipe = RECIPES[name]
    if name in NO_COPY:
        assert not survives(name, lambda *both: copy.deepcopy(both)), "can be copied now"
        return
    original = in_the_middle(name)
    expected = Algorithm1(recipe, FISH[name])
    for i in range(3):
        expected.meta_iteration(domains(i))
    for model, optimizer in (copy.deepcopy(original), original):
        walk(recipe, model, optimizer, [*domains(1)[2:], *domains(2)])
        assert optimizer.inner_step == 0
        assert_same(model, expected.model, "a copy was made")
