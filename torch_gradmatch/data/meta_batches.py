"""Batches that know their domains: in lists of S, one for each ``GradMatch.meta_step``, and one by one for ``step``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import count, islice, repeat
from typing import Any, Generic, cast

from torch.utils.data import BatchSampler, DataLoader

from torch_gradmatch._checks import check_int
from torch_gradmatch.data.sampler import DomainBatchSampler
from torch_gradmatch.data.streams import Batch, DomainLoader

__all__ = ["MetaBatch", "domain_batches", "meta_batches"]


class MetaBatch(list[Batch]):
    """A list of S batches, one of each of S domains, and the labels of these domains.

    Args:
        batches: The batches.
        domains: Their labels in the same order, None if unknown.

    Attributes:
        domains: Those labels. A copy made by ``type(batches)(...)`` has none.

    Example:
        >>> MetaBatch([0.5, 0.7], ("north", "south")) == [0.5, 0.7]
        True
    """

    def __init__(self, batches: Iterable[Batch] = (), domains: tuple[str | int, ...] | None = None) -> None:
        super().__init__(batches)
        self.domains = domains


def meta_batches(loader: Iterable[Batch], domains_per_step: int | None = None) -> MetaBatches[Batch]:
    """Group the batches of a loader into lists of S, one for each ``GradMatch.meta_step``.

    Over a ``DomainBatchSampler`` or a ``DomainLoader`` the lists are
    :class:`~torch_gradmatch.data.meta_batches.MetaBatch` with the labels of their domains. Over other loaders an
    incomplete last list is left out. To resume, save the state dict of a ``StatefulDataLoader``, or of the
    ``DomainLoader``, between two lists: one saved in the middle of a group is a ``RuntimeError`` when iteration starts.

    Args:
        loader: Any iterable of batches that have one domain each: a ``DataLoader`` with a ``DomainBatchSampler`` or a
            batch sampler class of your own, or a ``DomainLoader``. Batches of torch's own ``BatchSampler`` mix domains
            and are refused.
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
    sampler = sampler_of(loader)
    if sampler is None:
        cut_by = [getattr(loader, name, None) for name in ("batch_sampler", "sampler")]
        known = ("torch.", "torchdata.", "accelerate.")  # a class of the user's may know domains
        if any(isinstance(found, BatchSampler) and type(found).__module__.startswith(known) for found in cut_by):
            raise ValueError(
                f"loader should serve batches of one domain each (got {type(loader).__name__} over a BatchSampler of a "
                "framework): pass DataLoader(dataset, batch_sampler=DomainBatchSampler(...)) or a DomainLoader"
            )
        return MetaBatches(loader, check_int("domains_per_step", domains_per_step, 1), None)
    size = sampler.batches_per_group
    if sampler.accumulate > 1:
        raise ValueError(f"meta_batches needs accumulate=1 (got {sampler.accumulate}), as more is for loops of step()")
    if domains_per_step not in {None, size}:
        raise ValueError(f"domains_per_step should be {size}, as in the loader, or None (got {domains_per_step!r:.80})")
    return MetaBatches(loader, size, sampler)


def sampler_of(loader: Any) -> DomainBatchSampler | None:
    """Return what decides the domain of each of a loader's batches, if it fits the loader; None if nobody knows."""
    if isinstance(loader, DomainLoader):
        return loader._sampler
    sampler = getattr(loader, "sampler" if getattr(loader, "batch_sampler", None) is None else "batch_sampler", None)
    if not isinstance(loader, DataLoader) or not isinstance(sampler, DomainBatchSampler):
        return None
    for name, needed in (("in_order", True), ("snapshot_every_n_steps", 1)):
        if (found := getattr(loader, name, needed)) != needed:
            raise ValueError(f"loader should have {name}={needed}, or its place in a group is unknown (got {found!r})")
    if hasattr(loader.dataset, "__len__"):
        sampler.check_dataset(len(loader.dataset))
    saves = any(base.__module__.startswith("torchdata.") for base in type(loader).__mro__)
    sampler._runs_ahead = not saves and (loader.num_workers > 0 or type(loader).__iter__ is not DataLoader.__iter__)
    return sampler


