"""The text of the CUDA kernel, compiled for this CPU by the C++ compiler; and that such a run finds planted faults.

``make test-sanitize`` compiles it with ASan and UBSan. Races and what nvcc makes of the text are not covered.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from _kernel_on_host import (
    COMPILER,
    KERNEL,
    LARGEST,
    LIBRARY,
    MAX_BLOCKS,
    OFFSETS,
    SANITIZE,
    SANITIZED,
    SOURCES,
    Kernel,
    Span,
    check,
    check_large,
    check_plan,
    compile_kernel,
    same_bits,
    without_preload,
)
from hypothesis import given, settings
from test_ops import KERNEL_PAIRS, needs_kernel

from torch_gradmatch.slow.ops import interpolate_

WEIGHTS = [0.0, 0.3, 0.5, 0.7, 1.0]

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler: set CXX")


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    library = tmp_path_factory.mktemp("kernel") / "kernel.so"
    return Kernel(compile_kernel(library, *LIBRARY, "-O2", *(SANITIZE if SANITIZED else [])))


def sizes_around(chunk: int) -> list[int]:
    """Below, at and above the widths of vectors (1 to 8), the number of threads and what a block takes."""
    return [*range(1, 10), 255, 256, 257, chunk - 9, chunk - 1, chunk, chunk + 1, chunk + 8, 2 * chunk, 3 * chunk + 9]


pairs = pytest.mark.parametrize("pair", range(len(KERNEL_PAIRS)), ids=[str(p) for p in KERNEL_PAIRS])


@pytest.mark.parametrize("weight", WEIGHTS)
@pairs
def test_is_the_formula_at_every_size_and_alignment(kernel: Kernel, pair: int, weight: float):
    sizes = [size for size in sizes_around(kernel.chunks[pair]) for _ in OFFSETS]
    check(kernel, pair, sizes, OFFSETS * (len(sizes) // len(OFFSETS)), weight)


@settings(deadline=None, max_examples=150)
@given(
    pair=st.integers(0, len(KERNEL_PAIRS) - 1),
    tensors=st.lists(
        st.tuples(
            st.one_of(st.integers(1, 40), st.integers(1, 10_000), st.sampled_from(sizes_around(8192))),
            st.tuples(st.integers(0, 9), st.integers(0, 9)),
        ),
        min_size=1,
        max_size=150,
    ),
    weight=st.one_of(st.sampled_from(WEIGHTS), st.floats(0.0, 1.0)),
    order=st.integers(0, 2**32),
)
def test_is_the_formula_in_any_order_of_threads(kernel: Kernel, pair, tensors, weight, order):
    sizes, offsets = zip(*tensors, strict=True)
    check(kernel, pair, sizes, offsets, weight, order=order)


@pytest.mark.parametrize("number", [1, 2, 127, 128, 129, 256, 257, 3000])
@pairs
def test_one_to_thousands_of_tensors(kernel: Kernel, pair: int, number: int):
    check(kernel, pair, [1 + i % 5 for i in range(number)], [OFFSETS[i % 4] for i in range(number)], 0.3)


@needs_kernel
@pytest.mark.parametrize("weight", WEIGHTS)
@pairs
def test_is_the_cpu_kernel_on_special_numbers(kernel: Kernel, pair: int, weight: float):
    """Every two of them meet, in vectors and, misaligned, one by one."""
    dtypes = KERNEL_PAIRS[pair]
    special = [float("nan"), float("inf"), 0.0, 1.0, 1 + 2**-7, 1 / 3, 1e-45, 1e-40, 6e-8, 3e-5, 65504.0, 65519.0, 3e38]
    for dtype in dtypes:
        limits = torch.finfo(dtype)
        special += [limits.max, limits.smallest_normal, limits.smallest_normal * (1 - limits.eps), limits.eps]
    values = torch.tensor([sign * value for value in special for sign in (1, -1)], dtype=torch.float64)
    for offset in (0, 1):
        slow, fast = (
            torch.cat([torch.zeros(offset, dtype=dtype), side.to(dtype)])[offset:]
            for dtype, side in zip(dtypes, torch.cartesian_prod(values, values).T, strict=True)
        )
        expected_slow, expected_fast = slow.clone(), fast.clone()
        assert kernel.run(pair, [Span(slow.data_ptr(), fast.data_ptr(), slow.numel())], weight) == 1
        interpolate_([expected_slow], [expected_fast], weight)
        assert same_bits(slow, expected_slow)
        assert same_bits(fast, expected_fast)


# ------------------------------------------------------------------------------------------------- large tensors


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for address space without memory")
@pytest.mark.parametrize("offset", [0, 1])
@pairs
def test_more_than_two_to_the_32_elements(kernel: Kernel, pair: int, offset: int):
    check_large(kernel, pair, offset)


@settings(deadline=None, max_examples=100)
@given(
    pair=st.integers(0, len(KERNEL_PAIRS) - 1),
    numels=st.lists(st.one_of(st.integers(1, 9000), st.integers(1, LARGEST)), min_size=1, max_size=300),
)
def test_every_tensor_is_in_one_launch_and_no_launch_is_too_large(kernel: Kernel, pair, numels):
    check_plan(kernel, pair, numels)


@pairs
def test_what_is_just_not_too_large_for_a_launch(kernel: Kernel, pair: int):
    chunk = kernel.chunks[pair]
    check_plan(kernel, pair, [MAX_BLOCKS * chunk])
    check_plan(kernel, pair, [1, (MAX_BLOCKS - 1) * chunk])
    check_plan(kernel, pair, [1, (MAX_BLOCKS - 1) * chunk + 1, 1])
    check_plan(kernel, pair, [2**30 * chunk] * 5)


@pairs
def test_what_is_too_large_is_refused_before_anything_is_launched(kernel: Kernel, pair: int):
    slow, fast = (torch.full((3,), float(side), dtype=dtype) for side, dtype in enumerate(KERNEL_PAIRS[pair]))
    small = Span(slow.data_ptr(), fast.data_ptr(), 3)
    assert kernel.run(pair, [small, small, Span(0, 0, MAX_BLOCKS * kernel.chunks[pair] + 1)], 0.5) == -1 - 2
    assert slow.tolist() == [0.0] * 3
    assert fast.tolist() == [1.0] * 3


# ------------------------------------------------------------------------------------- conversions played by on_host.h


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_half_precision_widens_as_in_torch(kernel: Kernel, dtype: torch.dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(2**16)
    kernel.library.from_half_precision(dtype == torch.bfloat16, every.data_ptr(), wide.data_ptr(), 2**16)
    assert same_bits(wide, every.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_floats_round_to_half_precision_as_in_torch(kernel: Kernel, dtype: torch.dtype):
    """Every bit pattern of the upper half of a float, with all lower halves that decide a rounding, and any others."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    any_other = torch.randint(2**16, upper.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([upper | half for half in [*lower, any_other]]).view(torch.float32)
    narrow = torch.empty_like(wide, dtype=dtype)
    kernel.library.to_half_precision(dtype == torch.bfloat16, wide.data_ptr(), narrow.data_ptr(), wide.numel())
    assert same_bits(narrow, wide.to(dtype))


