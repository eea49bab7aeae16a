"""The check that a loader and a training loop serve what an optimizer matches."""

from __future__ import annotations

from typing import Any

import torch

from torch_gradmatch._checks import check_int
from torch_gradmatch.data.meta_batches import MetaBatches, source_of, watch
from torch_gradmatch.data.sampler import DomainBatchSampler
from torch_gradmatch.data.streams import DomainLoader
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.optimizer import GradMatch

__all__ = ["check_loader"]


def check_loader(optimizer: Any, loader: Any, accumulation_steps: int = 1) -> None:
    """Raise unless a training loop over this loader matches the gradients of as many domains as the optimizer expects.

    For frameworks, whose loop calls ``optimizer.step()`` out of sight: called once before training, on every rank, with
    ``torch.distributed`` initialized where there are several. :func:`~torch_gradmatch.meta_batches` are for a loop of
    ``meta_step``, any other loader is for one of ``step()``, which needs ``Fish(inner_steps=S)``.

    What several ranks serve together has to fit, too:

    - ``DomainBatchSampler(split="walks")`` if each rank walks by itself: ``Fish`` with a ``process_group``, or
      ``SmoothFish`` with one and ``parallel="walks"``;
    - ``split="domains"`` for ``IDGM`` with a ``process_group`` and ``parallel="domains"``;
    - ``split="batch"`` with ``parallel="data"`` or without ``process_group``.

    The loaders in a ``DomainLoader`` have to give each rank its part themselves; nobody can check that.

    Args:
        optimizer: A ``GradMatch``, or the object into which Lightning or Accelerate have wrapped it.
        loader: What the loop iterates over: a ``DataLoader`` with a ``DomainBatchSampler``, a ``DomainLoader``, or
            ``meta_batches`` of one of them. A framework should not have prepared it.
        accumulation_steps: Batches whose gradients the framework adds up before it steps.

    Raises:
        TypeError: If there is no ``GradMatch``.
        ValueError: If the numbers of domains or the batches that are accumulated differ, ``step()`` would never match
            gradients (a method other than ``Fish``, or ``Fish`` without ``inner_steps``, over a loader that is no
            ``meta_batches``), the loader is none of the three, or is over another data set, or the ranks' batches do
            not fit the method.

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
        ValueError: Fish(inner_steps=5) but the loader's DomainBatchSampler serves groups of domains_per_step=3 ...
    """
    wrapped = optimizer
    # Accelerate's wrapper has none of GradMatch's members, and Lightning's passes for one: go down to the real one.
    while type(wrapped) is not GradMatch and hasattr(wrapped, "optimizer"):
        wrapped = wrapped.optimizer
    if not isinstance(wrapped, GradMatch):
        raise TypeError(f"optimizer should be a GradMatch, wrapped or not (got {type(optimizer).__name__})")
    lists = isinstance(loader, MetaBatches)
    source = _source(loader.loader if lists else loader)
    _check_method(wrapped.method, source, lists)
    served = getattr(source, "accumulate", 1)
    if check_int("accumulation_steps", accumulation_steps, at_least=1) != served:
        raise ValueError(
            f"accumulation_steps={accumulation_steps} adds up as many batches before one step, but the "
            f"{type(source).__name__} serves {served} of a domain in a row: pass "
            f"DomainBatchSampler(accumulate={accumulation_steps}), or set the framework's accumulation to {served}"
        )
    if isinstance(source, DomainBatchSampler):
        _check_ranks(wrapped.method, source)


def _source(loader: Any) -> DomainBatchSampler | DomainLoader[Any]:
    """Return what decides the domains of a loader that no framework has changed."""
    source = source_of(loader)
    if source is None or any(base.__module__.startswith("accelerate.") for base in type(loader).__mro__):
        raise ValueError(
            "loader should be a DataLoader whose batch_sampler is a DomainBatchSampler, a DomainLoader, or "
            f"meta_batches of one of them, as you made it (got {type(loader).__name__}): leave the loader out of what "
            "the framework prepares, and pass num_replicas, rank and split to the sampler (Accelerate: "
            "accelerator.prepare(model, optimizer) without it; Lightning: Trainer(use_distributed_sampler=False); "
            "Trainer of transformers: override get_train_dataloader and return the loader itself)"
        )
    watch(loader, source)
    return source


def _check_method(method: Any, source: DomainBatchSampler | DomainLoader[Any], lists: bool) -> None:
    """Raise ``ValueError`` unless the loop that a loader is for is one in which the method matches gradients."""
    domains, inner_steps = source.domains_per_step, getattr(method, "inner_steps", None)
    if not lists and not isinstance(method, Fish):
        raise ValueError(
            f"{type(method).__name__} matches gradients in meta_step(loss_fn, batches) only, and step() is ordinary "
            f"training: iterate over meta_batches(loader, {source.batches_per_group}) and call meta_step"
        )
    if not lists and inner_steps is None:
        raise ValueError(
            "Fish without inner_steps never interpolates in a loop of step(): "
            f"pass Fish(inner_steps={domains}), or iterate over meta_batches(loader, {domains}) and call meta_step"
        )
    if inner_steps not in {None, domains}:
        raise ValueError(
            f"Fish(inner_steps={inner_steps}) but the loader's {type(source).__name__} serves groups of "
            f"domains_per_step={domains} domains: make both the same, for instance "
            f"Fish(inner_steps={'loader' if isinstance(source, DomainLoader) else 'sampler'}.domains_per_step)"
        )


def _check_ranks(method: Any, sampler: DomainBatchSampler) -> None:
    """Raise ``ValueError`` unless the ranks share a sampler's batches as a method needs it."""
    group, parallel = getattr(method, "process_group", None), getattr(method, "parallel", None)
    which, split, of_group = f"{type(method).__name__} without process_group", "batch", ""
    if group is not None:
        which = f"{type(method).__name__}({'' if parallel is None else f'parallel={parallel!r}'}) with process_group"
        split = "batch" if parallel == "data" else parallel or ("walks" if isinstance(method, Fish) else sampler.split)
        of_group = "process_group"
    num_parts, num_ranks, rank = sampler.num_replicas, sampler.num_replicas, sampler.rank
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        num_ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    # Without a group there may be more ranks than parts: those of tensor parallelism serve the same batches.
    fits = (num_ranks, rank) == (num_parts, sampler.rank) or (group is None and 1 < num_parts < num_ranks)
    if num_ranks % num_parts or not fits or (num_parts > 1 and sampler.split != split):
        raise ValueError(
            f"the loader's DomainBatchSampler has num_replicas={num_parts}, rank={sampler.rank} and split="
            f"{sampler.split!r}, but {which} needs split={split!r}, and this is rank {rank} of {num_ranks}: pass "
            f"num_replicas=torch.distributed.get_world_size({of_group}), rank=torch.distributed.get_rank({of_group}) "
            f"and split={split!r}"
        )
