"""Batches for meta-iterations where every domain has a loader of its own: streams, for instance.

Algorithm 1 of Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, has a loader for
each domain, too. The groups are drawn as in :class:`~torch_gradmatch.DomainBatchSampler`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from torch_gradmatch._checks import add_note, check_choice, check_int
from torch_gradmatch.data.sampler import DomainBatchSampler

__all__ = ["DomainLoader"]

Batch = TypeVar("Batch")
FAILED = object()


class DomainLoader(Generic[Batch]):
    """A loader over one loader per domain. It serves groups of S batches, each batch from another domain.

    It is for domains that cannot be indexed, such as one ``IterableDataset`` each. Where they can be indexed,
    :class:`~torch_gradmatch.DomainBatchSampler` needs one set of workers instead of one per domain. A group draws S
    domains without replacement and serves them in random order. The next group serves the same domains in reverse
    order, with their next batches, and so on in pairs.

    A loader that has come to its end is iterated over again. Each epoch has the given length and goes on, in every
    loader, where the one before ended. No batch is fetched before it is served.

    Epochs advance by themselves: each new iterator serves the next epoch, also after one that was broken off. Only the
    iterator that was started last can go on. The draws depend only on the arguments and the number of the epoch; global
    random state is neither read nor changed.

    If a loader raises an error, the next batch of that domain is the first of a new pass over its loader, as the note
    in the error says. The next iterator begins again with the group that was broken off.

    To save the place and resume, every domain's loader needs ``state_dict`` and ``load_state_dict``, as torchdata's
    ``StatefulDataLoader`` has them.

    Args:
        loaders: For each domain's label, string or integer, an iterable of its batches, such as a ``DataLoader``, or a
            list or tuple of batches. Data sets, anything else with ``__getitem__``, are refused.
        batches_per_epoch: The length of an epoch, a multiple of S.
        domains_per_step: S; ``None`` for all domains.
        weighting: ``"uniform"`` draws every domain with the same probability, a mapping from every label to a positive
            number in proportion to that.
        order: ``"flipflop"`` serves groups in pairs, the second in the reverse order of the first, also where an epoch
            ends between the two. ``"random"`` draws every group, each in an order of its own.
        seed: Integer of at least 0.

    Attributes:
        labels: The domains' labels.
        domains_per_step: S.

    Raises:
        TypeError: If ``loaders`` is no mapping, or a loader is not iterable, or a data set.
        ValueError: If an argument is out of range, there is only one domain although S is not 1, or two of them have
            the same loader.

    Example:
        >>> from torch_gradmatch import meta_batches
        >>> loaders = {"north": ["n0", "n1"], "south": ["s0", "s1", "s2"]}
        >>> for batches in meta_batches(DomainLoader(loaders, batches_per_epoch=6)):
        ...     print(sorted(zip(batches.domains, batches)))
        [('north', 'n0'), ('south', 's0')]
        [('north', 'n1'), ('south', 's1')]
        [('north', 'n0'), ('south', 's2')]
    """

    labels: tuple[str | int, ...]
    domains_per_step: int

    def __init__(
        self,
        loaders: Mapping[str, Iterable[Batch]] | Mapping[int, Iterable[Batch]],
        batches_per_epoch: int,
        domains_per_step: int | None = None,
        weighting: str | Mapping[str, float] | Mapping[int, float] = "uniform",
        order: str = "flipflop",
        seed: int = 0,
    ) -> None:
        if not isinstance(loaders, Mapping):
            raise TypeError(f"loaders should be a mapping from each domain's label to its loader (got {loaders!r:.80})")
        if not isinstance(weighting, Mapping):  # streams have no size to be in proportion to
            check_choice("weighting, if no mapping from labels,", weighting, ("uniform",))
        for key, loader in loaders.items():
            rows = hasattr(loader, "__getitem__") and not isinstance(loader, list | tuple)
            if rows or not isinstance(loader, Iterable):
                raise TypeError(
                    f"loaders[{key!r:.80}] should be a loader or list of batches (got {loader!r:.80}): pass DataLoader("
                    "dataset, batch_size=...) for a data set, with batch_size=None if it yields batches"
                )
        if len(set(map(id, loaders.values()))) < len(loaders):
            raise ValueError("loaders should have an object of its own for every domain, which has a place of its own")
        numbers = {label: [number] for number, label in enumerate(loaders)}
        length = check_int("batches_per_epoch", batches_per_epoch, 1)
        self._sampler = DomainBatchSampler(numbers, 1, domains_per_step, weighting, order, "cycle", length, seed=seed)
        self.labels, self.domains_per_step = self._sampler.labels, self._sampler.domains_per_step
        self._loaders: dict[str | int, Any] = dict(zip(self.labels, loaders.values(), strict=True))
        self._iterators: dict[str | int, Iterator[Batch]] = {}
        self._unserved: dict[str | int, Any] = {}  # the states of loaders that have served nothing since

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Serve the rest of the epoch after ``load_state_dict``, else the next epoch.

        The first ``next()`` claims the epoch, not this call.

        Yields:
            The loaders' batches.

        Raises:
            RuntimeError: If a loader yields no batch at all, or another iterator was started or a state loaded since.
        """
        turn = None
        for (number,) in self._sampler:
            turn = turn or self._sampler._turn
            if turn is not self._sampler._turn:
                raise RuntimeError("another iterator was started since, or a state loaded: iterate with one at a time")
            try:
                batch = self._next(self.labels[number])
            except BaseException as error:
                named = f"the loader of domain {self.labels[number]!r:.80}"
                add_note(error, f"raised by {named}, whose next batch will be the first of a new pass over it")
                epoch, position = self._sampler._place
                self._sampler._go_to(epoch, position - 1 - (position - 1) % self.domains_per_step)
                raise
            yield batch
            del batch  # or it stays in memory while the next is fetched

    def state_dict(self) -> dict[str, Any]:
        """Return the place behind the last batch that was handed out, a hash of the settings and the loaders' places.

        What a loader draws from global generators is no part of it.

        Returns:
            Numbers, strings, and by label what the domains' loaders return as their state.

        Raises:
            TypeError: If a domain's loader cannot save its place.
            ValueError: If one keeps no order, or two share a generator.
            RuntimeError: If a loader has raised an error, and has served no batch since.
        """
        self._check_saves()
        states = {}
        for label, loader in self._loaders.items():
            state = self._unserved[label] if label in self._unserved else loader.state_dict()
            if state is FAILED:
                raise RuntimeError(f"the loader of domain {label!r:.80} raised an error: save after its next batch")
            states[label] = copy.deepcopy(state)  # the batch that is fetched next may change it in place
        return {**self._sampler.state_dict(), "loaders": states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where a state dict was taken: the next iterator serves the rest of that epoch.

        Args:
            state_dict: From :meth:`state_dict` of a ``DomainLoader`` with the same arguments, over loaders with the
                same arguments.

        Raises:
            TypeError: If a domain's loader cannot find a place again.
            ValueError: If it is malformed or of other arguments; nothing changes then.
        """
        self._check_saves()
        states = state_dict.get("loaders") if isinstance(state_dict, Mapping) else None
        if not isinstance(states, Mapping) or set(states) != set(self.labels):
            raise ValueError(f"the state dict's loaders should hold a state by every label (got {states!r:.200})")
        self._sampler.load_state_dict({name: entry for name, entry in state_dict.items() if name != "loaders"})
        self._iterators, self._unserved = {}, dict.fromkeys(self.labels, FAILED)
        for label, loader in self._loaders.items():
            loader.load_state_dict(copy.deepcopy(states[label]))
            self._unserved[label] = copy.deepcopy(states[label])

    def _next(self, label: str | int) -> Batch:
        """Return a domain's next batch, of a new pass if this one is over."""
        iterator = self._iterators.pop(label, iter(()))  # put back if no error comes between
        self._unserved[label] = FAILED
        for _ in range(4):  # a resumed loader may be at its end, and a generator in it take a pass to notice
            for batch in iterator:
                self._iterators[label] = iterator
                del self._unserved[label]
                return batch
            iterator = iter(self._loaders[label])
        raise RuntimeError(f"the loader of domain {label!r:.80} yields no batch, or only once: pass a DataLoader")

    def _check_saves(self) -> None:
        """Raise unless every domain's loader can save its place, apart from the others'."""
        seen: set[int] = set()
        for label, loader in self._loaders.items():
            named = f"the loader of domain {label!r:.80}, a {type(loader).__name__},"
            if not hasattr(loader, "state_dict") or not hasattr(loader, "load_state_dict"):
                raise TypeError(f"{named} cannot save its place: use StatefulDataLoader, of torch_gradmatch[data]")
            generators = {id(getattr(of, "generator", None)) for of in (loader, getattr(loader, "sampler", None))}
            if seen & (generators - {id(None)}) or not getattr(loader, "in_order", True):
                raise ValueError(f"{named} should have in_order=True and a generator of its own, or has no place")
            seen |= generators
