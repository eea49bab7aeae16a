r"""The interpolation step of Fish over lists of tensors: one fused native pass where there is a kernel for it.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, Algorithm 1, last line.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from operator import add, attrgetter, le
from typing import NamedTuple

import torch
from torch import Tensor

from torch_gradmatch._foreach import is_sharded, local_of
from torch_gradmatch.slow._native import WHATEVER_TORCH_RAISES, cuda_obstacle, give_up, native_status

__all__ = ["interpolate_"]

# The dtypes of fast weights that the kernels take, by that of the slow ones; interpolate.h has the same table.
_KERNEL_DTYPES = {
    torch.float32: {torch.float32, torch.bfloat16, torch.float16},
    torch.float64: {torch.float64},
    torch.bfloat16: {torch.bfloat16},
    torch.float16: {torch.float16},
}
_PLAIN = {Tensor, torch.nn.Parameter}
_CPU_KERNEL, _CUDA_KERNEL = native_status().cpu, native_status().cuda
_CAST_AT_ONCE = 1 << 18  # elements: copies of small tensors are made together, up to 1 MiB of them

_SHAPE, _DEVICE, _DTYPE, _LAYOUT, _NBYTES = map(attrgetter, ("shape", "device", "dtype", "layout", "nbytes"))


def interpolate_(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    r"""Move the slow weights towards the fast ones and set the fast ones to the result, in place.

    .. math:: \theta \leftarrow \theta + \epsilon\,(\tilde\theta - \theta), \qquad \tilde\theta \leftarrow \theta

    Exact at ``weight`` 0 (the fast weights return to the slow ones) and 1 (the slow weights take the fast ones).
    Pairs that the native kernel does not take (gaps in memory, complex numbers, other dtypes or devices, tensor
    subclasses) go through ``torch._foreach_lerp_`` and ``torch._foreach_copy_``; ``native_status()`` says whether
    there is a kernel at all. An error of the kernel is raised as it is. Of a ``DTensor`` every rank moves its shard.

    Fast tensors may share memory among themselves (weights tied by their storage): all slow ones are moved before
    any fast one is set. Under ``torch.compile`` there is no memory to look at, and nothing is refused for its sake.

    Args:
        slow: :math:`\theta`, any shapes, strides and devices; real or complex floating point.
        fast: :math:`\tilde\theta`, each of the shape and device of its slow tensor; its dtype may be narrower
            (bf16 parameters with fp32 slow weights).
        weight: :math:`\epsilon` in [0, 1].

    Raises:
        ValueError: If the lists differ in length or a pair in shape or device, a pair is not real or complex floating
            point on both sides, or ``weight`` lies outside [0, 1].
        RuntimeError: If a slow tensor shares memory with another tensor, or a tensor's elements with one another.

    Example:
        >>> import torch
        >>> slow, fast = [torch.zeros(2)], [torch.ones(2)]
        >>> interpolate_(slow, fast, 0.25)
        >>> slow[0], fast[0]
        (tensor([0.2500, 0.2500]), tensor([0.2500, 0.2500]))
    """
    if len(slow) != len(fast):
        raise ValueError(f"slow and fast should have the same length (got {len(slow)} and {len(fast)})")
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight should lie in [0, 1] (got {weight!r})")
    if not slow:
        return
    if torch.compiler.is_compiling():
        _check_pairs(slow, fast)
        _interpolate_foreach(slow, fast, weight)
        return
    slow_are_plain = _PLAIN.issuperset(map(type, slow))
    if not slow_are_plain and any(map(is_sharded, slow)):
        _check_shards(slow, fast)
        interpolate_([local_of(s) for s in slow], [local_of(f) for f in fast], weight)
        return
    left: Sequence[int] = range(len(slow))
    if (_CPU_KERNEL if slow[0].is_cpu else _CUDA_KERNEL) and slow_are_plain and _PLAIN.issuperset(map(type, fast)):
        left = _interpolate_native(slow, fast, weight)
    if len(left) == len(slow):
        _interpolate_looking_closer(slow, fast, weight)
    elif left:  # pairs that the kernel does not take, and of which it saw that foreach does, on memory of their own
        _interpolate_foreach([slow[i] for i in left], [fast[i] for i in left], weight)


def _interpolate_native(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> Sequence[int]:
    """Do what the kernel takes and return the indices of the rest; in doubt it does nothing and returns all of them."""
    # The operator looks at every tensor before it writes, and to say what it left costs nothing more. The same look
    # from Python takes as long as the whole call.
    left: Sequence[int] = torch.ops.torch_gradmatch.interpolate_taken_.default(slow, fast, float(weight))
    if not left:
        _mark_as_written(slow, fast)
    elif len(left) < len(slow):
        rest = set(left)
        taken = [i for i in range(len(slow)) if i not in rest]
        _mark_as_written([slow[i] for i in taken], [fast[i] for i in taken])
    return left


def _interpolate_whole(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    torch.ops.torch_gradmatch.interpolate_.default(slow, fast, float(weight))
    _mark_as_written(slow, fast)


def _mark_as_written(slow: Sequence[Tensor], fast: Sequence[Tensor]) -> None:
    # The kernel writes behind autograd's back: a graph built before must notice.
    torch.autograd.graph.increment_version(slow)
    torch.autograd.graph.increment_version(fast)


def _interpolate_looking_closer(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    """Check all that can be wrong, then give each pair to the kernel of its device or to foreach."""
    if not _pairs_are_plain(slow, fast):
        _check_pairs(slow, fast)
    shared = _memory_is_shared(slow, fast)
    if shared or not (_CPU_KERNEL or _CUDA_KERNEL):  # tied by their storage they are right in two passes, not in one
        _interpolate_foreach(slow, fast, weight)
        return
    native: defaultdict[torch.device, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    other = []
    for pair in zip(slow, fast, strict=True):
        if _kernel_takes(*pair):
            native[pair[0].device].append(pair)
        else:
            other.append(pair)
    for pairs in native.values():
        _interpolate_whole([s for s, _ in pairs], [f for _, f in pairs], weight)
    if other:
        _interpolate_foreach([s for s, _ in other], [f for _, f in other], weight)


# ------------------------------------------------------------------------------------------------------ the pairs


def _pairs_are_plain(slow: Sequence[Tensor], fast: Sequence[Tensor]) -> bool:
    """The look that suffices almost always, in a few passes over the lists."""
    everything = [*slow, *fast]
    return (
        list(map(_SHAPE, slow)) == list(map(_SHAPE, fast))
        and len(set(map(_DEVICE, everything))) == 1
        and all(dtype.is_floating_point for dtype in set(map(_DTYPE, everything)))
    )


def _check_pairs(slow: Sequence[Tensor], fast: Sequence[Tensor]) -> None:
    """Check shapes, since foreach would broadcast, and what would fail in the middle."""
    for index, (s, f) in enumerate(zip(slow, fast, strict=True)):
        if s.shape != f.shape:
            shapes = f"slow[{index}] has shape {tuple(s.shape)} and fast[{index}] {tuple(f.shape)}"
            raise ValueError(f"{shapes}: pass pairs of the same shape")
        if s.device != f.device:
            raise ValueError(f"slow[{index}] is on {s.device} and fast[{index}] on {f.device}: move one of them")
        both_real = s.is_floating_point() and f.is_floating_point()
        if not (both_real or (s.is_complex() and f.is_complex())):
            kinds = f"slow[{index}] is {s.dtype} and fast[{index}] {f.dtype}"
            raise ValueError(f"{kinds}; both should be floating point, or both complex")
        if s.is_complex() and (s.is_conj() or f.is_conj()):
            raise ValueError(
                f"slow[{index}] or fast[{index}] is a conjugated view, to which torch._foreach_* cannot write: "
                "store what its resolve_conj() returns"
            )


def _check_shards(slow: Sequence[Tensor], fast: Sequence[Tensor]) -> None:
    """Check that shards are the same parts of the same tensors."""
    for index, (s, f) in enumerate(zip(slow, fast, strict=True)):
        placed = [(t.shape, t.device_mesh, t.placements) if is_sharded(t) else t.shape for t in (s, f)]  # type: ignore[attr-defined]
        if placed[0] != placed[1]:
            raise ValueError(
                f"slow[{index}] and fast[{index}] should be sharded alike (got {placed[0]} and {placed[1]})"
            )


def _kernel_takes(slow: Tensor, fast: Tensor) -> bool:
    """Whether the kernel takes a pair of tensors, given that they have the same shape and device."""
    runs_there = (_CPU_KERNEL and slow.is_cpu) or (
        _CUDA_KERNEL and slow.is_cuda and not cuda_obstacle(slow.device.index)
    )
    if not runs_there:
        return False
    if type(slow) not in _PLAIN or type(fast) not in _PLAIN:
        return False
    if fast.dtype not in _KERNEL_DTYPES.get(slow.dtype, ()):
        return False
    if not slow.layout == fast.layout == torch.strided:
        return False
    return (slow.is_contiguous() and fast.is_contiguous()) or (slow.stride() == fast.stride() and _is_dense(slow))


# ------------------------------------------------------------------------------------------------------ their memory


class _Piece(NamedTuple):
    """The memory of a tensor, from its first byte to behind its last, gaps included."""

    device: str
    begin: int
    end: int
    is_slow: bool
    name: str
    tensor: Tensor


def _memory_is_shared(slow: Sequence[Tensor], fast: Sequence[Tensor]) -> bool:
    """Refuse memory that two tensors write to unless both are fast ones; return whether two fast ones may do so."""
    everything = [*slow, *fast]
    if _each_has_its_own(everything):
        return False
    pieces = [*_pieces("slow", slow), *_pieces("fast", fast)]
    for piece in pieces:
        if _overlaps_itself(piece.tensor):
            raise RuntimeError(f"elements of {piece.name} share memory with one another: clone it")
    pieces.sort(key=lambda piece: piece[:3])
    shared, cluster, end = False, pieces[:1], pieces[0].end if pieces else 0
    for piece in pieces[1:]:
        if piece.device == cluster[0].device and piece.begin < end:
            cluster.append(piece)
            end = max(end, piece.end)
        else:
            shared |= _cluster_is_shared(cluster)
            cluster, end = [piece], piece.end
    return shared | _cluster_is_shared(cluster)


def _each_has_its_own(tensors: Sequence[Tensor]) -> bool:
    """The look that suffices almost always: plain contiguous tensors, end to end."""
    if not (
        _PLAIN.issuperset(map(type, tensors))
        and set(map(_LAYOUT, tensors)) == {torch.strided}
        and all(map(Tensor.is_contiguous, tensors))
    ):
        return False
    begins = list(map(Tensor.data_ptr, tensors))
    ends = sorted(map(add, begins, map(_NBYTES, tensors)))
    return all(map(le, ends, sorted(begins)[1:]))  # as many have ended as have begun, before each begins


def _pieces(name: str, tensors: Sequence[Tensor]) -> Iterator[_Piece]:
    for index, tensor in enumerate(tensors):
        for part in _parts(tensor):
            begin, last = part.data_ptr(), sum((n - 1) * st for n, st in zip(part.shape, part.stride(), strict=True))
            end = begin + (last + 1) * part.element_size()
            yield _Piece(str(part.device), begin, end, name == "slow", f"{name}[{index}]", part)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors in which a tensor has its numbers: itself, or those that a wrapper (DTensor) has around it."""
    if type(tensor) not in _PLAIN and hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, name)
            if inner.is_floating_point() or inner.is_complex():
                yield from _parts(inner)
    elif tensor.layout == torch.strided and tensor.numel():
        # A fake tensor has its storage on meta, and a wrapper that hides its tensors has one at no address.
        on_meta = tensor.untyped_storage().device.type == "meta"
        if not on_meta and tensor.data_ptr():
            yield tensor


