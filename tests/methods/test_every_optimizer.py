"""Every optimizer of torch and pytorch_optimizer under Fish: what it cannot carry or reset, Algorithm 1, and wrapping.

``tests/ecosystem`` has those of two more libraries, and their checkpoints, copies and failures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
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

from torch_gradmatch import Fish, GradMatch
from torch_gradmatch.slow.inner_state import KEEPS_POINTS

RECIPES = recipes("torch", "pytorch_optimizer")
NAMES = [name for name in RECIPES if name not in CANNOT and (find_spec("einops") or name != "pytorch_optimizer.DeMo")]
POINTS = [name for name in NAMES if RECIPES[name].cls.__name__ in KEEPS_POINTS or has_modes(RECIPES[name])]
every_optimizer = pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", [name for name in RECIPES if name in CANNOT])
def test_what_cannot_be_wrapped_says_so(name: str):
    check_cannot(RECIPES[name])


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
