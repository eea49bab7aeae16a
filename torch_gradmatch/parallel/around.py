"""Who trains the same parameters, and whether their gradients are averaged on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from torch_gradmatch.parallel.ranks import Ranks
from torch_gradmatch.parallel.shards import groups_of
from torch_gradmatch.parallel.wrappers import data_parallel_group, find_wrappers, is_distributed

__all__ = ["ranks_around"]


def ranks_around(parameters: Sequence[Tensor], process_group: ProcessGroup | None) -> tuple[Ranks, bool]:
    """Find out who trains the same parameters.

    Args:
        parameters: The optimizer's.
        process_group: The ranks that walk by themselves, if any.

    Returns:
        All ranks that train them together; and whether forward and backward passes are collectives, as under
        ``DistributedDataParallel`` and ``fully_shard``, so that no rank may leave one out.

    Raises:
        ValueError: If they walk by themselves, but ``DistributedDataParallel`` averages their gradients; or if the
            model is in a ``FullyShardedDataParallel``, whose parameters do not say that they are shards.
    """
    if not is_distributed():
        return Ranks([], torch.device("cpu")), False
    wrappers = find_wrappers(parameters)
    averaged_by = data_parallel_group(wrappers)
    if any(type(wrapper).__name__ == "FullyShardedDataParallel" for wrapper in wrappers):
        raise ValueError(
            "the model is in a FullyShardedDataParallel (FSDP1), whose parameters do not say which shards they are: "
            "use torch.distributed.fsdp.fully_shard"
        )
    if averaged_by is not None and process_group is not None:
        raise ValueError(
            "process_group is for ranks that walk by themselves, but DistributedDataParallel averages their gradients "
            "in every step: leave one of the two out. With process_group wrap the plain module's parameters, and call "
            "the plain module"
        )
    groups = [*groups_of(parameters)]
    lockstep = [*groups, *([] if averaged_by is None else [averaged_by])]
    every = [*lockstep, *([] if process_group is None else [process_group])]
    device = next((p.device for p in parameters), torch.device("cpu"))
    return Ranks(every, device), bool(Ranks(lockstep, device))
