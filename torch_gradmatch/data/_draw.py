"""Which S domains a group has, by number: one draw, behind the sampler and the loader of streams alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

BLOCK = 1024  # groups that are drawn together, and candidates


def random_stream(seed: int, *key: int) -> np.random.Generator:
    """Return the generator of one of the streams of random numbers that belong to a seed."""
    # spawn_key, not more entropy: SeedSequence([1, 2]) and SeedSequence([1, 2, 0]) are the same.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@dataclass
class Groups:
    """The groups of S distinct domains of all epochs, each of which can be asked for by its number.

    A domain after the other is drawn with a probability in proportion to its weight, among those not yet in the group.
    Candidates are drawn with replacement, in blocks; one that is in the group, or no longer has the weight it had when
    the block was drawn, is passed over. Where many are, independent exponential times with the weights as rates decide
    in one go: their order has the same distribution (Efraimidis and Spirakis, *Weighted random sampling with a
    reservoir*, 2006).

    Where every epoch has the same number of groups, they are stretches of one endless sequence, in which no domain runs
    out: it is drawn in blocks that depend on their number alone, and a pair may begin in one epoch and end in the next.

    Args:
        num_batches: Of each domain.
        size: S.
        weights: Of each domain, positive; None for the number of batches it has left.
        seed: Integer of at least 0.
        paired: Whether every second group is the reverse of the first, where all its domains have a batch left.
        per_epoch: Groups in an epoch; None where one ends when fewer than S domains have a batch left.
        walk: Which of several independent orders the groups are in; their domains are the same.
    """

    num_batches: Sequence[int]
    size: int
    weights: Sequence[float] | None
    seed: int
    paired: bool
    per_epoch: int | None
    walk: int = field(default=0, repr=False)
    _kept: tuple[int, list[list[int]]] = field(default=(-1, []), init=False, repr=False)

    def number(self, epoch: int) -> int:
        """Return the number of groups of an epoch."""
        return len(self.of_epoch(epoch)) if self.per_epoch is None else self.per_epoch

    def group(self, epoch: int, number: int) -> list[int]:
        """Return the domains of a group in the order in which they are served."""
        if self.per_epoch is None:
            return self.of_epoch(epoch)[number]
        length = 2 * -(-max(BLOCK, len(self.num_batches)) // (2 * self.size))
        block, row = divmod(epoch * self.per_epoch + number, length)
        return self.of_epoch(block, length)[row]

    def of_epoch(self, block: int, length: int | None = None) -> list[list[int]]:
        """Return the groups of an epoch, or a block of so many of the endless sequence; the latest are kept."""
        if self._kept[0] != block:
            self._kept = block, self._draw(random_stream(self.seed, 0, block), length)
        return self._kept[1]

    def _draw(self, generator: np.random.Generator, length: int | None) -> list[list[int]]:
        """Draw groups until fewer than S domains have a batch left, or so many."""
        left = list(self.num_batches) if length is None else [length + 1] * len(self.num_batches)  # none runs out
        rates = left if length is None and self.weights is None else list(self.weights or self.num_batches)
        able, candidates = len(left), _candidates(rates, generator)
        groups: list[list[int]] = []
        while length is None or len(groups) < length:
            reverse = self.paired and len(groups) % 2 == 1 and all(left[domain] for domain in groups[-1])
            if not reverse and able < self.size:
                break
            group = list(groups[-1]) if reverse else []
            for domain, needed in islice(candidates, 0 if reverse or 2 * self.size >= able else 4 * self.size):
                if needed < rates[domain] and domain not in group:
                    group.append(domain)
                    if len(group) == self.size:
                        break
            if missing := self.size - len(group):
                open_rates = np.array(rates, dtype=np.float64)
                open_rates[group] = 0
                others = np.flatnonzero(open_rates)
                times = generator.standard_exponential(others.size) / open_rates[others]
                group += others[np.argpartition(times, missing - 1)[:missing]].tolist()
            groups.append(group)
            for domain in group:
                left[domain] -= 1
                if not left[domain]:
                    able, rates[domain] = able - 1, 0
        # The heaviest domain of a group is in general drawn first: shuffle within the groups.
        drawn = np.array(groups, dtype=np.int64).reshape(-1, self.size)
        for _ in range(self.walk + 1):
            drawn = generator.permuted(drawn, axis=1)
        # Where a domain of the first group of a pair has run out, the second is not the same.
        reverses = [self.paired and n % 2 == 1 and group == groups[n - 1] for n, group in enumerate(groups)]
        drawn = np.where(np.array(reverses, dtype=bool)[:, None], np.roll(drawn, 1, axis=0)[:, ::-1], drawn)
        return [list(map(int, group)) for group in drawn]


def _candidates(rates: Sequence[float], generator: np.random.Generator) -> Iterator[tuple[int, float]]:
    """Yield domains, and the weight from which on each counts as drawn."""
    while True:
        table = np.array(rates, dtype=np.float64)
        bounds = table.cumsum()
        drawn = bounds.searchsorted(generator.random(BLOCK) * bounds[-1], side="right").clip(max=table.size - 1)
        yield from zip(drawn.tolist(), (generator.random(BLOCK) * table[drawn]).tolist(), strict=True)
