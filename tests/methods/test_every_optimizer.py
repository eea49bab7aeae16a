"""Every optimizer of torch and pytorch_optimizer under Fish: what it cannot carry or reset, Algorithm 1, and wrapping.

And what those that evaluate the loss themselves, LBFGS and SAM by closure, have beside that.

``tests/ecosystem`` has those of two more libraries, and their checkpoints, copies and failures.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import pytorch_optimizer
import torch
from _models import assert_identical, assert_same_state, domain_loss, small_network
from _operations import Operations
from _optimizer_laws import (
    check_cannot,
    check_carry,
    check_list,
    check_reset,
    check_reset_in_training,
    check_wrapping,
    has_modes,
)
from _optimizers import CANNOT, process_group, recipes
from _reference import mean_pairwise_cosine
from torch import Tensor
from torch.optim import LBFGS, SGD, Adam, Optimizer

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish
from torch_gradmatch.slow.inner_state import KEEPS_POINTS

RECIPES = recipes("torch", "pytorch_optimizer")
NAMES = [name for name in RECIPES if name not in CANNOT and (find_spec("einops") or name != "pytorch_optimizer.DeMo")]
POINTS = [name for name in NAMES if RECIPES[name].cls.__name__ in KEEPS_POINTS or has_modes(RECIPES[name])]
pytestmark = [  # of the libraries, in plain loops as well
    pytest.mark.filterwarnings(r"ignore:Using backward\(\) with create_graph:UserWarning"),
    pytest.mark.filterwarnings("ignore:you need to install:ImportWarning"),
]


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Provide a process group of one for the optimizers that ask for one."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    with process_group(name in RECIPES and RECIPES[name].distributed):
        yield


def test_the_list_of_those_that_keep_points_names_all_and_no_others():
    check_list(RECIPES[name] for name in NAMES)


@pytest.mark.parametrize(
    ("check", "name"),
    [
        *itertools.product([check_carry, check_reset], NAMES),
        *((check_reset_in_training, name) for name in POINTS),
        *((check_cannot, name) for name in RECIPES if name in CANNOT),
    ],
)
def test_what_is_refused_and_else_is_algorithm_1(check: Callable[[Any], None], name: str):
    check(RECIPES[name])


@pytest.mark.parametrize("name", NAMES)
def test_wrapping_leaves_the_optimizer_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    check_wrapping(RECIPES[name], monkeypatch)


@pytest.mark.parametrize("inner_state", ["carry", "reset"])
def test_wrapping_costs_a_few_calls_for_each_group(inner_state: str):
    """Of an Adam of 200 groups."""
    optimizer = torch.optim.Adam([{"params": [torch.nn.Parameter(torch.randn(3))]} for _ in range(200)])
    events: list[str] = []

    with Operations() as operations:
        before = sys.getprofile()
        sys.setprofile(lambda _, event, __: events.append(event))
        try:
            GradMatch(optimizer, Fish(inner_state=inner_state))
        finally:
            sys.setprofile(before)
    assert not operations.counts
    assert events.count("call") <= 20 * 200


DOMAINS = range(3)
CLOSURES: dict[str, Callable[[Any], Optimizer]] = {
    "SAM": lambda p: pytorch_optimizer.SAM(p, SGD, lr=0.1, momentum=0.9, rho=0.2),
    "SAM-Adam": lambda p: pytorch_optimizer.SAM(p, Adam, lr=0.05, rho=0.2, adaptive=True),
    "LookSAM": lambda p: pytorch_optimizer.LookSAM(p, SGD, lr=0.1, rho=0.2, k=2),
    "LBFGS": lambda p: LBFGS(p, lr=0.1, max_iter=3),
    "LBFGS-Wolfe": lambda p: LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
}


def plain_step(optimizer: Optimizer, loss: Callable[[], Any]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    closure()
    optimizer.step(closure)


@pytest.mark.parametrize("name", CLOSURES)
def test_what_is_reported_is_at_the_point_before_the_step_and_changes_nothing(name: str):
    model, plain = small_network(), small_network()
    optimizer = GradMatch(CLOSURES[name](model.parameters()), Fish(1.0, track_alignment=True))
    inner, losses, gradients = CLOSURES[name](plain.parameters()), [], []
    for d in DOMAINS:
        losses.append(domain_loss(plain, d))
        found = torch.autograd.grad(losses[-1], list(plain.parameters()))
        gradients.append(torch.cat([g.reshape(-1) for g in found]))
        plain_step(inner, partial(domain_loss, plain, d))
    report = optimizer.meta_step(partial(domain_loss, model), DOMAINS)
    torch.testing.assert_close(report.losses, torch.stack(losses).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(report.cosine, mean_pairwise_cosine(gradients), rtol=1e-10, atol=1e-12)
    assert_identical(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", CLOSURES)
@pytest.mark.parametrize("method", ["SmoothFish", "IDGM"])
def test_a_direction_is_worked_out_again_where_they_ask_for_it(method: str, name: str):
    """With gamma 0 the direction is the gradient of the mean loss: a plain step of the optimizer on that."""
    model, plain = small_network(), small_network()
    settings = {"SmoothFish": SmoothFish(0.0, 0.1), "IDGM": IDGM(model, 0.0)}[method]
    optimizer, inner = GradMatch(CLOSURES[name](model.parameters()), settings), CLOSURES[name](plain.parameters())
    for _ in range(3):
        plain_step(inner, lambda: sum(domain_loss(plain, d) for d in DOMAINS) / 3)
        optimizer.meta_step(partial(domain_loss, model), DOMAINS)
        assert_same_state(model.state_dict(), plain.state_dict(), rtol=1e-10)


@pytest.mark.parametrize("method", [Fish(0.4), SmoothFish(1.0, 0.1)], ids=["Fish", "SmoothFish"])
def test_sam_in_two_calls_is_refused_in_words(method: Any):
    """They would move the parameters outside of ``step``."""
    optimizer = GradMatch(CLOSURES["SAM"](small_network().parameters()), method)
    for name in ("first_step", "second_step"):
        assert not hasattr(optimizer, name)
        with pytest.raises(AttributeError, match=rf"{name}\(\) would move the parameters.*call step\(closure\)"):
            getattr(optimizer, name)(zero_grad=True)


@pytest.mark.parametrize("name", ["SAM", "LBFGS"])
def test_a_scaler_is_refused(name: str):
    model = small_network()
    optimizer = GradMatch(CLOSURES[name](model.parameters()), Fish(0.5))
    with pytest.raises(RuntimeError, match=f"{name} needs a closure, which a GradScaler does not support"):
        optimizer.meta_step(partial(domain_loss, model), DOMAINS, torch.amp.GradScaler("cpu"))
