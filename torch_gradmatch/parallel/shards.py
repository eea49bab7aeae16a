"""Parameters that are sharded over ranks: ``DTensor`` s, as ``fully_shard`` makes them, and their local shards.

Elementwise work is done on the local shards; only what sums over elements (norms, inner products, whether all are
finite) has to be reduced over the ranks that hold the other shards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.utils import get_total_norm

from torch_gradmatch.parallel.collective import in_collective
from torch_gradmatch.parallel.foreach import is_sharded, local_of

__all__ = [
    "Spread",
    "groups_of",
    "is_sharded",
    "local_of",
    "placed_like",
    "reshard",
    "sharded_like",
    "spread_of",
    "sum_over_shards",
    "total_norm",
]

Spread = tuple[ProcessGroup, ...]
"""The groups of ranks, one for each dimension of a mesh, over which a tensor's elements are spread."""


def sharded_like(local: Tensor, like: Tensor) -> Tensor:
    """Return a local shard as a ``DTensor`` with the mesh, placements and shape of another tensor.

    Args:
        local: Of the shape of the other's local shard; any dtype.
        like: A ``DTensor``, or any other tensor.

    Returns:
        A tensor around ``local``, which shares its memory; ``local`` itself if ``like`` is no ``DTensor``.
    """
    if not is_sharded(like):
        return local
    sharded: Any = like
    found: Tensor = type(sharded).from_local(
        local,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )
    return found


def spread_of(tensor: Tensor) -> Spread:
    """Return the groups over which the elements of a tensor are spread.

    Args:
        tensor: Any.

    Returns:
        Nothing for a plain tensor, and for one of which every rank holds all.

    Raises:
        ValueError: If it is a sum that is not carried out yet (a ``Partial`` placement).
    """
    if not is_sharded(tensor):
        return ()
    sharded: Any = tensor
    if any(placement.is_partial() for placement in sharded.placements):
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has a Partial placement: redistribute it first")
    placements = enumerate(sharded.placements)
    return tuple(sharded.device_mesh.get_group(dim) for dim, p in placements if not p.is_replicate())


def groups_of(tensors: Iterable[Tensor]) -> Spread:
    """Return the groups of all dimensions of the meshes on which some tensors are, each group once.

    Args:
        tensors: Any.

    Returns:
        The groups: what is reduced over each of them in turn, is reduced over all ranks of the meshes.
    """
    found: dict[ProcessGroup, None] = {}
    for tensor in tensors:
        if is_sharded(tensor):
            sharded: Any = tensor
            for dim in range(sharded.device_mesh.ndim):
                found[sharded.device_mesh.get_group(dim)] = None
    return tuple(found)


@torch.no_grad()
def sum_over_shards(values: Tensor, spread: Sequence[ProcessGroup]) -> Tensor:
    """Sum over the ranks that hold the other shards, in place.

    Args:
        values: What this rank found for its shard.
        spread: The groups.

    Returns:
        ``values``.
    """
    with in_collective():
        for group in spread:
            torch.distributed.all_reduce(values, group=group)
    return values


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> Tensor:
    """Return the Euclidean norm of all elements of some tensors.

    Args:
        tensors: ``DTensor`` s, of which the whole counts and not the shard, or any others.
        like: Where the tensors are local shards, those that say over which ranks the others are.

    Returns:
        Shape ().
    """
    by_spread: dict[Spread, list[Tensor]] = {}
    for tensor, other in zip(tensors, tensors if like is None else like, strict=True):
        by_spread.setdefault(spread_of(other), []).append(local_of(tensor))
    norms = []
    for spread, parts in by_spread.items():
        norm = get_total_norm(parts)
        norms.append(sum_over_shards(norm.square(), spread).sqrt() if spread else norm)
    if len(norms) == 1:
        return norms[0]
    return get_total_norm(norms)


def placed_like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient with the placements of its parameter.

    Args:
        gradient: Any.
        parameter: The parameter; a ``DTensor`` if the gradient is one.

    Returns:
        The gradient itself where it has them.
    """
    sharded: Any = gradient
    like: Any = parameter
    if is_sharded(gradient) and sharded.placements != like.placements:
        redistributed: Tensor = sharded.redistribute(like.device_mesh, like.placements)
        return redistributed
    return gradient


def reshard(model: nn.Module) -> None:
    """Let a model of ``fully_shard`` hold its shards again, where a forward pass without backward left all of them.

    Args:
        model: Any module.
    """
    for module in model.modules():
        if _is_fully_sharded(module):
            sharded: Any = module
            sharded.reshard()


def _is_fully_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # to import it takes seconds: who has one, has done so
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
