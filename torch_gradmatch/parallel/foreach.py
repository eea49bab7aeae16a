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
    "find_nonfinite",
    "in_transform",
    "is_sharded",
    "local_of",
    "map_kinds",
    "over_shards",
    "precision",
    "read",
    "sharded_like",
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
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def in_transform() -> bool:
    """Return whether a transform of ``torch.func`` is at work, whose tensors do not say what they depend on."""
    return torch._C._functorch.maybe_current_level() is not None  # private, and torch has nothing public that tells


def sharded_like(local: Tensor, like: Any) -> Tensor:
    """Return a local shard as a ``DTensor`` with the mesh, placements and shape of another tensor.

    Args:
        local: Of the shape of the other's local shard; any dtype.
        like: A ``DTensor``, or any other tensor.

    Returns:
        A tensor around ``local``, which shares its memory; ``local`` itself if ``like`` is no ``DTensor``.
    """
    if not is_sharded(like):
        return local
    layout = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    return type(like).from_local(local, like.device_mesh, like.placements, **layout)  # type: ignore[no-any-return]


def by_kind(*lists: Sequence[Any]) -> list[tuple[list[int], list[list[Tensor]]]]:
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
    kinds = [{(t.dtype, t.get_device()) if type(t) in PLAIN else None for t in tensors} for tensors in lists]
    if len(set(map(len, lists))) == 1 and all(len(kind) == 1 and None not in kind for kind in kinds):
        return [(list(range(len(lists[0]))), [list(tensors) for tensors in lists])]  # the usual case, told quickly
    groups: dict[tuple[Any, ...], list[tuple[int, list[Tensor]]]] = {}
    for position, group in enumerate(zip(*lists, strict=True)):
        parts = [t if type(t) in PLAIN else local_of(t) for t in group if t is not None]
        if len(parts) == len(lists):
            groups.setdefault(tuple((t.device, t.dtype) for t in parts), []).append((position, parts))
    found = [tuple(zip(*group, strict=True)) for group in groups.values()]
    return [(list(positions), [list(part) for part in zip(*parts, strict=True)]) for positions, parts in found]


def map_kinds(function: Callable[..., Any], *lists: Vector) -> list[Tensor | None]:
    """Call a function of lists of tensors for each group that :func:`by_kind` finds.

    Args:
        function: Takes as many lists and returns one, a ``foreach`` operator for instance.
        lists: Of the same length.

    Returns:
        What it returned, in the places of the tensors; None where a list has None. ``DTensor`` s like the first list's.
    """
    found: list[Tensor | None] = [None] * len(lists[0])
    for positions, group in by_kind(*lists):
        for position, part in zip(positions, function(*group), strict=True):
            like = lists[0][position]
            found[position] = part if type(like) in PLAIN else sharded_like(part, like)
    return found


@torch.no_grad()
def clone_all(tensors: Sequence[Any]) -> list[Any]:
    """Return copies of tensors, detached and exact whatever the dtype.

    Args:
        tensors: Tensors or None. If one is of a subclass or not strided, inside a transform of ``torch.func``, and
            before torch 2.12 they are copied one by one: not all of these have ``foreach`` operators.

    Returns:
        The copies, in order; None for None.
    """
    clone: Any = getattr(torch, "_foreach_clone", None)
    present = [t for t in tensors if t is not None]
    if clone is None or in_transform() or any(type(t) not in PLAIN or t.layout is not torch.strided for t in present):
        return [None if t is None else t.detach().clone() for t in tensors]
    return map_kinds(clone, tensors)


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
def over_shards(tensors: Sequence[Any], found: Callable[[list[int]], Tensor]) -> Tensor:
    """Sum what is found of the local shards of some tensors over the ranks that hold the others.

    Args:
        tensors: The tensors; without a ``DTensor`` no rank is asked.
        found: Called with the positions of tensors that lie on the same ranks: what these add to the sum.

    Returns:
        The sum, on the first one's device.
    """
    layouts = [(t.device_mesh, t.placements) if is_sharded(t) else None for t in tensors]
    sums = []
    for layout in dict.fromkeys(layouts):
        value: Any = found([position for position, other in enumerate(layouts) if other == layout])
        if layout is not None:
            from torch.distributed.tensor import DTensor, Partial, Replicate  # whoever has one, has imported it

            placements = [Replicate() if p.is_replicate() else Partial() for p in layout[1]]
            value = DTensor.from_local(value, layout[0], placements, run_check=False).full_tensor()
        sums.append(value)
    return torch.stack([value.to(sums[0].device) for value in sums]).sum(dim=0)


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements of some tensors, the whole ones where they are ``DTensor`` s.

    Args:
        tensors: At least one; dense, real or complex, of any dtypes.

    Returns:
        Shape (), float64 (float32 on a device that has no other), on the first tensor's device.
    """
    if any(map(is_sharded, tensors)):
        return over_shards(tensors, lambda positions: squared_norm([local_of(tensors[i]) for i in positions]))
    found = []
    for _, (group,) in by_kind(tensors):
        dtype = WIDE.get(group[0].dtype, group[0].dtype)
        if group[0].device.type == "cpu":
            group = [part for t in group for part in ((t,) if t.numel() <= CHUNK else t.reshape(-1).split(CHUNK))]
        norms = torch.stack(torch._foreach_norm(group, 2, dtype))
        wide = norms.dtype if norms.device.type == "mps" else torch.float64
        found.append(torch.linalg.vector_norm(norms, dtype=wide).square())
    return found[0] if len(found) == 1 else torch.stack([part.to(found[0].device) for part in found]).sum()


@torch.no_grad()
def read(scalars: Sequence[Tensor]) -> list[float]:
    """Read some scalars, synchronizing once if they are on one device.

    Args:
        scalars: Each of shape (), real.

    Returns:
        Their values.
    """
    alike = len({scalar.device for scalar in scalars}) == 1
    return torch.stack([s if alike else s.cpu() for s in scalars]).tolist() if scalars else []


@torch.no_grad()
def find_nonfinite(tensors: Sequence[Tensor]) -> list[int]:
    """Return which tensors hold NaN or infinity, synchronizing once for each kind in the usual case, that none does.

    By the Euclidean norm, which is finite only if all elements are. It may also overflow: then the tensor itself is
    looked at. The maximum norm would not, but on a CPU takes twenty times as long (45 ms instead of 2.3 for 17 M
    elements on one thread).

    Args:
        tensors: Any shapes, floating-point dtypes and devices; of a ``DTensor`` this rank's shard.

    Returns:
        Their positions, in order.
    """
    found = []
    for positions, (group,) in by_kind(tensors):
        norms = torch.stack(torch._foreach_norm(group)).tolist()
        suspects = [(i, t) for i, t, norm in zip(positions, group, norms, strict=True) if not math.isfinite(norm)]
        found += [i for i, t in suspects if not bool(torch.isfinite(t).all())]
    return sorted(found)
