"""Domains of unequal size: cycles, weights, and how many batches there are in all."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from _samplers import (
    LABELS,
    ORDERS,
    assert_distributed,
    cycling,
    plan_probabilities,
    samplers,
    small_sampler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_gradmatch import DomainBatchSampler
from torch_gradmatch.data import _draw


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Of as few groups as can be, so that an epoch has many."""
    monkeypatch.setattr(_draw, "BLOCK", 1)


def num_batches_of(labels, arguments):
    size = arguments["batch_size"]
    return {
        label: count // size if arguments["drop_last"] else -(-count // size)
        for label, count in sorted(Counter(labels).items())
    }


def in_groups(batches, size):
    return [batches[start : start + size] for start in range(0, len(batches), size)]


STOPPED = {"exhausted": "stop", "batches_per_epoch": None}


# The laws of a cycle


@given(case=cycling())
@settings(deadline=None, max_examples=200)
def test_every_epoch_of_a_cycle_is_as_long_as_said_and_has_whole_groups_of_distinct_domains(case):
    labels, arguments = case
    sampler = DomainBatchSampler(labels, **arguments)
    num_batches, size = num_batches_of(labels, arguments), sampler.domains_per_step
    expected = max(max(num_batches.values()), math.ceil(Fraction(sum(num_batches.values()), size))) * size
    expected = arguments.get("batches_per_epoch") or expected
    for _ in range(3):
        assert len(sampler) == expected
        domains = [{labels[index] for index in batch} for batch in sampler]
        assert len(domains) == expected
        assert all(len(set.union(*group)) == size for group in in_groups(domains, size))


@given(case=cycling())
@settings(deadline=None, max_examples=200)
def test_a_domain_serves_all_its_samples_before_it_serves_one_again(case):
    labels, arguments = case
    sampler = DomainBatchSampler(labels, **arguments)
    num_batches = num_batches_of(labels, arguments)
    for _ in range(2):
        batches_of = {label: [] for label in num_batches}
        for batch in sampler:
            batches_of[labels[batch[0]]].append(batch)
        for label, batches in batches_of.items():
            own = {index for index, other in enumerate(labels) if other == label}
            for served_round in in_groups(batches, num_batches[label]):
                served = [index for batch in served_round for index in batch]
                assert len(served) == len(set(served))
                assert own.issuperset(served)
                assert all(len(batch) == arguments["batch_size"] for batch in served_round[: num_batches[label] - 1])
                if len(served_round) == num_batches[label]:
                    missing = len(own) % arguments["batch_size"] if arguments["drop_last"] else 0
                    assert len(served) == len(own) - missing


@given(case=cycling() | samplers(), changes=st.sampled_from([STOPPED, {"order": "random"}, {"weighting": "uniform"}]))
@settings(deadline=None)
def test_the_batches_of_a_domains_first_round_are_the_same_whatever_is_drawn(case, changes):
    labels, arguments = case

    def batches_of_domains(**changes):
        of_domain = {label: [] for label in labels}
        for batch in DomainBatchSampler(labels, **{**arguments, **changes}):
            of_domain[labels[batch[0]]].append(batch)
        return of_domain

    served, reference = batches_of_domains(), batches_of_domains(**changes)
    for label, number in num_batches_of(labels, arguments).items():
        common = min(len(served[label]), len(reference[label]), number)
        assert served[label][:common] == reference[label][:common]


def test_every_round_of_every_epoch_is_shuffled_anew():
    sampler = DomainBatchSampler([0] * 8 + [1] * 80, 8, exhausted="cycle", seed=4)
    rounds = [tuple(batch) for _ in range(5) for batch in sampler if batch[0] < 8]
    assert len(rounds) == len(set(rounds)) == 50
    sampler = DomainBatchSampler([0] * 3 + [1] * 3000, 3, exhausted="cycle")
    rounds = [tuple(batch) for _ in range(7) for batch in sampler if batch[0] < 3]
    assert_distributed(rounds, dict.fromkeys(itertools.permutations(range(3)), Fraction(1, 6)))


