"""Which S domains a group has, by number: one draw, behind the sampler and the loader of streams alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from math import inf
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Groups", "IntArray", "draw_groups", "random_stream"]

IntArray: TypeAlias = npt.NDArray[np.int64]
BLOCK = 1024  # batches that are drawn together, and candidates


def random_stream(seed: int, *key: int) -> np.random.Generator:
    """Return the generator of one of the streams of random numbers that belong to a seed."""
    # spawn_key, not more entropy: SeedSequence([1, 2]) and SeedSequence([1, 2, 0]) are the same.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def draw_groups(
    num_batches: Sequence[int],
    size: int,
    weights: Sequence[float] | None,
    generator: np.random.Generator,
    paired: bool = False,
    max_groups: float = inf,
) -> IntArray:
    """Draw groups of S distinct domains, until fewer than S have a batch left.

    A domain after the other is drawn with a probability in proportion to its weight, among those not yet in the group.
    Candidates are drawn with replacement, in blocks; one that is in the group, or no longer has the weight it had when
    the block was drawn, is passed over. Where many are, independent exponential times with the weights as rates decide
    in one go: their order has the same distribution (Efraimidis and Spirakis, *Weighted random sampling with a
    reservoir*, 2006).

    Args:
        num_batches: The batches of each domain.
        size: S.
        weights: Of each domain, positive; None for the number of batches it has left.
        generator: The source of randomness.
        paired: Whether every second group is the reverse of the first, where all its domains have a batch left.
        max_groups: Draw no more than these.

    Returns:
        Domains by number, shape (groups, S).
    """
    left = list(num_batches)
    rates = left if weights is None else list(weights)  # of a domain without a batch: 0
    able = sum(count > 0 for count in left)
    candidates = _candidates(rates, generator)
    groups: list[list[int]] = []
    reverses: list[bool] = []
    while len(groups) < max_groups:
        reverse = paired and len(groups) % 2 == 1 and all(left[domain] for domain in groups[-1])
        if not reverse and able < size:
            break
        group = groups[-1] if reverse else _draw(rates, size, candidates if 2 * size < able else iter(()), generator)
        for domain in group:
            left[domain] -= 1
            if not left[domain]:
                able -= 1
                rates[domain] = 0
        groups.append(group)
        reverses.append(reverse)
    # The heaviest domain of a group is in general drawn first: shuffle within the groups.
    drawn = generator.permuted(np.array(groups, dtype=np.int64).reshape(-1, size), axis=1)
    return np.where(np.array(reverses, dtype=bool)[:, None], np.roll(drawn, 1, axis=0)[:, ::-1], drawn)


def _candidates(rates: Sequence[float], generator: np.random.Generator) -> Iterator[tuple[int, float]]:
    """Yield domains, and the weight from which on each counts as drawn."""
    while True:
        table = np.array(rates, dtype=np.float64)
        bounds = table.cumsum()
        drawn = bounds.searchsorted(generator.random(BLOCK) * bounds[-1], side="right").clip(max=table.size - 1)
        yield from zip(drawn.tolist(), (generator.random(BLOCK) * table[drawn]).tolist(), strict=True)


def _draw(
    rates: Sequence[float], size: int, candidates: Iterator[tuple[int, float]], generator: np.random.Generator
) -> list[int]:
    """Draw one group."""
    group: list[int] = []
    for domain, needed in islice(candidates, 4 * size):
        if needed < rates[domain] and domain not in group:
            group.append(domain)
            if len(group) == size:
                return group
    open_rates = np.array(rates, dtype=np.float64)
    open_rates[group] = 0
    others = np.flatnonzero(open_rates)
    times = generator.standard_exponential(others.size) / open_rates[others]
    missing = size - len(group)
    return [*group, *others[np.argpartition(times, missing - 1)[:missing]].tolist()]


@dataclass
class Groups:
    """The groups of all epochs, each of which can be asked for by its number.

    Where every epoch has the same number of groups, they are stretches of one endless sequence, in which no domain runs
    out: it is drawn in blocks that depend on their number alone, and a pair may begin in one epoch and end in the next.

    Args:
        num_batches: As in :func:`draw_groups`.
        size: As there.
        weights: As there.
        seed: Integer of at least 0.
        paired: As there.
        per_epoch: Groups in an epoch; None where one ends when fewer than S domains have a batch left.
    """

    num_batches: Sequence[int]
    size: int
    weights: Sequence[float] | None
    seed: int
    paired: bool
    per_epoch: int | None
    _kept: tuple[int, IntArray] | None = field(default=None, init=False, repr=False)

    @property
    def _per_block(self) -> int:
        return 2 * -(-max(BLOCK, len(self.num_batches)) // (2 * self.size))

    def number(self, epoch: int) -> int:
        """Return the number of groups of an epoch."""
        return len(self._drawn(epoch)) if self.per_epoch is None else self.per_epoch

    def group(self, epoch: int, number: int) -> list[int]:
        """Return the domains of a group in the order in which they are served."""
        block, row = epoch, number
        if self.per_epoch is not None:
            block, row = divmod(epoch * self.per_epoch + number, self._per_block)
        group: list[int] = self._drawn(block)[row].tolist()
        return group

    def pair(self, epoch: int, number: int) -> tuple[tuple[int, ...], bool]:
        """Return the name of the pair that a group is in, and whether it is the second of the two."""
        length = 2 if self.paired else 1
        if self.per_epoch is None:
            return (epoch, number // length), number % length == 1
        pair, place = divmod(epoch * self.per_epoch + number, length)
        return (pair,), place == 1

    def served(self, epoch: int, first: int) -> Iterator[list[int]]:
        """Yield how often each domain is in the groups before number ``first``, and before each that follows."""
        known = first if self.size == len(self.num_batches) else 0
        counts = [known] * len(self.num_batches)
        for number in count(known):
            if number >= first:
                yield counts
            for domain in self.group(epoch, number):
                counts[domain] += 1

    def _drawn(self, block: int) -> IntArray:
        """Return the groups of an epoch, or of a block of the endless sequence; the latest are kept."""
        if self._kept is None or self._kept[0] != block:
            num_batches, weights, length = self.num_batches, self.weights, inf
            if self.per_epoch is not None:
                weights, length = weights or num_batches, self._per_block
                num_batches = [self._per_block + 1] * len(num_batches)  # none runs out
            generator = random_stream(self.seed, 0, block)
            self._kept = block, draw_groups(num_batches, self.size, weights, generator, self.paired, length)
        return self._kept[1]
