"""What a training framework asks of a loader beyond batches: its place in the epoch, and that it fits the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch

from torch_gradmatch._checks import check_int
from torch_gradmatch.data._stream import check_saves
from torch_gradmatch.data.meta_batches import _batches_per_group, _check_dataset, _MetaBatches
from torch_gradmatch.data.sampler import DomainBatchSampler
from torch_gradmatch.data.streams import DomainLoader
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.optimizer import GradMatch

__all__ = ["ResumableLoader", "check_loader"]

Batch = TypeVar("Batch")

_IN_TRAINER = (
    "Trainer of transformers: accelerate.data_loader.prepare_data_loader(loader, num_processes=1, process_index=0) "
    "for accelerator.prepare(loader)"
)


class ResumableLoader(Generic[Batch]):
    """A loader that says how far training is in the epoch, and goes on from there.

    Workers, and the loaders that Accelerate prepares, fetch batches ahead of the loop, so the sampler alone does not
    know what was trained on. Here it counts what the loop received. Lightning saves and restores the state of a train
    dataloader that has ``state_dict`` and ``load_state_dict``; Accelerate that of whatever is registered by
    ``register_for_checkpointing``.

    The length is that of the whole epoch, also after ``load_state_dict``, as frameworks expect of a loader that
    resumes: they count the batches before the checkpoint themselves.

    Args:
        loader: A ``DataLoader`` with a :class:`~torch_gradmatch.DomainBatchSampler`, also one that Accelerate has
            prepared, a :class:`~torch_gradmatch.DomainLoader`, or :func:`~torch_gradmatch.meta_batches` of one of them.

    Attributes:
        loader: That loader.
        sampler: Its sampler, or the ``DomainLoader``, which knows its place itself.

    Raises:
        TypeError: If a domain's loader in a ``DomainLoader`` cannot save its place.
        ValueError: If the loader has no ``DomainBatchSampler``, or one for another data set, or does not keep its
            order, or gives every process batches of other domains, or a part of what is the process's own part already
            or of batches that are not all of the same size, or its lists are not the sampler's groups.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from torch_gradmatch import DomainBatchSampler
        >>> sampler = DomainBatchSampler(["a", "b"] * 4, batch_size=1)
        >>> loader = ResumableLoader(DataLoader(range(8), batch_sampler=sampler, num_workers=0))
        >>> for batch, _ in zip(loader, range(3)):  # zip has taken three when it stops
        ...     state = loader.state_dict()
        >>> state["epoch"], state["position"], len(loader)
        (0, 3, 8)
    """

    def __init__(self, loader: Iterable[Batch]) -> None:
        self.sampler, _ = _sampler_of(loader)
        if isinstance(loader, _MetaBatches) and loader.source is None:  # it did not look as deep
            loader = _MetaBatches(loader.loader, loader.domains_per_step, self.sampler)
        self.loader = loader
        self._under = loader.loader if isinstance(loader, _MetaBatches) else loader
        self._size = loader.domains_per_step if isinstance(loader, _MetaBatches) else 1
        if not getattr(self._under, "in_order", True):
            raise ValueError("loader should keep its sampler's order (got in_order=False): nobody knows its place then")
        if isinstance(self.sampler, DomainLoader):
            check_saves(self.sampler._streams)

    def __len__(self) -> int:
        return self.sampler._epoch_length() // self._size

    def __iter__(self) -> Iterator[Any]:
        """Serve the rest of the epoch after ``load_state_dict``, else the next epoch.

        Yields:
            What the loader yields.
        """
        if isinstance(self.sampler, DomainLoader):
            yield from self.loader
            return
        set_epoch = getattr(self._under, "set_epoch", None)
        if callable(set_epoch):  # Accelerate's loaders count epochs themselves, from 0, and impose that on the sampler
            set_epoch(self.sampler._next_epoch)
        # meta_batches calls _track by itself.
        yield from self.loader if isinstance(self.loader, _MetaBatches) else self.sampler._track(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Return the place behind the last batch that was handed out.

        Returns:
            The sampler's state; behind the last batch of an epoch it is at the start of the next, over streams only
            where that batch is known to be the last.
        """
        if isinstance(self.sampler, DomainLoader):
            return self.sampler.state_dict()
        state: dict[str, Any] = self.sampler.state_dict()
        if self.sampler._is_end(state):
            state |= {"epoch": int(state["epoch"]) + 1, "position": 0}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there: the next iterator serves the rest of that epoch.

        Args:
            state_dict: From :meth:`state_dict`, or a sampler's.
        """
        self.sampler.load_state_dict(state_dict)


def check_loader(optimizer: Any, loader: Any, accumulation_steps: int = 1) -> None:
    """Raise unless a training loop over this loader matches the gradients of as many domains as the optimizer expects.

    For frameworks, whose loop calls ``optimizer.step()`` out of sight: called once before training, on every rank, with
    ``torch.distributed`` initialized where there are several. :func:`~torch_gradmatch.meta_batches` are for a loop of
    ``meta_step``, any other loader is for one of ``step()``, which needs ``Fish(inner_steps=S)``.

    What several ranks serve together has to fit, too:

    - ``DomainBatchSampler(split="walks")`` if each rank walks by itself: ``Fish`` with a ``process_group``, or
      ``SmoothFish`` with one and ``parallel="walks"``;
    - ``split="domains"`` for ``IDGM`` with a ``process_group`` and ``parallel="domains"``;
    - ``split="batch"``, or a framework that splits every batch, with ``parallel="data"`` or without ``process_group``.
      Accelerate's ``split_batches`` leaves out batches that are smaller than ``batch_size``: so none may be.

    The loaders in a ``DomainLoader`` have to give each rank its part themselves; nobody can check that.

    Args:
        optimizer: A ``GradMatch``, or the object into which Lightning or Accelerate have wrapped it.
        loader: What the loop iterates over; it must lead to a ``DomainBatchSampler`` or be made of a ``DomainLoader``.
        accumulation_steps: Batches whose gradients the framework adds up before it steps.

    Raises:
        TypeError: If there is no ``GradMatch``.
        ValueError: If the numbers of domains differ, gradients of several domains would be added up in one inner
            step, ``step()`` would never match gradients (a method other than ``Fish``, or ``Fish`` without
            ``inner_steps``, over a loader that is no ``meta_batches``), the loader has no ``DomainBatchSampler``, or
            one for another data set, or the ranks' batches do not fit the method.

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
    method = wrapped.method
    sampler, num_parts = _sampler_of(loader)
    domains = sampler.domains_per_step
    if isinstance(sampler, DomainBatchSampler):
        _check_ranks(method, sampler, num_parts)
    streams = isinstance(sampler, DomainLoader)
    lists = isinstance(loader.loader if isinstance(loader, ResumableLoader) else loader, _MetaBatches)
    if not isinstance(method, Fish) and not lists:
        raise ValueError(
            f"{type(method).__name__} matches gradients in meta_step(loss_fn, batches) only, and step() is ordinary "
            f"training: iterate over meta_batches(loader, {_batches_per_group(sampler)}) and call meta_step"
        )
    if isinstance(method, Fish) and method.inner_steps is None and not lists:
        raise ValueError(
            "Fish without inner_steps never interpolates in a loop of step(): "
            f"pass Fish(inner_steps={domains}), or iterate over meta_batches(loader, {domains}) and call meta_step"
        )
    if isinstance(method, Fish) and method.inner_steps not in (None, domains):
        raise ValueError(
            f"Fish(inner_steps={method.inner_steps}) but the loader's {type(sampler).__name__} serves groups of "
            f"domains_per_step={domains} domains: make both the same, for instance "
            f"Fish(inner_steps={'loader' if streams else 'sampler'}.domains_per_step)"
        )
    if check_int("accumulation_steps", accumulation_steps, at_least=1) > 1:
        raise ValueError(
            f"accumulation_steps={accumulation_steps} adds up the gradients of {accumulation_steps} batches, which "
            f"come from different domains (domains_per_step={domains}), before one step: their agreement is lost. "
            f"Use 1, and a larger batch_size in {'every loader' if streams else 'the DomainBatchSampler'}"
        )


