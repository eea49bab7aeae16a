"""Batches in lists of S, one for each ``GradMatch.meta_step``, that know their domains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from typing import Any, Generic, TypeVar, cast

from torch.utils.data import BatchSampler, DataLoader

from torch_gradmatch._checks import check_int
from torch_gradmatch.data.sampler import DomainBatchSampler
from torch_gradmatch.data.streams import DomainLoader

__all__ = ["MetaBatch", "meta_batches"]

Batch = TypeVar("Batch")


class MetaBatch(list[Batch]):
    """A list of S batches, one of each of S domains, and the labels of these domains.

    Args:
        batches: The batches.
        domains: Their labels in the same order, None if unknown.

    Attributes:
        domains: Those labels. A copy that was made through the type, ``type(batches)(...)``, knows none.

    Example:
        >>> MetaBatch([0.5, 0.7], ("north", "south")) == [0.5, 0.7]
        True
    """

    domains: tuple[str | int, ...] | None = None

    def __init__(self, batches: Iterable[Batch] = (), domains: tuple[str | int, ...] | None = None) -> None:
        super().__init__(batches)
        if domains is not None:
            self.domains = domains


def meta_batches(loader: Iterable[Batch], domains_per_step: int | None = None) -> MetaBatches[Batch]:
    """Group the batches of a loader into lists of S, one for each ``GradMatch.meta_step``.

    An incomplete last list is left out; after a ``DomainBatchSampler`` or a ``DomainLoader`` there is none, and the
    lists are :class:`~torch_gradmatch.data.meta_batches.MetaBatch` with the labels of their domains. To resume, save
    the state dict of a ``StatefulDataLoader``, or of the ``DomainLoader``, between two lists: in the middle of a group
    it is a ``RuntimeError`` when iteration starts.

    Args:
        loader: Any iterable of batches that have one domain each: a ``DataLoader`` with a ``DomainBatchSampler`` or a
            batch sampler class of your own, a ``DomainLoader``, or any other whose batches torch's ``BatchSampler``
            does not cut: that mixes domains, shuffled or not.
        domains_per_step: S; where the sampler has ``split="domains"``, S / R, its ``batches_per_group``. ``None`` takes
            it from the loader's ``DomainBatchSampler``, or the ``DomainLoader``.

    Returns:
        An iterable of lists, each time over the loader anew, with a length if the loader has one.

    Raises:
        ValueError: If S is no positive integer or not that of the loader or its ``DomainBatchSampler``, is not given
            where the loader has neither, the loader's batches are cut by torch's ``BatchSampler``, the loader does not
            keep its sampler's order, the sampler serves several batches of a domain in a row, or its domains are not
            those of the loader's data set.

    Example:
        >>> list(meta_batches(["a", "b", "c", "d", "e"], 2))
        [['a', 'b'], ['c', 'd']]
    """
    source = source_of(loader)
    if source is None:
        cut_by = [getattr(loader, name, None) for name in ("batch_sampler", "sampler")]
        known = ("torch.", "torchdata.", "accelerate.")  # a class of the user's may know domains
        if any(isinstance(found, BatchSampler) and type(found).__module__.startswith(known) for found in cut_by):
            raise ValueError(
                f"loader should serve batches of one domain each (got {type(loader).__name__} over a BatchSampler of a "
                "framework, which knows none): pass DataLoader(dataset, batch_sampler=DomainBatchSampler(...)) or a "
                "DomainLoader, or call meta_step with a mapping or list of one batch per domain"
            )
        if domains_per_step is None:
            raise ValueError("domains_per_step should be given for a loader without a DomainBatchSampler (got None)")
        return MetaBatches(loader, check_int("domains_per_step", domains_per_step, 1), None)
    watch(loader, source)
    if isinstance(source, DomainBatchSampler) and source.accumulate > 1:
        raise ValueError(f"meta_batches needs accumulate=1 (got {source.accumulate}), as more is for loops of step()")
    if domains_per_step not in {None, source.batches_per_group}:
        raise ValueError(
            f"domains_per_step should be {source.batches_per_group}, the batches of a group in the loader's "
            f"{type(source).__name__} (got {domains_per_step!r:.80})"
        )
    return MetaBatches(loader, source.batches_per_group, source)


def source_of(loader: Any) -> DomainBatchSampler | DomainLoader[Any] | None:
    """Return what decides the domain of each of a loader's batches, None where that is neither of the two."""
    if isinstance(loader, DomainLoader):
        return loader
    found = getattr(loader, "sampler" if getattr(loader, "batch_sampler", None) is None else "batch_sampler", None)
    return found if isinstance(loader, DataLoader) and isinstance(found, DomainBatchSampler) else None


def watch(loader: Any, source: DomainBatchSampler | DomainLoader[Any]) -> None:
    """Raise ``ValueError`` if a loader does not fit its sampler; let the sampler know whether it fetches ahead."""
    if isinstance(source, DomainLoader):
        return
    for name, needed in (("in_order", True), ("snapshot_every_n_steps", 1)):
        if (found := getattr(loader, name, needed)) != needed:
            raise ValueError(f"loader should have {name}={needed}, or its place in a group is unknown (got {found!r})")
    with suppress(TypeError, NotImplementedError):  # of a data set without a length
        source.check_dataset(len(loader.dataset))
    in_step = loader.num_workers == 0 and type(loader).__iter__ is DataLoader.__iter__
    saves = any(base.__module__.startswith("torchdata.") for base in type(loader).__mro__)
    source.runs_ahead = not in_step and not saves


class MetaBatches(Generic[Batch]):
    """What :func:`meta_batches` returns."""

    def __init__(
        self, loader: Iterable[Batch], domains_per_step: int, source: DomainBatchSampler | DomainLoader[Batch] | None
    ) -> None:
        self.loader = loader
        self.domains_per_step = domains_per_step
        self.source = source

    def __len__(self) -> int:
        return len(cast("Sized", self.loader)) // self.domains_per_step

    def __iter__(self) -> Iterator[MetaBatch[Batch]]:
        return self._lists(iter(self.loader))  # a StatefulDataLoader loads its state here

    def _lists(self, iterator: Iterator[Batch]) -> Iterator[MetaBatch[Batch]]:
        """Yield the batches in lists that know their domains."""
        size, source = self.domains_per_step, self.source
        batches: MetaBatch[Batch] = MetaBatch()
        place = None
        for batch in iterator:
            if source is not None and place is None:
                place = epoch, start = source._started
                number = start // size
                if start % size:
                    where = f"at batch {start} of epoch {epoch}, in the middle of a group of {size}"
                    raise RuntimeError(f"the loader resumes {where}: save its state between two lists of meta_batches")
            batches.append(batch)
            del batch  # or a batch the loop is done with stays in memory while the next is fetched
            if len(batches) == size:
                if source is not None:
                    batches.domains = source._group_labels(epoch, number)
                    number += 1
                yield batches
                batches = MetaBatch()
        if isinstance(source, DomainBatchSampler) and source._started is place:
            source.set_epoch(source._following[0])  # a loader that fetches ahead has come to its end
