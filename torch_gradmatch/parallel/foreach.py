"""Work on many tensors in few operations, by the ``foreach`` operators that torch's optimizers are made of.

On an accelerator these take all tensors in one launch if device, dtype and strides agree; so lists are parted by kind.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "WIDE",
    "Vector",
    "add_all_",
    "by_kind",
    "clone_all",
    "copy_all_",
    "detach_all",
    "find_nonfinite",
    "in_transform",
    "is_sharded",
    "local_of",
    "over_shards",
    "precision",
    "read",
    "squared_norm",
]


WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
"""The dtype of sums over tensors of a dtype, if it is another one."""
CHUNK = 1 << 18  # elements: on a CPU the error of a norm in single precision grows with its length (12 M: 6e-4)
PLAIN = (Tensor, nn.Parameter)
Vector = Sequence[Tensor | None]
"""One tensor for each parameter; None where a loss does not depend on it."""


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``, of which this rank holds a shard."""
    if type(tensor) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # to import it takes seconds: who has one, has done so
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """Return a tensor, or of a ``DTensor`` the shard that this rank holds, which shares its memory."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        shard: Tensor = sharded.to_local()
    return shard


def in_transform() -> bool:
    """Return whether a transform of ``torch.func`` is at work, whose tensors do not say what they depend on."""
    functorch = getattr(torch._C, "_functorch", None)  # private, and torch has nothing public that tells
    level = getattr(functorch, "maybe_current_level", None)
    return level is not None and level() is not None


def by_kind(*lists: Sequence[Tensor | None]) -> list[tuple[list[int], list[list[Tensor]]]]:
    """Part lists of tensors into groups of one device and dtype.

    Args:
        lists: Of the same length; a position counts where none of them has None.

    Returns:
        For each group the positions and, out of each list, the tensors there; of a ``DTensor``, for which not all
        ``foreach`` operators are made, the local shard.

    Example:
        >>> import torch
        >>> single, double = torch.zeros(2), torch.ones(2, dtype=torch.float64)
        >>> [positions for positions, _ in by_kind([single, double, None, single])]
        [[0, 3], [1]]
    """
    size, alike = len(lists[0]), True
    for tensors in lists:  # the usual case, told quickly: plain tensors of one device and dtype
        first: Any = tensors[0] if tensors else None
        alike = alike and first is not None and len(tensors) == size
        if alike:
            dtype, device = first.dtype, first.get_device()
            alike = all(type(t) in PLAIN and t.dtype is dtype and t.get_device() == device for t in tensors)  # type: ignore[union-attr]
    if alike:
        return [(list(range(size)), [list(tensors) for tensors in lists])]  # type: ignore[arg-type]
    groups: dict[tuple[torch.device | torch.dtype, ...], tuple[list[int], list[list[Tensor]]]] = {}
    for position, group in enumerate(zip(*lists, strict=True)):
        present = [t if type(t) in PLAIN else local_of(t) for t in group if t is not None]
        if len(present) < len(group):
            continue
        kind = tuple(part for t in present for part in (t.device, t.dtype))
        positions, parts = groups.setdefault(kind, ([], [[] for _ in lists]))
        positions.append(position)
        for part, t in zip(parts, present, strict=True):
            part.append(t)
    return list(groups.values())


@torch.no_grad()
def clone_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors, detached and exact whatever the dtype.

    Args:
        tensors: The tensors. Those of a subclass or not strided, any inside a transform of ``torch.func``, and all
            before torch 2.12 are copied one by one: not all of these have ``foreach`` operators.

    Returns:
        The copies, in order.
    """
    clone: Any = getattr(torch, "_foreach_clone", None)
    plain = clone is not None and not in_transform()
    together = [t if plain and type(t) in PLAIN and t.layout is torch.strided else None for t in tensors]
    copies: dict[int, Tensor] = {}
    for positions, (group,) in by_kind(together) if clone is not None else ():
        copies.update(zip(positions, clone(group), strict=True))
    return [copies[i] if i in copies else t.detach().clone() for i, t in enumerate(tensors)]


@torch.no_grad()
def add_all_(totals: Vector, parts: Vector, factor: float | Tensor = 1.0) -> None:
    """Add ``factor`` times each part to the total in its place.

    Args:
        totals: Written to; as wide as the parts or wider. Nothing is added where one is None.
        parts: As many; None counts as zero.
        factor: A number, or a tensor of shape ().
    """
    for _, (into, given) in by_kind(totals, parts):
        if isinstance(factor, Tensor):
            wide = [g.to(into[0].dtype) for g in given] if given[0].dtype != into[0].dtype else given
            torch._foreach_add_(into, torch._foreach_mul(wide, factor.to(into[0].device, into[0].dtype.to_real())))
        else:
            torch._foreach_add_(into, given, alpha=factor)


