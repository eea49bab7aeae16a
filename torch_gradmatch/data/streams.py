"""Batches for meta-iterations where every domain has a loader of its own: for streams, which have no index to sample.

Algorithm 1 of Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, has a loader for
each domain, too. The groups are drawn as in :class:`~torch_gradmatch.DomainBatchSampler`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Generic, TypeVar, cast

from torch.utils.data import Dataset

from torch_gradmatch._checks import add_note, check_choice, check_int
from torch_gradmatch.data._draw import Groups
from torch_gradmatch.data._epochs import Epochs, check_groups
from torch_gradmatch.data._labels import check_label, domain_weights

__all__ = ["DomainLoader"]

Batch = TypeVar("Batch")
END = object()


class DomainLoader(Epochs, Generic[Batch]):
    """A loader over one loader per domain, whose consecutive groups of S batches come from S distinct domains.

    For domains that cannot be indexed, such as one ``IterableDataset`` each. Where they can,
    :class:`~torch_gradmatch.DomainBatchSampler` needs one set of workers, and not one per domain. A group draws S
    domains without replacement and serves them in random order; the next group serves the same domains in reverse
    order, with their next batches, and so on in pairs.

    A loader that has come to its end is iterated over again. So there is no end but the given length of an epoch, and
    each epoch goes on where the one before ended, in every loader. No batch is fetched before it is served.

    Epochs advance by themselves: each new iterator serves the next one, also after one that was broken off. Only the
    iterator that was started last can go on. The draws depend only on the arguments and the number of the epoch; global
    random state is neither read nor changed.

    If a loader raises an error, its pass is over: the next batch of that domain is the first of a new pass, as the note
    in the error says. The next iterator begins again with the group that was broken off.

    To save the place and to go on there, every domain's loader needs ``state_dict`` and ``load_state_dict``, as
    torchdata's ``StatefulDataLoader`` has them. At the end of a pass a loader may save that nothing is left, or the
    start of the next pass; both resume alike.

    Args:
        loaders: For each domain's label, string or integer, an iterable of its batches, such as a ``DataLoader``, or a
            list or tuple of batches. Whatever else has ``__getitem__`` is a data set, whose rows are no batches.
        batches_per_epoch: The length of an epoch, a multiple of S.
        domains_per_step: S; ``None`` for all domains.
        weighting: ``"uniform"`` draws every domain with the same probability, a mapping from every label to a positive
            number in proportion to that.
        order: ``"flipflop"`` serves groups in pairs, the second in the reverse order of the first, also where an epoch
            ends between the two. ``"random"`` draws every group, each in an order of its own.
        seed: Integer of at least 0.

    Attributes:
        domains_per_step: S.

    Raises:
        TypeError: If ``loaders`` is no mapping, or a loader is not iterable, or a data set.
        ValueError: If an argument is out of range, there are fewer than two domains, or two of them have the same
            loader.

    Example:
        >>> from torch_gradmatch import meta_batches
        >>> loader = DomainLoader({"north": ["n0", "n1"], "south": ["s0", "s1", "s2"]}, batches_per_epoch=6)
        >>> for batches in meta_batches(loader):
        ...     print(sorted(batches), [batch[0] for batch in batches] == [domain[0] for domain in batches.domains])
        ['n0', 's0'] True
        ['n1', 's1'] True
        ['n0', 's2'] True
    """

    def __init__(
        self,
        loaders: Mapping[str, Iterable[Batch]] | Mapping[int, Iterable[Batch]],
        batches_per_epoch: int,
        domains_per_step: int | None = None,
        weighting: str | Mapping[str, float] | Mapping[int, float] = "uniform",
        order: str = "flipflop",
        seed: int = 0,
    ) -> None:
        seed = check_int("seed", seed, 0)
        order = check_choice("order", order, ("flipflop", "random"))
        labels, self._loaders = _check_loaders(loaders)
        length = check_int("batches_per_epoch", batches_per_epoch, 1)
        size = check_groups(domains_per_step, length, len(labels))
        weights = domain_weights(weighting, labels, choices=("uniform",))
        groups = Groups([1] * len(labels), size, weights, seed, order == "flipflop", length // size)
        super().__init__(groups, labels, size, repr((labels, length, size, weights, order, seed)).encode())
        self._iterators: dict[int, Iterator[Batch]] = {}
        self._loaded: dict[int, Any] = {}  # states of loaders that have served nothing since they were given them
        self._failed: set[int] = set()  # loaders that have served nothing since they raised

    def __iter__(self) -> Iterator[Batch]:
        """Serve the rest of the epoch after ``load_state_dict``, else the next epoch.

        The first ``next()`` claims the epoch, not this call.

        Yields:
            The loaders' batches.

        Raises:
            RuntimeError: If a loader yields no batch at all, or another iterator was started or a state loaded since.
        """
        turn = None
        for epoch, position in self._places():
            turn = turn or self._turn
            if turn is not self._turn:
                raise RuntimeError(
                    "this iterator cannot go on: another one was started over the same DomainLoader, or a state "
                    "loaded, and the domains' loaders have one place each; iterate with one at a time"
                )
            number, place = divmod(position, self.batches_per_group)
            try:
                batch = self._next(self._group(epoch, number)[place])
            except BaseException:
                self._go_to(epoch, position - place)
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
        if self._failed:
            raise RuntimeError(
                f"the loader of domain {self._labels[min(self._failed)]!r:.80} raised an error and begins a new pass "
                "with its next batch: save after that batch"
            )
        states = {  # copies: the batch that is fetched next may change them in place
            label: copy.deepcopy(
                self._loaded[domain] if domain in self._loaded else self._of_loader(domain, loader.state_dict)
            )
            for domain, (label, loader) in enumerate(zip(self._labels, self._loaders, strict=True))
        }
        return {**self._state(), "loaders": states}

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
        loaders = state_dict.get("loaders") if isinstance(state_dict, Mapping) else None
        if isinstance(state_dict, Mapping) and not (isinstance(loaders, Mapping) and {*loaders} == {*self._labels}):
            raise ValueError(f"the state dict's loaders should hold a state by every label (got {loaders!r:.200})")
        self._load_state(state_dict, "loaders")
        self._iterators, self._failed = {}, set()
        for domain, loader in enumerate(self._loaders):
            state = copy.deepcopy(state_dict["loaders"][self._labels[domain]])
            self._of_loader(domain, partial(loader.load_state_dict, copy.deepcopy(state)))
            self._loaded[domain] = state

    def _next(self, domain: int) -> Batch:
        """Return a domain's next batch, of a new pass if this one is over."""
        # A resumed loader may be at its end, and a generator function in it may take a pass to notice.
        for _ in range(3 if domain in self._loaded else 2):
            if domain not in self._iterators:
                self._iterators[domain] = self._of_loader(domain, lambda: iter(self._loaders[domain]))
            batch = self._of_loader(domain, lambda: next(self._iterators[domain], END))
            if batch is not END:
                self._loaded.pop(domain, None)
                self._failed.discard(domain)
                return cast("Batch", batch)
            del self._iterators[domain]
        raise RuntimeError(
            f"the loader of domain {self._labels[domain]!r:.80} yields no batch: it is empty or, like a generator, can "
            f"be iterated over only once (got {type(self._loaders[domain]).__name__}); pass a DataLoader or leave the "
            "domain out"
        )

    def _of_loader(self, domain: int, call: Callable[[], Any]) -> Any:
        """Return what a loader's call does; let an error say whose it is, and what follows."""
        try:
            return call()
        except BaseException as error:
            self._iterators.pop(domain, None)
            self._loaded.pop(domain, None)
            self._failed.add(domain)
            add_note(
                error,
                f"raised by the loader of domain {self._labels[domain]!r:.80}, whose next batch will be the first of a "
                "new pass over it",
            )
            raise

    def _check_saves(self) -> None:
        """Raise unless every domain's loader can save its place, apart from the others'."""
        seen: set[int] = set()
        for label, loader in zip(self._labels, self._loaders, strict=True):
            named = f"the loader of domain {label!r:.80}, a {type(loader).__name__},"
            if not all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict")):
                raise TypeError(
                    f"{named} cannot save its place: it has no state_dict and load_state_dict. Use torchdata's "
                    "StatefulDataLoader (pip install torch_gradmatch[data]), or a loader that has them"
                )
            if not getattr(loader, "in_order", True):
                raise ValueError(f"{named} should keep its order (got in_order=False): nobody knows its place then")
            generators = {id(getattr(of, "generator", None)) for of in (loader, getattr(loader, "sampler", None))}
            if seen & (generators := generators - {id(None)}):
                raise ValueError(f"{named} shares a generator with another: one state cannot serve two places")
            seen |= generators


