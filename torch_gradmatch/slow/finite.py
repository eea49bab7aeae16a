"""Whether many tensors are finite, found out in a few operations and one wait for an accelerator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_gradmatch._foreach import by_kind, local_of

__all__ = ["find_nonfinite", "holds_nonfinite", "norms_of", "read"]


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the Euclidean norm of each tensor, of a ``DTensor`` that of this rank's shard: finite only if all are.

    It may also overflow; :func:`holds_nonfinite` tells. The maximum norm would not, but on a CPU takes twenty times as
    long (45 ms instead of 2.3 for 17 M elements on one thread).

    Args:
        tensors: Any shapes, floating-point dtypes and devices.

    Returns:
        One scalar for each, 0 for an empty tensor. Nothing waits.
    """
    with torch.no_grad():
        norms: dict[int, Tensor] = {}
        for positions, (group,) in by_kind(tensors):
            norms.update(zip(positions, torch._foreach_norm(group), strict=True))
    return [norms[i] for i in range(len(tensors))]


@torch.no_grad()
def read(scalars: Sequence[Tensor]) -> list[float]:
    """Read some scalars, waiting once for each device.

    Args:
        scalars: Each of shape ().

    Returns:
        Their values; the modulus of a complex one.
    """
    by_device: dict[torch.device, list[int]] = {}
    for index, scalar in enumerate(scalars):
        by_device.setdefault(scalar.device, []).append(index)
    values = [0.0] * len(scalars)
    for indices in by_device.values():
        together = torch.stack([scalars[i] for i in indices])
        for index, value in zip(indices, together.tolist(), strict=True):
            values[index] = abs(value) if isinstance(value, complex) else value
    return values


def holds_nonfinite(tensor: Tensor, norm: float) -> bool:
    """Return whether a tensor holds NaN or infinity.

    Args:
        tensor: The tensor.
        norm: Its norm: only if that is not finite is the tensor looked at, and waited for.

    Returns:
        False also for a tensor whose norm has only overflowed.
    """
    return not math.isfinite(norm) and not bool(torch.isfinite(local_of(tensor)).all())


def find_nonfinite(tensors: Sequence[Tensor]) -> list[int]:
    """Return which tensors hold NaN or infinity, waiting once for each device in the usual case, that there is none.

    Args:
        tensors: Any shapes, floating-point dtypes and devices.

    Returns:
        Their positions, in order.
    """
    norms = read(norms_of(tensors))
    return [i for i, (t, norm) in enumerate(zip(tensors, norms, strict=True)) if holds_nonfinite(t, norm)]
