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


@pytest.mark.parametrize("interpolate", [interpolate_, ops._interpolate_foreach], ids=["routed", "foreach"])
@settings(deadline=None, max_examples=150)
@given(
    kinds=st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), max_size=4),
            st.sampled_from(KERNEL_PAIRS + OTHER_PAIRS),
            st.sampled_from(LAYOUTS),
        ),
        max_size=6,
    ),
    weight=st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 1.0)),
    seed=st.integers(0, 2**32),
)
def test_is_the_formula_to_a_rounding(interpolate: Interpolate, kinds, weight, seed):
    generator = torch.Generator().manual_seed(seed)
    slow, fast = ([draw(s, pair[side], layout, generator) for s, pair, layout in kinds] for side in (0, 1))
    before = [(s.clone(), f.clone()) for s, f in zip(slow, fast, strict=True)]
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
@pytest.mark.parametrize("slow_is_wide", [False, True])
def test_every_half_precision_number_survives_a_round_trip(dtype: torch.dtype, slow_is_wide: bool):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    slow, fast = torch.zeros_like(finite, dtype=torch.float32 if slow_is_wide else dtype), finite.clone()
    interpolate_([slow], [fast], 1.0)
    assert torch.equal(fast, finite)
    assert torch.equal(slow, finite.to(slow.dtype))


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


@pytest.mark.large
def test_a_tensor_of_more_than_two_to_the_31_bytes():
    numel = 2**30 + 2**20 + 7  # elements of two bytes
    slow, fast = torch.zeros(numel, dtype=torch.bfloat16), torch.ones(numel, dtype=torch.bfloat16)
    interpolate_([slow], [fast], 0.25)
    assert bool((slow == 0.25).all())
    assert bool((fast == 0.25).all())


def test_the_number_of_threads_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    before = [[torch.randn(n, generator=generator) for n in (100_003, 7, 250_001)] for _ in range(2)]
    results = []
    for number in (1, 2):  # conftest.py sets it back
        torch.set_num_threads(number)
        slow, fast = ([t.clone() for t in tensors] for tensors in before)
        interpolate_(slow, fast, 0.3)
        results.append(slow)
    assert all(map(torch.equal, *results))