def _check_loaders(loaders: Any) -> tuple[tuple[str | int, ...], list[Any]]:
    """Return the labels and the loaders if every domain is given a loader of its own."""
    if not isinstance(loaders, Mapping):
        raise TypeError(f"loaders should be a mapping from each domain's label to its loader (got {loaders!r:.80})")
    if len(loaders) < 2:
        raise ValueError(f"loaders should hold the loaders of at least 2 domains (got {len(loaders)})")
    labels = tuple(check_label("loaders", key) for key in loaders)
    for label, loader in zip(labels, loaders.values(), strict=True):
        if isinstance(loader, Dataset) or (hasattr(loader, "__getitem__") and not isinstance(loader, list | tuple)):
            raise TypeError(
                f"loaders[{label!r:.80}] is a data set, a {type(loader).__name__}, and should be a loader of batches: "
                "pass DataLoader(dataset, batch_size=...), with batch_size=None if the data set itself yields batches"
            )
        if not isinstance(loader, Iterable):
            raise TypeError(f"loaders[{label!r:.80}] should be a loader of batches (got {loader!r:.80})")
    if len(set(map(id, loaders.values()))) < len(loaders):
        raise ValueError("loaders should have an object of its own for every domain, which has a place of its own")
    return labels, list(loaders.values())
