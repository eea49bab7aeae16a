"""The check that a loader and a training loop serve what an optimizer matches."""

from __future__ import annotations

from typing import Any

import torch

from torch_gradmatch._checks import check_int
from torch_gradmatch.data.meta_batches import MetaBatches, sampler_of
from torch_gradmatch.data.sampler import DomainBatchSampler
from torch_gradmatch.data.streams import DomainLoader
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.optimizer import GradMatch

__all__ = ["check_loader"]


def check_loader(optimizer: Any, loader: Any, accumulation_steps: int = 1) -> None:
    """Raise unless a training loop over this loader matches the gradients of as many domains as the optimizer expects.

    Call it once before training, on every rank, with ``torch.distributed`` initialized where there are several ranks.
    :func:`~torch_gradmatch.meta_batches` are for a loop of ``meta_step``; any other loader is for a loop of ``step()``,
    which needs ``Fish(inner_steps=S)``.

    Several ranks need a sampler with:

    - ``split="walks"`` for ``Fish`` with a ``process_group``, or ``SmoothFish`` with one and ``parallel="walks"``;
    - ``split="domains"`` for ``IDGM`` with a ``process_group`` and ``parallel="domains"``;
    - ``split="batch"`` with ``parallel="data"`` or without ``process_group``.

    The loaders in a ``DomainLoader`` have to give each rank its part themselves; that cannot be checked.

    Args:
        optimizer: A ``GradMatch``, or the object into which Lightning or Accelerate have wrapped it.
        loader: What the loop iterates over: a ``DataLoader`` with a ``DomainBatchSampler``, a ``DomainLoader``, or
            ``meta_batches`` of one of them. A framework should not have prepared it.
        accumulation_steps: Number of batches whose gradients the framework adds up before it steps.

    Raises:
        TypeError: If there is no ``GradMatch``.
        ValueError: If loader and optimizer differ in the number of domains or of accumulated batches; if ``step()``
            would never match gradients (a method other than ``Fish``, or ``Fish`` without ``inner_steps``, over a
            loader that is no ``meta_batches``); if the loader is none of the three or is over another data set; or if
            the ranks' batches do not fit the method.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> from torch_gradmatch import DomainBatchSampler, Fish
        >>> w = torch.nn.Parameter(torch.zeros(()))
        >>> optimizer = GradMatch(torch.optim.SGD([w], lr=0.1), Fish(inner_steps=5))
        >>> sampler = DomainBatchSampler(["a", "b", "c"] * 4, batch_size=2)
        >>> check_loader(optimizer, DataLoader(range(12), batch_sampler=sampler))
        Traceback (most recent call last):
            ...
        ValueError: Fish(inner_steps=5) but the loader has domains_per_step=3: make both equal
    """
    wrapped = optimizer
    # Accelerate's wrapper has none of GradMatch's members, and Lightning's passes for one: go down to the real one.
    while type(wrapped) is not GradMatch and hasattr(wrapped, "optimizer"):
        wrapped = wrapped.optimizer
    if not isinstance(wrapped, GradMatch):
        raise TypeError(f"optimizer should be a GradMatch, wrapped or not (got {type(optimizer).__name__})")
    method, inner = wrapped.method, loader.loader if isinstance(loader, MetaBatches) else loader
    sampler = sampler_of(inner)
    if sampler is None or any(base.__module__.startswith("accelerate.") for base in type(inner).__mro__):
        raise ValueError(
            "loader should be a DataLoader over a DomainBatchSampler, a DomainLoader, or meta_batches of one, as you "
            f"made it (got {type(loader).__name__}): leave it out of what the framework prepares"
        )
    domains, inner_steps = sampler.domains_per_step, getattr(method, "inner_steps", None)
    if inner is loader and (inner_steps is None or not isinstance(method, Fish)):
        raise ValueError(
            f"{type(method).__name__} without inner_steps never matches gradients in step(): pass Fish(inner_steps="
            f"{domains}), or iterate over meta_batches(loader, {sampler.batches_per_group}) and call meta_step"
        )
    if inner_steps not in {None, domains}:
        raise ValueError(
            f"Fish(inner_steps={inner_steps}) but the loader has domains_per_step={domains}: make both equal"
        )
    if check_int("accumulation_steps", accumulation_steps, at_least=1) != sampler.accumulate:
        raise ValueError(
            f"accumulation_steps={accumulation_steps} adds up as many batches before one step, but the loader serves "
            f"{sampler.accumulate} of a domain in a row: pass DomainBatchSampler(accumulate={accumulation_steps})"
        )
    if not isinstance(inner, DomainLoader):
        _check_ranks(method, sampler)


def _check_ranks(method: Any, sampler: DomainBatchSampler) -> None:
    """Raise ``ValueError`` unless the ranks share a sampler's batches as a method needs it."""
    group, parallel = getattr(method, "process_group", None), getattr(method, "parallel", None)
    alone = "walks" if isinstance(method, Fish) else sampler.split
    split = "batch" if group is None or parallel == "data" else parallel or alone
    num_parts, num_ranks, rank = sampler.num_replicas, sampler.num_replicas, sampler.rank
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        num_ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    # Without a group there may be more ranks than parts: those of tensor parallelism serve the same batches.
    fits = (num_ranks, rank) == (num_parts, sampler.rank) or (group is None and 1 < num_parts < num_ranks)
    if num_ranks % num_parts or not fits or (num_parts > 1 and sampler.split != split):
        raise ValueError(
            f"the loader's DomainBatchSampler has num_replicas={num_parts}, rank={sampler.rank} and split="
            f"{sampler.split!r}, but {type(method).__name__} {'without' if group is None else 'with'} process_group "
            f"needs split={split!r}, and this is rank {rank} of {num_ranks}: pass them to the sampler"
        )
