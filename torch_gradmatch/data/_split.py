"""How one sampler is spread over the ranks of ``torch.distributed``: what each of them serves of one common plan.

Every rank works this out by itself, from the seed. Nothing is communicated, and no rank has more batches than another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import numpy as np

from torch_gradmatch.data._draw import Plan, plan_epochs, random_stream
from torch_gradmatch.data._labels import IntArray, shown

__all__ = ["SPLITS", "RankPlan", "Split", "plan_ranks"]

SPLITS = ("batch", "walks", "domains")


@dataclass(frozen=True)
class Split:
    """How the batches of a domain are cut, and which part of them is this rank's.

    The ranks together take W samples of a domain at a time: a batch, or with ``"walks"`` R of them. With ``"batch"``
    and ``"walks"`` each rank has W / R of these, in the order of the ranks. Of the fewer than W that a domain has last,
    as many as R divides are dealt out; with ``drop_last`` none. With ``"domains"`` one rank has all W.

    Args:
        kind: One of ``SPLITS``.
        num_replicas: R.
        rank: From 0 to R - 1.
        batch_size: As in :class:`torch_gradmatch.DomainBatchSampler`.
        drop_last: As there.

    Raises:
        ValueError: If there is no such rank, or R does not divide a batch that is to be cut.
    """

    kind: str
    num_replicas: int
    rank: int
    batch_size: int
    drop_last: bool

    def __post_init__(self) -> None:
        if self.rank >= self.num_replicas:
            raise ValueError(
                f"rank should be less than num_replicas={shown(self.num_replicas)} (got {shown(self.rank)}): pass "
                "torch.distributed.get_rank() and get_world_size(), both of one process group"
            )
        if self.kind == "batch":
            _check_divides("batch_size", self.batch_size, self.num_replicas, self.kind, "of every batch an equal part")

    @cached_property
    def parts(self) -> int:
        """Into how many equal parts the W samples are cut."""
        return 1 if self.kind == "domains" else self.num_replicas

    @cached_property
    def whole_batch(self) -> int:
        """W."""
        return self.batch_size * (self.num_replicas if self.kind == "walks" else 1)

    @property
    def shares(self) -> int:
        """Into how many equal parts the batches of a group are dealt."""
        return self.num_replicas if self.kind == "domains" else 1

    def num_samples(self, size: int) -> int:
        """Count the samples of a domain that are served until it has run out.

        Args:
            size: All it has.

        Returns:
            How many all ranks serve together.
        """
        rest = size % self.whole_batch
        return size - (rest if self.drop_last else rest % self.parts)

    def num_batches(self, sizes: Sequence[int], labels: Sequence[str | int]) -> list[int]:
        """Count the batches of each domain until it has run out, where W samples are one batch.

        Args:
            sizes: The samples of each domain.
            labels: Their labels.

        Returns:
            At least one each.

        Raises:
            ValueError: If a domain has none.
        """
        counts = [-(-self.num_samples(size) // self.whole_batch) for size in sizes]
        if 0 not in counts:
            return counts
        first = counts.index(0)
        which = f"domain {shown(labels[first])} has {sizes[first]} samples"
        how_many = f"(so have {counts.count(0)} of {len(sizes)} domains)"
        if not self.drop_last:
            raise ValueError(
                f"{which}, fewer than num_replicas={shown(self.num_replicas)}, so that not every rank has one "
                f"{how_many}: use fewer ranks or leave such domains out"
            )
        each = (
            f" for each of num_replicas={shown(self.num_replicas)} ranks" if self.whole_batch > self.batch_size else ""
        )
        raise ValueError(
            f"{which}, with drop_last=True not one batch of batch_size={shown(self.batch_size)}{each} {how_many}: "
            "lower batch_size, pass drop_last=False or leave such domains out"
        )

    def part(self, shuffled: IntArray, number: int) -> IntArray:
        """Return this rank's part of one batch of a domain.

        Args:
            shuffled: The domain's samples.
            number: Of the batch, counted from 0.

        Returns:
            The samples. All ranks' parts are equally long.
        """
        whole = shuffled[number * self.whole_batch : (number + 1) * self.whole_batch]
        length = whole.size // self.parts
        first = length * self.rank if self.parts > 1 else 0
        return whole[first : first + length]


@dataclass(frozen=True)
class RankPlan:
    """What one rank serves of a plan. Positions count its own batches.

    With ``"walks"`` the ranks 2k and 2k + 1 walk through every group in opposite orders, rank 0 in the plan's. With
    ``"domains"`` each has S / R consecutive batches of every group.

    Args:
        plan: Of all ranks together.
        split: How they share it.
        sizes: The samples of each domain.
    """

    plan: Plan
    split: Split
    sizes: list[int] = field(repr=False)

    @property
    def batches_per_group(self) -> int:
        """How many batches of a group this rank has."""
        return self.plan.domains_per_step // self.split.shares

    def length(self, epoch: int) -> int:
        """Return the number of batches that a rank has in an epoch."""
        return self.plan.length(epoch) // self.split.shares

    def total(self, epochs: int) -> int:
        """Return the number of batches that a rank has in the first epochs together."""
        return self.plan.total(epochs) // self.split.shares

    def numbered(self, epoch: int, start: int) -> Iterator[tuple[int, int]]:
        """Go through a rank's batches.

        Args:
            epoch: Its number.
            start: Batches of the rank that are left out.

        Yields:
            A domain, and how many batches of it all ranks together have served in this epoch before this group.
        """
        group, offset = divmod(start, self.batches_per_group)
        served = self.plan.served(epoch, group * self.plan.domains_per_step).tolist()
        for domains, own in self._groups(epoch, group):
            for domain in islice(own, offset, None) if offset else own:
                yield domain, served[domain]
            for domain in domains:
                served[domain] += 1
            offset = 0

    def domains(self, epoch: int, start: int, end: int) -> list[int]:
        """Return the domains of a rank's batches.

        Args:
            epoch: Its number.
            start: The first batch.
            end: Behind the last.

        Returns:
            Domains by number, fewer where the epoch ends before.
        """
        size = self.batches_per_group
        group = start // size
        found = [domain for _, own in self._groups(epoch, group, -(-end // size)) for domain in own]
        return found[start - group * size : end - group * size]

    def _groups(self, epoch: int, first: int, last: int | None = None) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the domains of each group from ``first`` to before ``last``, and those of this rank's batches."""
        size, own_size = self.plan.domains_per_step, self.batches_per_group
        start = own_size * self.split.rank if self.split.shares > 1 else 0
        group = first
        for stretch in self.plan.stretches(epoch, first * size, None if last is None else last * size):
            for domains in stretch.reshape(-1, size).tolist():
                yield domains, self._walk(epoch, group, domains)[start : start + own_size]
                group += 1

    def _walk(self, epoch: int, group: int, domains: list[int]) -> list[int]:
        """Return the domains of a group in the order in which this rank's walk visits them."""
        if self.split.kind != "walks":
            return domains
        pair, opposite = divmod(self.split.rank, 2)
        if pair:
            # Both groups of a pair take the same draw. So the second is the reverse where it has the same domains;
            # where it was drawn anew, this is as random an order as any.
            first_epoch, first_group, second = self.plan.pair_of(epoch, group)
            generator = random_stream(self.plan.seed, first_epoch, 0, first_group, pair)
            domains = generator.permutation(np.sort(domains)).tolist()
            opposite ^= second
        return domains[::-1] if opposite else domains


