"""The text of the CUDA kernel, compiled for this CPU by the C++ compiler; and that such a run finds planted faults.

``make test-sanitize`` compiles it with ASan and UBSan. Races and what nvcc makes of the text are not covered.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_ops import KERNEL_PAIRS, assert_is_the_formula, draw, needs_kernel
from torch import Tensor

from torch_gradmatch import native_status
from torch_gradmatch.slow.ops import interpolate_

SOURCES = Path(__file__).parent / "on_host"
KERNEL = Path(__file__).parents[2] / "csrc" / "cuda" / "kernel.h"
COMPILER = shlex.split(os.environ.get("CXX", "")) or [c for c in map(shutil.which, ("c++", "g++", "clang++")) if c][:1]
SANITIZED = "TORCH_GRADMATCH_SANITIZE" in os.environ
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-g"]

TABLE_SIZE = 128
MAX_BLOCKS = 2**31 - 1
LARGEST = MAX_BLOCKS * 2048  # of the pair with the smallest chunks
GAP = 64  # elements around each tensor that nobody may write; keeps the alignment
OFFSETS = [(0, 0), (1, 0), (0, 1), (1, 1)]  # of slow and fast from where they are aligned
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# ------------------------------------------------------------------------------------------ the kernel as a library


class Span(ctypes.Structure):
    """One pair of tensors, by address."""

    _fields_ = [("slow", ctypes.c_int64), ("fast", ctypes.c_int64), ("numel", ctypes.c_int64)]


class Planned(ctypes.Structure):
    """What a launch was told of one pair; ``blocks`` are those of the whole launch."""

    _fields_ = [(name, ctypes.c_int64) for name in ("launch", "blocks", "first_block", "slow", "fast", "numel")]


class Kernel:
    """The shared library, with the pairs of dtypes by their place in KERNEL_PAIRS."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        int64, address = ctypes.c_int64, ctypes.c_void_p
        call = [ctypes.c_int, ctypes.POINTER(Span), int64]
        for name, more in (
            ("run", [ctypes.c_double, ctypes.c_uint64]),
            ("run_blocks", [ctypes.c_double, ctypes.POINTER(ctypes.c_uint32), int64]),
            ("plan", [ctypes.POINTER(Planned)]),
        ):
            getattr(self.library, name).argtypes = call + more
            getattr(self.library, name).restype = int64
        for name in ("from_half_precision", "to_half_precision"):
            getattr(self.library, name).argtypes = [ctypes.c_int, address, address, int64]
            getattr(self.library, name).restype = None
        self.chunks = [self.library.chunk_of(pair) for pair in range(len(KERNEL_PAIRS))]

    def run(self, pair: int, spans: Sequence[Span], weight: float, order: int = 0) -> int:
        return self.library.run(pair, (Span * len(spans))(*spans), len(spans), weight, order)

    def run_blocks(self, pair: int, spans: Sequence[Span], weight: float, blocks: Sequence[int]) -> int:
        chosen = (ctypes.c_uint32 * len(blocks))(*blocks)
        return self.library.run_blocks(pair, (Span * len(spans))(*spans), len(spans), weight, chosen, len(blocks))

    def plan(self, pair: int, spans: Sequence[Span]) -> tuple[int, list[Planned]]:
        planned = (Planned * len(spans))()
        return self.library.plan(pair, (Span * len(spans))(*spans), len(spans), planned), list(planned)


