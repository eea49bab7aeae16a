"""Samplers that several test files draw or build, a trip through a checkpoint, and the probabilities of plans."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from torch_gradmatch.data.sampler import DomainBatchSampler

LABELS = ["b"] * 7 + ["a"] * 3 + ["d"] * 1 + ["c"] * 10
WEIGHTINGS = ["uniform", "proportional"]
ORDERS = ["flipflop", "random"]


def small_sampler(**changes):
    arguments = {"batch_size": 2, "domains_per_step": 2, "seed": 3, **changes}
    return DomainBatchSampler(LABELS, **arguments)


def loader_of(sampler, num_workers=0, **options):
    data = range(sum(indices.size for indices in sampler._indices))
    return DataLoader(data, batch_sampler=sampler, collate_fn=list, num_workers=num_workers, **options)


@st.composite
def samplers(draw, orders=ORDERS):
    """The labels of a data set, shuffled, and the arguments of a sampler for it."""
    drop_last = draw(st.booleans())
    batch_size = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(batch_size if drop_last else 1, 40), min_size=1, max_size=8))
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    draw(st.randoms(use_true_random=False)).shuffle(labels)
    arguments = {
        "batch_size": batch_size,
        "domains_per_step": draw(st.integers(1, len(sizes)) | (st.none() if len(sizes) > 1 else st.nothing())),
        "weighting": draw(st.sampled_from(WEIGHTINGS)),
        "seed": draw(st.integers(0, 2**70)),
        "drop_last": drop_last,
        "order": draw(st.sampled_from(orders)),
    }
    return labels, arguments


@st.composite
def cycling(draw, **options):
    """The same with ``exhausted="cycle"`` and every kind of weighting."""
    labels, arguments = draw(samplers(**options))
    names = sorted(set(labels))
    arguments["exhausted"] = "cycle"
    groups = draw(st.none() | st.integers(1, 30))
    if groups is not None:
        arguments["batches_per_epoch"] = groups * (arguments["domains_per_step"] or len(names))
    if draw(st.booleans()):
        arguments["weighting"] = {name: draw(st.floats(0.01, 100)) for name in names}
    return labels, arguments


def plan_probabilities(num_batches, group_size, weights, order="random", max_groups=None, first_of_pair=None):
    """Every sequence of groups and its probability, by enumeration in fractions; weights None: the batches left."""
    if sum(left > 0 for left in num_batches) < group_size or max_groups == 0:
        return {(): Fraction(1)}

    def followed(served, first_of_pair):
        left = [count - (domain in served) for domain, count in enumerate(num_batches)]
        max_following = None if max_groups is None else max_groups - 1
        rest = plan_probabilities(left, group_size, weights, order, max_following, first_of_pair)
        return {(*served, *plan): probability for plan, probability in rest.items()}

    if first_of_pair is not None and all(num_batches[domain] for domain in first_of_pair):
        return followed(first_of_pair[::-1], None)
    begins_pair = order == "flipflop" and first_of_pair is None
    plans = Counter()
    for drawn in itertools.permutations([domain for domain, left in enumerate(num_batches) if left], group_size):
        probability, weights_left = Fraction(1), [Fraction(weight) for weight in (weights or num_batches)]
        weights_left = [weight * (left > 0) for weight, left in zip(weights_left, num_batches, strict=True)]
        for domain in drawn:
            probability *= weights_left[domain] / sum(weights_left)
            weights_left[domain] = Fraction(0)
        for served in itertools.permutations(drawn):  # the group is served in any order
            for plan, following in followed(served, served if begins_pair else None).items():
                plans[plan] += probability / math.factorial(group_size) * following
    assert sum(plans.values()) == 1
    return dict(plans)


def assert_distributed(outcomes, probabilities):
    """Chi-square within 7 standard deviations of its mean; its bins expect at least 5 each."""
    counts = Counter(outcomes)
    assert set(counts) <= set(probabilities)
    expected = {outcome: float(probability) * len(outcomes) for outcome, probability in probabilities.items()}
    rare = [outcome for outcome, number in expected.items() if number < 5]
    bins = [([outcome], number) for outcome, number in expected.items() if number >= 5]
    if rare:
        bins.append((rare, sum(expected[outcome] for outcome in rare)))
    statistic = sum((sum(counts[outcome] for outcome in members) - number) ** 2 / number for members, number in bins)
    degrees = len(bins) - 1
    assert statistic < degrees + 7 * math.sqrt(2 * degrees), (statistic, degrees)


def changing(message, **changes):
    return pytest.param(changes, message, id=", ".join(f"{name}={value!r}" for name, value in changes.items()))