def plan_ranks(
    split: Split,
    sizes: list[int],
    labels: Sequence[str | int],
    domains_per_step: int,
    weights: list[int] | None,
    seed: int,
    paired: bool,
    exhausted: str,
    batches_per_epoch: object,
) -> RankPlan:
    """Return the plan of all epochs for one rank.

    Args:
        split: How the ranks share it.
        sizes: The samples of each domain.
        labels: Their labels, for messages.
        domains_per_step: S.
        weights: As in :class:`torch_gradmatch.data._draw.Plan`.
        seed: Of the sampler.
        paired: Whether groups come in pairs.
        exhausted: ``"stop"`` or ``"cycle"``.
        batches_per_epoch: What the caller passed to :class:`torch_gradmatch.DomainBatchSampler`.

    Returns:
        A plan; nothing is drawn yet.

    Raises:
        ValueError: If ``batches_per_epoch`` or the number of ranks does not fit, or a domain has no batch.
    """
    if split.kind == "domains":
        _check_divides(
            "domains_per_step", domains_per_step, split.num_replicas, split.kind, "as many batches of a group"
        )
    num_batches = split.num_batches(sizes, labels)
    plan = plan_epochs(num_batches, domains_per_step, weights, seed, paired, exhausted, batches_per_epoch)
    return RankPlan(plan, split, sizes)


def _check_divides(name: str, value: int, num_replicas: int, kind: str, share: str) -> None:
    """Raise ``ValueError`` unless ``num_replicas`` divides ``value``, of which each rank has a share."""
    if surplus := value % num_replicas:
        fitting = [number for number in (value - surplus, value - surplus + num_replicas) if number]
        raise ValueError(
            f"{name}={shown(value)} should be a multiple of num_replicas={shown(num_replicas)}, as split={kind!r} "
            f"gives each rank {share}: {name}={' or '.join(map(shown, fitting))} would do, or a number of ranks that "
            "divides it"
        )
