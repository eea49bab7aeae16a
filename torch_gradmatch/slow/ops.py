r"""The interpolation step of Fish over lists of tensors: one fused native pass where there is a kernel for it.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, Algorithm 1, last line.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_gradmatch.slow._native import native_status

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


def interpolate_(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    r"""Move the slow weights towards the fast ones and set the fast ones to the result, in place.

    .. math:: \theta \leftarrow \theta + \epsilon\,(\tilde\theta - \theta), \qquad \tilde\theta \leftarrow \theta

    Exact at ``weight`` 0 (the fast weights return to the slow ones) and 1 (the slow weights take the fast ones).
    Pairs that the native kernel does not take (gaps in memory, complex numbers, other dtypes or devices, tensor
    subclasses) go through ``torch._foreach_lerp_`` and ``torch._foreach_copy_``; ``native_status()`` says whether
    there is a kernel at all.

    Args:
        slow: :math:`\theta`, any shapes, strides and devices; real or complex floating point.
        fast: :math:`\tilde\theta`, each of the shape and device of its slow tensor; its dtype may be narrower
            (bf16 parameters with fp32 slow weights).
        weight: :math:`\epsilon` in [0, 1].

    Raises:
        ValueError: If the lists differ in length or a pair in shape, or ``weight`` lies outside [0, 1].
        RuntimeError: If a slow tensor shares memory with another tensor.

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
    if (_CPU_KERNEL or _CUDA_KERNEL) and _PLAIN.issuperset(map(type, slow)) and _PLAIN.issuperset(map(type, fast)):
        try:  # The kernel checks everything before it writes anything: asking it first is what costs least.
            _interpolate_native(slow, fast, weight)
        except RuntimeError:
            pass
        else:
            return
    _check_shapes(slow, fast)
    pairs = list(zip(slow, fast, strict=True))
    native = [pair for pair in pairs if _kernel_takes(*pair)]
    other = [pair for pair in pairs if not _kernel_takes(*pair)]
    if native and not _memory_is_shared(*zip(*native, strict=True)) and _memory_is_shared([f for _, f in native]):
        native, other = [], pairs  # weights tied by their storage: right in two passes, not in one
    for on_cpu in (True, False):
        here = [pair for pair in native if pair[0].is_cpu is on_cpu]
        if here:  # what the kernel now refuses, or fails at, is an error
            _interpolate_native([s for s, _ in here], [f for _, f in here], weight)
    if other:
        _interpolate_foreach([s for s, _ in other], [f for _, f in other], weight)


def _check_shapes(slow: Sequence[Tensor], fast: Sequence[Tensor]) -> None:
    for index, (s, f) in enumerate(zip(slow, fast, strict=True)):
        if s.shape != f.shape:
            raise ValueError(f"slow[{index}] has shape {tuple(s.shape)} and fast[{index}] {tuple(f.shape)}")


def _interpolate_native(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    # No torch.no_grad(): the operator returns nothing that autograd could record, and small networks would notice it.
    torch.ops.torch_gradmatch.interpolate_.default(slow, fast, float(weight))
    # The kernel writes behind autograd's back: a graph built before must notice.
    torch.autograd.graph.increment_version(slow)
    torch.autograd.graph.increment_version(fast)


def _memory_is_shared(tensors: Sequence[Tensor], others: Sequence[Tensor] = ()) -> bool:
    """Whether one of some dense tensors shares memory with another of them or of ``others``."""
    tagged = [(t, True) for t in tensors] + [(t, False) for t in others]
    pieces = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, counts) for t, counts in tagged if t.numel())
    end_of_any = end_of_counted = 0
    for begin, end, counts in pieces:
        if begin < end_of_counted or (counts and begin < end_of_any):
            return True
        end_of_any = max(end_of_any, end)
        end_of_counted = max(end_of_counted, end) if counts else end_of_counted
    return False


def _kernel_takes(slow: Tensor, fast: Tensor) -> bool:
    """Whether the kernel takes a pair of tensors, given that they have the same shape."""
    on_cpu = _CPU_KERNEL and slow.is_cpu and fast.is_cpu
    if not (on_cpu or (_CUDA_KERNEL and slow.is_cuda and slow.device == fast.device)):
        return False
    if type(slow) not in _PLAIN or type(fast) not in _PLAIN:
        return False
    if fast.dtype not in _KERNEL_DTYPES.get(slow.dtype, ()):
        return False
    if slow.is_contiguous() and fast.is_contiguous():
        return True
    return slow.layout == fast.layout == torch.strided and slow.stride() == fast.stride() and _is_dense(slow)


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor covers each element of a contiguous piece of memory exactly once, in whatever order."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True


@torch.no_grad()
def _interpolate_foreach(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    if weight == 0.0:
        torch._foreach_copy_(list(fast), list(slow))
    elif weight == 1.0:  # no arithmetic: the difference of two finite numbers may overflow, and times zero that is NaN
        torch._foreach_copy_(list(slow), list(fast))
        torch._foreach_copy_(list(fast), list(slow))
    else:
        alike = [(s, f) for s, f in zip(slow, fast, strict=True) if s.dtype == f.dtype]
        if alike:
            same_slow, same_fast = map(list, zip(*alike, strict=True))
            torch._foreach_lerp_(same_slow, same_fast, weight)
            torch._foreach_copy_(same_fast, same_slow)
        for s, f in zip(slow, fast, strict=True):
            if s.dtype != f.dtype:
                s.lerp_(f.to(s.dtype), weight)
                f.copy_(s)


def _without_kernel(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    """The operator where a device has no kernel of its own: checked like a kernel, since foreach would broadcast."""
    _check_shapes(slow, fast)
    _interpolate_foreach(slow, fast, weight)


def _fake(slow: Sequence[Tensor], fast: Sequence[Tensor], _weight: float) -> None:
    """What tracing and meta tensors need of the operator: its checks; it returns nothing."""
    _check_shapes(slow, fast)


if _CPU_KERNEL or _CUDA_KERNEL:
    # Devices without a kernel of their own, meta tensors and tracing.
    torch.library.impl("torch_gradmatch::interpolate_", "CompositeExplicitAutograd", _without_kernel)
    torch.library.register_fake("torch_gradmatch::interpolate_", _fake)
