"""Rows as text."""

from __future__ import annotations

from torch_gradmatch.evaluation.cost import ERM
from torch_gradmatch.evaluation.rows import Row
from torch_gradmatch.evaluation.tables import failures


def rows(**errors: str | None) -> list[Row]:
    return [Row(name, name, None, None, error) for name, error in ({ERM: None} | errors).items()]


def test_what_failed_alike_is_said_once():
    assert failures(rows(a="x is 1.5", b=None, c="y", d="x is 1.5", e="x is 1.5")) == [
        "a; d and e failed: x is 1.5",
        "c failed: y",
    ]


def test_what_failed_alike_but_for_figures_is_said_once():
    assert failures(rows(a="got 1.5e-3 of 2", b="got 7 of 2", c=None)) == [
        "a and b failed: got 1.5e-3 of 2 (The others with other figures.)"
    ]


def test_what_every_method_met_is_said_of_every_method():
    assert failures(rows(a="x", b="x")) == ["Every method failed: x"]
    assert failures(rows(a="x")) == ["a failed: x"]
    assert failures(rows(a=None)) == []
