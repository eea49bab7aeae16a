"""Batches in lists of S, one for each ``GradMatch.meta_step``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Generic, TypeVar, cast

from torch_gradmatch._checks import check_int
from torch_gradmatch.data.sampler import DomainBatchSampler

__all__ = ["meta_batches"]

Batch = TypeVar("Batch")


def meta_batches(loader: Iterable[Batch], domains_per_step: int) -> _MetaBatches[Batch]:
    """Group the batches of a loader into lists of S, one for each ``GradMatch.meta_step``.

    An incomplete last list is left out; after a ``DomainBatchSampler`` there is none. The sampler is told what was
    handed out, so its ``state_dict()`` is right although the loader's workers run ahead. A sampler resumed in the
    middle of a group is refused with ``RuntimeError`` when iteration starts.

    Args:
        loader: Any iterable of batches; a ``DataLoader`` with a ``DomainBatchSampler`` to have one domain each.
        domains_per_step: S.

    Returns:
        An iterable of lists, each time over the loader anew, with a length if the loader has one.

    Raises:
        ValueError: If S is no positive integer or not that of the loader's ``DomainBatchSampler``, or if the loader
            does not keep its sampler's order.

    Example:
        >>> list(meta_batches(["a", "b", "c", "d", "e"], 2))
        [['a', 'b'], ['c', 'd']]
    """
    domains_per_step = check_int("domains_per_step", domains_per_step, at_least=1)
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, DomainBatchSampler):
        return _MetaBatches(loader, domains_per_step, None)
    if sampler.domains_per_step != domains_per_step:
        raise ValueError(
            f"domains_per_step should be {sampler.domains_per_step}, as in the loader's DomainBatchSampler "
            f"(got {domains_per_step}): otherwise a list could hold two batches of one domain"
        )
    if not getattr(loader, "in_order", True):
        raise ValueError("loader should keep its sampler's order (got in_order=False): lists would mix groups")
    return _MetaBatches(loader, domains_per_step, sampler)


class _MetaBatches(Generic[Batch]):
    """What ``meta_batches`` returns."""

    def __init__(self, loader: Iterable[Batch], domains_per_step: int, sampler: DomainBatchSampler | None) -> None:
        self.loader = loader
        self.domains_per_step = domains_per_step
        self.sampler = sampler

    def __len__(self) -> int:
        return len(cast("Sized", self.loader)) // self.domains_per_step

    def __iter__(self) -> Iterator[list[Batch]]:
        groups = self._groups()
        return groups if self.sampler is None else self.sampler._track(groups, self.domains_per_step)

    def _groups(self) -> Iterator[list[Batch]]:
        """Yield the loader's batches in lists of S."""
        batches: list[Batch] = []
        for batch in self.loader:
            batches.append(batch)
            if len(batches) == self.domains_per_step:
                yield batches
                batches = []
