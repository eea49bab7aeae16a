"""The answer stays right whichever of the three ways is near, missing or failed."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from torch_gradmatch import IDGM, Fish, SmoothFish
from torch_gradmatch.evaluation.answer import answer
from torch_gradmatch.evaluation.cost import Cost
from torch_gradmatch.evaluation.fidelity import Fidelity
from torch_gradmatch.evaluation.rows import Row

MODEL = nn.Linear(1, 1)
METHODS = {"Fish": Fish(), "to and fro": SmoothFish(0.1, 0.1, symmetric=True), "exact by hand": IDGM(MODEL, 0.1)}
TIME = {"Fish": 1.0, "to and fro": 3.0, "exact by hand": 4.0}
FAR, ROUGH, NEAR = 0.3, 0.7, 0.95


def row(name: str, state: Any) -> Row:
    """A row whose cosine is ``state``, or that failed, is lost in rounding, or was not measured."""
    if state == "failed":
        return Row(name, name, None, None, "no such luck")
    cost = Cost([1.0], [TIME.get(name, 2.0)], 3, 10**6)
    if state == "unmeasured":
        return Row(name, name, cost, None, None)
    cosine, resolved = (0.1, False) if state == "lost" else (state, True)
    return Row(name, name, cost, Fidelity([cosine], cosine, 0.25, 0.1, 0.5, resolved, "inner_product"), None)


def answered(fish: Any = None, symmetric: Any = None, exact: Any = None, **others: Any) -> str:
    states = dict(zip(METHODS, (fish, symmetric, exact), strict=True))
    methods = {name: method for name, method in METHODS.items() if states[name] is not None}
    rows = [row(name, states[name]) for name in methods] + [row(name, state) for name, state in others.items()]
    return answer(rows, methods).replace("\n", " ")


@pytest.mark.parametrize(
    ("states", "begins", "says"),
    [
        ((NEAR, NEAR, 1.0), "Fish. ", ["gamma = 0.25", "0.5 of the ERM", "another strength than Fish's: to and fro."]),
        ((NEAR, FAR, 1.0), "Fish. ", ["another strength than Fish's: exact by hand."]),
        ((NEAR, "failed", "failed"), "Fish. ", ["to and fro failed here (above).", "exact by hand failed here"]),
        ((NEAR, None, 1.0), "Fish. ", ["another strength than Fish's: exact by hand."]),
        ((ROUGH, NEAR, 1.0), "to and fro. ", ["Fish is a rough stand-in for exact here (cosine 0.70"]),
        ((FAR, NEAR, None), "to and fro. ", ["Fish goes another way at this inner learning rate (cosine 0.30"]),
        (("lost", NEAR, 1.0), "to and fro. ", ["Fish hardly matches gradients", "lost in rounding"]),
        (("failed", NEAR, 1.0), "to and fro. ", ["Fish failed here (above)."]),
        ((None, NEAR, 1.0), "to and fro. ", ["time / to and fro"]),
        (
            (FAR, FAR, 1.0),
            "exact, if it is the inner product ",
            ["to and fro goes another way", "Fish goes"],
        ),
        ((ROUGH, "lost", 1.0), "exact, if it is the inner product ", ["to and fro hardly matches gradients"]),
        (("failed", "failed", 1.0), "exact, if it is the inner product ", ["to and fro failed here (above)."]),
        ((ROUGH, "failed", "failed"), "Fish, for want of a nearer one. ", ["exact by hand failed here (above)."]),
        ((ROUGH, FAR, None), "Fish, for want of a nearer one. ", ["to and fro goes another way"]),
        (("failed", FAR, "failed"), "to and fro, for want of a nearer one. ", ["Fish failed here (above)."]),
        (("unmeasured", "unmeasured", "unmeasured"), "How near they come to exact could not be measured. ", []),
        (("failed", "failed", "failed"), "None of these works here (above).", []),
        ((NEAR, None, None), "That takes at least two of these among the methods", []),
    ],
    ids=str,
)
def test_every_combination_has_an_answer(states: tuple[Any, ...], begins: str, says: list[str]):
    found = answered(*states)
    assert found.startswith(f"Fish or exact? {begins}")
    for words in says:
        assert words in found
    for name, state in zip(METHODS, states, strict=True):
        if state is None:
            assert name not in found or name == "Fish"
    working = [name for name, state in zip(METHODS, states, strict=True) if state not in (None, "failed")]
    if len(working) > 1:
        assert all(f"  {name}: " in f" {found}" or f" {name}: where" in found for name in working)
        assert f"time / {working[0]}" in found


def test_times_are_over_those_of_fish():
    table = answer([row(name, NEAR) for name in METHODS], METHODS).split("\n\n")[1].splitlines()
    assert [line.split()[-5:-4] for line in table[2:]] == [["1.00"], ["3.00"], ["4.00"]]
    assert table[0].split("  ")[0] == "way"


def test_a_faster_exact_is_mentioned_beside_the_symmetric_one():
    methods = {**METHODS, "kept": IDGM(MODEL, 0.1, keep_graphs=True)}  # takes 2
    rows = [row(name, FAR if name == "Fish" else 1.0) for name in methods]
    assert "kept is faster, if there is the memory for it." in answer(rows, methods).replace("\n", " ")


@pytest.mark.parametrize(("fish", "walk", "mentioned"), [(FAR, NEAR, True), (NEAR, NEAR, False), (FAR, ROUGH, False)])
def test_smooth_fish_at_gamma_1_is_mentioned_where_it_is_nearer_than_fish(fish: float, walk: float, mentioned: bool):
    methods = {**METHODS, "walk": SmoothFish(1.0, 0.1), "other": SmoothFish(2.0, 0.1)}
    rows = [row(name, {"Fish": fish, "walk": walk}.get(name, NEAR)) for name in methods]
    found = answer(rows, methods).replace("\n", " ")
    assert ("At the price of Fish, walk follows exact in the mean over orders (cosine 0.95)" in found) is mentioned


def test_another_inner_learning_rate_at_which_fish_is_nearer_is_named():
    found = answered(ROUGH, FAR, 1.0, **{"Fish, lr x 0.1": 0.99, "Fish, lr x 10": 0.2})
    assert "nearer at 0.1 times the inner learning rate, 0.99" in found


def test_an_exact_method_by_differences_or_of_another_agreement_comes_last():
    methods = {
        "Fish": Fish(),
        "differences": IDGM(MODEL, 0.1, hvp="finite_difference"),
        "one order": IDGM(MODEL, 0.1, one_pass=True),
        "exact by hand": IDGM(MODEL, 0.1),
    }
    rows = [row(name, FAR if name == "Fish" else 1.0) for name in methods]
    assert "exact by hand: where" in answer(rows, methods)
    del methods["exact by hand"]
    assert "differences: where" in answer(rows, methods)
