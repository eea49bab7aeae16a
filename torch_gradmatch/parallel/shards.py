"""Parameters that are sharded over ranks: ``DTensor`` s, as ``fully_shard`` makes them, and their local shards.

Elementwise work is done on the local shards. What sums over elements is added up by DTensor itself, over the ranks that
hold the other shards (:func:`torch_gradmatch.parallel.foreach.over_shards`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from torch_gradmatch.parallel.foreach import is_sharded

__all__ = ["groups_of", "placed_like", "reshard", "sharded_like"]


def sharded_like(local: Tensor, like: Tensor | None) -> Tensor:
    """Return a local shard as a ``DTensor`` with the mesh, placements and shape of another tensor.

    Args:
        local: Of the shape of the other's local shard; any dtype.
        like: A ``DTensor``, or any other tensor.

    Returns:
        A tensor around ``local``, which shares its memory; ``local`` itself if ``like`` is no ``DTensor``.
    """
    if like is None or not is_sharded(like):
        return local
    to: Any = like
    layout = {"run_check": False, "shape": to.shape, "stride": to.stride()}
    found: Tensor = type(to).from_local(local, to.device_mesh, to.placements, **layout)
    return found


def groups_of(tensors: Iterable[Tensor]) -> list[ProcessGroup]:
    """Return the groups of all dimensions of the meshes on which some tensors are, each group once.

    Args:
        tensors: Any.

    Returns:
        The groups: what is reduced over each of them in turn, is reduced over all ranks of the meshes.
    """
    meshes: list[Any] = [getattr(tensor, "device_mesh", None) for tensor in tensors if is_sharded(tensor)]
    return list(dict.fromkeys(mesh.get_group(dim) for mesh in dict.fromkeys(meshes) for dim in range(mesh.ndim)))


def placed_like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient with the placements of its parameter: itself where it has them."""
    sharded: Any = gradient
    like: Any = parameter
    if not is_sharded(gradient) or sharded.placements == like.placements:
        return gradient
    redistributed: Tensor = sharded.redistribute(like.device_mesh, like.placements)
    return redistributed


def reshard(model: nn.Module | None, parameters: Iterable[Tensor], call: str = "") -> None:
    """Let a model of ``fully_shard`` hold its shards again, where a forward pass without backward left all of them.

    What is written to the shards is seen only then.

    Args:
        model: The model, if it is known.
        parameters: Those that are written to; if none is sharded nothing happens.
        call: What cannot do without the model.

    Raises:
        RuntimeError: If such a call lacks the model.
    """
    if not any(map(is_sharded, parameters)):
        return
    if model is None and call:
        raise RuntimeError(
            f"{call} over a model of fully_shard needs to know it, because an evaluation leaves whole parameters there "
            "that do not see what is written to the shards: pass the method model=model"
        )
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # to import it takes seconds: who has one, has done so
    for module in () if model is None else model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            sharded: Any = module
            sharded.reshard()