def compile_kernel(output: Path, *flags: str, sources: Path = SOURCES) -> Path:
    # The CPU kernel fuses multiply and add where the processor can, as a GPU does: so they agree to the bit.
    avx2 = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # AVX2 or AVX512
    fused = avx2 and os.environ.get("TORCH_GRADMATCH_CPU_LEVEL") != "baseline"
    command = [*COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=fast"]
    command += ["-shared", "-fPIC", "-fvisibility=hidden"] if output.suffix == ".so" else []
    command += [*(["-mfma"] if fused else []), *flags, "-I", str(KERNEL.parent), str(sources / "on_host.cpp")]
    command += ["-o", str(output)]
    done = subprocess.run(command, env=without_preload(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return output


def without_preload() -> dict[str, str]:
    """The environment without the sanitizers' libraries, which ``make test-sanitize`` loads before Python."""
    return {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}


# ------------------------------------------------------------------------------------------------------- its checks


class Arena(NamedTuple):
    """Tensors in one piece of memory, and which elements of it are theirs."""

    memory: Tensor
    starts: list[int]
    sizes: Sequence[int]
    inside: Tensor

    def addresses(self) -> list[int]:
        return [self.memory.data_ptr() + start * self.memory.element_size() for start in self.starts]


def lay_out(sizes: Sequence[int], offsets: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Arena:
    starts, end = [], 0
    for size, offset in zip(sizes, offsets, strict=True):
        starts.append((end + 2 * GAP - 1) // GAP * GAP + offset)
        end = starts[-1] + size
    inside = torch.zeros(end + GAP, dtype=torch.bool)
    for start, size in zip(starts, sizes, strict=True):
        inside[start : start + size] = True
    return Arena(draw([end + GAP], dtype, "contiguous", generator), starts, sizes, inside)


@contextmanager
def fenced(arenas: Sequence[Arena]) -> Iterator[None]:
    """Where there is ASan, it reports who reads or writes between the tensors."""
    asan, pieces = ctypes.CDLL(None), []
    for memory, starts, sizes, _ in arenas if SANITIZED else []:
        ends = [0, *(start + size for start, size in zip(starts, sizes, strict=True))]
        for begin, end in zip(ends, [*starts, len(memory)], strict=True):
            address, length = memory[begin:end].data_ptr(), memory[begin:end].nbytes
            pieces.append((ctypes.c_void_p(address), ctypes.c_size_t(length)))
    for piece in pieces:
        asan.__asan_poison_memory_region(*piece)
    try:
        yield
    finally:
        for piece in pieces:
            asan.__asan_unpoison_memory_region(*piece)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal with the signs of zeros; NaN is NaN."""
    bits = BITS[a.element_size()]
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def check(
    kernel: Kernel, pair: int, sizes: Sequence[int], offsets: Sequence[tuple[int, int]], weight: float, order: int = 0
) -> None:
    """The kernel moves just the tensors, by the formula and as the CPU kernel does, in as few launches as it can."""
    generator = torch.Generator().manual_seed(order)
    arenas = [
        lay_out(sizes, [offset[side] for offset in offsets], dtype, generator)
        for side, dtype in enumerate(KERNEL_PAIRS[pair])
    ]
    spans = [Span(*span) for span in zip(*(arena.addresses() for arena in arenas), sizes, strict=True)]
    before = [arena.memory.clone() for arena in arenas]
    with fenced(arenas):
        launches = kernel.run(pair, spans, weight, order)
    assert launches == -(-len(sizes) // TABLE_SIZE)
    for arena, old in zip(arenas, before, strict=True):
        assert same_bits(arena.memory[~arena.inside], old[~arena.inside])
    moved = [arena.memory[arena.inside] for arena in arenas]
    expected = [old[arena.inside] for arena, old in zip(arenas, before, strict=True)]
    assert_is_the_formula(*moved, *expected, weight)
    if native_status().cpu:
        interpolate_(expected[:1], expected[1:], weight)
        assert all(map(same_bits, moved, expected))


def check_large(kernel: Kernel, pair: int, offset: int) -> None:
    """The first, the last and the blocks where 32 bits end, of tensors with more than 2^32 elements.

    Only these are run, so only their memory becomes real.
    """
    numel, chunk, generator = 2**32 + 2**31 + 12_345, kernel.chunks[pair], torch.Generator().manual_seed(pair)
    large = [reserve(offset + numel, dtype)[offset:] for dtype in KERNEL_PAIRS[pair]]
    small = [torch.zeros(5, dtype=dtype) for dtype in KERNEL_PAIRS[pair]]  # takes block 0
    begins = [0, 2**31 - chunk, 2**31, 2**32 - chunk, 2**32, (numel - 1) // chunk * chunk]
    windows = [slice(max(begin - GAP, 0), begin + chunk + GAP) for begin in begins]
    for tensor in large:
        for window in windows:
            tensor[window] = draw([len(tensor[window])], tensor.dtype, "contiguous", generator)
    before = [[tensor[window].clone() for window in windows] for tensor in large]
    spans = [Span(s.data_ptr(), f.data_ptr(), s.numel()) for s, f in (small, large)]
    assert kernel.run_blocks(pair, spans, 0.3, [1 + begin // chunk for begin in begins]) == 1
    for i, (begin, window) in enumerate(zip(begins, windows, strict=True)):
        moved = [tensor[window] for tensor in large]
        expected = [old[i] for old in before]
        at = torch.arange(window.start, window.start + len(moved[0]))
        inside = sum((b <= at) & (at < b + chunk) for b in begins).bool()
        assert bool(inside[begin - window.start :][: min(chunk, numel - begin)].all())
        assert_is_the_formula(*(m[inside] for m in moved), *(e[inside] for e in expected), 0.3)
        assert all(same_bits(m[~inside], e[~inside]) for m, e in zip(moved, expected, strict=True))


def reserve(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros whose memory becomes real where it is touched."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.13 has the name
    try:
        memory = mmap.mmap(-1, numel * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError as error:
        pytest.skip(f"this system gives no address space without memory: {error}")
    return torch.frombuffer(memory, dtype=dtype)


def check_plan(kernel: Kernel, pair: int, numels: Sequence[int]) -> None:
    """Against the same thing said once more: a launch is closed only when another tensor does not fit into it."""
    spans = [Span(1 + i, 2**62 + i, numel) for i, numel in enumerate(numels)]
    launches, planned = kernel.plan(pair, spans)
    expected: list[list[tuple[int, Span]]] = [[]]
    blocks = 0
    for span in spans:
        needed = -(-span.numel // kernel.chunks[pair])
        if len(expected[-1]) == TABLE_SIZE or blocks + needed > MAX_BLOCKS:
            expected.append([])
            blocks = 0
        expected[-1].append((blocks, span))
        blocks += needed
    assert launches == len(expected)
    entries = iter(planned)
    for number, launch in enumerate(expected):
        last_block, last = launch[-1]
        blocks = last_block + -(-last.numel // kernel.chunks[pair])
        for first_block, span in launch:
            entry = next(entries)
            assert (entry.launch, entry.blocks, entry.first_block) == (number, blocks, first_block)
            assert (entry.slow, entry.fast, entry.numel) == (span.slow, span.fast, span.numel)
        assert 0 < blocks <= MAX_BLOCKS


WEIGHTS = [0.0, 0.3, 0.5, 0.7, 1.0]

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler: set CXX")


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    library = tmp_path_factory.mktemp("kernel") / "kernel.so"
    return Kernel(compile_kernel(library, "-O2", *(SANITIZE if SANITIZED else [])))


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


@pairs
def test_one_to_thousands_of_tensors(kernel: Kernel, pair: int):
    for number in (1, 2, 127, 128, 129, 256, 257, 3000):
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
def test_conversions_from_and_to_half_precision_are_those_of_torch(kernel: Kernel, dtype: torch.dtype):
    """Every number of half precision, and every upper half of a float with all lower halves that decide a rounding."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    half, wide = every.to(torch.int16).view(dtype), torch.empty(2**16)
    kernel.library.from_half_precision(dtype == torch.bfloat16, half.data_ptr(), wide.data_ptr(), 2**16)
    assert same_bits(wide, half.float())
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    any_other = torch.randint(2**16, every.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([every << 16 | low for low in [*lower, any_other]]).view(torch.float32)
    narrow = torch.empty_like(wide, dtype=dtype)
    kernel.library.to_half_precision(dtype == torch.bfloat16, wide.data_ptr(), narrow.data_ptr(), wide.numel())
    assert same_bits(narrow, wide.to(dtype))


# ------------------------------------------------------------------------------------------------- planted faults


class Fault(NamedTuple):
    """An expression of kernel.h that becomes another; what the sanitized program says of it; a check that fails."""

    expression: str
    planted: str
    report: str | None = None
    check: Callable[[Kernel], None] | None = None


OUTSIDE, MISALIGNED, WRONG = "heap-buffer-overflow", "misaligned address", "wrong result"
SLOW_ALIGNED = "table.slow[low] % sizeof(SlowVector) == 0"
FAST_ALIGNED = "table.fast[low] % sizeof(FastVector) == 0"
FIRST_BLOCK = "table.first_block[middle] <= blockIdx.x"
BEGIN = "static_cast<int64_t>(blockIdx.x - table.first_block[low]) * kChunk"
NUMEL = "static_cast<int64_t>(table.numel_high[low]) << 32 | table.numel_low[low]"


def moving(*sizes: int, offset: int = 0) -> Callable[[Kernel], None]:
    """At weight 0.5, where compiled without optimization the rounding is the same, fused or not."""
    return lambda kernel: check(kernel, 0, sizes, [(0, 0), (offset, offset)], 0.5)


def moving_large(kernel: Kernel) -> None:
    check_large(kernel, 2, 0)


FAULTS = {
    "one element too many": Fault("i < n", "i <= n", OUTSIDE, moving(5, 4095, offset=1)),
    "one element too few": Fault("i < n", "i < n - 1", WRONG, moving(5, 5)),
    "one vector too many": Fault("v < vectors", "v <= vectors", OUTSIDE, moving(8, 4092)),
    "an element left out behind the vectors": Fault("vectors * kWidth", "vectors * kWidth + 1", WRONG, moving(5, 5)),
    "half a chunk taken for a whole one": Fault("n == kChunk", "n >= kChunk / 2", OUTSIDE),
    "a chunk begins one late": Fault(BEGIN, f"{BEGIN} + 1", MISALIGNED, moving(5, 4095, offset=1)),
    "no alignment asked for": Fault(f"{SLOW_ALIGNED} && {FAST_ALIGNED}", "true", MISALIGNED),
    "no alignment of slow asked for": Fault(SLOW_ALIGNED, "true", MISALIGNED),
    "no alignment of fast asked for": Fault(FAST_ALIGNED, "true", MISALIGNED),
    "the tensor before": Fault(FIRST_BLOCK, FIRST_BLOCK.replace("<=", "<"), WRONG, moving(5, 5)),
    "no block for a tail": Fault("(numel + kChunk - 1) / kChunk", "numel / kChunk", WRONG),
    "half of numel read": Fault(NUMEL, "static_cast<int64_t>(table.numel_low[low])", None, moving_large),
    "half of numel written": Fault(
        "static_cast<uint16_t>(span.numel >> 32)", "uint16_t{0}", None, lambda kernel: check_plan(kernel, 0, [2**32])
    ),
    "half of where a chunk begins": Fault(BEGIN, f"static_cast<uint32_t>({BEGIN})", None, moving_large),
    "more blocks than a launch takes": Fault(
        "blocks + needed > kMaxBlocks", "false", None, lambda kernel: check_plan(kernel, 0, [1, LARGEST, LARGEST])
    ),
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
    return Kernel(compile_kernel(faulty_sources / "faulty.so", "-O0", sources=faulty_sources))


@pytest.mark.parametrize("name", [None, *(name for name, fault in FAULTS.items() if fault.report)])
def test_sanitizers_and_results_tell_planted_faults_and_nothing_else(sanitized_program: Path, name: str | None):
    number = 0 if name is None else 1 + list(FAULTS).index(name)
    environment = without_preload() | {"FAULT": str(number), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sanitized_program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode == 0) == (name is None), done.stderr
    assert (FAULTS[name].report or "") in done.stderr if name else not done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for address space without memory")
@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.check])
def test_the_checks_here_tell_planted_faults(faulty_kernel: Kernel, name: str):
    number, tells = ctypes.c_int.in_dll(faulty_kernel.library, "fault"), FAULTS[name].check
    assert tells is not None
    tells(faulty_kernel)
    number.value = 1 + list(FAULTS).index(name)
    try:
        with pytest.raises(AssertionError):
            tells(faulty_kernel)
    finally:
        number.value = 0
