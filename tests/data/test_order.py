"""The order of the walk: pairs of groups, the second the reverse of the first, within epochs and across them."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from _loops import QUIET
from _samplers import samplers
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_gradmatch import DomainBatchSampler

pytestmark = QUIET


def groups_of(sampler, labels):
    """The domains of the groups that the next epoch serves."""
    domains = [labels[batch[0]] for batch in sampler]
    size = sampler.domains_per_step
    return [tuple(domains[start : start + size]) for start in range(0, len(domains), size)]


# Within an epoch


@given(case=samplers(orders=["flipflop"]), epoch=st.integers(0, 3))
@settings(deadline=None, max_examples=300)
def test_the_second_group_of_a_pair_is_the_reverse_of_the_first_wherever_that_is_possible(case, epoch):
    labels, arguments = case
    sampler = DomainBatchSampler(labels, **arguments)
    size = arguments["batch_size"]
    left = {
        label: count // size if arguments["drop_last"] else -(-count // size)
        for label, count in Counter(labels).items()
    }
    crosses = sampler.domains_per_step == len(left) and min(left.values()) % 2 and epoch % 2
    sampler.set_epoch(epoch - 1 if crosses else epoch)
    first = groups_of(sampler, labels)[-1] if crosses else None
    for group in groups_of(sampler, labels):
        if first is None:
            first = group
        else:
            if all(left[domain] for domain in first):
                assert group == first[::-1]
            first = None
        for domain in group:
            left[domain] -= 1
    assert min(left.values()) >= 0


# Across epochs


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5])
def test_epochs_of_all_domains_are_one_sequence_of_pairs(num_groups):
    labels = list(range(4)) * num_groups
    paired, unpaired = (DomainBatchSampler(labels, 1, order=order, seed=5) for order in ("flipflop", "random"))
    groups = [group for _ in range(8) for group in groups_of(paired, labels)]
    assert len(groups) == 8 * num_groups
    assert all(second == first[::-1] for first, second in zip(groups[::2], groups[1::2], strict=True))
    assert len({frozenset([first, first[::-1]]) for first in groups[::2]}) > 2  # each pair in an order of its own
    groups = [group for _ in range(20) for group in groups_of(unpaired, labels)]
    assert (
        sum(second == first[::-1] for first, second in itertools.pairwise(groups)) < len(groups) / 4
    )  # 1/24 by chance


def test_with_fewer_domains_than_there_are_pairs_do_not_cross_epochs():
    labels = list(range(3)) * 3
    sampler = DomainBatchSampler(labels, 1, domains_per_step=2)
    epochs = [groups_of(sampler, labels) for _ in range(200)]
    unpaired = [(even, odd) for even, odd in zip(epochs[::2], epochs[1::2], strict=True) if len(even) == 3]
    assert len(unpaired) > 30
    assert sum(odd[0] == even[-1][::-1] for even, odd in unpaired) < len(unpaired) / 2  # 1/6 by chance
