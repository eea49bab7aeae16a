"""DomainBatchSampler: the laws of a draw, epochs, length, workers, and who touches its progress."""

from __future__ import annotations

import itertools
import pickle
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from _feature_training import through_file
from _loops import QUIET
from _samplers import (
    LABELS,
    ORDERS,
    assert_distributed,
    cycling,
    loader_of,
    plan_probabilities,
    samplers,
    small_sampler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Sampler

from torch_gradmatch.data._draw import Groups
from torch_gradmatch.data.sampler import DomainBatchSampler

pytestmark = QUIET

# The laws of an epoch


@given(case=samplers())
@settings(deadline=None, max_examples=200)
def test_an_epoch_serves_groups_of_distinct_domains_until_too_few_have_a_batch_left(case):
    labels, arguments = case
    sampler = DomainBatchSampler(labels, **arguments)
    num_domains = len(set(labels))
    size, group_size = arguments["batch_size"], arguments["domains_per_step"] or num_domains
    samples_left = Counter(labels)

    def num_drawable():
        return sum(left >= (size if arguments["drop_last"] else 1) for left in samples_left.values())

    for _ in range(2):
        expected_length = len(sampler)
        samples_left.update(Counter(labels) - samples_left)
        batches = list(sampler)
        assert len(batches) == expected_length
        assert len(batches) % group_size == 0
        served = [index for batch in batches for index in batch]
        assert len(served) == len(set(served))
        for start in range(0, len(batches), group_size):
            assert num_drawable() >= group_size
            group = batches[start : start + group_size]
            domains = [{labels[index] for index in batch} for batch in group]
            assert all(len(domain) == 1 for domain in domains)
            assert len(set.union(*domains)) == group_size
            for batch, (domain,) in zip(group, domains, strict=True):
                full = size if arguments["drop_last"] else min(size, samples_left[domain])
                assert len(batch) == full
                assert all(type(index) is int for index in batch)
                samples_left[domain] -= len(batch)
        assert num_drawable() < group_size


@given(case=samplers() | cycling(), epoch=st.integers(0, 5))
@settings(deadline=None)
def test_an_epoch_depends_on_the_arguments_and_its_number_alone(case, epoch):
    labels, arguments = case
    sampler, again = (DomainBatchSampler(labels, **arguments) for _ in range(2))
    served = [list(sampler) for _ in range(epoch + 1)][-1]
    again.set_epoch(epoch)
    assert list(again) == served


@given(case=samplers(), data=st.data())
@settings(deadline=None)
def test_renaming_the_domains_and_renumbering_the_samples_changes_nothing_else(case, data):
    labels, arguments = case
    sampler = DomainBatchSampler(labels, **arguments)
    mapping: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        mapping.setdefault(f"hospital {label}", []).append(index * 3 + 1)
    renumbered = DomainBatchSampler(mapping, **arguments)
    epoch = data.draw(st.integers(0, 1000))
    sampler.set_epoch(epoch)
    renumbered.set_epoch(epoch)
    assert list(renumbered) == [[index * 3 + 1 for index in batch] for batch in sampler]


def test_epochs_and_seeds_differ_in_domains_and_in_samples():
    def orders(sampler):
        batches = list(sampler)
        return [LABELS[batch[0]] for batch in batches], [index for batch in batches for index in batch if index < 7]

    sampler = small_sampler(domains_per_step=1)
    epochs = [orders(sampler) for _ in range(5)] + [
        orders(small_sampler(domains_per_step=1, seed=seed)) for seed in (4, 5)
    ]
    for one, other in itertools.combinations(epochs, 2):
        assert one[0] != other[0]
        assert one[1] != other[1]


# The distribution of the draws: every plan that is possible, with its exact probability


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("num_batches", "group_size", "max_groups", "weights"),
    [
        *itertools.product([[1, 2, 3]], [2], [None], [[1, 1, 1], None, [0.3, 0.1, 2.5]]),
        *itertools.product([[3, 1, 1]], [1], [None], [[1, 1, 1], None]),
        *itertools.product([[1, 2, 1, 4]], [3], [None], [[1, 1, 1, 1], None, [3, 5, 0.2, 4]]),
        *itertools.product([[1, 3, 6, 40, 100]], [2], [1], [[1, 1, 1, 1, 1], None]),
        *itertools.product([[5, 6, 7, 1, 1, 8]], [3], [1], [[1, 1, 1, 1, 1, 1], None]),
        ([2, 2], 2, None, None),
        ([1, 50, 2, 4], 2, 2, None),
        ([2, 1, 2], 1, None, [1, 1e-3, 1e3]),
        ([1, 1, 1], 2, None, [1e-200, 1e-220, 3e-220]),
        ([9, 9, 9, 9, 9], 3, 1, [7.0, 0.7, 0.07, 0.007, 0.7]),
        ([1, 3, 2, 2], 2, 2, [1, 10, 11, 0.5]),
    ],
    ids=str,
)
def test_whole_plans_have_their_exact_probabilities(order, num_batches, group_size, max_groups, weights):
    groups = Groups(num_batches, group_size, weights, 20, order == "flipflop", None)
    plans = [tuple(itertools.chain(*groups.of_epoch(epoch)[:max_groups])) for epoch in range(12000)]
    assert_distributed(plans, plan_probabilities(num_batches, group_size, weights, order, max_groups))


