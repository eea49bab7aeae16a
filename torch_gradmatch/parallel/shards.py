"""Modules of ``fully_shard``, whose parameters are ``DTensor`` s: one shard on each rank.

Elementwise work is done on the local shards. What sums over elements is added up by DTensor itself, over the ranks
that hold the other shards (:func:`torch_gradmatch.parallel.foreach.over_shards`).
"""

from __future__ import annotations

from torch import nn

__all__ = ["reshard"]


def reshard(model: nn.Module) -> None:
    """Let a model of ``fully_shard`` hold its shards again, where a forward pass without backward left all of them."""
    from torch.distributed.fsdp import FSDPModule  # takes seconds: who has such a model, has done so

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