# ------------------------------------------------------------------------------------------------- planted faults


class Fault(NamedTuple):
    """An expression of kernel.h that becomes another, and what the sanitized program says of it, if it can."""

    expression: str
    planted: str
    report: str | None = None


SLOW_ALIGNED = "table.slow[low] % sizeof(SlowVector) == 0"
FAST_ALIGNED = "table.fast[low] % sizeof(FastVector) == 0"
FIRST_BLOCK = "table.first_block[middle] <= blockIdx.x"
BEGIN = "static_cast<int64_t>(blockIdx.x - table.first_block[low]) * kChunk"
NUMEL = "static_cast<int64_t>(table.numel_high[low]) << 32 | table.numel_low[low]"
FAULTS = {
    "one element too many": Fault("i < n", "i <= n", "heap-buffer-overflow"),
    "one element too few": Fault("i < n", "i < n - 1", "wrong result"),
    "one vector too many": Fault("v < vectors", "v <= vectors", "heap-buffer-overflow"),
    "an element left out behind the vectors": Fault("vectors * kWidth", "vectors * kWidth + 1", "wrong result"),
    "half a chunk taken for a whole one": Fault("n == kChunk", "n >= kChunk / 2", "heap-buffer-overflow"),
    "a chunk begins one late": Fault(BEGIN, f"{BEGIN} + 1", "misaligned address"),
    "no alignment asked for": Fault(f"{SLOW_ALIGNED} && {FAST_ALIGNED}", "true", "misaligned address"),
    "no alignment of slow asked for": Fault(SLOW_ALIGNED, "true", "misaligned address"),
    "no alignment of fast asked for": Fault(FAST_ALIGNED, "true", "misaligned address"),
    "the tensor before": Fault(FIRST_BLOCK, FIRST_BLOCK.replace("<=", "<"), "wrong result"),
    "no block for a tail": Fault("(numel + kChunk - 1) / kChunk", "numel / kChunk", "wrong result"),
    "half of numel read": Fault(NUMEL, "static_cast<int64_t>(table.numel_low[low])"),
    "half of numel written": Fault("static_cast<uint16_t>(span.numel >> 32)", "uint16_t{0}"),
    "half of where a chunk begins": Fault(BEGIN, f"static_cast<uint32_t>({BEGIN})"),
    "more blocks than a launch takes": Fault("blocks + needed > kMaxBlocks", "false"),
}


