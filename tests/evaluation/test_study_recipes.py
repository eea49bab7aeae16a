"""Ranges, draws and recipes; whatever may be given as ``methods``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _study import net

from torch_gradmatch import ERM, IDGM, Choice, Fish, Fishr, LogUniform, Recipe, SmoothFish
from torch_gradmatch.evaluation.recipes import (
    DEFAULT,
    SHARED,
    draw_settings,
    for_model,
    known_recipes,
    named_recipes,
    passes_of,
)


def test_methods_get_the_same_draws_of_what_they_share():
    shared = {"lr": LogUniform(1e-4, 1e-2, 1e-3), "batch_size": Choice((8, 16, 32))}
    for draw in range(20):
        one = draw_settings(shared, draw, 0)
        other = draw_settings(shared | {"gamma": LogUniform(1e-3, 1.0, 0.1)}, draw, 0)
        assert one.items() <= other.items()
        assert 1e-4 <= one["lr"] <= 1e-2
    assert draw_settings(shared, 0, 0) == {"lr": 1e-3, "batch_size": 8}
    drawn = torch.tensor([math.log10(draw_settings(shared, d, 0)["lr"]) for d in range(1, 2001)])
    assert abs(float(drawn.mean()) + 3) < 0.05
    assert float(drawn.std()) == pytest.approx(2 / 12**0.5, rel=0.05)
    assert draw_settings(shared, 1, 0) != draw_settings(shared, 1, 1) != draw_settings(shared, 2, 1)


def test_a_name_stands_for_the_defaults_of_the_class():
    """Fault 5: "Fish" was ``Fish(inner_state="reset")``, and the class carries."""
    for name, recipe in known_recipes("2").items():
        if recipe.method is None or name in ("Fish, reset", "SmoothFish, symmetric"):
            continue
        model = net()
        ranges = {**SHARED, **recipe.search}
        method: Any = recipe.method(model, {key: of.default for key, of in ranges.items()})
        searched = {key: vars(method)[key] for key in vars(method) if key in {*ranges, "model", "matched", "head"}}
        required = {"gamma": 1.0} if type(method) is SmoothFish else {}
        assert vars(method) == vars(type(method)(**(required | searched)))
    assert all("weight_decay" in {**SHARED, **recipe.search} for recipe in known_recipes().values())


def test_the_default_ones_match_the_head_only_where_there_is_one():
    assert list(named_recipes(None, "2")) == list(DEFAULT)
    assert not any("head" in name for name in named_recipes(None, None))
    with pytest.raises(ValueError, match=r"got 'IDGM, head'\) \('IDGM, head' and 'Fishr' need head=\)"):
        named_recipes(["IDGM, head"], None)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LogUniform(1.0, 2.0, 3.0), ValueError, "0 < low <= default <= high"),
        (lambda: Choice(()), ValueError, "values should hold at least one"),
        (lambda: Choice(0.9), TypeError, r"values should be a tuple of values \(got 0.9\)"),  # type: ignore[arg-type]
        (lambda: Recipe(order="sorted"), ValueError, "order should be one of"),  # type: ignore[arg-type]
        (lambda: Recipe(lambda m, s: Fish(), order="pooled"), ValueError, "order='pooled' is for plain steps"),
        (lambda: Recipe(lambda m, s: Fish(), train=print), ValueError, "method= or train=, not both"),
        (lambda: Recipe(Fish()), TypeError, "method should be a function"),  # type: ignore[arg-type]
        (lambda: Recipe(search={"lr": 0.1}), TypeError, r"search\['lr'\] should be a LogUniform"),  # type: ignore[dict-item]
        (lambda: Recipe(search=0.1), TypeError, r"search should map names"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_ranges_and_recipes_are_checked(make: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make()


def test_a_method_object_is_moved_to_another_model():
    one, other = net(), net()
    for matched in (one[2], [one[0].weight, one[2].bias]):
        moved: Any = for_model(IDGM(one, 0.5, "cosine", matched=matched), other)
        assert (moved.model, moved.gamma, moved.agreement) == (other, 0.5, "cosine")
        expected = other[2] if matched is one[2] else (other[0].weight, other[2].bias)
        assert moved.matched is expected or all(a is b for a, b in zip(moved.matched, expected, strict=True))
    assert for_model(Fish(0.3), other) == Fish(0.3)


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        (lambda m: Fish(), 1.0),
        (lambda m: SmoothFish(0.0, 0.1), 1.0),
        (lambda m: SmoothFish(2.0, 0.1), 1.75),
        (lambda m: SmoothFish(1.0, 0.1, symmetric=True), 2.5),
        (lambda m: IDGM(m), 2.0),
        (lambda m: IDGM(m, matched=m[2]), 1 + 18 / 66),
        (lambda m: IDGM(m, matched=[m[2].bias]), 1 + 2 / 66),
        (lambda m: Fishr(m, m[2]), 1 + 18 / 66),
        (lambda m: ERM(), 1.0),
    ],
)
def test_second_derivatives_count_for_what_they_cost(method: Any, passes: float):
    model = net()
    assert passes_of(method(model), model, 4) == pytest.approx(passes)
