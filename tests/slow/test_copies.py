"""Slow copies against the definition, tensor by tensor."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from _operations import count
from hypothesis import example, given, settings
from test_ops import draw
from torch import Tensor

from torch_gradmatch.slow import copies as module
from torch_gradmatch.slow.copies import SlowCopies, slow_dtype
from torch_gradmatch.slow.ops import _interpolate_foreach

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.int64, torch.bool]
SHAPES = [(), (0, 3), (1,), (5,), (3, 4), (2, 3, 4, 5)]
LAYOUTS = ["contiguous", "transposed", "channels_last", "gaps"]


def expected(slow: Tensor, fast: Tensor) -> Tensor:
    """The old copy where it still rounds to the tensor, else the tensor."""
    if slow.dtype == fast.dtype:
        return fast.clone()
    return torch.where(slow.to(fast.dtype) == fast, slow, fast.to(slow.dtype))


@settings(deadline=None, max_examples=60)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS)), max_size=6),
    meta_dtype=st.sampled_from([None, torch.float32, torch.float64]),
    bucket=st.sampled_from([7, 1 << 25]),
    seed=st.integers(0, 2**32),
)
@example(kinds=[((3, 4), torch.bfloat16, layout) for layout in LAYOUTS], meta_dtype=torch.float32, bucket=7, seed=0)
def test_refresh_keeps_the_digits_of_what_nobody_changed(
    kinds: list[tuple[tuple[int, ...], torch.dtype, str]], meta_dtype: torch.dtype | None, bucket: int, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    fast = [draw(*kind, generator) for kind in kinds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUCKET", bucket)
        copies = SlowCopies(fast, [None] * len(fast), meta_dtype)
        copies.refresh()
        for s, f in zip(copies.slow, fast, strict=True):
            assert (s.dtype, s.shape) == (slow_dtype(f, meta_dtype), f.shape)
            assert torch.equal(s, f.to(s.dtype))
        for _ in range(2):
            for s, f in zip(copies.slow, fast, strict=True):  # as after an interpolation; then surgery here and there
                if s.dtype != f.dtype:
                    s.copy_(torch.randn(s.shape, generator=generator, dtype=torch.float64).to(s.dtype))
                    f.copy_(s)
                changed = torch.rand(f.shape, generator=generator) < 0.3
                f.copy_(torch.where(changed, torch.full_like(f, 1), f))
            wanted = [expected(s, f) for s, f in zip(copies.slow, fast, strict=True)]
            copies.refresh()
            assert all(map(torch.equal, copies.slow, wanted))
            assert copies.fits(fast, meta_dtype)
            again = SlowCopies(fast, copies.slow, meta_dtype)  # from the same values, whoever holds them
            again.refresh()
            assert all(map(torch.equal, again.slow, wanted))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), -0.0])
def test_special_numbers(special: float):
    fast = torch.tensor([special, 1.0], dtype=torch.bfloat16)
    copies = SlowCopies([fast], [None], torch.float32)
    for before in (None, 5.0):  # somebody put the special number there since
        if before is not None:
            copies.slow[0][0] = before
        copies.refresh()
        torch.testing.assert_close(copies.slow[0], fast.float(), equal_nan=True, rtol=0, atol=0)


def test_it_no_longer_fits_when_anything_changed():
    fast = [torch.zeros(3, 3, dtype=torch.bfloat16), torch.zeros(2)]
    copies = SlowCopies(fast, [None, None], torch.float32)
    assert copies.fits(fast, torch.float32)
    assert not copies.fits(fast[:1], torch.float32)
    assert not copies.fits(fast, None)
    assert not copies.fits([fast[0].clone(), fast[1]], torch.float32)
    for index, data in ((0, fast[0].data.t()), (1, torch.zeros(4))):  # other strides in the same memory; another shape
        before, fast[index].data = fast[index].data, data
        assert not copies.fits(fast, torch.float32)
        fast[index].data = before
        assert copies.fits(fast, torch.float32)


def test_memory_put_elsewhere_by_data_is_followed():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    copies = SlowCopies([parameter], [None], torch.float32)
    copies.refresh()
    parameter.data = torch.full((3,), 2.0, dtype=torch.bfloat16)
    copies.refresh()
    assert copies.slow[0].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("meta_dtype", [None, torch.float32])
def test_few_operations_however_many_tensors(meta_dtype: torch.dtype | None):
    found = []
    for number in (2, 200):
        fast = [torch.zeros(3, dtype=torch.bfloat16) for _ in range(number)] + [torch.zeros(2) for _ in range(number)]
        copies = SlowCopies(fast, [None] * len(fast), meta_dtype)
        copies.refresh()
        found.append(count(copies.refresh))
    assert found[0] == found[1]
    assert found[0].total() <= 8


@pytest.mark.parametrize(
    ("slow_dtype", "fast_dtype", "operations"),
    [
        *((dtype, dtype, {"_foreach_lerp_": 1}) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
        (torch.float32, torch.bfloat16, {"_to_copy": 50, "lerp_": 50}),
    ],
    ids=str,
)
def test_without_a_kernel_an_interpolation_passes_over_memory_no_more_often_than_this(
    slow_dtype: torch.dtype, fast_dtype: torch.dtype, operations: dict[str, int]
):
    slow, fast = ([torch.zeros(9, dtype=dtype) for _ in range(50)] for dtype in (slow_dtype, fast_dtype))
    found = count(lambda: _interpolate_foreach(slow, fast, 0.3))
    assert {name.split(".")[1]: number for name, number in found.items()} == operations | {"_foreach_copy_": 1}
