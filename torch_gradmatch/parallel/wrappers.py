"""Modules that reduce gradients by themselves, found by the parameters that they are around."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["buffers_around", "data_parallel_group", "find_wrappers", "is_distributed"]


def is_distributed() -> bool:
    """Return whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def find_wrappers(parameters: Iterable[Tensor]) -> list[nn.Module]:
    """Return the modules around some parameters that reduce their gradients over ranks in the backward pass.

    Nothing leads from a parameter to its ``DistributedDataParallel``, and a training loop that calls ``step`` shows
    nobody its model, so the garbage collector is asked for all that there are: some tens of milliseconds, for once in
    a training run and only where there are several processes.

    Args:
        parameters: The optimizer's.

    Returns:
        Each ``DistributedDataParallel``, ``DataParallel`` or ``FullyShardedDataParallel`` that holds one of them.
    """
    wanted = {id(p) for p in parameters}
    kinds = (DistributedDataParallel, DataParallel, *_fsdp1())
    for attempt in range(2):
        modules = [m for m in gc.get_objects() if issubclass(type(m), kinds)]
        found = [m for m in modules if not wanted.isdisjoint(map(id, m.parameters()))]
        if not found or attempt:
            return found
        gc.collect()  # one that is used no more may still be in a cycle
    return []


def data_parallel_group(wrappers: Iterable[nn.Module]) -> ProcessGroup | None:
    """Return the ranks over which ``DistributedDataParallel`` averages gradients.

    Args:
        wrappers: From :func:`find_wrappers`.

    Returns:
        The group, None if there is none.
    """
    for wrapper in wrappers:
        if isinstance(wrapper, DistributedDataParallel):
            group: ProcessGroup = wrapper.process_group
            return group
    return None


def buffers_around(parameters: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the floating-point buffers of the models that hold some parameters, found as in :func:`find_wrappers`.

    Args:
        parameters: The optimizer's.

    Returns:
        The buffers by name, with the class of the module that has each.
    """
    wanted = {id(p) for p in parameters}
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module.children():
            parents.setdefault(id(child), []).append(module)
    waiting = [m for m in modules if not wanted.isdisjoint(map(id, m.parameters(recurse=False)))]
    around = {id(m): m for m in waiting}
    while waiting:
        for parent in parents.get(id(waiting.pop()), ()):
            if id(parent) not in around:
                around[id(parent)] = parent
                waiting.append(parent)
    return {
        f"{name} of {type(module).__name__}": buffer
        for one in around.values()
        for module in one.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


def _fsdp1() -> tuple[type[nn.Module], ...]:
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    return () if module is None else (module.FullyShardedDataParallel,)
