"""The interpolation step, native and foreach, against its formula in double precision; and who takes which tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_gradmatch import native_status, ops
from torch_gradmatch.slow.ops import interpolate_

KERNEL_PAIRS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
OTHER_PAIRS = [(torch.float64, torch.float32), (torch.complex64, torch.complex64)]
LAYOUTS = ["contiguous", "transposed", "channels_last", "gaps", "misaligned"]
Interpolate = Callable[[Sequence[Tensor], Sequence[Tensor], float], None]

needs_kernel = pytest.mark.skipif(not native_status().cpu, reason=f"no native CPU kernel: {native_status().reason}")


def draw(shape: Sequence[int], dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = torch.randn(tuple(shape), generator=generator, dtype=wide).to(dtype)
    if layout == "transposed" and len(shape) >= 2:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels_last" and len(shape) == 4:
        return values.to(memory_format=torch.channels_last)
    if layout == "gaps" and len(shape) >= 1:
        spread = torch.zeros([2 * shape[0], *shape[1:]], dtype=dtype)
        spread[::2] = values
        return spread[::2]
    if layout == "misaligned":
        return torch.cat([torch.zeros(1, dtype=dtype), values.reshape(-1)])[1:].view(tuple(shape))
    return values


def assert_is_the_formula(
    slow: Tensor, fast: Tensor, slow_before: Tensor, fast_before: Tensor, weight: float, *, ulps: float = 2.0
) -> None:
    """To 2 ulp, at the larger of the two numbers; exact at both ends; the fast weights are the slow ones, cast.

    Half an ulp from each of four roundings: of 1 - weight, of the difference (up to twice as large, but halved by the
    factor), of their product, and of the sum. Fused multiply-add spares one.
    """
    wide = torch.complex128 if slow.is_complex() else torch.float64
    s, f = slow_before.to(wide), fast_before.to(wide)
    scale = torch.maximum(s.abs(), f.abs()).clamp_min(torch.finfo(slow.dtype).smallest_normal)
    ulp = torch.finfo(slow.dtype).eps * torch.exp2(torch.floor(torch.log2(scale)))
    if slow.dtype == torch.float64 or slow.is_complex():
        ulps += 1.0  # there the reference rounds, too
    worst = float(((slow.to(wide) - (s + weight * (f - s))).abs() / ulp).max()) if slow.numel() else 0.0
    assert worst <= ulps
    assert torch.equal(fast, slow.to(fast.dtype))
    if weight == 0.0:
        assert torch.equal(slow, slow_before)
    if weight == 1.0:
        assert torch.equal(fast, fast_before)


cases = {
    "shapes": st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=6),
    "pairs": st.lists(st.sampled_from(KERNEL_PAIRS + OTHER_PAIRS), min_size=6, max_size=6),
    "layouts": st.lists(st.sampled_from(LAYOUTS), min_size=6, max_size=6),
    "weight": st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 1.0)),
    "seed": st.integers(0, 2**32),
}


@pytest.mark.parametrize("interpolate", [interpolate_, ops._interpolate_foreach], ids=["routed", "foreach"])
@settings(deadline=None, max_examples=150)
@given(**cases)
def test_is_the_formula_to_a_rounding(interpolate: Interpolate, shapes, pairs, layouts, weight, seed):
    generator = torch.Generator().manual_seed(seed)
    slow = [draw(s, p[0], lay, generator) for s, p, lay in zip(shapes, pairs, layouts, strict=False)]
    fast = [draw(s, p[1], lay, generator) for s, p, lay in zip(shapes, pairs, layouts, strict=False)]
    before = [(s.clone(), f.clone()) for s, f in zip(slow, fast, strict=True)]
    if slow or interpolate is interpolate_:
        interpolate(slow, fast, weight)
    for s, f, (s0, f0) in zip(slow, fast, before, strict=True):
        assert_is_the_formula(s, f, s0, f0, weight)


@needs_kernel
@pytest.mark.parametrize("pair", KERNEL_PAIRS, ids=str)
def test_the_kernel_is_the_formula_to_1_ulp(pair: tuple[torch.dtype, torch.dtype]):
    """With fused multiply-add, which every processor with AVX2 or NEON has."""
    generator = torch.Generator().manual_seed(0)
    for weight in torch.rand(20, generator=generator).tolist():
        slow, fast = (draw([50_000], dtype, "contiguous", generator) for dtype in pair)
        before = slow.clone(), fast.clone()
        interpolate_([slow], [fast], weight)
        assert_is_the_formula(slow, fast, *before, weight, ulps=1.0)


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 40), pair=st.sampled_from(KERNEL_PAIRS), weight=st.floats(0.0, 1.0), seed=st.integers(0, 99))
def test_equal_weights_stay_where_they_are(size, pair, weight, seed):
    fast = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(pair[1])
    slow = fast.to(pair[0], copy=True)
    before = slow.clone()
    interpolate_([slow], [fast], weight)
    assert torch.equal(slow, before)
    assert torch.equal(fast, before.to(pair[1]))


@pytest.mark.parametrize("pair", KERNEL_PAIRS, ids=str)
@pytest.mark.parametrize("weight", [0.0, 0.25, 0.75, 1.0])
def test_nan_and_infinity_pass_through_from_the_fast_weights(pair: tuple[torch.dtype, torch.dtype], weight: float):
    special = [float("nan"), float("inf"), -float("inf")] * 11  # whole vectors and a tail
    slow, fast = torch.zeros(33, dtype=pair[0]), torch.tensor(special).to(pair[1])
    interpolate_([slow], [fast], weight)
    # As in torch.lerp, an infinity may turn into NaN on its way; it never turns into a number.
    expected = torch.lerp(torch.zeros(33), torch.tensor(special), weight) if 0 < weight < 1 else torch.tensor(special)
    expected = torch.zeros(33) if weight == 0.0 else expected
    torch.testing.assert_close(slow.float(), expected, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(fast.float(), expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("pair", KERNEL_PAIRS, ids=str)
def test_subnormal_numbers_are_not_flushed(pair: tuple[torch.dtype, torch.dtype]):
    tiny = torch.finfo(pair[1]).smallest_normal
    values = (torch.arange(1, 34, dtype=torch.float64) / 64 * tiny).to(pair[1])
    slow, fast = values.to(pair[0]), values.clone()
    interpolate_([slow], [fast], 0.3)
    assert torch.equal(fast, values)
    slow, fast = torch.zeros_like(slow), values.clone()
    before = slow.clone()
    interpolate_([slow], [fast], 0.5)
    assert_is_the_formula(slow, fast, before, values, 0.5)
    assert bool((slow[4:] > 0).all())


@pytest.mark.parametrize("pair", [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_the_cast_to_narrow_fast_weights_rounds_as_torch_does(pair: tuple[torch.dtype, torch.dtype], offset: int):
    """Every bit pattern of the upper half of a float, with all lower halves that decide a rounding."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    for lower in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        slow = torch.cat([torch.zeros(offset), (upper | lower).view(torch.float32)])[offset:]
        fast = torch.zeros(offset + 2**16, dtype=pair[1])[offset:]
        before = slow.clone()
        interpolate_([slow], [fast], 0.0)
        torch.testing.assert_close(fast, before.to(pair[1]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_survives_a_round_trip(dtype: torch.dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    slow, fast = torch.zeros_like(finite), finite.clone()
    interpolate_([slow], [fast], 1.0)
    assert torch.equal(slow, finite)
    slow = torch.zeros_like(finite, dtype=torch.float32)
    interpolate_([slow], [fast], 1.0)
    assert torch.equal(slow, finite.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interpolate", [interpolate_, ops._interpolate_foreach], ids=["routed", "foreach"])
def test_weights_0_and_1_are_exact_even_where_the_difference_overflows(interpolate: Interpolate, dtype: torch.dtype):
    largest = torch.finfo(dtype).max
    for weight, expected in ((0.0, largest), (1.0, -largest)):
        slow, fast = torch.full((2,), largest, dtype=dtype), torch.full((2,), -largest, dtype=dtype)
        interpolate([slow], [fast], weight)
        assert slow.tolist() == fast.tolist() == [expected] * 2


def test_thousands_of_tiny_tensors_and_empty_ones_among_them():
    sizes = [i % 4 for i in range(5000)]
    slow = [torch.full((size,), float(i)) for i, size in enumerate(sizes)]
    fast = [torch.zeros(size) for size in sizes]
    interpolate_(slow, fast, 0.25)
    for i, (s, f) in enumerate(zip(slow, fast, strict=True)):
        assert s.tolist() == f.tolist() == [0.75 * i] * sizes[i]


def test_empty_lists_are_fine():
    interpolate_([], [], 0.5)


@pytest.mark.large
def test_a_tensor_of_more_than_two_to_the_31_bytes():
    numel = 2**30 + 2**20 + 7  # elements of two bytes
    slow, fast = torch.zeros(numel, dtype=torch.bfloat16), torch.ones(numel, dtype=torch.bfloat16)
    interpolate_([slow], [fast], 0.25)
    assert bool((slow == 0.25).all())
    assert bool((fast == 0.25).all())


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_nothing(threads: int):
    generator = torch.Generator().manual_seed(0)
    slow = [torch.randn(n, generator=generator) for n in (100_003, 7, 250_001)]
    fast = [torch.randn(s.shape, generator=generator) for s in slow]
    expected = [s.clone() for s in slow]
    interpolate_(expected, [f.clone() for f in fast], 0.3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        interpolate_(slow, fast, 0.3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(s, e) for s, e in zip(slow, expected, strict=True))


def test_leaves_that_require_gradients_are_changed_in_place():
    fast = torch.nn.Parameter(torch.ones(2))
    interpolate_([torch.zeros(2)], [fast], 0.5)
    assert fast.tolist() == [0.5, 0.5]
    assert fast.requires_grad
    assert fast.is_leaf


@pytest.mark.parametrize("which", ["slow", "fast"])
def test_a_graph_built_before_is_stale(which: str):
    slow, fast = torch.ones(3), torch.zeros(3)
    leaf = torch.ones(3, requires_grad=True)
    loss = (leaf * (slow if which == "slow" else fast)).sum()
    interpolate_([slow], [fast], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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


# ------------------------------------------------------------------------------------------------- who takes which


def taken_natively(slow: Tensor, fast: Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    calls: list[int] = []
    foreach = ops._interpolate_foreach
    monkeypatch.setattr(ops, "_interpolate_foreach", lambda *a: (calls.append(1), foreach(*a)))
    interpolate_([slow], [fast], 0.5)
    return not calls


ROUTES = {
    "contiguous": (lambda: (torch.zeros(3, 4), torch.ones(3, 4)), True),
    "transposed alike": (lambda: (torch.zeros(3, 4).t(), torch.ones(3, 4).t()), True),
    "channels_last alike": (
        lambda: tuple(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(2)),
        True,
    ),
    "parameter": (lambda: (torch.zeros(3), torch.nn.Parameter(torch.ones(3))), True),
    "bf16 with fp32": (lambda: (torch.zeros(3), torch.ones(3, dtype=torch.bfloat16)), True),
    "empty": (lambda: (torch.zeros(0, 3), torch.ones(0, 3)), True),
    "scalar": (lambda: (torch.zeros(()), torch.ones(())), True),
    "transposed unlike": (lambda: (torch.zeros(4, 4), torch.ones(4, 4).t()), False),
    "gaps": (lambda: (torch.zeros(6)[::2], torch.ones(6)[::2]), False),
    "complex": (lambda: (torch.zeros(3) + 0j, torch.ones(3) + 0j), False),
    "fp32 with fp64": (lambda: (torch.zeros(3, dtype=torch.float64), torch.ones(3)), False),
    "subclass with a dispatch of its own": (lambda: (torch.zeros(3), TwoTensor(torch.ones(3), torch.ones(3))), False),
}


@needs_kernel
@pytest.mark.parametrize("name", sorted(ROUTES))
def test_the_kernel_takes_what_it_can_and_foreach_the_rest(name: str, monkeypatch: pytest.MonkeyPatch):
    make, native = ROUTES[name]
    slow, fast = make()
    assert taken_natively(slow, fast, monkeypatch) is native
    assert bool((slow == fast).all())


@needs_kernel
@pytest.mark.parametrize("others", ["none", "complex", "subclass"])
def test_a_kernel_that_fails_is_an_error_and_not_a_slower_path(others: str, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError("launch failed")

    slow, fast = [torch.zeros(3)], [torch.ones(3)]
    if others == "complex":
        slow.append(torch.zeros(3) + 0j)
        fast.append(torch.ones(3) + 0j)
    if others == "subclass":  # such lists are split in Python
        slow.append(torch.zeros(3))
        fast.append(TwoTensor(torch.ones(3), torch.ones(3)))
    call = "interpolate_" if others == "subclass" else "interpolate_taken_"
    monkeypatch.setattr(torch.ops.torch_gradmatch, call, SimpleNamespace(default=fail))
    monkeypatch.setattr(ops, "_interpolate_foreach", lambda *_: pytest.fail("a slower path was tried"))
    with pytest.raises(RuntimeError, match="launch failed"):
        interpolate_(slow, fast, 0.5)
    assert all(bool((s == 0).all()) for s in slow)
    assert all(bool((f == 1).all()) for f in fast)


@needs_kernel
@pytest.mark.parametrize("odd", ["complex", "gaps", "fp32 with fp64"])
def test_one_odd_pair_among_many_leaves_the_others_to_the_kernel(odd: str, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, int]] = []

    def count(name: str) -> None:
        run = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda slow, *rest: (calls.append((name, len(slow))), run(slow, *rest))[1])

    for name in ("_interpolate_native", "_interpolate_whole", "_interpolate_foreach"):
        count(name)
    slow, fast = [torch.zeros(5) for _ in range(161)], [torch.ones(5) for _ in range(161)]
    slow[80], fast[80] = ROUTES[odd][0]()
    interpolate_(slow, fast, 0.25)
    assert calls == [("_interpolate_native", 161), ("_interpolate_foreach", 1)]
    assert all(torch.equal(s, f.to(s.dtype)) for s, f in zip(slow, fast, strict=True))
    assert all(bool((s == 0.25).all()) for s in slow)


@pytest.mark.parametrize("odd", ["none", "complex"])
def test_every_version_counts_up_whoever_writes(odd: str):
    slow, fast = [torch.zeros(3)], [torch.nn.Parameter(torch.ones(3))]
    if odd == "complex":
        slow.append(torch.zeros(3) + 0j)
        fast.append(torch.nn.Parameter(torch.ones(3) + 0j))
    versions = [t._version for t in slow + fast]
    interpolate_(slow, fast, 0.5)
    assert all(t._version > before for t, before in zip(slow + fast, versions, strict=True))


@pytest.mark.parametrize("conjugated", ["slow", "fast"])
def test_conjugated_views_are_refused_before_anything_changes(conjugated: str):
    slow, fast = [torch.zeros(3), torch.zeros(3) + 0j], [torch.ones(3), torch.ones(3) + 0j]
    tensors = slow if conjugated == "slow" else fast
    tensors[1] = tensors[1].conj()
    with pytest.raises((ValueError, RuntimeError), match="conjugate"):
        interpolate_(slow, fast, 0.5)
    assert all(bool((s == 0).all()) and bool((f == 1).all()) for s, f in zip(slow, fast, strict=True))


def test_parameters_and_buffers_of_several_dtypes_in_one_call():
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.float32, torch.bfloat16)] * 100 + [(torch.float32, torch.float32)] * 59
    pairs += [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float16, torch.float16)] * 35
    pairs += [(torch.float64, torch.float32)]
    shapes: list[list[int]] = [[i % 7, 3] if i < 159 else [] if i % 2 else [4] for i in range(len(pairs))]
    slow, fast = ([draw(s, p[k], "contiguous", generator) for s, p in zip(shapes, pairs, strict=True)] for k in (0, 1))
    before = [(s.clone(), f.clone()) for s, f in zip(slow, fast, strict=True)]
    interpolate_(slow, fast, 0.3)
    for s, f, (s0, f0) in zip(slow, fast, before, strict=True):
        assert_is_the_formula(s, f, s0, f0, 0.3)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pair", [*KERNEL_PAIRS[:1], *KERNEL_PAIRS[4:], *OTHER_PAIRS], ids=str)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_foreach_takes_as_many_operations_for_200_tensors_as_for_2(
    pair: tuple[torch.dtype, torch.dtype], weight: float
):
    counts = []
    for number in (2, 200):
        slow, fast = ([torch.ones(3, dtype=dtype) for _ in range(number)] for dtype in pair)
        with Operations() as operations:
            ops._interpolate_foreach(slow, fast, weight)
        counts.append(len(operations.names))
    assert counts[0] == counts[1] <= 4


@pytest.mark.parametrize("sizes", [[2**18], [2**17, 5, 2**17, 2**18, 7, 2**17], [2**18 - 1, 1, 1]], ids=str)
def test_casts_in_batches_reach_every_tensor(sizes: list[int]):
    slow, fast = [torch.zeros(n) for n in sizes], [torch.ones(n, dtype=torch.bfloat16) for n in sizes]
    ops._interpolate_foreach(slow, fast, 0.25)
    assert all(bool((t == 0.25).all()) for t in slow + fast)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_that_would_broadcast_are_refused_on_every_device(device: str):
    with pytest.raises(ValueError, match=r"slow\[0\] has shape \(3,\) and fast\[0\] \(1,\)"):
        interpolate_([torch.zeros(3, device=device)], [torch.ones(1, device=device)], 0.5)


def test_a_list_of_both_kinds_is_done_in_full():
    slow = [torch.zeros(4), torch.zeros(8)[::2], torch.zeros(3) + 0j, torch.zeros(2, dtype=torch.float64)]
    fast = [torch.ones(4), torch.ones(8)[::2], torch.ones(3) + 0j, torch.ones(2)]
    interpolate_(slow, fast, 0.5)
    assert all(bool((s == 0.5).all()) and bool((f == 0.5).all()) for s, f in zip(slow, fast, strict=True))


# ------------------------------------------------------------------------------------------------- the operator itself


def native_op(slow: list[Tensor], fast: list[Tensor], weight: float) -> None:
    torch.ops.torch_gradmatch.interpolate_(slow, fast, weight)


@needs_kernel
@pytest.mark.parametrize(
    ("slow", "fast", "weight", "message"),
    [
        (lambda: [torch.zeros(2)], list, 0.5, "same length"),
        (lambda: [torch.zeros(2)], lambda: [torch.zeros(2)], 1.5, r"weight should lie in \[0, 1\]"),
        (lambda: [torch.zeros(2)], lambda: [torch.zeros(2)], float("nan"), r"weight should lie in \[0, 1\]"),
        (lambda: [torch.zeros(2)], lambda: [torch.zeros(3)], 0.5, "same sizes and strides"),
        (lambda: [torch.zeros(2, 3)], lambda: [torch.zeros(3, 2).t()], 0.5, "same sizes and strides"),
        (lambda: [torch.zeros(4)[::2]], lambda: [torch.zeros(4)[::2]], 0.5, "no gaps"),
        (lambda: [torch.zeros(1).expand(4)], lambda: [torch.zeros(1).expand(4)], 0.5, "no gaps"),
        (lambda: [torch.zeros(2, dtype=torch.int64)], lambda: [torch.zeros(2, dtype=torch.int64)], 0.5, "dtypes"),
    ],
)
def test_the_operator_refuses_what_it_cannot_do(slow, fast, weight, message):
    with pytest.raises(RuntimeError, match=message):
        native_op(slow(), fast(), weight)


BLOCK = 24
SHARED = {
    "slow with fast": lambda b: ([b[:6]], [b[4:10]]),
    "slow with slow": lambda b: ([b[:4], b[3:7]], [torch.ones(4), torch.ones(4)]),
    "slow with another fast": lambda b: ([b[:3], torch.ones(5)], [torch.ones(3), b[2:7]]),
    "slow is fast": lambda b: ([b], [b]),
    "slow around fast": lambda b: ([b[:9:4]], [b[3:6]]),
    "slow in two dtypes": lambda b: ([b[:2], b.view(torch.float16)[3:5]], [torch.ones(2), torch.ones(2).half()]),
    "slow with itself": lambda b: ([b[:1].expand(3)], [torch.ones(3)]),
    "slow with itself by strides": lambda b: ([b.as_strided((3, 4), (2, 1))], [torch.ones(3, 4)]),
    "fast with itself": lambda b: ([torch.ones(3)], [b[:1].expand(3)]),
    "inside a wrapper": lambda b: ([b[:3]], [TwoTensor(torch.ones(BLOCK)[1:4], b[1:4])]),
}


@pytest.mark.parametrize("beside", ["alone", "beside a pair for the kernel", "beside a complex pair"])
@pytest.mark.parametrize("name", SHARED)
def test_slow_memory_shared_with_another_tensor_is_an_error(name: str, beside: str):
    block = torch.arange(float(BLOCK))
    slow, fast = SHARED[name](block)
    if beside != "alone":
        slow, fast = [torch.zeros(3), *slow], [torch.ones(3), *fast]
    if beside == "beside a complex pair":
        slow, fast = [torch.zeros(3) + 0j, *slow], [torch.ones(3) + 0j, *fast]
    before = [t.clone() for t in (*slow, *fast)]
    with pytest.raises(RuntimeError, match=r"share memory.* clone it"):
        interpolate_(slow, fast, 0.5)
    assert block.tolist() == list(range(BLOCK))
    assert all(bool((t == was).all()) for t, was in zip((*slow, *fast), before, strict=True))


APART = {
    "neighbours": lambda b: ([b[:5]], [b[5:10]]),
    "one between the other": lambda b: ([b[::2]], [b[1::2]]),
    "columns of one matrix": lambda b: ([b.view(4, 6)[:, :3]], [b.view(4, 6)[:, 3:]]),
    "a dense one in a gap": lambda b: ([b[1:4]], [b[:9:4]]),
    "real and imaginary part": lambda b: ([torch.view_as_complex(b.view(-1, 2)).real], [b[1::2]]),
    "an empty one within": lambda b: ([b[:4], b[2:2]], [b[4:8], b[6:6]]),
    "strides that step over one another": lambda b: ([b.as_strided((2, 3), (3, 2))], [torch.ones(2, 3)]),
    "two dtypes": lambda b: ([b[:3]], [b.view(torch.bfloat16)[6:9]]),
}


@pytest.mark.parametrize("name", APART)
def test_memory_of_the_same_storage_that_does_not_meet_is_accepted(name: str):
    slow, fast = APART[name](torch.linspace(1.0, 2.0, BLOCK))
    before = [(s.clone(), f.clone()) for s, f in zip(slow, fast, strict=True)]
    if name == "two dtypes":
        fast[0].fill_(1.0)
        before = [(slow[0].clone(), fast[0].clone())]
    interpolate_(slow, fast, 0.5)
    for s, f, (s0, f0) in zip(slow, fast, before, strict=True):
        assert_is_the_formula(s, f, s0, f0, 0.5)


@st.composite
def views_of_one_block(draw_one) -> list[tuple[list[int], list[int], int]]:
    """Sizes, strides and offset of four views of one shape."""
    sizes = draw_one(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    views = []
    for _ in range(4):
        strides = [draw_one(st.integers(0, 6)) for _ in sizes]
        reach = sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
        views.append((sizes, strides, draw_one(st.integers(0, 2 * BLOCK - 1 - reach))))
    return views


@settings(deadline=None, max_examples=300)
@given(views=views_of_one_block())
def test_exactly_what_meets_is_refused(views):
    """Against sets of places: a slow view meets no other, no view itself; two fast ones may meet."""
    block = torch.arange(2.0 * BLOCK)
    slow_1, fast_1, slow_2, fast_2 = (block.as_strided(*view) for view in views)
    places = [torch.arange(2 * BLOCK).as_strided(*view).flatten().tolist() for view in views]
    sets = [set(p) for p in places]
    meets = any(sets[i] & sets[j] for i in (0, 2) for j in range(4) if i != j)
    meets = meets or any(len(p) != len(s) for p, s in zip(places, sets, strict=True))
    before = block.clone()
    expected = [torch.lerp(s, f, 0.25) for s, f in ((slow_1, fast_1), (slow_2, fast_2))]
    if meets:
        with pytest.raises(RuntimeError, match="share memory"):
            interpolate_([slow_1, slow_2], [fast_1, fast_2], 0.25)
        assert torch.equal(block, before)
    else:
        interpolate_([slow_1, slow_2], [fast_1, fast_2], 0.25)
        torch.testing.assert_close([slow_1, slow_2], expected)
        assert torch.equal(fast_2, slow_2)


def test_a_pair_that_would_fail_in_the_middle_is_refused_before_anything_changes():
    good = torch.zeros(2), torch.ones(2)
    cases = {
        r"slow\[1\] is torch.int64": (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)),
        r"slow\[1\] is torch.float32 and fast\[1\] torch.complex64": (torch.zeros(2), torch.zeros(2) + 0j),
        r"slow\[1\] is on cpu and fast\[1\] on meta": (torch.zeros(2), torch.zeros(2, device="meta")),
    }
    for message, (slow, fast) in cases.items():
        with pytest.raises(ValueError, match=message):
            interpolate_([good[0], slow], [good[1], fast], 0.5)
    assert good[0].tolist() == [0.0, 0.0]
    assert good[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("interpolate", [interpolate_, ops._interpolate_foreach], ids=["routed", "foreach"])
def test_fast_weights_may_share_memory_among_themselves(interpolate: Interpolate):
    """Weights tied by their storage: each slow copy holds the same numbers, so both move to the same place."""
    fast = torch.arange(6.0)
    slow = [torch.zeros(4), torch.zeros(4), torch.zeros(6)]
    interpolate(slow, [fast[:4], fast[2:], fast], 0.5)
    assert fast.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert slow[1].tolist() == [1.0, 1.5, 2.0, 2.5]


def test_fast_weights_may_share_memory_also_where_their_slow_copies_differ_in_dtype():
    fast = torch.arange(4.0)
    slow = [torch.zeros(4), torch.zeros(4, dtype=torch.float64), torch.zeros(2)]
    interpolate_(slow, [fast, fast, fast[::2]], 0.5)
    assert fast.tolist() == slow[0].tolist() == slow[1].tolist() == [0.0, 0.5, 1.0, 1.5]
    assert slow[2].tolist() == [0.0, 1.0]


@needs_kernel
@pytest.mark.parametrize("pair", [*KERNEL_PAIRS[:1], *KERNEL_PAIRS[4:]], ids=str)
def test_opcheck(pair: tuple[torch.dtype, torch.dtype]):
    slow = [torch.zeros(3, 4, dtype=pair[0]), torch.zeros(5, dtype=pair[0])]
    fast = [torch.ones(3, 4, dtype=pair[1]), torch.ones(5, dtype=pair[1])]
    torch.library.opcheck(torch.ops.torch_gradmatch.interpolate_.default, (slow, fast, 0.5))


@needs_kernel
@pytest.mark.filterwarnings("default")  # what the compiler warns of is not ours
def test_torch_compile_traces_the_operator_whole():
    def program(slow: Tensor, fast: Tensor) -> Tensor:
        torch.ops.torch_gradmatch.interpolate_([slow], [fast], 0.25)
        return slow + fast

    results = [
        run(torch.zeros(3), torch.ones(3))
        for run in (program, torch.compile(program, backend="aot_eager", fullgraph=True))
    ]
    assert results[0].tolist() == results[1].tolist() == [0.5] * 3


@pytest.mark.filterwarnings("default")  # what the compiler warns of is not ours
@pytest.mark.parametrize("pair", [*KERNEL_PAIRS[:1], *KERNEL_PAIRS[4:5]], ids=str)
def test_torch_compile_traces_the_function_whole(pair: tuple[torch.dtype, torch.dtype]):
    compiled = torch.compile(interpolate_, backend="aot_eager", fullgraph=True)
    slow, fast = [torch.zeros(3, dtype=pair[0]) for _ in range(2)], [torch.ones(3, dtype=pair[1]) for _ in range(2)]
    compiled(slow, fast, 0.25)
    assert all(t.tolist() == [0.25] * 3 for t in slow + fast)


def test_the_function_takes_fake_and_meta_tensors():
    with torch._subclasses.FakeTensorMode():
        interpolate_([torch.zeros(3), torch.zeros(3)], [torch.ones(3), torch.ones(3).bfloat16()], 0.5)
    slow, fast = ([torch.zeros(3, device="meta") for _ in range(2)] for _ in range(2))
    interpolate_(slow, fast, 0.5)


@needs_kernel
def test_fake_and_meta_tensors():
    with torch._subclasses.FakeTensorMode():
        native_op([torch.zeros(3)], [torch.ones(3)], 0.5)
    native_op([torch.zeros(3, device="meta")], [torch.ones(3, device="meta")], 0.5)


@needs_kernel
@pytest.mark.parametrize("level", ["baseline", pytest.param("avx2", marks=pytest.mark.large)])
def test_every_instruction_set_gives_the_formula(level: str):
    """The choice is made once in a process, so each level below the processor's own, which runs here, has its own."""
    selected = ("to_a_rounding", "rounds_as_torch", "round_trip", "infinity", "subnormal", "overflows", "tiny")
    command = [sys.executable, "-m", "pytest", "-q", "-k", f"({' or '.join(selected)}) and not instruction", __file__]
    environment = os.environ | {"TORCH_GRADMATCH_CPU_LEVEL": level}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
