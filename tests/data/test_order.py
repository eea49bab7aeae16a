"""The order of the walk: pairs of groups, the second the reverse of the first, within epochs and across them."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from _samplers import ORDERS, loader_of, samplers, small_sampler, through_a_file
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_gradmatch import DomainBatchSampler, ResumableLoader, meta_batches
from torch_gradmatch.data._draw import draw_groups

# From Python 3.12 on, forking a worker from a process with threads warns; these workers only read a range.
# Domains are drawn of any sizes, so that an epoch may well serve little; test_unequal.py tests that warning.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*:DeprecationWarning", "ignore:an epoch serves:UserWarning"
)


def groups_of(sampler, labels):
    """The domains of the groups that the next epoch serves."""
    domains = [labels[batch[0]] for batch in sampler]
    size = sampler.domains_per_step
    return [tuple(domains[start : start + size]) for start in range(0, len(domains), size)]


def equal_sampler(num_groups, num_domains=3, **changes):
    """A sampler of domains that have one batch for each group, and their labels."""
    labels = list(range(num_domains)) * num_groups
    return DomainBatchSampler(labels, **{"batch_size": 1, "seed": 5, **changes}), labels


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


@given(case=samplers(orders=["flipflop"]))
@settings(deadline=None)
def test_every_batch_is_the_next_of_its_domain_as_in_random_order(case):
    labels, arguments = case

    def batches_of_domains(order):
        of_domain = {label: [] for label in labels}
        for batch in DomainBatchSampler(labels, **{**arguments, "order": order}):
            of_domain[labels[batch[0]]].append(batch)
        return of_domain

    served, reference = batches_of_domains("flipflop"), batches_of_domains("random")
    for label, batches in served.items():
        common = min(len(batches), len(reference[label]))
        assert batches[:common] == reference[label][:common]


@given(case=samplers(), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_with_all_domains_in_every_step_both_orders_serve_the_same_batches(case, epoch):
    labels, arguments = case
    served = []
    for order in ORDERS:
        changes = {"domains_per_step": len(set(labels)), "order": order}
        sampler = DomainBatchSampler(labels, **{**arguments, **changes})
        sampler.set_epoch(epoch)
        served.append(sorted(map(tuple, sampler)))
    assert served[0] == served[1]


@given(case=samplers(), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_the_first_group_of_an_epoch_has_the_domains_that_random_order_draws(case, epoch):
    labels, arguments = case
    first = []
    for order in ORDERS:
        sampler = DomainBatchSampler(labels, **{**arguments, "order": order})
        sampler.set_epoch(epoch)
        first.append(set(groups_of(sampler, labels)[0]))
    assert first[0] == first[1]


def test_one_domain_per_step_serves_each_domain_twice_in_a_row_while_it_can():
    labels = [0] * 4 + [1] * 8 + [2] * 6
    sampler = DomainBatchSampler(labels, 1, domains_per_step=1)
    for _ in range(3):
        served = [labels[index] for (index,) in sampler]
        assert served[::2] == served[1::2]
        assert len(served) == 18


# Across epochs


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 5])
def test_epochs_of_all_domains_are_one_sequence_of_pairs(num_groups):
    sampler, labels = equal_sampler(num_groups, num_domains=4)
    groups = [group for _ in range(8) for group in groups_of(sampler, labels)]
    assert len(groups) == 8 * num_groups
    assert all(second == first[::-1] for first, second in zip(groups[::2], groups[1::2], strict=True))
    assert len({frozenset([first, first[::-1]]) for first in groups[::2]}) > 2  # each pair in an order of its own


@pytest.mark.parametrize("num_groups", [1, 3, 4])
def test_an_odd_epoch_alone_is_what_it_is_after_the_one_before(num_groups):
    sampler, _ = equal_sampler(num_groups)
    epochs = [list(sampler) for _ in range(4)]
    for epoch in (3, 1, 2, 0):
        alone, _ = equal_sampler(num_groups)
        alone.set_epoch(epoch)
        assert len(alone) == len(epochs[epoch])
        assert list(alone) == epochs[epoch]
        sampler.set_epoch(epoch)
        assert list(sampler) == epochs[epoch]


def test_after_the_reverse_of_the_epoch_before_every_order_is_drawn_equally_often():
    generator, unpaired = np.random.default_rng(2), np.array([2, 0, 1])
    drawn = Counter()
    for _ in range(6000):
        groups = draw_groups([3, 5, 4], 3, None, generator, paired=True, unpaired=unpaired)
        assert groups.shape == (3, 3)
        assert groups[0].tolist() == [1, 0, 2]
        assert groups[2].tolist() == groups[1, ::-1].tolist()
        drawn[tuple(groups[1].tolist())] += 1
    assert set(drawn) == set(itertools.permutations(range(3)))
    assert max(abs(count - 1000) for count in drawn.values()) < 5 * np.sqrt(1000 * 5 / 6)


def test_random_order_pairs_nothing():
    sampler, labels = equal_sampler(3, num_domains=4, order="random")
    groups = [group for _ in range(20) for group in groups_of(sampler, labels)]
    assert sum(second == first[::-1] for first, second in itertools.pairwise(groups)) < 10  # of 59, 1/24 by chance


def test_with_fewer_domains_than_there_are_pairs_do_not_cross_epochs():
    labels = list(range(3)) * 3
    sampler = DomainBatchSampler(labels, 1, domains_per_step=2)
    epochs = [groups_of(sampler, labels) for _ in range(200)]
    unpaired = [(even, odd) for even, odd in zip(epochs[::2], epochs[1::2], strict=True) if len(even) == 3]
    assert len(unpaired) > 30
    assert sum(odd[0] == even[-1][::-1] for even, odd in unpaired) < len(unpaired) / 2  # 1/6 by chance


# Resuming


def loops(kind, order, num_workers=0, **changes):
    """The sampler and a loop over it that can be iterated anew for every epoch; the batches of an item."""
    sampler, _ = equal_sampler(3, order=order, **changes)
    loader = loader_of(sampler, num_workers, prefetch_factor=20 if num_workers else None)
    if kind == "sampler":
        return sampler, sampler, 1
    if kind == "ResumableLoader":
        return sampler, ResumableLoader(loader), 1
    return sampler, meta_batches(loader, sampler.domains_per_step), sampler.domains_per_step


def flattened(items, size):
    return list(items) if size == 1 else [batch for group in items for batch in group]


@pytest.mark.parametrize("chosen", [False, True], ids=["", "set_epoch"])
@pytest.mark.parametrize("domains_per_step", [2, 3])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("kind", "num_workers"),
    [("sampler", 0), ("ResumableLoader", 0), ("meta_batches", 0), ("ResumableLoader", 1), ("meta_batches", 1)],
)
def test_resumed_at_every_position_of_an_even_and_an_odd_epoch(kind, num_workers, order, domains_per_step, chosen):
    changes = {"num_workers": num_workers, "domains_per_step": domains_per_step}
    reference, _ = equal_sampler(3, order=order, domains_per_step=domains_per_step)
    epochs = [list(reference) for _ in range(4)]
    for epoch in (0, 1):
        stops = range(1, len(epochs[epoch]) // (domains_per_step if kind == "meta_batches" else 1))
        for stop in stops if not num_workers else stops[1:2]:
            sampler, loop, size = loops(kind, order, **changes)
            sampler.set_epoch(epoch)
            taken = flattened(itertools.islice(loop, stop), size)
            assert taken == epochs[epoch][: stop * size]
            state_dict = through_a_file(sampler.state_dict())
            assert (state_dict["epoch"], state_dict["position"]) == (epoch, stop * size)

            sampler, loop, size = loops(kind, order, **changes)
            sampler.load_state_dict(state_dict)
            for number in range(epoch, 4):
                if chosen:
                    sampler.set_epoch(number)
                served = flattened(loop, size)
                assert served == epochs[number][stop * size if number == epoch else 0 :]


@pytest.mark.parametrize("epochs_before", [0, 1, 2])
@pytest.mark.parametrize("domains_per_step", [2, 3])
def test_a_pickled_sampler_goes_on_alike(domains_per_step, epochs_before):
    sampler, _ = equal_sampler(3, domains_per_step=domains_per_step, order="flipflop")
    for _ in range(epochs_before):
        list(sampler)
    copied = pickle.loads(pickle.dumps(sampler))
    assert copied.order == "flipflop"
    assert [list(copied) for _ in range(3)] == [list(sampler) for _ in range(3)]


# States of version 1, written before there was an order (commit 55973ae)

VERSION_1 = {
    "two-of-four": (
        {"domains_per_step": 2},
        {
            "version": 1,
            "epoch": 1,
            "position": 3,
            "seed": 3,
            "batch_size": 2,
            "domains_per_step": 2,
            "weighting": "uniform",
            "drop_last": False,
            "num_domains": 4,
            "num_samples": 21,
            "domains_checksum": "0d66b9c2b23611e176f921a263163f5c",
        },
        [[1, 3], [5, 6], [17, 12], [15, 20], [8, 9], [4], [19, 11], [16, 13], [7]],
        [[10], [6, 1], [19, 15], [8, 9], [7], [4, 2], [17, 20], [3, 0], [11, 13], [5]],
    ),
    "three-of-four": (
        {"domains_per_step": 3, "weighting": "proportional"},
        {
            "version": 1,
            "epoch": 1,
            "position": 3,
            "seed": 3,
            "batch_size": 2,
            "domains_per_step": 3,
            "weighting": "proportional",
            "drop_last": False,
            "num_domains": 4,
            "num_samples": 21,
            "domains_checksum": "0d66b9c2b23611e176f921a263163f5c",
        },
        [[1, 3], [17, 12], [7], [5, 6], [15, 20], [10]],
        [[6, 1], [8, 9], [19, 15], [7], [17, 20], [10]],
    ),
    "all": (
        {"domains_per_step": None, "weighting": "proportional", "batch_size": 1},
        {
            "version": 1,
            "epoch": 1,
            "position": 3,
            "seed": 3,
            "batch_size": 1,
            "domains_per_step": 4,
            "weighting": "proportional",
            "drop_last": False,
            "num_domains": 4,
            "num_samples": 21,
            "domains_checksum": "0d66b9c2b23611e176f921a263163f5c",
        },
        [[14]],
        [[10], [19], [8], [6]],
    ),
}


@pytest.mark.parametrize("case", VERSION_1)
def test_a_state_of_version_1_continues_in_random_order(case):
    changes, state_dict, rest, following = VERSION_1[case]
    sampler = small_sampler(**changes, order="random")
    sampler.load_state_dict(state_dict)
    added = {"order": "random", "exhausted": "stop", "batches_per_epoch": 0, "num_replicas": 1, "split": "batch"}
    assert sampler.state_dict() == {**state_dict, "version": 4, **added}
    assert [list(sampler), list(sampler)] == [rest, following]


@pytest.mark.parametrize("case", VERSION_1)
def test_a_state_of_version_1_is_refused_by_flipflop(case):
    changes, state_dict, _, _ = VERSION_1[case]
    sampler = small_sampler(**changes)
    before, epochs = sampler.state_dict(), [list(small_sampler(**changes))]
    message = r'saved in random order, DomainBatchSampler\(order="random"\) resumes it'
    for version in (state_dict, {**state_dict, "version": 2, "order": "random"}):
        with pytest.raises(ValueError, match=message):
            sampler.load_state_dict(version)
    assert sampler.state_dict() == before
    assert [list(sampler)] == epochs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": True}, "should hold exactly"),
        ({"version": 2}, "should hold exactly"),
        ({"seed": 4}, "seed is 4, but this sampler's is 3: resume with the same domains"),
        ({"position": 100}, "position is 100, but epoch 1 has 12 batches"),
    ],
    ids=["version=True", "version=2", "seed", "position"],
)
def test_a_state_of_version_1_that_does_not_fit_is_refused(change, message):
    _, state_dict, _, _ = VERSION_1["two-of-four"]
    with pytest.raises(ValueError, match=message):
        small_sampler(order="random").load_state_dict({**state_dict, **change})


def test_a_state_of_flipflop_is_refused_by_random_order():
    with pytest.raises(ValueError, match="order is 'flipflop', but this sampler's is 'random': resume with the same"):
        small_sampler(order="random").load_state_dict(small_sampler().state_dict())
