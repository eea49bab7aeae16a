"""Batches in lists of S, one for each ``GradMatch.meta_step``, that know their domains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
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
    if domains_per_step is not None:
        domains_per_step = check_int("domains_per_step", domains_per_step, at_least=1)
    source = source_of(loader)
    if source is None:
        cut_by = next(
            (found for name in ("batch_sampler", "sampler") if (found := getattr(loader, name, None)) is not None), None
        )
        if isinstance(cut_by, BatchSampler) and type(cut_by).__module__.startswith(("torch.", "torchdata.")):
            raise ValueError(
                f"loader should serve batches of one domain each (got {type(loader).__name__} over torch's "
                "BatchSampler, which cuts batches whatever the domains): pass DataLoader(dataset, "
                "batch_sampler=DomainBatchSampler(...)) or a DomainLoader, or call meta_step with a mapping or list of "
                "one batch per domain that you built by hand"
            )
        if domains_per_step is None:
            raise ValueError(
                "domains_per_step should be an integer of at least 1 (got None) over a loader that is no DomainLoader "
                f"and has no DomainBatchSampler (got {type(loader).__name__})"
            )
        return MetaBatches(loader, domains_per_step, None)
    if isinstance(source, DomainBatchSampler) and source.accumulate > 1:
        raise ValueError(
            f"loader should serve one batch of each domain for meta_batches (got accumulate={source.accumulate} in its "
            "DomainBatchSampler, which is for loops of step()): pass accumulate=1, and a larger batch_size"
        )
    if domains_per_step not in {None, source.batches_per_group}:
        raise ValueError(
            f"domains_per_step should be {source.batches_per_group}, the batches of a group in the loader's "
            f"{type(source).__name__} (got {domains_per_step}): otherwise a list could hold two batches of one domain"
        )
    watch(loader, source)
    return MetaBatches(loader, source.batches_per_group, source)


def source_of(loader: Any) -> DomainBatchSampler | DomainLoader[Any] | None:
    """Return what decides the domain of each of a loader's batches, None where that is neither of the two."""
    if isinstance(loader, DataLoader):
        loader = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return loader if isinstance(loader, DomainBatchSampler | DomainLoader) else None


def watch(loader: Any, source: DomainBatchSampler | DomainLoader[Any]) -> None:
    """Raise ``ValueError`` if a loader does not fit its sampler; let the sampler know whether it fetches ahead."""
    if isinstance(source, DomainLoader):
        return
    if not loader.in_order:
        raise ValueError("loader should keep its sampler's order (got in_order=False): groups would be mixed")
    if getattr(loader, "snapshot_every_n_steps", 1) != 1:
        raise ValueError(
            f"loader should have snapshot_every_n_steps=1 (got {loader.snapshot_every_n_steps}): resumed elsewhere, it "
            "serves batches again that the loop does not see"
        )
    try:
        num_samples = len(loader.dataset)
    except (TypeError, NotImplementedError):
        pass
    else:
        source._check_dataset(num_samples)
    saves = any(base.__module__.startswith("torchdata.") for base in type(loader).__mro__)
    in_step = loader.num_workers == 0 and type(loader).__iter__ is DataLoader.__iter__
    source._runs_ahead = not saves and not in_step


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
        size, source = self.domains_per_step, self.source
        batches: MetaBatch[Batch] = MetaBatch()
        place = None
        for batch in self.loader:
            if source is not None and place is None:
                place = epoch, start = source._started
                number = start // size
                if start % size:
                    raise RuntimeError(
                        f"the loader resumes at batch {start} of epoch {epoch}, in the middle of a group of {size}: "
                        "save its state dict between two lists of meta_batches"
                    )
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
