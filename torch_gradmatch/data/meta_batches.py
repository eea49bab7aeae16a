"""Batches in lists of S, one for each ``GradMatch.meta_step``, that know their domains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, Generic, TypeVar, cast

from torch.utils.data import BatchSampler

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


def meta_batches(loader: Iterable[Batch], domains_per_step: int | None = None) -> _MetaBatches[Batch]:
    """Group the batches of a loader into lists of S, one for each ``GradMatch.meta_step``.

    An incomplete last list is left out; after a ``DomainBatchSampler`` or a ``DomainLoader`` there is none, and the
    lists are :class:`~torch_gradmatch.data.meta_batches.MetaBatch` with the labels of their domains. The sampler is
    told what was handed out, so its ``state_dict()`` is right although the loader's workers run ahead. A sampler or
    ``DomainLoader`` resumed in the middle of a group is refused with ``RuntimeError`` when iteration starts.

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
            keep its sampler's order, or the sampler's domains are not those of the loader's data set.

    Example:
        >>> list(meta_batches(["a", "b", "c", "d", "e"], 2))
        [['a', 'b'], ['c', 'd']]
    """
    if domains_per_step is not None:
        domains_per_step = check_int("domains_per_step", domains_per_step, at_least=1)
    source: Any = loader if isinstance(loader, DomainLoader) else getattr(loader, "batch_sampler", None)
    while not isinstance(source, DomainBatchSampler | DomainLoader) and hasattr(source, "batch_sampler"):
        source = source.batch_sampler  # under the shards that a framework makes of it
    if not isinstance(source, DomainBatchSampler | DomainLoader):
        _check_not_mixed(loader)
        if domains_per_step is None:
            raise ValueError(
                "domains_per_step should be an integer of at least 1 (got None) over a loader that is no DomainLoader "
                f"and has no DomainBatchSampler (got {type(loader).__name__})"
            )
        return _MetaBatches(loader, domains_per_step, None)
    own = _batches_per_group(source)
    if domains_per_step not in {None, own}:
        which = "DomainLoader" if source is loader else "loader's DomainBatchSampler"
        if own != source.domains_per_step:
            which += f", which deals out domains_per_step={source.domains_per_step} batches to the ranks"
        raise ValueError(
            f"domains_per_step should be {own}, as in the {which} (got {domains_per_step}): "
            "otherwise a list could hold two batches of one domain"
        )
    if not getattr(loader, "in_order", True):
        raise ValueError("loader should keep its sampler's order (got in_order=False): lists would mix groups")
    if isinstance(source, DomainBatchSampler):
        _check_dataset(loader, source)
    return _MetaBatches(loader, own, source)


def _check_not_mixed(loader: Any) -> None:
    """Raise ``ValueError`` if a loader's batches are cut by torch's own ``BatchSampler``, which knows no domains."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    if sampler is None:
        sampler = getattr(loader, "sampler", None)  # cuts batches where batch_size=None, if it is a batch sampler
    while hasattr(sampler, "split_batches"):  # Accelerate's shards of it; a class of the user's may group by domain
        sampler = sampler.batch_sampler
    if not isinstance(sampler, BatchSampler) or not type(sampler).__module__.startswith(("torch.", "torchdata.")):
        return
    if not isinstance(sampler.sampler, DomainBatchSampler):
        raise ValueError(
            f"loader should serve batches of one domain each (got {type(loader).__name__} over torch's BatchSampler, "
            "which cuts batches whatever the domains): pass DataLoader(dataset, batch_sampler=DomainBatchSampler(...)) "
            "or a DomainLoader, or call meta_step with a mapping or list of one batch per domain that you built by hand"
        )


def _batches_per_group(source: DomainBatchSampler | DomainLoader[Any]) -> int:
    """Return how many batches of a group this process has."""
    return source.batches_per_group if isinstance(source, DomainBatchSampler) else source.domains_per_step


def _check_dataset(loader: Any, sampler: DomainBatchSampler) -> None:
    """Raise ``ValueError`` if a sampler's domains are not those of the loader's data set, if that has a length."""
    try:
        num_samples = len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return
    sampler._check_dataset(num_samples)


class _MetaBatches(Generic[Batch]):
    """What ``meta_batches`` returns."""

    def __init__(
        self, loader: Iterable[Batch], domains_per_step: int, source: DomainBatchSampler | DomainLoader[Batch] | None
    ) -> None:
        self.loader = loader
        self.domains_per_step = domains_per_step
        self.source = source

    def __len__(self) -> int:
        return len(cast("Sized", self.loader)) // self.domains_per_step

    def __iter__(self) -> Iterator[MetaBatch[Batch]]:
        if isinstance(self.source, DomainBatchSampler):
            return self._of_sampler(self.source)
        if isinstance(self.source, DomainLoader):
            return self._of_domain_loader(self.source)
        return self._groups()

    def _of_sampler(self, sampler: DomainBatchSampler) -> Iterator[MetaBatch[Batch]]:
        """Yield lists whose domains the sampler planned, and let it count them as handed out."""
        epoch, position = -1, 0
        for batches in sampler._track(self._groups(), self.domains_per_step):
            if epoch < 0:
                epoch, position = sampler._current()  # of the iterator that the loader has just started
                known = epoch < sampler._next_epoch  # unless it has started none
            if known:
                batches.domains = sampler._labels_at(epoch, position, self.domains_per_step)
            position += self.domains_per_step
            yield batches
            del batches  # or a group the loop is done with stays in memory while the loader fetches the next

    def _of_domain_loader(self, loader: DomainLoader[Batch]) -> Iterator[MetaBatch[Batch]]:
        """Yield lists whose domains the loader has just served."""
        loader._check_between_groups()
        for batches in self._groups():
            batches.domains = loader._group_labels()
            yield batches
            del batches  # or a group the loop is done with stays in memory while the loader fetches the next

    def _groups(self) -> Iterator[MetaBatch[Batch]]:
        """Yield the loader's batches in lists of S."""
        batches: MetaBatch[Batch] = MetaBatch()
        for batch in self.loader:
            batches.append(batch)
            if len(batches) == self.domains_per_step:
                yield batches
                batches = MetaBatch()
