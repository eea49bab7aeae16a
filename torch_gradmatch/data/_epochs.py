"""Epochs of groups of S domains, and the place in them: what the sampler and the loader of streams have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch_gradmatch._checks import check_int
from torch_gradmatch.data._draw import Groups

__all__ = ["Epochs", "check_groups"]


class Epochs:
    """Counts epochs, and the batches of each that were handed out.

    Every iterator serves the epoch after that of the one before, or resumes one. Its first ``next()`` claims the epoch,
    not ``iter()``, which a ``DataLoader`` with workers calls twice. Only the iterator that was started last moves the
    place.

    Args:
        groups: Of all epochs.
        labels: Of the domains, by number.
        batches_per_group: Batches of a group that are served here.
        settings: Bytes that tell whatever decides what is served from all else.
    """

    def __init__(self, groups: Groups, labels: tuple[str | int, ...], batches_per_group: int, settings: bytes) -> None:
        self._groups, self._labels = groups, labels
        self.domains_per_step, self.batches_per_group = groups.size, batches_per_group
        self._settings = hashlib.blake2b(settings, digest_size=16).hexdigest()
        self._following = self._place = (0, 0)  # where the next iterator starts, and what a state dict says
        self._started = (0, 0)  # where the latest iterator did
        self._turn = object()  # of that iterator
        self._in_progress = self._begun = False  # _begun: since a place was chosen

    @property
    def labels(self) -> tuple[str | int, ...]:
        """The domains' labels, in the order in which they were given."""
        return self._labels

    def __len__(self) -> int:
        return self._length((self._started if self._in_progress else self._following)[0])

    def _state(self) -> dict[str, Any]:
        """Return the place behind the last batch that was handed out."""
        return {"epoch": self._place[0], "position": self._place[1], "settings": self._settings}

    def _load_state(self, state_dict: Any, *more: str) -> None:
        """Go to the place of a state dict that holds entries of these names, too; if it is malformed, nowhere."""
        expected = [*self._state(), *more]
        if not isinstance(state_dict, Mapping) or set(state_dict) != set(expected):
            raise ValueError(f"the state dict should hold exactly {expected} (got {state_dict!r:.200})")
        if state_dict["settings"] != self._settings:
            raise ValueError("the state dict was saved with other domains, arguments or ranks: resume with the same")
        epoch, position = (check_int(f"the state dict's {name}", state_dict[name], 0) for name in expected[:2])
        if position > self._length(epoch):
            raise ValueError(f"the state dict's position {position} is behind the end of epoch {epoch}")
        self._go_to(epoch, position)

    def _go_to(self, epoch: int, position: int) -> None:
        """Let the next iterator start at a place; the one in progress moves the place no more."""
        self._following = self._place = (epoch, position)
        self._turn, self._in_progress, self._begun = object(), False, False

    def _places(self) -> Iterator[tuple[int, int]]:
        """Yield the number of the following epoch and, one by one, the positions in the rest of it."""
        turn = self._turn = object()
        epoch, start = self._started = self._place = self._following
        self._following, self._in_progress, self._begun = (epoch + 1, 0), True, True
        try:
            for position in range(start, self._length(epoch)):
                if self._turn is turn:
                    self._place = (epoch, position + 1)
                yield epoch, position
            if self._turn is turn:
                self._place = self._following
        finally:
            if self._turn is turn:
                self._in_progress = False

    def _length(self, epoch: int) -> int:
        """Return the batches of an epoch."""
        return self._groups.number(epoch) * self.batches_per_group

    def _group(self, epoch: int, number: int) -> list[int]:
        """Return the domains of a group in the order in which they are served here."""
        return self._groups.group(epoch, number)

    def _group_labels(self, epoch: int, number: int) -> tuple[str | int, ...]:
        """Return the labels of those domains."""
        return tuple(self._labels[domain] for domain in self._group(epoch, number))


def check_groups(
    domains_per_step: int | None, batches_per_epoch: int | None, num_domains: int, repeats: int = 1
) -> int:
    """Return S.

    Args:
        domains_per_step: S, or None for all domains.
        batches_per_epoch: Should be a multiple of S times ``repeats``.
        num_domains: Of all domains.
        repeats: Batches of a domain in a row.

    Returns:
        The number of domains in a group.

    Raises:
        ValueError: If one of the two is out of range.
    """
    size = num_domains if domains_per_step is None else check_int("domains_per_step", domains_per_step, 1)
    if size > num_domains:
        raise ValueError(f"domains_per_step should be at most {num_domains}, the number of domains (got {size})")
    if batches_per_epoch is not None:
        length, group = check_int("batches_per_epoch", batches_per_epoch, 1), size * repeats
        if surplus := length % group:
            fits = length - surplus + group
            raise ValueError(f"batches_per_epoch should be a multiple of {group}, as {fits} is (got {length})")
    return size
