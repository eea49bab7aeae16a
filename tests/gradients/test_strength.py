"""``gamma=None`` finds the gamma at which the matching part is ``strength`` times as long as the mean gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from _regression import AGREEMENTS, drawn, phi_of, regression

from torch_gradmatch.gradients.functional import idgm_grad

WAYS: dict[str, dict[str, Any]] = {hvp: {"hvp": hvp} for hvp in ("reverse", "forward", "finite_difference")}
WAYS |= {way: {way: True} for way in ("keep_graphs", "one_pass")}


@pytest.mark.parametrize(
    ("chosen", "way"), [pair for pair in itertools.product(AGREEMENTS, WAYS) if pair != ("own", "one_pass")]
)
def test_the_matching_part_is_as_long_as_asked_for(chosen: str, way: str):
    theta, batches = drawn(1, 4)
    mean = idgm_grad(regression, theta, batches, 0.0).gradient
    for strength in (0.1, 2.0):
        found = idgm_grad(regression, theta, batches, None, phi_of(chosen), strength=strength, **WAYS[way])
        assert float((found.gradient - mean).norm() / mean.norm()) == pytest.approx(strength, rel=1e-10)
        given = idgm_grad(regression, theta, batches, found.gamma, phi_of(chosen), **WAYS[way])
        torch.testing.assert_close(found.gradient, given.gradient, rtol=1e-10, atol=1e-13)
        assert given.gamma == found.gamma
        torch.testing.assert_close([found.agreement, found.losses], [given.agreement, given.losses])


def test_strength_has_no_units():
    """Gamma has: 1/loss here."""
    theta, batches = drawn(0, 3)
    found = idgm_grad(regression, theta, batches, None, "variance")
    scaled = idgm_grad(lambda t, b: 8 * regression(t, b), theta, batches, None, "variance")
    assert scaled.gamma == pytest.approx(found.gamma / 8, rel=1e-10)
    torch.testing.assert_close(scaled.gradient, 8 * found.gradient)


def test_where_there_is_nothing_to_measure_it_is_plain_training():
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    found = idgm_grad(lambda w, x: (w - 1).square().sum() * x.sum(), torch.ones(2), batches, None)
    assert found.gamma is None
    assert found.gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("factor", [1e30, float("nan")], ids=["overflow", "nan"])
def test_what_is_not_finite_is_not_finite_in_the_gradient(factor: float):
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    found = idgm_grad(lambda w, x: factor * (w * x).square().sum(), torch.ones(2), batches, None, check=False)
    assert found.gamma is None
    assert not found.gradient.isfinite().any()
