"""Modules of ``fully_shard``, whose parameters are ``DTensor`` s: one shard on each rank.

Elementwise work is done on the local shards. What sums over elements is added up by DTensor itself, over the ranks
that hold the other shards (:func:`torch_gradmatch.parallel.foreach.over_shards`).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from torch_gradmatch.parallel.foreach import is_sharded

__all__ = ["reshard"]


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
    from torch.distributed.fsdp import FSDPModule  # takes seconds: who has such a model, has done so

    for module in () if model is None else model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
