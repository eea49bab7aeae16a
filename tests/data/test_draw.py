"""Which domains a group has and in which order: exact probabilities, pairs, and walks of several ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import pytest
from _samplers import ORDERS, assert_distributed, cases, in_groups, plan_probabilities
from hypothesis import given, settings

from torch_gradmatch import DomainBatchSampler
from torch_gradmatch.data._draw import Groups


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("num_batches", "group_size", "max_groups", "weights"),
    [
        *itertools.product([[1, 2, 3]], [2], [None], [[1, 1, 1], None, [0.3, 0.1, 2.5]]),
        *itertools.product([[3, 1, 1]], [1], [None], [[1, 1, 1], None]),
        *itertools.product([[1, 2, 3, 5, 7]], [2], [1], [[1, 1, 1, 1, 1], None]),
        ([1, 2, 1, 4], 3, None, [3, 5, 0.2, 4]),
        ([1, 50, 2, 4], 2, 2, None),
        ([2, 1, 2], 1, None, [1, 1e-3, 1e3]),
        ([1, 1, 1], 2, None, [1e-200, 1e-220, 3e-220]),
        ([1, 3, 2, 2], 2, 2, [1, 10, 11, 0.5]),
    ],
    ids=str,
)
def test_whole_plans_have_their_exact_probabilities(order, num_batches, group_size, max_groups, weights):
    groups = Groups(num_batches, group_size, weights, 20, order == "flipflop", None)
    plans = [tuple(itertools.chain(*groups.of_epoch(epoch)[:max_groups])) for epoch in range(12000)]
    assert_distributed(plans, plan_probabilities(num_batches, group_size, weights, order, max_groups))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("weighting", "weights"),
    [
        ("uniform", [1, 1, 1, 1]),
        ("proportional", [1, 2, 5, 1]),  # in batches of 2
        ({0: 0.5, 1: 3, 2: 1.25, 3: 1e-3}, [0.5, 3, 1.25, 1e-3]),
    ],
    ids=str,
)
def test_groups_of_a_cycle_have_their_exact_probabilities(weighting, weights, order):
    labels = [0] * 2 + [1] * 4 + [2] * 10 + [3]
    sampler = DomainBatchSampler(labels, 2, 2, weighting, order, "cycle", batches_per_epoch=24000)
    plans = [tuple(plan) for plan in in_groups([labels[batch[0]] for batch in sampler], 4)]  # two groups
    assert_distributed(plans, plan_probabilities([9] * 4, 2, weights, order, max_groups=2))


def test_shuffles_of_the_domains_and_the_draw_are_independent():
    sampler = DomainBatchSampler([0, 0, 0, 1, 1, 1], batch_size=1, seed=8)
    outcomes = []
    for _ in range(7200):
        served = [index for (index,) in sampler]
        shuffled = [tuple(index for index in served if index // 3 == domain) for domain in (0, 1)]
        outcomes.append((served[0] // 3, *shuffled))
    orders = itertools.permutations(range(3)), itertools.permutations(range(3, 6))
    assert_distributed(outcomes, dict.fromkeys(itertools.product((0, 1), *orders), Fraction(1, 72)))


def test_every_round_of_every_epoch_is_shuffled_anew():
    sampler = DomainBatchSampler([0] * 8 + [1] * 80, 8, exhausted="cycle", seed=4)
    rounds = [tuple(batch) for _ in range(5) for batch in sampler if batch[0] < 8]
    assert len(rounds) == len(set(rounds)) == 50
    sampler = DomainBatchSampler([0] * 3 + [1] * 3000, 3, exhausted="cycle")
    rounds = [tuple(batch) for _ in range(7) for batch in sampler if batch[0] < 3]
    assert_distributed(rounds, dict.fromkeys(itertools.permutations(range(3)), Fraction(1, 6)))


@given(case=cases(split=["batch", "walks"], order=["flipflop"]))
@settings(deadline=None, max_examples=300)
def test_the_second_group_of_a_pair_is_the_reverse_of_the_first_wherever_that_is_possible(case):
    size = case.arguments["domains_per_step"]
    endless = case.arguments["exhausted"] == "cycle" or size == len(case.runs)  # pairs go on across epochs
    for sampler in case.ranks():
        epochs = [in_groups(case.walk(list(sampler)), size) for _ in range(4)]
        for groups in [list(itertools.chain(*epochs))] if endless else epochs:
            left = Counter(case.runs)
            for first, second in zip(groups[::2], groups[1::2], strict=False):
                left.subtract(first)
                if endless or all(left[domain] for domain in first):
                    assert second == first[::-1]
                left.subtract(second)


@pytest.mark.parametrize("order", ORDERS)
def test_pairs_of_ranks_have_independent_orders_all_equally_likely(order):
    arguments = {"batch_size": 1, "order": order, "exhausted": "cycle", "batches_per_epoch": 6}
    samplers = [
        DomainBatchSampler([0, 1, 2] * 6, **arguments, num_replicas=6, rank=rank, split="walks") for rank in (0, 2, 4)
    ]
    outcomes = [  # a first group, so not the reverse of another one's
        tuple(tuple(index % 3 for (index,) in itertools.islice(sampler, 3)) for sampler in samplers)
        for _ in range(4000)
    ]
    orders = list(itertools.permutations(range(3)))
    assert_distributed(outcomes, dict.fromkeys(itertools.product(orders, repeat=3), Fraction(1, 6**3)))