def test_shuffles_of_the_domains_and_the_draw_are_independent():
    sampler = DomainBatchSampler([0, 0, 0, 1, 1, 1], batch_size=1, seed=8)
    outcomes = []
    for _ in range(7200):
        served = [index for (index,) in sampler]
        first, second = (tuple(index for index in served if index // 3 == domain) for domain in (0, 1))
        outcomes.append((served[0] // 3, first, second))
    orders = list(itertools.permutations(range(3)))
    equally = {
        (domain, one, tuple(index + 3 for index in other)): Fraction(1, 72)
        for domain in (0, 1)
        for one in orders
        for other in orders
    }
    assert_distributed(outcomes, equally)


# Labels


def test_numpy_integers_are_accepted_as_arguments():
    sampler = small_sampler(batch_size=np.int64(2), domains_per_step=np.int32(2), seed=np.uint8(3))
    assert list(sampler) == list(small_sampler())
    through_file(sampler.state_dict())


# Epochs, length


def test_epochs_advance_after_an_end_and_after_a_break():
    sampler, reference = small_sampler(), small_sampler()
    epochs = [list(reference) for _ in range(5)]
    assert list(sampler) == epochs[0]
    broken_off = iter(sampler)
    assert next(broken_off) == epochs[1][0]
    assert list(sampler) == epochs[2]
    assert next(broken_off) == epochs[1][1]  # an iterator keeps to its epoch
    sampler.set_epoch(4)
    assert list(sampler) == epochs[4]
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]


def test_length_is_that_of_the_epoch_in_progress_or_else_the_next():
    reference = small_sampler(seed=0)
    lengths = [len(list(reference)) for _ in range(20)]
    assert len(set(lengths)) > 1
    sampler = small_sampler(seed=0)
    for epoch, length in enumerate(lengths):
        assert len(sampler) == length
        iterator = iter(sampler)
        for position, _ in enumerate(iterator):
            assert len(sampler) == length
            if epoch % 2 and position == 2:
                break
        del iterator  # breaking off and letting go ends the epoch


def test_iterators_of_one_sampler_do_not_disturb_each_other():
    reference = small_sampler()
    epochs = [list(reference) for _ in range(2)]
    sampler = small_sampler()
    together = list(itertools.zip_longest(sampler, sampler))
    for epoch, served in zip(epochs, zip(*together, strict=True), strict=True):
        assert [batch for batch in served if batch is not None] == epoch


# DataLoader


@pytest.mark.parametrize(
    ("num_workers", "persistent"),
    [(0, False), (2, False), (2, True)],
    ids=["no-workers", "workers", "persistent-workers"],
)
def test_a_data_loader_serves_epoch_after_epoch(num_workers, persistent):
    reference = small_sampler()
    epochs = [list(reference) for _ in range(3)]
    loader = loader_of(small_sampler(), num_workers, persistent_workers=persistent)
    for epoch in epochs:
        assert len(loader) == len(epoch)
        assert list(loader) == epoch


def test_it_is_a_sampler_and_uses_no_global_randomness():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    sampler = small_sampler(weighting="proportional")
    assert isinstance(sampler, Sampler)
    served = list(sampler)
    sampler.load_state_dict(sampler.state_dict())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), pickle.dumps(np.random.get_state()))  # noqa: NPY002
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert list(small_sampler(weighting="proportional")) == served
