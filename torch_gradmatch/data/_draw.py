"""Which domain serves each batch of an epoch: the arithmetic behind the sampler."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from torch_gradmatch._checks import check_int
from torch_gradmatch.data._labels import IntArray, check_short, shown

__all__ = ["Plan", "draw_groups", "plan_epochs", "random_stream", "warn_if_little_is_served"]

BLOCK_BATCHES = 2**13


def random_stream(seed: int, *key: int) -> np.random.Generator:
    """Return the generator of one stream of a sampler's random numbers.

    Args:
        seed: Of the sampler.
        *key: Which stream.

    Returns:
        The generator.
    """
    # spawn_key, not more entropy: SeedSequence([1, 2]) and SeedSequence([1, 2, 0]) are the same.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def draw_groups(
    num_batches: Sequence[int],
    domains_per_step: int,
    weights: Sequence[int] | None,
    generator: np.random.Generator,
    paired: bool = False,
    unpaired: IntArray | None = None,
    max_groups: float = float("inf"),
) -> IntArray:
    """Draw groups of distinct domains until fewer than S have a batch left.

    A draw costs the same for 3 domains and for 10,000, however unequal: the domains that can be drawn stand in
    buckets, by the bit length of their weight. A bucket is drawn by its total weight; in it a domain is drawn
    uniformly, and again unless it passes with probability weight / (the bucket's largest possible weight) > 1/2.
    Weights are integers, so the totals are exact after any number of draws.

    Args:
        num_batches: The batches of each domain, at least 1.
        domains_per_step: S.
        weights: The weight of each domain, at least 1; None for the number of batches it has left.
        generator: The source of randomness.
        paired: Whether groups come in pairs, the second the reverse of the first where all its domains have a batch
            left.
        unpaired: With ``paired`` and S all domains, a group without a second from before, shape (S,): the first
            group returned is its reverse.
        max_groups: Draw no more than these.

    Returns:
        Domains by number, shape (groups, S).
    """
    left = list(num_batches)
    if weights is None:
        weights = left  # the same list, so it follows what is left
    uniform = chain.from_iterable(iter(lambda: generator.random(512).tolist(), None)).__next__
    top = max(weights).bit_length()
    buckets: list[list[int]] = [[] for _ in range(top + 1)]
    totals = [0] * (top + 1)
    total = 0
    drawn: list[int] = []
    reversing: list[bool] = []  # whether a group is the reverse of the one before
    # The domains that are in no bucket: those of the latest group, and before the first draw all.
    group: list[int] = list(range(len(left))) if unpaired is None else unpaired.tolist()
    second = unpaired is not None  # whether the group that follows is the second of a pair
    num_drawable = 0
    while len(reversing) < max_groups:
        reverse = second and all(left[domain] for domain in group)
        if not reverse:
            for domain in group:
                if left[domain]:
                    bits = weights[domain].bit_length()
                    buckets[bits].append(domain)
                    totals[bits] += weights[domain]
                    total += weights[domain]
                    num_drawable += 1
            if num_drawable < domains_per_step:
                break
            group = []
            for _ in range(domains_per_step):
                target, bits = int(uniform() * total), top
                while target >= totals[bits]:
                    target -= totals[bits]
                    bits -= 1
                bucket, largest = buckets[bits], (1 << bits) - 1
                while True:
                    place = uniform() * len(bucket)
                    index = int(place)
                    domain = bucket[index]
                    if (place - index) * largest < weights[domain]:  # the fraction is uniform in [0, 1) again
                        break
                bucket[index] = bucket[-1]
                bucket.pop()
                totals[bits] -= weights[domain]
                total -= weights[domain]
                group.append(domain)
            num_drawable -= domains_per_step
        for domain in group:
            left[domain] -= 1
        drawn += group
        reversing.append(reverse)
        second = paired and not second
    # A group's heaviest domain is in general drawn first: shuffle within the groups.
    groups = generator.permuted(np.array(drawn, dtype=np.int64).reshape(-1, domains_per_step), axis=1)
    before = np.roll(groups, 1, axis=0)
    if unpaired is not None:
        before[0] = unpaired
    return np.where(np.array(reversing)[:, None], before[:, ::-1], groups)


@dataclass
class Plan(ABC):
    """The domain of every batch of every epoch.

    Args:
        num_batches: The batches of each domain, at least 1.
        domains_per_step: S.
        weights: As in :func:`draw_groups`.
        seed: Of the sampler.
        paired: Whether groups come in pairs.
    """

    num_batches: list[int]
    domains_per_step: int
    weights: list[int] | None
    seed: int
    paired: bool

    @property
    def _all_domains(self) -> bool:
        """Whether every group has all domains."""
        return self.domains_per_step == len(self.num_batches)

    @abstractmethod
    def length(self, epoch: int) -> int:
        """Return the number of batches of an epoch."""

    @abstractmethod
    def total(self, epochs: int) -> int:
        """Return the number of batches of the first epochs together."""

    @abstractmethod
    def stretches(self, epoch: int, start: int, end: int | None = None) -> Iterator[IntArray]:
        """Yield the domains of the batches from ``start`` to before ``end`` of an epoch, in one array or in many."""

    def served(self, epoch: int, position: int) -> IntArray:
        """Count the batches that every domain has served before a position.

        Args:
            epoch: Its number.
            position: Batches of the epoch.

        Returns:
            The counts, shape (domains,).
        """
        groups = position // self.domains_per_step if self._all_domains else 0  # these need no look at the plan
        counts = np.full(len(self.num_batches), groups, dtype=np.int64)
        for domains in self.stretches(epoch, groups * self.domains_per_step, position):
            counts += np.bincount(domains, minlength=counts.size)
        return counts

    def pair_of(self, epoch: int, group: int) -> tuple[int, int, bool]:
        """Find the pair in which a group is.

        Args:
            epoch: Its number.
            group: The group's number in it.

        Returns:
            Epoch and number of the first group of the pair, and whether the group is the second. A group that has no
            second is a pair by itself.
        """
        if not self.paired:
            return epoch, group, False
        groups = self._groups_of_every_epoch
        second = (epoch * groups + group) % 2
        return (epoch - 1, groups - 1, True) if second > group else (epoch, group - second, bool(second))

    @property
    @abstractmethod
    def _groups_of_every_epoch(self) -> int:
        """The groups of each epoch, where a pair may be in two of them; else 0."""


@dataclass
class StopPlan(Plan):
    """An epoch ends when fewer than S domains have a batch left. The plan of one epoch is kept."""

    _kept: tuple[int, IntArray] | None = field(default=None, init=False)

    def length(self, epoch: int) -> int:
        """Return the number of batches of an epoch, which is planned for that and kept unless S is all domains."""
        return self._constant_length or self._domains(epoch).size

    def total(self, epochs: int) -> int:
        """Plan the epochs one by one, unless all are equally long."""
        if self._constant_length:
            return epochs * self._constant_length
        return sum(self._domains(epoch, keep=False).size for epoch in range(epochs))

    def stretches(self, epoch: int, start: int, end: int | None = None) -> Iterator[IntArray]:
        """Yield one array."""
        yield self._domains(epoch)[start:end]

    @property
    def _groups_of_every_epoch(self) -> int:
        return min(self.num_batches) if self._all_domains else 0

    @property
    def _constant_length(self) -> int:
        """The length of every epoch, 0 if it depends on the draws."""
        if self._all_domains:
            return self.domains_per_step * min(self.num_batches)
        return sum(self.num_batches) if self.domains_per_step == 1 else 0

    def _domains(self, epoch: int, keep: bool = True) -> IntArray:
        """Return the domain of every batch of an epoch, shape (groups · S,)."""
        if self._kept is not None and self._kept[0] == epoch:
            return self._kept[1]
        unpaired = None
        if self.paired and self._all_domains and epoch % 2 and min(self.num_batches) % 2:
            # The epoch before ends with the first group of a pair. Its plan is at hand if it was just served.
            unpaired = self._domains(epoch - 1, keep)[-self.domains_per_step :]
        generator = random_stream(self.seed, epoch, 0)
        groups = draw_groups(
            self.num_batches, self.domains_per_step, self.weights, generator, self.paired, unpaired
        ).reshape(-1)
        if keep:
            self._kept = (epoch, groups)
        return groups


@dataclass
class CyclePlan(Plan):
    """Domains never run out, so the epochs are stretches of equal length of one endless sequence of groups.

    The sequence is drawn in blocks of an even number of groups. A block depends on its number alone, so an epoch of any
    length begins at once anywhere; and a pair is always whole, also where an epoch ends between its groups.

    Args:
        epoch_length: The batches of an epoch, a multiple of S.
    """

    epoch_length: int
    _kept: tuple[int, IntArray] | None = field(default=None, init=False)

    def length(self, epoch: int) -> int:  # noqa: ARG002
        """Return the number of batches of any epoch."""
        return self.epoch_length

    def total(self, epochs: int) -> int:
        """Multiply."""
        return epochs * self.epoch_length

    def stretches(self, epoch: int, start: int, end: int | None = None) -> Iterator[IntArray]:
        """Yield as much of each block as there is between ``start`` and ``end``."""
        position = epoch * self.epoch_length + start
        last = epoch * self.epoch_length + min(self.epoch_length if end is None else end, self.epoch_length)
        while position < last:
            number, offset = divmod(position, self._block_groups * self.domains_per_step)
            domains = self._block(number)[offset : offset + last - position]
            yield domains
            position += domains.size

    @property
    def _groups_of_every_epoch(self) -> int:
        return self.epoch_length // self.domains_per_step

    @property
    def _block_groups(self) -> int:
        """The groups of a block: even, and as many batches as domains, or putting these into buckets took longest."""
        return 2 * -(-max(len(self.num_batches), BLOCK_BATCHES) // (2 * self.domains_per_step))

    def _block(self, number: int) -> IntArray:
        """Return the domains of a block's batches; the latest is kept."""
        if self._kept is None or self._kept[0] != number:
            groups = draw_groups(
                [self._block_groups] * len(self.num_batches),  # none runs out
                self.domains_per_step,
                self.num_batches if self.weights is None else self.weights,
                random_stream(self.seed, number, 0),
                self.paired,
                max_groups=self._block_groups,
            )
            self._kept = (number, groups.reshape(-1))
        return self._kept[1]


def plan_epochs(
    num_batches: list[int],
    domains_per_step: int,
    weights: list[int] | None,
    seed: int,
    paired: bool,
    exhausted: str,
    batches_per_epoch: object,
) -> Plan:
    """Return the plan of all epochs.

    Args:
        num_batches: As in :class:`Plan`.
        domains_per_step: As in :class:`Plan`.
        weights: As in :class:`Plan`.
        seed: As in :class:`Plan`.
        paired: As in :class:`Plan`.
        exhausted: ``"stop"`` or ``"cycle"``.
        batches_per_epoch: What the caller passed to :class:`torch_gradmatch.DomainBatchSampler`.

    Returns:
        A plan; nothing is drawn yet.

    Raises:
        ValueError: If ``batches_per_epoch`` does not fit.
    """
    if exhausted == "stop":
        if batches_per_epoch is not None:
            raise ValueError(
                "batches_per_epoch should be None with exhausted='stop', where domains may run out before "
                f"(got {shown(batches_per_epoch)}): pass exhausted='cycle'"
            )
        return StopPlan(num_batches, domains_per_step, weights, seed, paired)
    if batches_per_epoch is None:
        # The fewest groups in which every domain could be served whole: McNaughton's bound.
        epoch_length = domains_per_step * max(*num_batches, -(-sum(num_batches) // domains_per_step))
    else:
        epoch_length = check_short(check_int, "batches_per_epoch", batches_per_epoch, 1)
        if surplus := epoch_length % domains_per_step:
            fitting = [
                length for length in (epoch_length - surplus, epoch_length - surplus + domains_per_step) if length
            ]
            raise ValueError(
                f"batches_per_epoch should be a multiple of domains_per_step={domains_per_step} (got "
                f"{shown(epoch_length)}): {' or '.join(map(shown, fitting))} would do"
            )
    return CyclePlan(num_batches, domains_per_step, weights, seed, paired, epoch_length)


def warn_if_little_is_served(plan: Plan, sizes: Sequence[int], batch_size: int, num_samples: int) -> None:
    """Warn if epoch 0 serves less than a tenth of the samples.

    Args:
        plan: With ``exhausted="stop"``.
        sizes: The samples of every domain.
        batch_size: Samples in a batch.
        num_samples: All samples, each counted once. (Where domains share samples, this misses some cases.)
    """

    def served(plan: Plan) -> int:
        return int(np.minimum(plan.served(0, plan.length(0)) * min(batch_size, max(sizes)), sizes).sum())

    # All domains but S - 1 are served whole, or with drop_last all of their batches: in general no plan is needed.
    batches = np.array(plan.num_batches) * min(batch_size, max(sizes))
    if 10 * np.sort(np.minimum(batches, sizes))[: len(sizes) - plan.domains_per_step + 1].sum() >= num_samples:
        return
    number = served(plan)
    if 10 * number >= num_samples:
        return
    advice = 'exhausted="cycle" goes on until the largest domain has been served whole'
    if plan.domains_per_step < len(sizes):
        advice = 'exhausted="cycle" goes on for at least as many batches as the data has'
        possible = served(replace(plan, weights=None))
        if 10 * possible >= num_samples:
            advice += f', weighting="proportional" serves {possible / num_samples:.0%} of the samples without repeats'
    warnings.warn(
        f"an epoch serves {number:,} of {num_samples:,} samples ({number / num_samples:.2%}) in {plan.length(0):,} "
        f"batches: it ends when fewer than domains_per_step={plan.domains_per_step} of {len(sizes)} domains have a "
        f"batch left, and they have {min(sizes):,} to {max(sizes):,} samples each; {advice}",
        stacklevel=3,
    )
