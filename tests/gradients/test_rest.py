"""The cosine of each gradient with the sum of the others, against the sums themselves."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from _reference import pairwise_cosines, with_rest, with_those_before
from hypothesis import given, settings
from torch import Tensor

from torch_gradmatch.gradients import rest
from torch_gradmatch.gradients.alignment import GradientAlignment, gradient_alignment

CLOSE = {"rtol": 0, "atol": 1e-12, "equal_nan": True}


@st.composite
def drawn(draw: st.DrawFn) -> list[Tensor]:
    """Gradients of 1 to 7 domains, of very different lengths, some of them zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    found = []
    for _ in range(draw(st.integers(1, 7))):
        length = draw(st.sampled_from([0.0, 1e-4, 1.0, 1e3]))
        found.append(torch.randn(draw(st.just(5)), generator=generator, dtype=torch.float64) * length)
    return found


def measure(gradients: list[Tensor], **settings: bool) -> GradientAlignment:
    alignment = GradientAlignment(**settings)
    for g in gradients:
        alignment.add([g[:2], None, g[2:]])
    return alignment


def again_with_rest(alignment: GradientAlignment, gradients: list[Tensor]) -> Tensor:
    found = torch.stack([alignment.with_rest(i, [g[:2], None, g[2:]]) for i, g in enumerate(gradients)])
    return rest.cosine_of(found[:, 0], [found[:, 1], found[:, 2]])


@settings(deadline=None)
@given(gradients=drawn())
def test_one_after_the_other_it_is_that_with_the_sum_of_those_before(gradients: list[Tensor]):
    found = measure(gradients).result().agreement_with_rest
    torch.testing.assert_close(found, with_those_before(gradients), **CLOSE)
    assert measure(gradients, cosines=False).result().agreement_with_rest is None


@settings(deadline=None)
@given(gradients=drawn())
def test_with_pairs_and_with_the_gradient_once_more_it_is_that_with_the_rest(gradients: list[Tensor]):
    alignment = measure(gradients, pairs=True)
    torch.testing.assert_close(alignment.result().agreement_with_rest, with_rest(gradients), rtol=0, atol=1e-9)
    again = again_with_rest(alignment, gradients)
    torch.testing.assert_close(again, with_rest(gradients), rtol=0, atol=1e-8)  # lengths differ by up to 1e7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cancels_counts_as_zero_and_not_as_rounding(dtype: torch.dtype):
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    gradients = [a, 3 * a, -4 * a + 1e-5 * b, b]  # what is left of the first three says nothing in single precision
    found = measure(gradients).result().agreement_with_rest
    assert found[1:3].tolist() == pytest.approx([1.0, -1.0], abs=1e-6)
    assert float(found[3]) == pytest.approx(0.0 if dtype == torch.float32 else 1.0, abs=1e-3)


@pytest.mark.parametrize("length", [1.0, 1e2, 1e4])
def test_a_gradient_much_longer_than_the_rest_leaves_it_to_rounding_of_their_sum(length: float):
    a, b, c = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    gradients = [length * a, b, c]
    expected = with_rest([g.double() for g in gradients])
    alignment = measure(gradients)
    again = again_with_rest(alignment, gradients)
    error = length * torch.finfo(torch.float32).eps
    torch.testing.assert_close(again.double(), expected, rtol=0, atol=error + 1e-6)


def test_it_is_measured_of_named_batches_exactly_with_pairs():
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    targets = {"north": [1.0, 0.0], "south": [0.0, 1.0], "west": [-1.0, 0.2]}
    batches = {name: torch.tensor(t, dtype=torch.float64) for name, t in targets.items()}
    running, exact = (gradient_alignment([w], lambda x: (w * x).sum(), batches, pairs) for pairs in (False, True))
    assert math.isnan(running.agreement_with_rest[0])
    torch.testing.assert_close(exact.agreement_with_rest, with_rest(list(batches.values())))
    assert exact.agreement_with_rest[0] < 0 < exact.agreement_with_rest[1]


def test_it_continues_over_a_checkpoint():
    gradients = list(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    half = measure(gradients[:2])
    resumed = GradientAlignment()
    resumed.load_state_dict(half.state_dict())
    for g in gradients[2:]:
        resumed.add([g[:2], None, g[2:]])
    whole = measure(gradients).result().agreement_with_rest
    torch.testing.assert_close(resumed.result().agreement_with_rest, whole, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_neither_underflows_nor_overflows(scale: float):
    gradients = [scale * g for g in torch.randn(3, 5, generator=torch.Generator().manual_seed(0))]
    double = [g.double() for g in gradients]
    norms = torch.stack([g.norm() for g in gradients])
    found = rest.with_others(pairwise_cosines(double).float(), norms)
    torch.testing.assert_close(found.double(), with_rest(double), rtol=0, atol=1e-5)
    found = measure(gradients).result().agreement_with_rest
    torch.testing.assert_close(found.double(), with_those_before(double), rtol=0, atol=1e-5, equal_nan=True)
