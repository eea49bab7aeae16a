"""What an optimizer is like is found out from what it does."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch
from _reference import fish_by_hand
from _wrapped import ITERATES, PLAIN, Averaging, CountsOutOfSight, Hiding, NeedsAModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from torch_gradmatch import Fish, GradMatch
from torch_gradmatch.slow.inner_state import resets_all
from torch_gradmatch.wrapped.traits import Traits, traits_of


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes or ((5, 7), (3, 4))]


@pytest.mark.parametrize("name", ITERATES)
def test_iterates_are_found(name: str):
    build, names = ITERATES[name]
    optimizer = build(parameters())
    state = copy.copy(dict(optimizer.state))
    traits = traits_of(optimizer)
    assert traits.known
    assert traits.iterates == {"": names}
    assert traits.averages == (("",) if name.startswith("ScheduleFree") else ())
    assert traits.hidden == ()
    assert not traits.needs_closure
    assert not traits.forgets
    assert dict(optimizer.state) == state


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_made_of_gradients_is_none(name: str):
    traits = traits_of(PLAIN[name](parameters()))
    assert traits.known
    assert traits.iterates == {}
    assert traits.hidden == ()
    assert traits.keeps is (name != "SGD")
    assert traits.counters == ({"": ("total_step",)} if name == "StableSPAM" else {})


@settings(deadline=None, max_examples=25)
@given(
    lr=st.sampled_from([0.0, 1e-8, 1e-3, 1.0, 100.0]),
    shapes=st.lists(st.sampled_from([(), (1,), (4,), (0, 3), (2, 5), (3, 1, 2, 2)]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    trained=st.booleans(),
)
def test_neither_size_nor_shape_nor_learning_rate_nor_training_matters(lr, shapes, dtype, trained):
    params = parameters(*shapes, dtype=dtype)
    optimizer = Averaging(params, lr=lr)
    if trained:
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    traits = traits_of(optimizer)
    assert traits.iterates == ({"": ("polyak",)} if any(p.numel() for p in params) else {})
    if any(p.numel() for p in params):
        assert traits.counters == {"": ("steps_taken",)}


def test_frozen_parameters_and_what_else_is_the_default_do_not_matter():
    params = [p.requires_grad_(False) for p in parameters()]
    with torch.device("meta"):
        assert traits_of(Averaging(params)).iterates == {"": ("polyak",)}


def test_optimizers_inside_an_optimizer_are_looked_at():
    inner = pytorch_optimizer.Ranger(parameters(), lr=0.1)
    traits = traits_of(pytorch_optimizer.Lookahead(inner, k=2))
    assert traits.iterates == {"": ("slow_params",), "optimizer": ("slow_buffer",)}


@pytest.mark.parametrize(
    ("build", "needs", "first"),
    [
        (lambda p: torch.optim.LBFGS(p), True, True),
        (lambda p: pytorch_optimizer.SAM(p, SGD, lr=0.1), True, False),
        (lambda p: pytorch_optimizer.LookSAM(p, Adam, lr=0.1), True, False),
        (lambda p: pytorch_optimizer.AliG(p), True, True),
        (lambda p: Adam(p), False, False),
    ],
    ids=["LBFGS", "SAM", "LookSAM", "AliG", "Adam"],
)
def test_who_needs_a_closure_and_when_it_is_called(build: Any, needs: bool, first: bool):
    traits = traits_of(build(parameters()))
    assert (traits.known, traits.needs_closure, traits.asks_first) == (True, needs, first)


@pytest.mark.parametrize("name", ["FTRL", "MADGRAD", "DAdaptAdaGrad"])
def test_who_works_the_parameters_out_of_its_state(name: str):
    optimizer = getattr(pytorch_optimizer, name)(parameters(), lr=0.1)
    assert traits_of(optimizer).forgets
    with pytest.warns(UserWarning, match=f'{name} works the parameters out.*Fish\\(inner_state="reset"\\)'):
        GradMatch(optimizer, Fish(0.5))


def test_hidden_iterates_are_refused_where_they_would_go_wrong():
    assert traits_of(Hiding(parameters())).hidden == ("averages[0]",)
    with pytest.raises(ValueError, match=r"keeps points of parameter space .* in averages\[0\].*SmoothFish"):
        GradMatch(Hiding(parameters()), Fish(0.5))
    optimizer = GradMatch(SGD(parameters(), lr=0.1), Fish(0.5))
    assert optimizer.inner_step == 0


def test_nothing_is_disturbed():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002
    optimizer = pytorch_optimizer.Kron(parameters(), lr=0.1)  # draws from torch's generator and from numpy's
    torch.manual_seed(1)
    with torch.no_grad():
        traits_of(optimizer)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_one_that_cannot_be_built_again_may_say_what_it_is_like():
    model = nn.Linear(3, 2)
    optimizer = NeedsAModel(model.parameters(), model)
    assert traits_of(optimizer) == Traits()
    optimizer.gradmatch_iterates = ("polyak",)
    assert traits_of(optimizer).iterates == {"": ("polyak",)}
    knows_better = Averaging(model.parameters())
    knows_better.gradmatch_iterates = ()
    assert traits_of(knows_better).iterates == {}
    hiding = Hiding(parameters())
    hiding.gradmatch_iterates = ()
    assert traits_of(hiding).hidden == ()


def test_an_anchor_that_never_moves_is_not_in_the_way():
    class Anchored(Hiding):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p, anchor in zip(group["params"], self.averages, strict=True):
                    p -= 0.1 * (p.grad + 0.01 * (p - anchor))

    assert traits_of(Anchored(parameters())).hidden == ()


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_the_wrapper_knows_it_too(through: Any):
    optimizer = through(GradMatch(Averaging(parameters()), Fish(0.5)))
    assert optimizer._loop.traits.iterates == {"": ("polyak",)}
    assert optimizer.optimizer.steps_taken == 0


# ------------------------------------------------------------------------------------------------------------- reset


@pytest.mark.parametrize("name", [*PLAIN, *ITERATES])
def test_reset_makes_all_of_these_new(name: str):
    optimizer = (PLAIN.get(name) or ITERATES[name][0])(parameters())
    assert resets_all(optimizer, traits_of(optimizer))


def test_a_reset_that_does_not_reach_everything_warns():
    with pytest.warns(UserWarning, match='inner_state="reset" does not make CountsOutOfSight new'):
        GradMatch(CountsOutOfSight(parameters()), Fish(0.5, inner_state="reset"))
    GradMatch(CountsOutOfSight(parameters()), Fish(0.5))  # which carries everything: no warning


class Stateless(NeedsAModel):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p -= 0.1 * p.grad


def test_where_nothing_is_known_and_there_is_nothing_to_reset_it_warns_once():
    w = nn.Parameter(torch.ones(2))
    optimizer: GradMatch[Fish] = GradMatch(Stateless([w], nn.Linear(1, 1)), Fish(0.5, inner_state="reset"))
    with pytest.warns(UserWarning, match="does not make Stateless new"):
        optimizer.meta_step(lambda x: (w * x).sum(), [1.0, 2.0])
    optimizer.meta_step(lambda x: (w * x).sum(), [1.0, 2.0])


def reset_by_hand(optimizer: Optimizer) -> None:
    optimizer.counting.number = 0  # type: ignore[attr-defined]


def walk_anew(inner: Optimizer, plain: Tensor) -> None:
    """A meta-iteration of Fish over two domains with an inner optimizer that is new."""
    losses = [lambda x=x: (plain * x).square().sum() for x in (1.0, 2.0)]
    fish_by_hand(inner, losses, 0.5, lambda *_: {})


def test_a_function_resets_what_it_will():
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    plain = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = GradMatch(CountsOutOfSight([w]), Fish(0.5, inner_state=reset_by_hand))
    for _ in range(3):
        optimizer.meta_step(lambda x: (w * x).square().sum(), [1.0, 2.0])
        walk_anew(CountsOutOfSight([plain]), plain)
        torch.testing.assert_close(w, plain, rtol=1e-15, atol=0)
    assert copy.deepcopy(optimizer).method.inner_state is reset_by_hand
    with pytest.raises(ValueError, match="inner_state should be one of 'carry', 'reset', or a function"):
        optimizer.method.inner_state = "new"


def test_counters_kept_as_attributes_are_reset():
    w, plain = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = GradMatch(Averaging([w]), Fish(0.5, inner_state="reset"))
    for _ in range(3):
        optimizer.meta_step(lambda x: (w * x).square().sum(), [1.0, 2.0])
        assert optimizer.optimizer.steps_taken == 2
        walk_anew(Averaging([plain]), plain)
        torch.testing.assert_close(w, plain, rtol=1e-15, atol=0)
    with pytest.raises(ValueError, match="nan"):
        optimizer.meta_step(lambda x: (w * x).square().sum(), [1.0, float("nan")])
    assert optimizer.optimizer.steps_taken == 2  # as before the meta_step that failed
