"""Which domain serves each batch of an epoch, and which samples a domain has: the arithmetic behind the sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["IntArray", "ListLike", "draw_groups", "indices_by_domain"]

IntArray = npt.NDArray[np.int64]


class ListLike(Protocol):
    """What NumPy arrays, torch tensors and pandas Series have in common."""

    def tolist(self) -> Any:
        """Return the elements as a list."""


def draw_groups(
    num_batches: Sequence[int],
    domains_per_step: int,
    proportional: bool,
    generator: np.random.Generator,
    paired: bool = False,
    unpaired: IntArray | None = None,
) -> IntArray:
    """Draw groups of distinct domains until fewer than S have a batch left.

    A draw costs the same for 3 domains and for 10,000, however unequal: the domains that can be drawn stand in
    buckets, by the bit length of their weight. A bucket is drawn by its total weight; in it a domain is drawn
    uniformly, and again unless it passes with probability weight / (the bucket's largest possible weight) > 1/2.

    Args:
        num_batches: The batches of each domain, at least 1.
        domains_per_step: S.
        proportional: Whether a domain's weight is the number of batches it has left, or 1.
        generator: The source of randomness.
        paired: Whether groups come in pairs, the second the reverse of the first where all its domains have a batch
            left.
        unpaired: With ``paired`` and S all domains, a group without a second from before, shape (S,): the first
            group returned is its reverse.

    Returns:
        Domains by number, shape (groups, S).
    """
    left = list(num_batches)
    weights = left if proportional else [1] * len(left)  # proportional: the same list, so it follows what is left
    uniform = chain.from_iterable(iter(lambda: generator.random(512).tolist(), None)).__next__
    top = max(weights).bit_length()
    buckets: list[list[int]] = [[] for _ in range(top + 1)]
    totals = [0] * (top + 1)
    drawn: list[int] = []
    reversing: list[bool] = []  # whether a group is the reverse of the one before
    # The domains that are in no bucket: those of the latest group, and before the first draw all.
    group: list[int] = list(range(len(left))) if unpaired is None else unpaired.tolist()
    second = unpaired is not None  # whether the group that follows is the second of a pair
    num_drawable = 0
    while True:
        reverse = second and all(left[domain] for domain in group)
        if not reverse:
            for domain in group:
                if left[domain]:
                    bits = weights[domain].bit_length()
                    buckets[bits].append(domain)
                    totals[bits] += weights[domain]
                    num_drawable += 1
            if num_drawable < domains_per_step:
                break
            group = []
            for _ in range(domains_per_step):
                target, bits = int(uniform() * sum(totals)), top
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


def indices_by_domain(domains: Any, overlapping: bool = False) -> tuple[list[Any], list[IntArray]]:
    """Sort the samples of a data set by domain.

    Args:
        domains: As in :class:`torch_gradmatch.DomainBatchSampler`.
        overlapping: Whether a sample may be in several domains (of a mapping), though in each only once.

    Returns:
        The labels, in the order in which they first appear, and the indices of each one's samples.

    Raises:
        TypeError: If ``domains`` is neither a sequence nor a mapping.
        ValueError: If a label or index is missing, malformed or given twice, or a domain is empty.
    """
    if isinstance(domains, Mapping):
        return _indices_from_mapping(domains, overlapping)
    if isinstance(domains, str | bytes) or not (isinstance(domains, Sequence) or hasattr(domains, "tolist")):
        raise TypeError(f"domains should be a sequence of labels or a mapping from label to indices (got {domains!r})")
    if getattr(domains, "ndim", 1) != 1:
        raise ValueError(f"domains should have one dimension, one label per sample (got shape {domains.shape})")
    numbers: list[int] = []
    number_of: dict[Any, int] = {}
    for index, label in enumerate(domains.tolist() if hasattr(domains, "tolist") else domains):
        if type(label) is not str and type(label) is not int:  # the usual ones cost nothing
            _check_label(f"domains[{index}]", label)
        numbers.append(number_of.setdefault(label, len(number_of)))
    if not numbers:
        raise ValueError("domains should hold one label per sample (got none)")
    ends = np.bincount(numbers).cumsum()
    return list(number_of), np.split(np.argsort(numbers, kind="stable"), ends[:-1])


def _indices_from_mapping(domains: Mapping[Any, Any], overlapping: bool) -> tuple[list[Any], list[IntArray]]:
    """Return the labels and each one's samples from a mapping of the one to the other."""
    labels = list(domains)
    indices_of: list[IntArray] = []
    for label in labels:
        _check_label("a key of domains", label)
        indices = np.asarray(domains[label])
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise ValueError(f"domains[{label!r}] should be a sequence of sample indices (got {domains[label]!r})")
        indices_of.append(indices.astype(np.int64))
    empty = [label for label, indices in zip(labels, indices_of, strict=True) if not indices.size]
    if empty or not labels:
        which = f"domain {empty[0]!r} is empty, {len(empty)} of {len(labels)} are" if empty else "got no domain"
        raise ValueError(f"domains should map each label to at least one sample index ({which})")
    samples = np.concatenate(indices_of)
    owners = np.repeat(np.arange(len(labels)), [indices.size for indices in indices_of])
    order = samples.argsort(kind="stable")
    if samples[order[0]] < 0:
        owner = labels[owners[order[0]]]
        raise ValueError(f"domains[{owner!r}] should hold indices of at least 0 (got {samples[order[0]]})")
    # A stable sort keeps each sample's owners in order: the same one twice stands side by side.
    repeated = np.diff(samples[order]) == 0
    if overlapping:
        repeated &= np.diff(owners[order]) == 0
    for repeat in np.flatnonzero(repeated)[:1]:
        one, other = (labels[owners[position]] for position in order[repeat : repeat + 2])
        hint = "" if overlapping or one == other else " or, if domains may share samples, pass overlapping=True"
        raise ValueError(
            f"sample {samples[order[repeat]]} is in domains[{one!r}] and again in domains[{other!r}]: "
            f"give it once{hint}"
        )
    return labels, indices_of


def _check_label(name: str, label: object) -> None:
    """Raise unless ``label`` is a string or an integer."""
    accepted = isinstance(label, str | Integral) and not isinstance(label, bool)
    if not accepted:
        raise ValueError(f"{name} is {label!r}: the label of a domain should be a string or an integer")
