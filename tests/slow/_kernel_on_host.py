"""The text of the CUDA kernel as a library for this CPU, and checks of what it does."""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_ops import KERNEL_PAIRS, assert_is_the_formula, draw
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
    command += [*(["-mfma"] if fused else []), *flags, "-I", str(KERNEL.parent), str(sources / "on_host.cpp")]
    command += ["-o", str(output)]
    done = subprocess.run(command, env=without_preload(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return output


def without_preload() -> dict[str, str]:
    """The environment without the sanitizers' libraries, which ``make test-sanitize`` loads before Python."""
    return {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}


LIBRARY = ["-shared", "-fPIC", "-fvisibility=hidden"]


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
    memory = draw([end + GAP], dtype, "contiguous", generator)
    inside = torch.zeros(end + GAP, dtype=torch.bool)
    for start, size in zip(starts, sizes, strict=True):
        inside[start : start + size] = True
    return Arena(memory, starts, sizes, inside)


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
    kernel: Kernel,
    pair: int,
    sizes: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    weight: float,
    *,
    order: int = 0,
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


LARGEST = MAX_BLOCKS * 2048  # of the pair with the smallest chunks