@dataclass(eq=False)
class MetaBatches(Generic[Batch]):
    """What :func:`meta_batches` returns."""

    loader: Iterable[Batch]
    domains_per_step: int
    sampler: DomainBatchSampler | None

    def __len__(self) -> int:
        return len(cast("Sized", self.loader)) // self.domains_per_step

    def __iter__(self) -> Iterator[MetaBatch[Batch]]:
        batches, labels = list[Batch](), list[str | int]()
        for label, batch in _labelled(self.loader, self.sampler):
            if self.sampler is not None and not batches:
                epoch, start = self.sampler._started
                if start % self.sampler.batches_per_group:
                    where = f"batch {start} of epoch {epoch}, inside a group"
                    raise RuntimeError(f"resumed at {where}: save between two lists")
            batches.append(batch)
            labels += [] if label is None else [label]
            del batch  # or a batch the loop is done with stays in memory while the next is fetched
            if len(batches) == self.domains_per_step:
                yield MetaBatch(batches, tuple(labels) or None)
                batches, labels = [], []
        if self.sampler is not None and self.sampler._turn is None:
            self.sampler.set_epoch(self.sampler._following[0])  # a loader that fetches ahead has come to its end


def served_labels(sampler: DomainBatchSampler) -> Iterator[str | int]:
    """Return the label of each batch, one after the other, from where the sampler's latest iterator started."""
    epoch, start = sampler._started
    first, begun = divmod(start, sampler.batches_per_group)
    groups = (sampler._groups.group(epoch, number)[sampler._own] for number in count(first))
    domains = (domain for group in groups for domain in group for _ in range(sampler.accumulate))
    return (sampler.labels[domain] for domain in islice(domains, begun, None))


def _labelled(loader: Iterable[Batch], sampler: DomainBatchSampler | None) -> Iterator[tuple[str | int | None, Batch]]:
    """Yield each batch behind its label, which is known once the loader has begun."""
    labels: Iterator[str | int | None] | None = None
    for batch in loader:
        labels = labels or (repeat(None) if sampler is None else served_labels(sampler))
        yield next(labels), batch
        del batch


def domain_batches(loader: Iterable[Batch]) -> Iterator[tuple[str | int, Batch]]:
    """Serve each batch of a loader behind the label of its domain, for loops of ``GradMatch.step``.

    ``for optimizer.domain, batch in domain_batches(loader)`` tells the optimizer the domain of every step, so that
    ``optimizer.last_meta_step.scalars()`` has a number for each domain. The batches and their order are the loader's,
    with workers, ``accumulate``, and from where it resumes.

    Args:
        loader: A ``DataLoader`` with a ``DomainBatchSampler``, or a ``DomainLoader``; not one that a framework has
            prepared.

    Yields:
        A label and a batch.

    Raises:
        ValueError: If the loader is another one, or its domains are not those of its data set.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> from torch_gradmatch import Fish, GradMatch
        >>> w = torch.nn.Parameter(torch.ones(()))
        >>> method = Fish(inner_steps=2, track_alignment=True)
        >>> optimizer = GradMatch(torch.optim.SGD([w], lr=0.1), method)
        >>> sampler = DomainBatchSampler(["north", "south"], batch_size=1)
        >>> loader = DataLoader([3.0, 5.0], batch_sampler=sampler)
        >>> for optimizer.domain, x in domain_batches(loader):
        ...     optimizer.zero_grad()
        ...     (w * x).sum().backward()
        ...     optimizer.step()
        >>> numbers = optimizer.last_meta_step.scalars()
        >>> numbers["grad_norm/north"], numbers["grad_norm/south"]
        (3.0, 5.0)
    """
    sampler = sampler_of(loader)
    if sampler is None:
        raise ValueError(
            "loader should be a DataLoader over a DomainBatchSampler, or a DomainLoader, as you made it (got "
            f"{type(loader).__name__}): only they know the domains"
        )
    yield from cast("Iterator[tuple[str | int, Batch]]", _labelled(loader, sampler))