META = torch.zeros(2, device="meta")
REFUSED: dict[str, tuple[list[Tensor], list[Tensor], float]] = {
    "same length": ([torch.zeros(2)], [], 0.5),
    **{f"weight should lie in .*got {w}": ([torch.zeros(2)], [torch.ones(2)], w) for w in (-0.1, 1.1, float("nan"))},
    r"\[1\] has shape \(2,\) and fast\[1\] \(1,\)": ([torch.zeros(2)], [torch.ones(1)], 0.5),  # would be broadcast
    r"\[1\] has shape \(2,\) and fast\[1\] \(3,\)": ([META], [torch.ones(3, device="meta")], 0.5),
    r"slow\[1\] is torch.int64": ([torch.zeros(2, dtype=torch.int64)], [torch.zeros(2, dtype=torch.int64)], 0.5),
    r"slow\[1\] is torch.float32 and fast\[1\] torch.complex64": ([torch.zeros(2)], [torch.zeros(2) + 0j], 0.5),
    r"slow\[1\] is on cpu and fast\[1\] on meta": ([torch.zeros(2)], [META], 0.5),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_are_refused_before_anything_changes(message: str):
    slow, fast, weight = REFUSED[message]
    good = torch.zeros(2), torch.ones(2)
    with pytest.raises(ValueError, match=message):
        interpolate_([good[0], *slow], [good[1], *fast], weight)
    assert [t.tolist() for t in good] == [[0.0] * 2, [1.0] * 2]


# ------------------------------------------------------------------------------------------------- who takes which


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which way was taken for how many pairs, in order."""
    made: list[tuple[str, int]] = []

    def count(way: str) -> None:
        run = getattr(ops, f"_interpolate_{way}")
        monkeypatch.setattr(ops, f"_interpolate_{way}", lambda s, *rest: (run(s, *rest), made.append((way, len(s)))))

    count("native")
    count("foreach")
    return made


NHWC = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
ROUTES = {
    "contiguous": (lambda: (torch.zeros(3, 4), torch.ones(3, 4)), True),
    "transposed alike": (lambda: (torch.zeros(3, 4).t(), torch.ones(3, 4).t()), True),
    "channels_last alike": (lambda: (NHWC * 0, NHWC + 0), True),
    "parameter": (lambda: (torch.zeros(3), torch.nn.Parameter(torch.ones(3))), True),
    "bf16 with fp32": (lambda: (torch.zeros(3), torch.ones(3, dtype=torch.bfloat16)), True),
    "empty": (lambda: (torch.zeros(0, 3), torch.ones(0, 3)), True),
    "scalar": (lambda: (torch.zeros(()), torch.ones(())), True),
    "transposed unlike": (lambda: (torch.zeros(4, 4), torch.ones(4, 4).t()), False),
    "gaps": (lambda: (torch.zeros(6)[::2], torch.ones(6)[::2]), False),
    "complex": (lambda: (torch.zeros(3) + 0j, torch.ones(3) + 0j), False),
    "fp32 with fp64": (lambda: (torch.zeros(3, dtype=torch.float64), torch.ones(3)), False),
    "subclass": (lambda: tuple(TwoTensor(make(3), make(3)) for make in (torch.zeros, torch.ones)), False),
}


@needs_kernel
@pytest.mark.parametrize("name", sorted(ROUTES))
def test_the_kernel_takes_what_it_can_and_foreach_the_rest(name: str, calls: list[tuple[str, int]]):
    make, native = ROUTES[name]
    slow, fast = make()
    versions = slow._version, fast._version
    interpolate_([slow], [fast], 0.5)
    assert calls[-1] == ("native" if native else "foreach", 1)
    assert bool((slow == fast).all())
    if name != "subclass":  # a graph built before has to notice, whoever writes
        assert slow._version > versions[0]
        assert fast._version > versions[1]


@needs_kernel
@pytest.mark.parametrize("odd", [name for name, (_, native) in ROUTES.items() if not native])
def test_a_list_with_an_odd_pair_goes_to_foreach_as_a_whole(odd: str, calls: list[tuple[str, int]]):
    names = [name for name, (_, native) in ROUTES.items() if native] * 20
    slow, fast = (list(tensors) for tensors in zip(*(ROUTES[n][0]() for n in [*names, odd, *names]), strict=True))
    interpolate_(slow, fast, 0.25)
    assert calls[-1] == ("foreach", 2 * len(names) + 1)
    assert all(bool((s == 0.25).all()) and bool((f == 0.25).all()) for s, f in zip(slow, fast, strict=True))


@needs_kernel
def test_a_kernel_that_fails_is_an_error_and_not_a_slower_path(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError("launch failed")

    monkeypatch.setattr(torch.ops.torch_gradmatch, "interpolate_", SimpleNamespace(default=fail))
    monkeypatch.setattr(ops, "_interpolate_foreach", lambda *_: pytest.fail("a slower path was tried"))
    with pytest.raises(RuntimeError, match="launch failed"):
        interpolate_([torch.zeros(3)], [torch.ones(3)], 0.5)


@pytest.mark.parametrize("beside", [None, "complex", "subclass"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_weights_tied_by_their_storage_move_to_the_same_place(wide: torch.dtype, beside: str | None):
    """Set before the other slow copy was moved, they would go only weight^2 of the way there."""
    a, b = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(2))
    b.data = a.data
    slow, fast = [torch.zeros(4), torch.zeros(4, dtype=wide)], [a, b]
    if beside:
        odd = ROUTES[beside][0]()
        slow.append(odd[0])
        fast.append(odd[1])
    interpolate_(slow, fast, 0.5)
    assert a.data_ptr() == b.data_ptr()
    assert a.tolist() == b.tolist() == slow[0].tolist() == slow[1].tolist() == [0.0, 0.5, 1.0, 1.5]
    assert all(bool((s == 0.5).all()) for s in slow[2:])


def test_tensors_on_several_devices_in_one_call():
    slow, fast = ([make(3), make(3, device="meta"), make(3)] for make in (torch.zeros, torch.ones))
    interpolate_(slow, fast, 0.5)
    assert all(t.tolist() == [0.5] * 3 for t in (*slow[::2], *fast[::2]))


# ------------------------------------------------------------------------------------------------- the operator itself


BLOCK = torch.arange(12.0)


@needs_kernel
@pytest.mark.parametrize(
    ("slow", "fast", "weight", "message"),
    [
        (lambda: [torch.zeros(2)], list, 0.5, "same length"),
        (lambda: [torch.zeros(2)], lambda: [torch.zeros(2)], float("nan"), r"weight should lie in \[0, 1\]"),
        (lambda: [torch.zeros(2, 3)], lambda: [torch.zeros(3, 2).t()], 0.5, "same sizes and strides"),
        (lambda: [torch.zeros(4)[::2]], lambda: [torch.zeros(4)[::2]], 0.5, "no gaps"),
        (lambda: [torch.zeros(1).expand(4)], lambda: [torch.zeros(1).expand(4)], 0.5, "no gaps"),
        (lambda: [torch.zeros(2, dtype=torch.int64)], lambda: [torch.zeros(2, dtype=torch.int64)], 0.5, "dtypes"),
        (lambda: [torch.zeros(2)], lambda: [torch.zeros(2, device="meta")], 0.5, "is on cpu and .* on meta"),
        (lambda: [torch.zeros(2), BLOCK[:6]], lambda: [torch.ones(2), BLOCK[4:10]], 0.5, "share memory"),
        (lambda: [torch.zeros(4), torch.zeros(4)], lambda: [BLOCK[:4], BLOCK[3:7]], 0.5, "share memory"),
    ],
)
def test_the_operator_refuses_what_it_cannot_do_and_writes_nothing(slow, fast, weight, message):
    """By a ValueError, which no error of the kernel itself is: interpolate_ relies on it."""
    good = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match=message):
        torch.ops.torch_gradmatch.interpolate_([good[0], *slow()], [good[1], *fast()], weight)
    assert good[0].tolist() == [0.0] * 3
    assert good[1].tolist() == [1.0] * 3
    assert BLOCK.tolist() == list(range(12))


@needs_kernel
@pytest.mark.parametrize("pair", [*KERNEL_PAIRS[:1], *KERNEL_PAIRS[4:]], ids=str)
def test_opcheck(pair: tuple[torch.dtype, torch.dtype]):
    slow = [torch.zeros(3, 4, dtype=pair[0]), torch.zeros(5, dtype=pair[0])]
    fast = [torch.ones(3, 4, dtype=pair[1]), torch.ones(5, dtype=pair[1])]
    torch.library.opcheck(torch.ops.torch_gradmatch.interpolate_.default, (slow, fast, 0.5))


@pytest.mark.filterwarnings("default")  # what the compiler warns of is not ours
@pytest.mark.parametrize("pair", [*KERNEL_PAIRS[:1], *KERNEL_PAIRS[4:5]], ids=str)
def test_torch_compile_traces_the_function_whole(pair: tuple[torch.dtype, torch.dtype]):
    compiled = torch.compile(interpolate_, backend="aot_eager", fullgraph=True)
    slow, fast = [torch.zeros(3, dtype=pair[0]) for _ in range(2)], [torch.ones(3, dtype=pair[1]) for _ in range(2)]
    compiled(slow, fast, 0.25)
    assert all(t.tolist() == [0.25] * 3 for t in slow + fast)


@needs_kernel
@pytest.mark.parametrize("level", ["baseline", pytest.param("avx2", marks=pytest.mark.large)])
def test_every_instruction_set_gives_the_formula(level: str):
    """The choice is made once in a process, so each level below the processor's own, which runs here, has its own."""
    selected = ("to_a_rounding", "rounds_as_torch", "round_trip", "infinity", "subnormal", "overflows", "tiny")
    command = [sys.executable, "-m", "pytest", "-q", "-k", f"({' or '.join(selected)}) and not instruction", __file__]
    environment = os.environ | {"TORCH_GRADMATCH_CPU_LEVEL": level}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
