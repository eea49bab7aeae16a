r"""The interpolation step of Fish over lists of tensors.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, Algorithm 1, last line.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["interpolate_"]


@torch.no_grad()
def interpolate_(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    r"""Move the slow weights towards the fast ones and set the fast ones to the result, in place.

    .. math:: \theta \leftarrow \theta + \epsilon\,(\tilde\theta - \theta), \qquad \tilde\theta \leftarrow \theta

    Exact at ``weight`` 0 (the fast weights return to the slow ones) and 1 (the slow weights take the fast ones).

    Args:
        slow: :math:`\theta`, any shapes, strides and devices; real or complex floating point.
        fast: :math:`\tilde\theta`, each of the shape and device of its slow tensor; its dtype may be narrower
            (bf16 parameters with fp32 slow weights).
        weight: :math:`\epsilon` in [0, 1].

    Raises:
        ValueError: If the lists differ in length or a pair in shape, or ``weight`` lies outside [0, 1].

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
    for index, (s, f) in enumerate(zip(slow, fast, strict=True)):
        if s.shape != f.shape:
            raise ValueError(f"slow[{index}] has shape {tuple(s.shape)} and fast[{index}] {tuple(f.shape)}")

    if weight == 0.0:
        _copy(fast, slow)
    elif weight == 1.0:  # no arithmetic: the difference of two finite numbers may overflow, and times zero that is NaN
        _copy(slow, fast)
        _copy(fast, slow)
    else:
        _lerp(slow, fast, weight)


def _copy(target: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    if target:
        torch._foreach_copy_(list(target), list(source))


def _lerp(slow: Sequence[Tensor], fast: Sequence[Tensor], weight: float) -> None:
    alike = [(s, f) for s, f in zip(slow, fast, strict=True) if s.dtype == f.dtype]
    if alike:
        same_slow, same_fast = map(list, zip(*alike, strict=True))
        torch._foreach_lerp_(same_slow, same_fast, weight)
        torch._foreach_copy_(same_fast, same_slow)
    for s, f in zip(slow, fast, strict=True):
        if s.dtype != f.dtype:
            s.lerp_(f.to(s.dtype), weight)
            f.copy_(s)