def _check_ranks(method: Any, sampler: DomainBatchSampler, num_parts: int) -> None:
    """Raise ``ValueError`` unless the ranks share a sampler's batches as a method needs it.

    Args:
        method: Of the ``GradMatch``.
        sampler: Of the loader.
        num_parts: Among how many processes a framework splits every batch.

    Raises:
        ValueError: If they do not.
    """
    group = getattr(method, "process_group", None)
    num_ranks = torch.distributed.get_world_size(group) if _is_initialized() else 0
    name, parallel = type(method).__name__, getattr(method, "parallel", None)
    of_group = "" if group is None else "process_group"
    if group is None:
        split, which = "batch", f"{name} without process_group"
    elif parallel is None:
        split, which = "walks" if isinstance(method, Fish) else sampler.split, f"{name} with process_group"
    else:
        split, which = "batch" if parallel == "data" else parallel, f"{name}(parallel={parallel!r}) with process_group"
    advice = (
        f"pass num_replicas=torch.distributed.get_world_size({of_group}), rank=torch.distributed.get_rank({of_group}) "
        f"and split={split!r}"
    )
    found = f"the loader's DomainBatchSampler has num_replicas={sampler.num_replicas}"
    if num_parts > 1:
        if split != "batch":
            raise ValueError(
                f"{which} needs a DomainBatchSampler with split={split!r}, but the loader splits every batch among "
                f"{num_parts} processes: leave the loader out of what the framework prepares, and {advice}"
            )
        return
    if sampler.num_replicas == 1:
        if num_ranks > 1:
            raise ValueError(
                f"{found}, but {which} runs on {num_ranks} ranks, all of which would serve the same batches: {advice}"
            )
        return
    if sampler.split != split:
        raise ValueError(
            f"the loader's DomainBatchSampler has split={sampler.split!r}, but {which} needs split={split!r}: pass that"
        )
    # Without a group there may be more ranks: those of tensor parallelism serve the same batches.
    if num_ranks % sampler.num_replicas or (group is not None and num_ranks != sampler.num_replicas):
        raise ValueError(f"{found}, but {which} runs on {num_ranks} ranks: {advice}")
    if num_ranks == sampler.num_replicas and sampler.rank != (rank := torch.distributed.get_rank(group)):
        raise ValueError(
            f"the loader's DomainBatchSampler has rank={sampler.rank}, but this is rank {rank} of {num_ranks}, and its "
            f"part of the data would not be served: {advice}"
        )


