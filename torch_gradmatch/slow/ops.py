r"""The interpolation step of Fish over lists of tensors: one fused native pass where there is a kernel for it.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, Algorithm 1, last line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from torch_gradmatch.parallel.foreach import local_of
from torch_gradmatch.slow._native import cuda_obstacle, native_status

__all__ = ["interpolate_"]

_PLAIN = {Tensor, torch.nn.Parameter}
_CPU_KERNEL, _CUDA_KERNEL = native_status().cpu, native_status().cuda


def interpolate_(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    r"""Move the slow weights towards the fast ones and set the fast ones to the result, in place.

    .. math:: \theta \leftarrow \theta + \epsilon\,(\tilde\theta - \theta), \qquad \tilde\theta \leftarrow \theta

    Exact at ``weight`` 0 (the fast weights return to the slow ones) and 1 (the slow weights take the fast ones).
    Lists with a pair that the native kernel does not take (gaps in memory, complex numbers, other dtypes or devices,
    tensor subclasses, fast tensors that share memory) go through ``torch._foreach_lerp_`` and ``torch._foreach_copy_``;
    ``native_status()`` says whether there is a kernel at all. Of a ``DTensor`` every rank moves its shard.

    Fast tensors may be tied by their storage (``b.data = a.data``): all slow ones are moved before any fast one is set.

    Args:
        slow: :math:`\theta`, any shapes, strides and devices; real or complex floating point.
        fast: :math:`\tilde\theta`, each of the shape and device of its slow tensor; its dtype may be narrower
            (bf16 parameters with fp32 slow weights).
        weight: :math:`\epsilon` in [0, 1].

    Raises:
        ValueError: If the lists differ in length or a pair in shape or device, a pair is not real or complex floating
            point on both sides, or ``weight`` lies outside [0, 1].

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
    first = slow[0]
    kernel = _CPU_KERNEL if first.is_cpu else _CUDA_KERNEL and first.is_cuda and not cuda_obstacle(first.device.index)
    if kernel and not torch.compiler.is_compiling() and _PLAIN.issuperset(map(type, [*slow, *fast])):
        with suppress(ValueError, NotImplementedError):  # it refuses what it does not take before it writes anything
            _interpolate_native(slow, fast, weight)
            return
    slow, fast = [local_of(s) for s in slow], [local_of(f) for f in fast]
    _check_pairs(slow, fast)
    _interpolate_foreach(slow, fast, weight)


def _interpolate_native(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    torch.ops.torch_gradmatch.interpolate_.default(slow, fast, float(weight))
    # The kernel writes behind autograd's back: a graph built before must notice.
    torch.autograd.graph.increment_version(slow)
    torch.autograd.graph.increment_version(fast)


@torch.no_grad()
def _interpolate_foreach(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    groups: defaultdict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    # torch has one launch for many tensors only if they are alike, and a subclass may treat a list as it likes.
    for s, f in zip(slow, fast, strict=True):
        group = groups[s.dtype, f.dtype, s.device, type(f)]
        group[0].append(s)
        group[1].append(f)
    for (slow_dtype, fast_dtype, *_), (slow_group, fast_group) in groups.items():
        if weight == 1.0:  # no arithmetic: the difference of two finite numbers may overflow, and times zero it is NaN
            torch._foreach_copy_(slow_group, fast_group)
        elif weight != 0.0 and slow_dtype == fast_dtype:
            torch._foreach_lerp_(slow_group, fast_group, weight)
        elif weight != 0.0:  # one by one, so that there is one cast tensor at a time
            for s, f in zip(slow_group, fast_group, strict=True):
                s.lerp_(f.to(s.dtype), weight)
    for slow_group, fast_group in groups.values():
        torch._foreach_copy_(fast_group, slow_group)


# ------------------------------------------------------------------------------------------------------ the pairs


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


def _fake(slow: Sequence[Tensor], fast: Sequence[Tensor], _weight: float) -> None:
    """The operator on meta tensors and where torch traces it."""
    _check_pairs(slow, fast)
    if len({s.device.type for s in slow}) > 1:  # one meta tensor among others, and torch calls nothing but this
        raise ValueError("interpolate_: the tensors are on devices of several kinds")


if _CPU_KERNEL:
    torch.library.register_fake("torch_gradmatch::interpolate_", _fake)
    # It returns no tensor, so autograd has nothing to record; without this it takes note of every parameter first.
    torch.library.impl("torch_gradmatch::interpolate_", "Autograd", torch.library.fallthrough_kernel)
