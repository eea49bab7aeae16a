"""Parameters that are sharded over ranks: ``DTensor`` s, as ``fully_shard`` makes them.

Elementwise work is done on their local shards. What sums over elements is added up by DTensor itself, over the ranks
that hold the other shards (:func:`torch_gradmatch.parallel.foreach.over_shards`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from torch_gradmatch.parallel.foreach import is_sharded

__all__ = ["groups_of", "reshard"]


def groups_of(tensors: Iterable[Tensor]) -> list[ProcessGroup]:
    """Return the groups of all dimensions of the meshes on which some tensors are, each group once.

    Args:
        tensors: Any.

    Returns:
        The groups: what is reduced over each of them in turn, is reduced over all ranks of the meshes.
    """
    meshes: list[Any] = [getattr(tensor, "device_mesh", None) for tensor in tensors if is_sharded(tensor)]
    return list(dict.fromkeys(mesh.get_group(dim) for mesh in dict.fromkeys(meshes) for dim in range(mesh.ndim)))


def reshard(model: nn.Module) -> None:
    """Let a model of ``fully_shard`` hold its shards again, where a forward pass without backward left all of them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # to import it takes seconds: who has one, has done so
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            sharded: Any = module
            sharded.reshard()
