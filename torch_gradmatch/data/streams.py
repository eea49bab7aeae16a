"""Batches for meta-iterations where every domain has a loader of its own: for streams, which have no index to sample.

Algorithm 1 of Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, has a loader for
each domain, too. The groups are drawn as in :class:`~torch_gradmatch.DomainBatchSampler`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from torch_gradmatch._checks import check_choice, check_int
from torch_gradmatch.data._labels import _plain, check_short, domain_weights, shown
from torch_gradmatch.data._stream import DomainStream, check_loaders, check_saves, check_state
from torch_gradmatch.data._walk import DomainWalk

__all__ = ["DomainLoader"]

STATE_VERSION = 1
Batch = TypeVar("Batch")


class DomainLoader(Generic[Batch]):
    """A loader over one loader per domain, whose consecutive groups of S batches come from S distinct domains.

    For domains that cannot be indexed, such as one ``IterableDataset`` each. Where they can,
    :class:`~torch_gradmatch.DomainBatchSampler` needs one set of workers, and not one per domain. A group draws S
    domains without replacement from those that have a batch left and serves them in random order; the next group serves
    the same domains in reverse order, with their next batches, and so on in pairs, across epochs, too.

    With ``exhausted="stop"`` an epoch is one pass over the loaders: it ends when fewer than S domains have a batch
    left, and the next begins with new iterators. What the other domains have left then is not served, fetched or not.
    Whether a domain has a batch left is known only when it is fetched, so a whole group is, before it is served.
    With ``exhausted="cycle"`` a loader that has run out is iterated over again, no batch is fetched ahead, and epochs
    are stretches of one endless sequence: each goes on where the one before ended, in every loader.

    Epochs advance by themselves: each new iterator serves the next one, also after one that was broken off. Only the
    iterator that was started last can go on. The draws depend on the arguments and on which domains have a batch left;
    global random state is neither read nor changed.

    To save the place and to go on there, every domain's loader needs ``state_dict`` and ``load_state_dict``, as
    torchdata's ``StatefulDataLoader`` has them: the next iterator then serves the rest of the pass, which is nothing
    behind its last batch, and the one after that a new pass. With ``exhausted="stop"`` such a loader is asked for its
    state before every batch, which for a ``StatefulDataLoader`` without workers takes 0.1 to 0.2 ms.

    ``len(loader)`` is what the iterator in progress, or else the next one, yields in all, after ``load_state_dict``
    what is left of the epoch. It is a ``TypeError``, as for a ``DataLoader`` over a stream, where there is neither
    ``batches_per_epoch`` nor a length of every domain's loader; what a ``DataLoader`` over an ``IterableDataset`` gives
    is a guess, and not used.

    Args:
        loaders: For each domain's label, string or integer, an iterable of its batches, such as a ``DataLoader``.
        domains_per_step: S; ``None`` for all domains.
        weighting: ``"uniform"`` draws every domain that has a batch left with the same probability, a mapping from
            every label to a positive number in proportion to that.
        seed: Integer of at least 0.
        order: ``"flipflop"`` serves groups in pairs, the second in the reverse order of the first; where one of the
            first's domains has no batch left, the second is drawn anew. ``"random"`` draws every group, each in an
            order of its own.
        exhausted: What happens when domains run out, ``"stop"`` or ``"cycle"``, see above.
        batches_per_epoch: With ``exhausted="cycle"``, the length of an epoch, a multiple of S. By default
            max(max_d n_d, ⌈(Σ_d n_d) / S⌉) groups, n_d the length of domain d's loader.

    Attributes:
        domains_per_step: S.

    Raises:
        TypeError: If ``loaders`` is no mapping, or a loader is not iterable, or a data set.
        ValueError: If an argument is out of range, there are fewer than two domains, two of them have the same loader,
            or with ``exhausted="cycle"`` the length of an epoch is neither given nor known.

    Example:
        >>> from torch_gradmatch import meta_batches
        >>> loader = DomainLoader({"north": ["n0", "n1"], "south": ["s0", "s1", "s2"], "west": ["w0", "w1"]})
        >>> for batches in meta_batches(loader, 3):
        ...     print(sorted(batches), [batch[0] for batch in batches] == [domain[0] for domain in batches.domains])
        ['n0', 's0', 'w0'] True
        ['n1', 's1', 'w1'] True
    """

    def __init__(
        self,
        loaders: Mapping[str, Iterable[Batch]] | Mapping[int, Iterable[Batch]],
        domains_per_step: int | None = None,
        weighting: str | Mapping[str, float] | Mapping[int, float] = "uniform",
        seed: int = 0,
        order: str = "flipflop",
        exhausted: str = "stop",
        batches_per_epoch: int | None = None,
    ) -> None:
        seed = check_short(check_int, "seed", seed, 0)
        order = check_short(check_choice, "order", order, ("flipflop", "random"))
        cycle = check_short(check_choice, "exhausted", exhausted, ("stop", "cycle")) == "cycle"
        check_loaders(loaders)
        self._streams = [DomainStream(_plain(label), loader, cycle) for label, loader in loaders.items()]
        self._labels = tuple(stream.label for stream in self._streams)
        self.domains_per_step = len(self._labels)
        if domains_per_step is not None:
            self.domains_per_step = check_short(check_int, "domains_per_step", domains_per_step, 1)
            if self.domains_per_step > len(self._labels):
                raise ValueError(
                    f"domains_per_step should be at most {len(self._labels)}, the number of domains "
                    f"(got {shown(domains_per_step)})"
                )
        if not isinstance(weighting, Mapping) and not (isinstance(weighting, str) and weighting == "uniform"):
            raise ValueError(
                "weighting should be 'uniform' or a mapping from every label to a positive weight "
                f"(got {shown(weighting)})"
            )
        weights, weights_id = domain_weights(weighting, self._labels, [1] * len(self._labels))
        self._fixed_length = self._check_batches_per_epoch(cycle, batches_per_epoch)
        self._settings: dict[str, Any] = {
            "labels": list(self._labels),
            "domains_per_step": self.domains_per_step,
            "weighting": weights_id,
            "seed": seed,
            "order": order,
            "exhausted": exhausted,
            "batches_per_epoch": self._fixed_length,
        }
        self._walk = DomainWalk(weights or [], self.domains_per_step, order == "flipflop", seed)
        self._turn = object()  # of the iterator that was started last
        self._begun = False  # an iterator has begun this epoch, so the next one serves the next epoch
        self._progress: tuple[int, int] | None = None  # epoch and start of the iterator in progress
        self._known_length: tuple[int, int] | None = None  # an epoch, and its batches

    @property
    def labels(self) -> tuple[str | int, ...]:
        """The domains' labels, in the order of ``loaders``."""
        return self._labels

    def __len__(self) -> int:
        start = self._progress[1] if self._progress is not None else (0 if self._begun else self._walk.position)
        return max(0, self._epoch_length() - start)  # not negative even where a resumed loader is shorter than it was

    def __iter__(self) -> Iterator[Batch]:
        """Serve the rest of the epoch after ``load_state_dict``, else the next epoch.

        The first ``next()`` claims the epoch, not this call.

        Yields:
            The loaders' batches.

        Raises:
            RuntimeError: If a loader yields no batch at all, or another iterator was started or a state loaded since.
        """
        if self._begun:
            self._begin_next_epoch()
        walk, streams = self._walk, self._streams
        turn = self._turn = object()
        self._begun, self._progress = True, (walk.epoch, walk.position)
        try:
            while walk.in_group or walk.next_group(self._has_batch):
                batch = streams[walk.following].take()
                walk.advance()
                # Where the last batch is known to be the last, the place behind it is the next epoch's start.
                last = not walk.in_group and self._is_known_end()
                if last:
                    self._begin_next_epoch()
                yield batch
                del batch  # or it stays in memory while the next is fetched
                if last:
                    return
                if turn is not self._turn:
                    raise RuntimeError(
                        "this iterator cannot go on: another one was started over the same DomainLoader, or a state "
                        "loaded, and the domains' loaders have one place each; iterate with one at a time"
                    )
            self._begin_next_epoch()
        finally:
            if turn is self._turn:
                self._progress = None

    def state_dict(self) -> dict[str, Any]:
        """Return the place behind the last batch that was handed out, and the settings.

        Behind the last batch of an epoch whose length is known, that is the start of the next. What a loader draws from
        global generators is no part of it.

        Returns:
            Numbers, strings, lists and dicts of them, and by label what the domains' loaders return as their state.

        Raises:
            TypeError: If a domain's loader cannot save its place.
            ValueError: If one keeps no order, or two share a generator.
        """
        check_saves(self._streams)
        loaders = {stream.label: stream.state_dict() for stream in self._streams}
        return {"version": STATE_VERSION, **self._settings, **self._walk.state_dict(), "loaders": loaders}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where a state dict was taken: the next iterator serves the rest of that epoch.

        Args:
            state_dict: From :meth:`state_dict` of a ``DomainLoader`` with the same arguments, over loaders with the
                same arguments.

        Raises:
            TypeError: If a domain's loader cannot find a place again.
            ValueError: If it is malformed or of other arguments; nothing changes then.
        """
        check_saves(self._streams)
        walk = copy.copy(self._walk)
        self._check_state_dict(state_dict)
        walk.load_state_dict(state_dict)
        if self._fixed_length is not None and walk.position >= self._fixed_length:
            raise ValueError(
                f"the state dict's position should be less than {self._fixed_length}, the batches of an epoch "
                f"(got {shown(walk.position)})"
            )
        self._turn, self._begun, self._progress, self._known_length = object(), False, None, None
        for stream in self._streams:
            stream.load_state_dict(state_dict["loaders"][stream.label])
        self._walk = walk

    def _has_batch(self, domain: int) -> bool:
        """Return whether a domain has a batch left."""
        return self._streams[domain].has_batch()

    def _group_labels(self) -> tuple[str | int, ...]:
        """Return the labels of the latest group."""
        return tuple(self._labels[domain] for domain in self._walk.group)

    def _check_between_groups(self) -> None:
        """Raise ``RuntimeError`` if the next iterator starts in the middle of a group. For ``meta_batches``."""
        if self._walk.in_group and not self._begun:
            raise RuntimeError(
                f"the loader resumes at batch {self._walk.position}, in the middle of a group of "
                f"{self.domains_per_step}: take the state dict under meta_batches, between two lists"
            )

    def _begin_next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        if self._fixed_length is None:
            for stream in self._streams:
                stream.leave()
        self._known_length = (self._walk.epoch, self._walk.position)
        self._walk.next_epoch()
        self._begun = False

    def _is_known_end(self) -> bool:
        """Return whether it is known, without fetching a batch, that no group is left in this epoch."""
        if self._fixed_length is not None:
            return self._walk.position == self._fixed_length
        lengths = [stream.length for stream in self._streams]
        left = [length is None or stream.taken < length for stream, length in zip(self._streams, lengths, strict=True)]
        return None not in lengths and sum(left) < self.domains_per_step

    def _epoch_length(self) -> int:
        """Return the batches of a whole epoch: the one in progress, or else the next one."""
        if self._fixed_length is not None:
            return self._fixed_length
        lengths = self._lengths()
        size = self.domains_per_step
        if size == len(lengths):
            return size * min(lengths)
        if size == 1:
            return sum(lengths)
        walk, broken_off = copy.copy(self._walk), self._begun and self._progress is None
        if broken_off:
            walk.next_epoch()
        epoch = walk.epoch if self._progress is None else self._progress[0]
        if self._known_length is None or self._known_length[0] != epoch:
            left = lengths if broken_off else [n - s.taken for n, s in zip(lengths, self._streams, strict=True)]
            while walk.in_group or walk.next_group(lambda domain: left[domain] > 0):
                left[walk.following] -= 1
                walk.advance()
            self._known_length = (epoch, walk.position)
        return self._known_length[1]

    def _lengths(self) -> list[int]:
        """Return the lengths of the domains' loaders."""
        lengths = []
        for stream in self._streams:
            if stream.length is None:
                raise TypeError(
                    f"the length of an epoch is unknown: the loader of domain {shown(stream.label)}, a "
                    f"{type(stream.loader).__name__}, has none of its own that can be relied on; pass "
                    "exhausted='cycle' and batches_per_epoch where a length is needed"
                )
            lengths.append(stream.length)
        return lengths

    def _check_batches_per_epoch(self, cycle: bool, batches_per_epoch: object) -> int | None:
        """Return the length of every epoch, None if it depends on the loaders."""
        size = self.domains_per_step
        if not cycle:
            if batches_per_epoch is not None:
                raise ValueError(
                    f"batches_per_epoch should be None with exhausted='stop' (got {shown(batches_per_epoch)}): domains "
                    "may run out before; pass exhausted='cycle'"
                )
            return None
        if batches_per_epoch is None:
            try:
                lengths = self._lengths()
            except TypeError as error:
                raise ValueError(f"batches_per_epoch is needed with exhausted='cycle' here: {error}") from None
            return size * max(*lengths, -(-sum(lengths) // size))
        length = check_short(check_int, "batches_per_epoch", batches_per_epoch, 1)
        if length % size:
            raise ValueError(
                f"batches_per_epoch should be a multiple of domains_per_step={size} (got {shown(length)}): "
                f"{shown(-(-length // size) * size)} would do"
            )
        return length

    def _check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raise unless a state dict is one, with the settings and the domains of this loader."""
        expected = ["version", *self._settings, *self._walk.state_dict(), "loaders"]
        if not isinstance(state_dict, Mapping) or set(state_dict) != set(expected):
            found = shown(list(state_dict) if isinstance(state_dict, Mapping) else state_dict)
            raise ValueError(f"the state dict should hold exactly {expected} (got {found})")
        for name, own in {"version": STATE_VERSION, **self._settings}.items():
            if type(state_dict[name]) is not type(own) or state_dict[name] != own:
                raise ValueError(
                    f"the state dict's {name} is {shown(state_dict[name])}, but this loader's is {shown(own)}: resume "
                    "with the same domains and arguments"
                )
        loaders = state_dict["loaders"]
        if not isinstance(loaders, Mapping) or set(loaders) != set(self._labels):
            raise ValueError(f"the state dict's loaders should hold a state by every label (got {shown(loaders)})")
        for label, state in loaders.items():
            check_state(label, state)
