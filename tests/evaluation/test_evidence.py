"""What a study says: the answer for whatever was found, tables for other programs, a picture that can be read."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from torch_gradmatch import Evidence
from torch_gradmatch.evaluation.evidence import EvidenceRow

mpl.use("Agg")
from matplotlib.backends.backend_agg import FigureCanvasAgg


def evidence(gains: dict[str, Any], *, seeds: int = 5, domains: int = 6, **others: Any) -> Evidence:
    """Evidence in which rows are better than ERM by these gains: a number, or a function of domain and seed."""
    generator = np.random.default_rng(0)
    base = 0.7 + 0.05 * generator.normal(size=(domains, seeds))
    rows = []
    for name, gain in {"ERM": 0.0, **gains}.items():
        noise = 0.0 if name == "ERM" else 0.002 * generator.normal(size=(domains, seeds))
        extra = np.array([[gain(d, s) if callable(gain) else gain for s in range(seeds)] for d in range(domains)])
        values = {f"site {d}": (base + noise + extra)[d].tolist() for d in range(domains)}
        settings = {label: {"lr": 0.1} for label in values}
        rows.append(EvidenceRow(name, values, settings, 0.8, 2.0 if name == "ERM" else 3.0, {}))
    return Evidence("six sites", rows, **others)


def test_yes_says_what_to_use_what_it_costs_and_what_the_sampler_does():
    found = evidence({"ERM, balanced": 0.01, "Fish": 0.03, "Fish, averaged": 0.05, "IDGM": -0.04})
    assert found.best == "Fish, averaged"
    said = found.answer
    assert said.startswith("Yes. Use Fish, averaged: +0.05")
    assert "for another domain" in said
    assert "after Holm's correction for 4 comparisons" in said
    assert "It takes 1.5 times the seconds of ERM for as many samples, averaging aside" in said
    assert ", averaging aside, and a copy of the parameters." in said
    assert "Also better: ERM, balanced +0.01" in said
    assert "The sampler alone (ERM, balanced): +0.0" in said
    assert "Worse: IDGM -0.0" in said


@pytest.mark.parametrize(
    ("gain", "lacks"),
    [
        (lambda d, s: 0.02 + 0.05 * (d - 2.5), "for another domain its interval .* includes 0"),
        (lambda d, s: 0.02 + 0.05 * (s - 2), "for another seed its interval .* includes 0"),
        (lambda d, s: 0.02 + 0.05 * (d - 2.5) + 0.05 * (s - 2), "another domain .* and for another seed"),
    ],
    ids=["domain", "seed", "both"],
)
def test_no_says_which_interval_failed(gain: Any, lacks: str):
    found = evidence({"Fish": gain})
    assert found.best == "ERM"
    assert found.answer.startswith("No. Use ERM: nothing is better")
    assert found.differences["Fish"].domains.mean == pytest.approx(0.02, abs=0.003)
    assert re.search(lacks, found.answer)


def test_holms_correction_decides_where_an_interval_alone_would_not():
    many = {f"method {i}": 0.0 for i in range(30)}
    nearly = evidence({"Fish": lambda d, s: 0.01 + 0.006 * (d - 2.5) / 2.5, **many})
    fish = nearly.differences["Fish"]
    assert fish.p < 0.05 < fish.corrected
    assert not fish.is_better
    assert "alone, " in nearly.answer
    assert "after Holm's correction" in fish.lacks()
    alone = evidence({"Fish": lambda d, s: 0.01 + 0.006 * (d - 2.5) / 2.5}).differences["Fish"]
    assert alone.corrected == alone.p


def test_one_seed_is_never_enough():
    found = evidence({"Fish": 0.1}, seeds=1)
    assert found.best == "ERM"
    assert "for another seed its interval +" in found.answer


def test_the_power_is_that_of_the_spread():
    wide = evidence({"Fish": lambda d, s: 0.1 * (d - 2.5)})
    tight = evidence({"Fish": 0.0})
    assert wide.power(0.01) < 0.1 < 0.9 < tight.power(0.01)
    assert tight.power(0.0) < 0.06
    assert f"of 0.01 in {wide.power(0.01):.0%} and of 0.03 in {wide.power(0.03):.0%} of cases" in wide.answer


def test_what_was_left_out_what_ended_early_and_a_control_are_said():
    found = evidence({"Fish": 0.0}, left_out={"IDGM": "no second derivatives"}, permuted=True)
    assert found.answer.startswith("Control: the domains are permuted")
    assert "IDGM was left out: no second derivatives." in found.answer
    found.rows[1].stopped["the loss is nan"] = 3
    assert "Fish: 3 runs ended early, the loss is nan" in str(found)
    alone = Evidence("", found.rows[:1], {"IDGM": "no second derivatives"})
    assert alone.answer == "There is nothing to compare ERM with. IDGM was left out: no second derivatives."
    assert "There is nothing" in str(alone)


def test_it_goes_to_pandas_and_to_json_and_back(tmp_path: Any):
    found = evidence({"Fish": 0.03})
    frame = found.to_frame()
    assert list(frame.columns) == ["method", "domain", "seed", "score", "lr"]
    assert len(frame) == 2 * 6 * 5
    assert frame.groupby("method")["score"].mean()["Fish"] == pytest.approx(found["Fish"].mean)
    text = found.to_json(tmp_path / "evidence.json")
    assert (tmp_path / "evidence.json").read_text() == text
    again = Evidence.from_json(text)
    assert again == found
    assert again.answer == json.loads(text)["answer"] == found.answer
    with pytest.raises(RuntimeError, match="call leave_one_domain_out again"):
        again.refit()
    with pytest.raises(KeyError, match="Sharpness"):
        found["Sharpness"]


def test_labels_of_the_picture_do_not_collide_and_fit_on_a_page(tmp_path: Any):
    names = [f"a method with a long name, number {i}" for i in range(14)]
    found = evidence({name: 0.01 * i for i, name in enumerate(names)})
    figure = found.plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    width, height = figure.get_size_inches() * figure.dpi
    assert figure.get_size_inches()[0] <= 7
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
    assert all(not one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    texts = [*boxes, *(text.get_window_extent(renderer) for text in figure.texts)]
    assert len(figure.texts) == 2
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in texts)
    assert math.isclose(axes.get_ylim()[0], 13.5)
    assert [label.get_text() for label in axes.get_yticklabels()] == names
