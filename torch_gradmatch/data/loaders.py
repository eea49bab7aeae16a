"""What a training framework asks of a loader beyond batches: its place in the epoch, and that it fits the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from torch_gradmatch._checks import check_int
from torch_gradmatch.data._stream import check_saves
from torch_gradmatch.data.meta_batches import _check_dataset, _MetaBatches
from torch_gradmatch.data.sampler import DomainBatchSampler
from torch_gradmatch.data.streams import DomainLoader
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.optimizer import GradMatch

__all__ = ["ResumableLoader", "check_loader"]

Batch = TypeVar("Batch")


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
            order.

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
        self.loader = loader
        self.sampler = _sampler_of(loader)
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
        if state["position"] == self.sampler._epoch_length(int(state["epoch"])):
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

    For frameworks, whose loop calls ``optimizer.step()`` out of sight: called once before training.

    Args:
        optimizer: A ``GradMatch``, or the object into which Lightning or Accelerate have wrapped it.
        loader: What the loop iterates over; it must lead to a ``DomainBatchSampler`` or be made of a ``DomainLoader``.
        accumulation_steps: Batches whose gradients the framework adds up before it steps.

    Raises:
        TypeError: If there is no ``GradMatch``.
        ValueError: If the numbers of domains differ, gradients of several domains would be added up in one inner
            step, the method takes no inner steps, or the loader has no ``DomainBatchSampler``, or one for another data
            set.

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
    method, sampler = wrapped.method, _sampler_of(loader)
    domains = sampler.domains_per_step
    streams = isinstance(sampler, DomainLoader)
    lists = isinstance(loader.loader if isinstance(loader, ResumableLoader) else loader, _MetaBatches)
    if not isinstance(method, Fish) and not lists:
        raise ValueError(
            f"{type(method).__name__} matches gradients in meta_step(loss_fn, batches) only, and step() is ordinary "
            f"training: iterate over meta_batches(loader, {domains}) and call meta_step"
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


def _sampler_of(loader: Any) -> DomainBatchSampler | DomainLoader[Any]:
    """Find the sampler, or the loader of streams, under the wrappers that a framework, or this package, puts around."""
    found, shards = loader, 1
    passed = []
    while not isinstance(found, DomainBatchSampler | DomainLoader):
        if not getattr(found, "split_batches", True):  # Accelerate's BatchSamplerShard
            shards = getattr(found, "num_processes", 1)
        passed.append(found)
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
    if shards > 1:
        raise ValueError(
            f"loader gives {shards} processes batches of {shards} different domains for the same step, and their "
            "gradients would be averaged: split every batch instead (Accelerate: DataLoaderConfiguration("
            "split_batches=True), with drop_last=True in the DomainBatchSampler)"
        )
    if isinstance(found, DomainBatchSampler):
        for wrapper in passed:
            _check_dataset(wrapper, found)
    return found
