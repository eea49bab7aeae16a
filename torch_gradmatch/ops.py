r"""The interpolation step of Fish over lists of tensors: one fused native pass where there is a kernel for it.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, Algorithm 1, last line.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_gradmatch._native import native_status

__all__ = ["interpolate_"]

# The (slow, fast) dtypes that the kernels take; interpolate.h has the same table.
_KERNEL_DTYPES = {
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
}
_KERNEL_DEVICES = {name for name in ("cpu", "cuda") if getattr(native_status(), name)}


@torch.no_grad()
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
        RuntimeError: If two of the tensors share memory.

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
    native_slow: list[Tensor] = []
    native_fast: list[Tensor] = []
    other_slow: list[Tensor] = []
    other_fast: list[Tensor] = []
    for index, (s, f) in enumerate(zip(slow, fast, strict=True)):
        if s.shape != f.shape:
            raise ValueError(f"slow[{index}] has shape {tuple(s.shape)} and fast[{index}] {tuple(f.shape)}")
        if _kernel_takes(s, f):
            native_slow.append(s)
            native_fast.append(f)
        else:
            other_slow.append(s)
            other_fast.append(f)
    if native_slow:
        torch.ops.torch_gradmatch.interpolate_(native_slow, native_fast, float(weight))
        # The kernel writes behind autograd's back: a graph built before must notice.
        torch.autograd.graph.increment_version(native_slow)
        torch.autograd.graph.increment_version(native_fast)
    if other_slow:
        _interpolate_foreach(other_slow, other_fast, weight)


def _kernel_takes(slow: Tensor, fast: Tensor) -> bool:
    if slow.device.type not in _KERNEL_DEVICES or slow.device != fast.device:
        return False
    if (slow.dtype, fast.dtype) not in _KERNEL_DTYPES or type(slow) not in _PLAIN or type(fast) not in _PLAIN:
        return False
    if slow.is_contiguous() and fast.is_contiguous():
        return True
    return slow.layout == fast.layout == torch.strided and slow.stride() == fast.stride() and _is_dense(slow)


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor covers each element of a contiguous piece of memory exactly once, in whatever order."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True


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


def _fake(_slow: Sequence[Tensor], _fast: Sequence[Tensor], _weight: float) -> None:
    """What tracing needs to know of the operator: it returns nothing."""


if _KERNEL_DEVICES:
    # Devices without a kernel of their own, meta tensors and tracing.
    torch.library.impl("torch_gradmatch::interpolate_", "CompositeExplicitAutograd", _interpolate_foreach)
    torch.library.register_fake("torch_gradmatch::interpolate_", _fake)