def _cluster_is_shared(cluster: list[_Piece]) -> bool:
    """Refuse a slow tensor that meets another one; return whether two fast ones might."""
    if len(cluster) < 2 or not any(piece.is_slow for piece in cluster):
        return len(cluster) > 1
    # The gaps of one tensor may hold another: every place is marked with the slow tensor that has an element there.
    cluster = sorted(cluster, key=lambda piece: not piece.is_slow)
    base, end = min(piece.begin for piece in cluster), max(piece.end for piece in cluster)
    unit = math.gcd(*(piece.tensor.element_size() for piece in cluster), *(piece.begin - base for piece in cluster))
    marks = torch.zeros((end - base) // unit, dtype=torch.int32, device="cpu")
    for number, piece in enumerate(cluster, start=1):
        scale, start = piece.tensor.element_size() // unit, (piece.begin - base) // unit
        strides = [stride * scale for stride in piece.tensor.stride()]
        places = marks.as_strided([*piece.tensor.shape, scale], [*strides, 1], start)
        there = int(places.max())
        if there:
            names = f"{cluster[there - 1].name} and {piece.name}"
            raise RuntimeError(f"{names} share memory; a slow tensor needs memory of its own: clone it")
        if piece.is_slow:
            places.fill_(number)
    return True


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    is_nested = True  # each dimension steps over all denser ones, as slices do
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si != 1):
        if stride == 0:
            return True
        is_nested = is_nested and stride > reach
        reach += (size - 1) * stride
    if is_nested:
        return False
    marks = torch.zeros(reach + 1, dtype=torch.bool, device="cpu")
    marks.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(marks.sum()) < tensor.numel()


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor covers each element of a contiguous piece of memory exactly once, in whatever order."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True