@given(case=cycling(orders=["flipflop"]))
@settings(deadline=None, max_examples=200)
def test_all_epochs_of_a_cycle_are_one_sequence_of_pairs(case):
    labels, arguments = case
    sampler = DomainBatchSampler(labels, **arguments)
    domains = [labels[batch[0]] for _ in range(4) for batch in sampler]
    groups = in_groups(domains, sampler.domains_per_step)
    assert all(second == first[::-1] for first, second in zip(groups[::2], groups[1::2], strict=True))


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
    sampler = DomainBatchSampler(labels, 2, 2, weighting, exhausted="cycle", batches_per_epoch=24000, order=order)
    domains = [labels[batch[0]] for batch in sampler]
    plans = [tuple(plan) for plan in in_groups(domains, 4)]  # two groups
    assert_distributed(plans, plan_probabilities([9] * 4, 2, weights, order, max_groups=2))


# Resuming a cycle


@pytest.mark.parametrize("order", ORDERS)
def test_a_cycle_of_all_domains_begins_at_once_however_far_in_it_is(order):
    sampler = small_sampler(exhausted="cycle", domains_per_step=None, batches_per_epoch=4 * 10**12, order=order)
    position = 4 * (10**12 - 5)  # every domain has served as many rounds as that takes, less the last 5 groups
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 10**6, "position": position})
    rest = list(iter(sampler))  # list(sampler) would make room for the whole epoch
    assert len(rest) == 20
    num_batches, size = {"b": 4, "a": 2, "d": 1, "c": 5}, {"b": 7, "a": 3, "d": 1, "c": 10}
    for label, number in num_batches.items():
        own = [batch for batch in rest if LABELS[batch[0]] == label]
        assert len(own) == 5
        to_the_end_of_the_round = number - (10**12 - 5) % number
        full = [2] * (number - 1) + [size[label] - 2 * (number - 1)]
        assert list(map(len, own)) == (full[-to_the_end_of_the_round:] + full * 5)[:5]


def test_a_cycle_that_is_as_long_without_being_told_can_be_resumed_either_way():
    state_dict = small_sampler(exhausted="cycle", batches_per_epoch=12).state_dict()
    small_sampler(exhausted="cycle").load_state_dict(state_dict)


# How many batches in all


@given(case=samplers() | cycling(), epochs=st.integers(0, 5), stop=st.integers(0, 9))
@settings(deadline=None)
def test_total_batches_is_the_sum_of_the_lengths_and_asking_changes_nothing(case, epochs, stop):
    labels, arguments = case
    sampler, reference = (DomainBatchSampler(labels, **arguments) for _ in range(2))
    served = [list(reference) for _ in range(max(epochs, 2))]
    iterator = iter(sampler)
    taken = list(itertools.islice(iterator, stop))
    assert sampler.total_batches(epochs) == sum(map(len, served[:epochs]))
    assert taken + list(iterator) == served[0]
    assert list(sampler) == served[1]


@pytest.mark.parametrize("changes", [{"exhausted": "cycle"}, {"domains_per_step": None}])
def test_where_all_epochs_are_equally_long_none_is_planned(changes, monkeypatch):
    sampler = small_sampler(**changes)
    monkeypatch.setattr(_draw.Groups, "of_epoch", None)
    assert sampler.total_batches(10**4) == 10**4 * len(sampler)


# Weights


def test_weights_go_by_label_whatever_the_order_in_which_they_are_given():
    weighting = {"c": 0.5, "b": 2, "a": np.float32(0.25), "d": Fraction(1, 3)}
    sampler = small_sampler(weighting=weighting)
    backwards = small_sampler(weighting=dict(reversed(weighting.items())))
    assert backwards.state_dict() == sampler.state_dict()
    assert list(backwards) == list(sampler)
    heavy = DomainBatchSampler(LABELS, 1, 1, {"a": 1, "b": 1, "c": 1, "d": 1e9}, exhausted="cycle")
    assert Counter(LABELS[index] for (index,) in heavy)["d"] > 15
