"""The interpolation step against its formula in double precision."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from torch_gradmatch.ops import interpolate_

PAIRS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
    (torch.complex64, torch.complex64),
]
LAYOUTS = ["contiguous", "transposed", "gaps"]


def draw(shape: list[int], dtype: torch.dtype, layout: str, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    values = values.to(dtype)
    if layout == "transposed" and len(shape) >= 2:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "gaps" and len(shape) >= 1:
        wide = torch.zeros([2 * shape[0], *shape[1:]], dtype=dtype)
        wide[::2] = values
        return wide[::2]
    return values


@settings(deadline=None, max_examples=150)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6),
    pairs=st.lists(st.sampled_from(PAIRS), min_size=6, max_size=6),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=6, max_size=6),
    weight=st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 1.0)),
    seed=st.integers(0, 2**32),
)
def test_is_the_formula_to_a_rounding(shapes, pairs, layouts, weight, seed):
    generator = torch.Generator().manual_seed(seed)
    slow = [draw(s, p[0], lay, generator) for s, p, lay in zip(shapes, pairs, layouts, strict=False)]
    fast = [draw(s, p[1], lay, generator) for s, p, lay in zip(shapes, pairs, layouts, strict=False)]
    before = [(s.clone(), f.clone()) for s, f in zip(slow, fast, strict=True)]
    interpolate_(slow, fast, weight)
    for s, f, (s0, f0) in zip(slow, fast, before, strict=True):
        wide = torch.complex128 if s.is_complex() else torch.float64
        expected = s0.to(wide) + weight * (f0.to(wide) - s0.to(wide))
        ulp = 2 * torch.finfo(s.dtype).eps
        scale = torch.maximum(s0.abs().to(torch.float64), f0.abs().to(torch.float64)) + 1e-30
        assert bool(((s.to(wide) - expected).abs() <= ulp * scale).all())
        assert torch.equal(f, s.to(f.dtype))
        if weight == 0.0:
            assert torch.equal(s, s0)
        if weight == 1.0:
            assert torch.equal(f, f0)


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 40), weight=st.floats(0.0, 1.0), seed=st.integers(0, 2**32))
def test_equal_weights_stay_where_they_are(size, weight, seed):
    slow = [torch.randn(size, generator=torch.Generator().manual_seed(seed))]
    fast = [slow[0].clone()]
    before = slow[0].clone()
    interpolate_(slow, fast, weight)
    assert torch.equal(slow[0], before)
    assert torch.equal(fast[0], before)


def test_nan_and_infinity_pass_through_from_the_fast_weights():
    slow, fast = torch.zeros(3), torch.tensor([float("nan"), float("inf"), -float("inf")])
    interpolate_([slow], [fast], 0.25)
    assert slow[0].isnan()
    assert slow[1:].tolist() == [float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_0_and_1_are_exact_even_where_the_difference_overflows(dtype: torch.dtype):
    largest = torch.finfo(dtype).max
    for weight, expected in ((0.0, largest), (1.0, -largest)):
        slow, fast = torch.full((2,), largest, dtype=dtype), torch.full((2,), -largest, dtype=dtype)
        interpolate_([slow], [fast], weight)
        assert slow.tolist() == fast.tolist() == [expected] * 2


def test_empty_lists_are_fine():
    interpolate_([], [], 0.5)


def test_leaves_that_require_gradients_are_changed_in_place():
    fast = torch.nn.Parameter(torch.ones(2))
    interpolate_([torch.zeros(2)], [fast], 0.5)
    assert fast.tolist() == [0.5, 0.5]
    assert fast.requires_grad
    assert fast.is_leaf


def test_bad_arguments_are_refused_before_anything_changes():
    slow, fast = torch.zeros(2), torch.ones(2)
    with pytest.raises(ValueError, match="same length"):
        interpolate_([slow], [], 0.5)
    with pytest.raises(ValueError, match=r"slow\[1\] has shape \(2,\) and fast\[1\] \(3,\)"):
        interpolate_([slow, slow], [fast, torch.ones(3)], 0.5)
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="weight should lie in"):
            interpolate_([slow], [fast], weight)
    assert slow.tolist() == [0.0, 0.0]
    assert fast.tolist() == [1.0, 1.0]