@torch.no_grad()
def copy_all_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of their shapes, casting where dtypes differ.

    Args:
        targets: Written to.
        sources: As many.
    """
    for _, (into, out_of) in by_kind(targets, sources):
        torch._foreach_copy_(into, out_of)


def precision(tensors: Iterable[Tensor]) -> float:
    """Return the machine epsilon of the coarsest dtype among some floating or complex tensors, at least one.

    Example:
        >>> import torch
        >>> precision([torch.zeros(2), torch.zeros(2, dtype=torch.float64)]) == torch.finfo(torch.float32).eps
        True
    """
    return max(torch.finfo(t.dtype).eps for t in tensors)


@torch.no_grad()
def over_shards(tensors: Sequence[Tensor], found: Callable[[list[int]], Tensor]) -> Tensor:
    """Sum what is found of the local shards of some tensors over the ranks that hold the others.

    Args:
        tensors: The tensors; without a ``DTensor`` no rank is asked.
        found: Called with the positions of tensors that lie on the same ranks: what these add to the sum.

    Returns:
        The sum, on the first one's device.
    """
    alike: dict[Any, list[int]] = {}
    for position, tensor in enumerate(tensors):
        to: Any = tensor
        alike.setdefault((to.device_mesh, to.placements) if is_sharded(to) else None, []).append(position)
    sums = []
    for layout, positions in alike.items():
        value: Any = found(positions)
        if layout is not None:
            from torch.distributed.tensor import DTensor, Partial, Replicate  # whoever has one, has imported it

            placements = [Replicate() if p.is_replicate() else Partial() for p in layout[1]]
            value = DTensor.from_local(value, layout[0], placements, run_check=False).full_tensor()
        sums.append(value)
    return sums[0] if len(sums) == 1 else torch.stack([value.to(sums[0].device) for value in sums]).sum(dim=0)


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements of some tensors, the whole ones where they are ``DTensor`` s.

    Args:
        tensors: At least one; dense, real or complex, of any dtypes.

    Returns:
        Shape (), float64 (float32 on a device that has no other), on the first tensor's device.
    """
    if any(map(is_sharded, tensors)):
        return over_shards(tensors, lambda positions: _squares([local_of(tensors[i]) for i in positions]))
    return _squares(tensors)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    found = []
    for _, (group,) in by_kind(tensors):
        real = [torch.view_as_real(t) if t.is_complex() else t for t in group]
        if group[0].device.type == "cpu":
            real = [part for t in real for part in ((t,) if t.numel() <= CHUNK else t.reshape(-1).split(CHUNK))]
        norms = torch.stack(torch._foreach_norm(real, 2, WIDE.get(real[0].dtype, real[0].dtype)))
        wide = norms.dtype if norms.device.type == "mps" else torch.float64
        found.append(torch.linalg.vector_norm(norms, dtype=wide).square())
    return found[0] if len(found) == 1 else torch.stack([part.to(found[0].device) for part in found]).sum()


def detach_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors that depend on nothing: themselves where they do not.

    Args:
        tensors: The tensors.

    Returns:
        The same values, in order.
    """
    wrapped = in_transform()
    return [t.detach() if wrapped or t.requires_grad else t for t in tensors]


@torch.no_grad()
def read(scalars: Sequence[Tensor]) -> list[float]:
    """Read some scalars, synchronizing once for each device.

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


def find_nonfinite(tensors: Sequence[Tensor]) -> list[int]:
    """Return which tensors hold NaN or infinity, synchronizing once in the usual case, that there is none.

    By the Euclidean norm, which is finite only if all elements are. It may also overflow: then the tensor itself is
    looked at. The maximum norm would not, but on a CPU takes twenty times as long (45 ms instead of 2.3 for 17 M
    elements on one thread).

    Args:
        tensors: Any shapes, floating-point dtypes and devices; of a ``DTensor`` this rank's shard.

    Returns:
        Their positions, in order.
    """
    norms = [torch.zeros(())] * len(tensors)
    with torch.no_grad():
        for positions, (group,) in by_kind(tensors):
            for position, norm in zip(positions, torch._foreach_norm(group), strict=True):
                norms[position] = norm
    found = [i for i, norm in enumerate(read(norms)) if not math.isfinite(norm)]
    return [i for i in found if not bool(torch.isfinite(local_of(tensors[i])).all())]