DECLARE_FAULT = """
#include <cstdlib>
extern "C" {
__attribute__((visibility("default"))) inline int fault = std::getenv("FAULT") ? std::atoi(std::getenv("FAULT")) : 0;
}
"""


@pytest.fixture(scope="session")
def faulty_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with all faults, each behind its number, so that one compilation has all of them, and none at 0."""
    original = KERNEL.read_text()
    text = original.replace("#pragma once", "#pragma once\n" + DECLARE_FAULT)
    for number, fault in enumerate(FAULTS.values(), start=1):
        assert original.count(fault.expression) == 1, (
            f"kernel.h should have {fault.expression!r} once, or FAULTS change"
        )
        text = text.replace(fault.expression, f"(fault == {number} ? {fault.planted} : {fault.expression})")
        assert f"fault == {number} " in text
    sources = tmp_path_factory.mktemp("faulty")
    (sources / "kernel.h").write_text(text)
    for name in ("on_host.h", "on_host.cpp"):
        shutil.copy(SOURCES / name, sources)
    return sources


@pytest.fixture(scope="session")
def sanitized_program(faulty_sources: Path) -> Path:
    empty = faulty_sources / "empty.cpp"
    empty.write_text("int main() { return 0; }")
    command = [*COMPILER, *SANITIZE, str(empty), "-o", str(empty.with_suffix(""))]
    if subprocess.run(command, env=without_preload(), capture_output=True, timeout=300, check=False).returncode:
        pytest.skip("the C++ compiler has no sanitizers")
    return compile_kernel(faulty_sources / "program", "-O0", *SANITIZE, sources=faulty_sources)


@pytest.fixture(scope="session")
def faulty_kernel(faulty_sources: Path) -> Kernel:
    return Kernel(compile_kernel(faulty_sources / "faulty.so", *LIBRARY, "-O0", sources=faulty_sources))


@pytest.mark.parametrize("name", [None, *(name for name, fault in FAULTS.items() if fault.report)])
def test_sanitizers_and_results_tell_planted_faults_and_nothing_else(sanitized_program: Path, name: str | None):
    number = 0 if name is None else 1 + list(FAULTS).index(name)
    environment = without_preload() | {"FAULT": str(number), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sanitized_program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode == 0) == (name is None), done.stderr
    assert (FAULTS[name].report or "") in done.stderr if name else not done.stderr


CHECKS = {  # at weight 0.5, where compiled without optimization the rounding is the same, fused or not
    "one element too many": lambda kernel: check(kernel, 0, [5, 4095], [(0, 0), (1, 1)], 0.5),
    "one vector too many": lambda kernel: check(kernel, 0, [8, 4092], [(0, 0), (0, 0)], 0.5),
    "a chunk begins one late": lambda kernel: check(kernel, 0, [5, 4095], [(1, 1), (1, 1)], 0.5),
    "the tensor before": lambda kernel: check(kernel, 0, [5, 5], [(0, 0), (0, 0)], 0.5),
    "half of numel read": lambda kernel: check_large(kernel, 2, 0),
    "half of numel written": lambda kernel: check_plan(kernel, 0, [2**32]),
    "half of where a chunk begins": lambda kernel: check_large(kernel, 2, 0),
    "more blocks than a launch takes": lambda kernel: check_plan(kernel, 0, [1, LARGEST, LARGEST]),
}


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for address space without memory")
@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_here_tell_planted_faults(faulty_kernel: Kernel, name: str):
    fault = ctypes.c_int.in_dll(faulty_kernel.library, "fault")
    CHECKS[name](faulty_kernel)
    fault.value = 1 + list(FAULTS).index(name)
    try:
        with pytest.raises(AssertionError):
            CHECKS[name](faulty_kernel)
    finally:
        fault.value = 0