# ------------------------------------------------------------------------------------------------------ the other way


@torch.no_grad()
def _interpolate_foreach(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    groups: defaultdict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for s, f in zip(slow, fast, strict=True):  # torch has one launch for many tensors only if they are alike
        slow_group, fast_group = groups[s.dtype, f.dtype, s.device]
        slow_group.append(s)
        fast_group.append(f)
    for slow_group, fast_group in groups.values():  # all of them before any fast tensor: those may share memory
        if weight == 1.0:  # no arithmetic: the difference of two finite numbers may overflow, and times zero it is NaN
            torch._foreach_copy_(slow_group, fast_group)
        elif weight != 0.0:
            _foreach_lerp_(slow_group, fast_group, weight)
    for slow_group, fast_group in groups.values():
        torch._foreach_copy_(fast_group, slow_group)


def _foreach_lerp_(slow: list[Tensor], fast: list[Tensor], weight: float) -> None:
    """``torch._foreach_lerp_``, also for fast tensors that are all of one other dtype than the slow ones."""
    if slow[0].dtype == fast[0].dtype:
        torch._foreach_lerp_(slow, fast, weight)
        return
    for slow_batch, fast_batch in _batches(slow, fast):
        if len(slow_batch) == 1:
            cast = [fast_batch[0].to(slow_batch[0].dtype)]
        else:
            cast = list(torch._foreach_neg(slow_batch))  # only for the memory: one operation for all of it
            torch._foreach_copy_(cast, fast_batch)
        torch._foreach_lerp_(slow_batch, cast, weight)
        del cast  # so that the next one takes its memory


def _batches(slow: list[Tensor], fast: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Small tensors together and large ones alone: casts are a little memory at a time, and it stays in the cache."""
    slow_batch: list[Tensor] = []
    fast_batch: list[Tensor] = []
    numel = 0
    for s, f in zip(slow, fast, strict=True):
        if s.numel() >= _CAST_AT_ONCE:
            yield [s], [f]
            continue
        if numel + s.numel() > _CAST_AT_ONCE:
            yield slow_batch, fast_batch
            slow_batch, fast_batch, numel = [], [], 0
        slow_batch.append(s)
        fast_batch.append(f)
        numel += s.numel()
    if slow_batch:
        yield slow_batch, fast_batch


# ------------------------------------------------------------------------------------------------------ registration


def _without_kernel(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    """The operator where a device has no kernel of its own: checked like a kernel, since foreach would broadcast."""
    _check_pairs(slow, fast)
    _interpolate_foreach(slow, fast, weight)


def _fake(slow: Sequence[Tensor], fast: Sequence[Tensor], _weight: float) -> None:
    """What tracing and meta tensors need of the operator: its checks; it returns nothing."""
    _check_pairs(slow, fast)


def _register() -> torch.library.Library:
    """Tell torch what else it needs to know of the operators; it forgets when the library object goes."""
    # Devices without a kernel of their own, meta tensors and tracing.
    torch.library.impl("torch_gradmatch::interpolate_", "CompositeExplicitAutograd", _without_kernel)
    torch.library.register_fake("torch_gradmatch::interpolate_", _fake)
    library = torch.library.Library("torch_gradmatch", "IMPL")
    # It returns no tensor, so autograd has nothing to record; without this it takes note of every parameter first.
    library.impl("interpolate_taken_", torch.library.fallthrough_kernel, "Autograd")
    return library


if _CPU_KERNEL or _CUDA_KERNEL:
    try:  # these functions are public, but they use private ones themselves
        _LIBRARY = _register()
    except WHATEVER_TORCH_RAISES as error:
        _CPU_KERNEL = _CUDA_KERNEL = False
        give_up(f"torch {torch.__version__} refuses the extension's operators ({type(error).__name__}: {error})")