def _is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sampler_of(loader: Any) -> tuple[DomainBatchSampler | DomainLoader[Any], int]:
    """Find what is under the wrappers that a framework, or this package, puts around.

    Args:
        loader: As in :func:`check_loader`.

    Returns:
        The sampler, or the loader of streams; and among how many processes a wrapper splits every batch.

    Raises:
        ValueError: If there is neither, processes would have batches of different domains, or parts of parts or of
            batches that cannot be split, or lists would not hold one batch of each domain.
    """
    found, num_processes, splits_batches = loader, 1, True
    passed = []
    while not isinstance(found, DomainBatchSampler | DomainLoader):
        passed.append(found)
        if hasattr(
            found, "split_batches"
        ):  # Accelerate's BatchSamplerShard or, where one process reads for all, loader
            state = found if hasattr(found, "num_processes") else getattr(found, "state", None)
            num_processes = max(num_processes, getattr(state, "num_processes", 1))
            splits_batches = splits_batches and found.split_batches
        for name in ("loader", "batch_sampler"):
            under = getattr(found, name, None)
            if under is not None:
                found = under
                break
        else:
            raise ValueError(
                "loader should be a DataLoader whose batch_sampler is a DomainBatchSampler, or a DomainLoader (got "
                f"{type(loader).__name__} over {type(found).__name__})"
            )
    if num_processes > 1 and isinstance(found, DomainBatchSampler) and found.num_replicas > 1:
        raise ValueError(
            f"loader gives {num_processes} processes parts of what the DomainBatchSampler with "
            f"num_replicas={found.num_replicas} serves on one rank, which is a part already: leave the loader out of "
            "what the framework prepares (Accelerate: accelerator.prepare(model, optimizer) without it, "
            "batch.to(accelerator.device), and DataLoaderConfiguration(split_batches=True) all the same, or schedulers "
            f"step once for each process; {_IN_TRAINER}; Lightning: Trainer(use_distributed_sampler=False))"
        )
    if num_processes > 1 and not splits_batches:
        raise ValueError(
            f"loader gives {num_processes} processes batches of {num_processes} different domains for the same step, "
            "and their gradients would be averaged: split every batch instead (Accelerate: DataLoaderConfiguration("
            "split_batches=True), with drop_last=True in the DomainBatchSampler; "
            f"{_IN_TRAINER} over a DomainBatchSampler with num_replicas, rank and split='batch')"
        )
    if num_processes > 1 and isinstance(found, DomainBatchSampler) and not found.drop_last:
        short = found._smaller_batches()
        if short:
            raise ValueError(
                f"loader splits batches of batch_size={found.batch_size} among {num_processes} processes, but the last "
                f"batch of {short} of {len(found.labels)} domains is smaller: Accelerate would leave it out, and the "
                "groups of domains would come apart, or fill it up with samples of other domains. Pass drop_last=True "
                "to the DomainBatchSampler"
            )
    for wrapper in passed:
        own = _batches_per_group(found)
        if isinstance(wrapper, _MetaBatches) and wrapper.domains_per_step != own:
            raise ValueError(
                f"loader makes lists of {wrapper.domains_per_step} batches over a {type(found).__name__} that serves "
                f"groups of {own}: pass meta_batches(loader, {own}), or a list could hold two batches of one domain"
            )
    if isinstance(found, DomainBatchSampler):
        for wrapper in passed:
            _check_dataset(wrapper, found)
    return found, num_processes
