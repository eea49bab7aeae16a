"""Domains of unequal size: cycles, weights, how many batches there are in all, and the warning of much unserved."""

from __future__ import annotations

import itertools
import math
import sys
import time
import warnings
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from _samplers import (
    LABELS,
    ORDERS,
    WEIGHTINGS,
    assert_distributed,
    cycling,
    loader_of,
    plan_probabilities,
    samplers,
    small_sampler,
    through_a_file,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torch_gradmatch import DomainBatchSampler, ResumableLoader, meta_batches
from torch_gradmatch.data import _draw
from torch_gradmatch.data import sampler as sampler_module
from torch_gradmatch.data._draw import draw_groups
from torch_gradmatch.data._labels import domain_weights

ignoring_the_warning = pytest.mark.filterwarnings("ignore:an epoch serves:UserWarning")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Of as few groups as can be, so that an epoch has many."""
    monkeypatch.setattr(_draw, "BLOCK_BATCHES", 1)


def num_batches_of(labels, arguments):
    size = arguments["batch_size"]
    return {
        label: count // size if arguments["drop_last"] else -(-count // size)
        for label, count in sorted(Counter(labels).items())
    }


def in_groups(batches, size):
    return [batches[start : start + size] for start in range(0, len(batches), size)]


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


@given(case=cycling())
@settings(deadline=None)
def test_with_all_domains_in_every_step_an_epoch_serves_the_largest_once_and_the_others_at_least_once(case):
    labels, arguments = case
    changes = {"domains_per_step": len(set(labels)), "batches_per_epoch": None, "drop_last": False}
    arguments = {**arguments, **changes}
    served = Counter(index for batch in DomainBatchSampler(labels, **arguments) for index in batch)
    num_batches = num_batches_of(labels, arguments)
    for index, label in enumerate(labels):
        assert served[index] >= 1
        if num_batches[label] == max(num_batches.values()):
            assert served[index] == 1


@given(case=cycling())
@settings(deadline=None)
@ignoring_the_warning
def test_the_first_round_of_a_domain_is_what_it_serves_without_a_cycle(case):
    labels, arguments = case

    def batches_of_domains(**changes):
        of_domain = {label: [] for label in labels}
        for batch in DomainBatchSampler(labels, **{**arguments, **changes}):
            of_domain[labels[batch[0]]].append(batch)
        return of_domain

    served, reference = batches_of_domains(), batches_of_domains(exhausted="stop", batches_per_epoch=None)
    num_batches = num_batches_of(labels, arguments)
    for label, batches in served.items():
        common = min(len(batches), len(reference[label]), num_batches[label])
        assert batches[:common] == reference[label][:common]


def test_every_round_of_every_epoch_is_shuffled_anew():
    sampler = DomainBatchSampler([0] * 8 + [1] * 80, 8, exhausted="cycle", seed=4)
    rounds = [tuple(batch) for _ in range(5) for batch in sampler if batch[0] < 8]
    assert len(rounds) == len(set(rounds)) == 50
    sampler = DomainBatchSampler([0] * 3 + [1] * 3000, 3, exhausted="cycle")
    rounds = [tuple(batch) for _ in range(7) for batch in sampler if batch[0] < 3]
    assert_distributed(rounds, dict.fromkeys(itertools.permutations(range(3)), Fraction(1, 6)))


@pytest.mark.parametrize("domains_per_step", [2, 4])
def test_every_stream_of_random_numbers_has_one_use_in_a_cycle(monkeypatch, domains_per_step):
    streams, random_stream = [], _draw.random_stream

    def recording(*key):
        streams.append(key)
        return random_stream(*key)

    for module in (_draw, sampler_module):
        monkeypatch.setattr(module, "random_stream", recording)
    sampler = small_sampler(domains_per_step=domains_per_step, exhausted="cycle")
    num_batches = sum(len(list(sampler)) for _ in range(4))
    assert len(streams) == len(set(streams)) > num_batches / 4  # a plan of 4 batches, and rounds of at most 5


@given(case=cycling(orders=["flipflop"]))
@settings(deadline=None, max_examples=200)
def test_all_epochs_of_a_cycle_are_one_sequence_of_pairs(case):
    labels, arguments = case
    sampler = DomainBatchSampler(labels, **arguments)
    domains = [labels[batch[0]] for _ in range(4) for batch in sampler]
    groups = in_groups(domains, sampler.domains_per_step)
    assert all(second == first[::-1] for first, second in zip(groups[::2], groups[1::2], strict=True))


def test_random_order_pairs_nothing_in_a_cycle():
    sampler = DomainBatchSampler(range(7), 1, domains_per_step=3, exhausted="cycle", order="random")
    groups = [group for _ in range(100) for group in in_groups([batch[0] for batch in sampler], 3)]
    assert sum(second == first[::-1] for first, second in itertools.pairwise(groups)) < 15  # of 299, 1/210 by chance


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("weighting", "weights"),
    [
        ("uniform", [1, 1, 1, 1]),
        ("proportional", [1, 2, 5, 1]),  # in batches of 2
        (0.0, [1, 1, 1, 1]),
        (0.5, [2**0.5, 4**0.5, 10**0.5, 1]),
        (1, [2, 4, 10, 1]),
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


def loops(kind, arguments):
    """The sampler and a loop over it that can be iterated anew for every epoch; the batches of an item."""
    sampler = small_sampler(**arguments)
    if kind == "sampler":
        return sampler, sampler, 1
    if kind == "ResumableLoader":
        return sampler, ResumableLoader(loader_of(sampler)), 1
    return sampler, meta_batches(loader_of(sampler), sampler.domains_per_step), sampler.domains_per_step


def flattened(items, size):
    return list(items) if size == 1 else [batch for group in items for batch in group]


@pytest.mark.parametrize("kind", ["sampler", "ResumableLoader", "meta_batches"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "changes",
    [
        {"domains_per_step": None},
        {"domains_per_step": 2, "weighting": {"a": 4, "b": 1, "c": 0.5, "d": 2}},
        {"domains_per_step": 3, "batches_per_epoch": 21, "weighting": 0.3},
    ],
    ids=["all", "two", "three"],
)
def test_resumed_at_every_position_of_three_epochs_of_a_cycle(kind, order, changes):
    arguments = {**changes, "order": order, "exhausted": "cycle"}
    reference = small_sampler(**arguments)
    epochs = [list(reference) for _ in range(4)]
    for epoch in range(3):
        for stop in range(len(epochs[epoch]) // (reference.domains_per_step if kind == "meta_batches" else 1)):
            sampler, loop, size = loops(kind, arguments)
            sampler.set_epoch(epoch)
            assert flattened(itertools.islice(loop, stop), size) == epochs[epoch][: stop * size]
            state_dict = through_a_file(sampler.state_dict())
            assert (state_dict["epoch"], state_dict["position"]) == (epoch, stop * size)
            sampler, loop, size = loops(kind, arguments)
            sampler.load_state_dict(state_dict)
            assert flattened(loop, size) == epochs[epoch][stop * size :]
            assert flattened(loop, size) == epochs[epoch + 1]


@pytest.mark.parametrize("order", ORDERS)
def test_a_cycle_of_all_domains_begins_at_once_however_far_in_it_is(order):
    sampler = small_sampler(exhausted="cycle", domains_per_step=None, batches_per_epoch=4 * 10**12, order=order)
    position = 4 * (10**12 - 5)  # every domain has served as many rounds as that takes, less the last 5 groups
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 10**6, "position": position})
    assert len(sampler) == 20
    rest = list(sampler)
    num_batches, size = {"b": 4, "a": 2, "d": 1, "c": 5}, {"b": 7, "a": 3, "d": 1, "c": 10}
    for label, number in num_batches.items():
        own = [batch for batch in rest if LABELS[batch[0]] == label]
        assert len(own) == 5
        to_the_end_of_the_round = number - (10**12 - 5) % number
        full = [2] * (number - 1) + [size[label] - 2 * (number - 1)]
        assert list(map(len, own)) == (full[-to_the_end_of_the_round:] + full * 5)[:5]


@given(case=samplers() | cycling(), data=st.data())
@settings(deadline=None)
@ignoring_the_warning
def test_the_plan_counts_what_was_served_before_any_position(case, data):
    labels, arguments = case
    sampler = DomainBatchSampler(labels, **arguments)
    epoch = data.draw(st.integers(0, 3))
    sampler.set_epoch(epoch)
    domains = [labels[batch[0]] for batch in sampler]
    position = data.draw(st.integers(0, len(domains)))
    counts = Counter(domains[:position])
    assert sampler._plan.plan.served(epoch, position).tolist() == [counts[label] for label in sampler.labels]


# States of version 2, written before there was a cycle (commit 43b7173)

SAVED = {
    "seed": 3,
    "batch_size": 2,
    "domains_per_step": 2,
    "weighting": "uniform",
    "drop_last": False,
    "num_domains": 4,
    "num_samples": 21,
    "domains_checksum": "0d66b9c2b23611e176f921a263163f5c",
    "order": "flipflop",
}
VERSION_2 = {
    "two-of-four": (
        {"domains_per_step": 2},
        {"epoch": 0, "position": 6},
        [[9, 8], [6, 2], [5], [16, 15], [20, 11], [7]],
        [[2, 0], [10], [14, 18], [1, 3], [5, 6], [17, 12], [15, 20], [4], [8, 9], [19, 11], [16, 13], [7]],
    ),
    "three-of-four": (
        {"domains_per_step": 3, "weighting": "proportional"},
        {"epoch": 1, "position": 4},
        [[7], [17, 12], [5, 6], [15, 20], [10]],
        [[6, 1], [8, 9], [19, 15], [17, 20], [7], [4, 2], [11, 13], [10], [3, 0]],
    ),
    "all": (
        {"domains_per_step": 4, "batch_size": 1},
        {"epoch": 1, "position": 2},
        [[14], [2]],
        [[8], [6], [10], [19]],
    ),
    "random": (
        {"order": "random", "drop_last": True, "batch_size": 1},
        {"epoch": 2, "position": 5},
        [[1], [15], [7], [4], [17], [2], [20], [11], [3], [0], [13], [18], [5]],
        [[14], [9], [10], [19], [1], [13], [18], [7], [8], [2], [4], [16], [17], [5], [3], [15], [6], [20], [12], [0]],
    ),
}


@pytest.mark.parametrize("case", VERSION_2)
def test_a_state_of_version_2_continues(case):
    changes, place, rest, following = VERSION_2[case]
    state_dict = {"version": 2, **place, **SAVED, **changes}
    sampler = small_sampler(**changes)
    sampler.load_state_dict(state_dict)
    added = {"exhausted": "stop", "batches_per_epoch": 0, "num_replicas": 1, "split": "batch"}
    assert sampler.state_dict() == {**state_dict, "version": 4, **added}
    assert [list(sampler), list(sampler)] == [rest, following]


@pytest.mark.parametrize("case", VERSION_2)
def test_a_state_of_version_2_is_refused_by_a_cycle(case):
    changes, place, _, _ = VERSION_2[case]
    sampler = small_sampler(**changes, exhausted="cycle")
    before = sampler.state_dict()
    with pytest.raises(ValueError, match="exhausted is 'stop', but this sampler's is 'cycle': resume with the same"):
        sampler.load_state_dict({"version": 2, **place, **SAVED, **changes})
    assert sampler.state_dict() == before


@pytest.mark.parametrize(
    ("saved", "loading", "message"),
    [
        ({"exhausted": "cycle"}, {}, "exhausted is 'cycle', but this sampler's is 'stop'"),
        (
            {"exhausted": "cycle", "batches_per_epoch": 8},
            {"exhausted": "cycle"},
            "batches_per_epoch is 8, but this sampler's is 12",
        ),
        ({"weighting": 0.5}, {"weighting": 0.25}, "weighting is 'exponent 0.5', but this sampler's is 'exponent 0.25'"),
        ({"weighting": 0}, {}, "weighting is 'exponent 0.0', but this sampler's is 'uniform'"),
        (
            {"weighting": {"a": 1, "b": 2, "c": 3, "d": 4}},
            {"weighting": {"a": 1, "b": 2, "c": 3, "d": 5}},
            "weighting is 'weights [0-9a-f]{32}', but this sampler's is 'weights [0-9a-f]{32}'",
        ),
    ],
    ids=["exhausted", "batches_per_epoch", "exponent", "kind", "weights"],
)
def test_a_state_of_another_cycle_or_weighting_is_refused(saved, loading, message):
    state_dict = through_a_file(small_sampler(**saved).state_dict())
    assert {type(value) for value in state_dict.values()} <= {int, str, bool}
    with pytest.raises(ValueError, match=message):
        small_sampler(**loading).load_state_dict(state_dict)


def test_a_cycle_that_is_as_long_without_being_told_can_be_resumed_either_way():
    state_dict = small_sampler(exhausted="cycle", batches_per_epoch=12).state_dict()
    small_sampler(exhausted="cycle").load_state_dict(state_dict)


# How many batches in all


@given(case=samplers() | cycling(), epochs=st.integers(0, 5), data=st.data())
@settings(deadline=None)
@ignoring_the_warning
def test_total_batches_is_the_sum_of_the_lengths_and_asking_changes_nothing(case, epochs, data):
    labels, arguments = case
    reference = DomainBatchSampler(labels, **arguments)
    served = [list(reference) for _ in range(max(epochs, 3))]
    sampler = DomainBatchSampler(labels, **arguments)
    assert sampler.total_batches(epochs) == sum(map(len, served[:epochs]))
    epoch = data.draw(st.integers(0, 1))
    sampler.set_epoch(epoch)
    iterator = iter(sampler)
    stop = data.draw(st.integers(0, len(served[epoch])))
    assert list(itertools.islice(iterator, stop)) == served[epoch][:stop]
    before, kept = sampler.state_dict(), sampler._plan.plan._kept
    assert sampler.total_batches(epochs) == sum(map(len, served[:epochs]))
    assert sampler.state_dict() == before
    assert sampler._plan.plan._kept is kept
    assert list(iterator) == served[epoch][stop:]
    assert list(sampler) == served[epoch + 1]


@pytest.mark.parametrize("epochs", [-1, 1.0, True, None])
def test_epochs_that_are_none(epochs):
    with pytest.raises(ValueError, match=rf"epochs should be an integer of at least 0 \(got {epochs!r}\)"):
        small_sampler().total_batches(epochs)


@pytest.mark.parametrize("changes", [{"exhausted": "cycle"}, {"domains_per_step": None}, {"domains_per_step": 1}])
def test_where_all_epochs_are_equally_long_none_is_planned(changes, monkeypatch):
    sampler = small_sampler(**changes)
    monkeypatch.setattr(_draw, "draw_groups", None)
    assert sampler.total_batches(10**9) == 10**9 * len(sampler)


# The warning


@given(case=samplers() | cycling())
@settings(deadline=None, max_examples=300)
def test_the_warning_comes_just_where_an_epoch_serves_less_than_a_tenth(case):
    labels, arguments = case
    labels = labels + [-1] * (10 * len(labels))  # or hardly any would
    if isinstance(arguments["weighting"], dict):
        arguments = {**arguments, "weighting": {-1: 1, **arguments["weighting"]}}
    assume("batches_per_epoch" not in arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = DomainBatchSampler(labels, **arguments)
    served = sum(map(len, sampler))
    assert len(caught) == (10 * served < len(labels) and "exhausted" not in arguments)
    for warning in caught:
        assert warning.filename == __file__
        assert f"{served:,} of {len(labels):,} samples" in str(warning.message)


SIZES = {"small": 10, "middle": 1000, "large": 100_000}
UNEQUAL = [label for label, size in SIZES.items() for _ in range(size)]


def test_the_warning_has_the_numbers_and_the_remedy():
    message = (
        r"an epoch serves 74 of 101,010 samples \(0.07%\) in 3 batches: it ends when fewer than domains_per_step=3 of "
        r"3 domains have a batch left, and they have 10 to 100,000 samples each; "
        r'exhausted="cycle" goes on until the largest domain has been served whole$'
    )
    with pytest.warns(UserWarning, match=message):
        DomainBatchSampler(UNEQUAL, 32)
    with pytest.warns(UserWarning, match=r'exhausted="cycle" goes on for at least as many batches as the data has$'):
        DomainBatchSampler(UNEQUAL, 32, domains_per_step=2)
    sampler = DomainBatchSampler(UNEQUAL, 32, exhausted="cycle")
    assert len(sampler) == 3 * math.ceil(100_000 / 32) == 9375
    assert Counter(index for batch in sampler for index in batch if index >= 1010) == Counter(range(1010, 101_010))


def test_the_warning_proposes_proportional_weights_where_they_help():
    labels = [label for label in range(20) for _ in range(100 if label < 18 else 12_000)]
    with pytest.warns(UserWarning, match=r'weighting="proportional" serves (\d+)% of the samples') as caught:
        DomainBatchSampler(labels, 1, domains_per_step=3)
    served = sum(map(len, DomainBatchSampler(labels, 1, domains_per_step=3, weighting="proportional")))
    assert f"serves {served / len(labels):.0%} of" in str(caught[0].message)


def test_samples_that_domains_share_count_once():
    shared = {"a": range(1000), "b": range(1000), "c": range(100), "d": range(100)}
    DomainBatchSampler(shared, 1, overlapping=True)  # 400 of 1000
    with pytest.warns(UserWarning, match=r"serves 40 of 1,000 samples \(4.00%\)"):
        DomainBatchSampler({**shared, "d": range(10)}, 1, overlapping=True)


@pytest.mark.parametrize("batches_per_epoch", [None, 3])
def test_no_warning_of_a_cycle(batches_per_epoch):
    DomainBatchSampler(UNEQUAL, 32, exhausted="cycle", batches_per_epoch=batches_per_epoch)


# Weights


def label_weights(weights):
    return domain_weights(dict(enumerate(weights)), range(len(weights)), [1] * len(weights))[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("weights", "num_batches", "group_size", "max_groups"),
    [
        ([0.3, 0.1, 2.5], [1, 2, 3], 2, None),
        ([1, 1e-3, 1e3], [2, 1, 2], 1, None),
        ([1e-200, 1e-220, 3e-220], [1, 1, 1], 2, None),
        ([7.0, 0.7, 0.07, 0.007, 0.7], [9, 9, 9, 9, 9], 3, 1),
        ([3, 5, 0.2, 4], [1, 2, 1, 4], 3, None),
        ([1, 10, 11, 0.5], [1, 3, 2, 2], 2, 2),
    ],
    ids=str,
)
def test_plans_with_fixed_weights_have_their_exact_probabilities(order, weights, num_batches, group_size, max_groups):
    generator, integers = np.random.default_rng(21), label_weights(weights)
    plans = []
    for _ in range(12000):
        groups = draw_groups(num_batches, group_size, integers, generator, order == "flipflop")
        plans.append(tuple(groups[:max_groups].reshape(-1).tolist()))
    assert_distributed(plans, plan_probabilities(num_batches, group_size, weights, order, max_groups))


@given(weights=st.lists(st.floats(1e-40, 1e40), min_size=1, max_size=6), scale=st.integers(-100, 100))
def test_weights_become_integers_of_exactly_their_ratios(weights, scale):
    integers = label_weights(weights)
    assert all(type(integer) is int and integer > 0 for integer in integers)
    assert math.gcd(*integers) == 1
    for integer, weight in zip(integers, weights, strict=True):
        assert Fraction(integer, integers[0]) == Fraction(weight) / Fraction(weights[0])
    assert label_weights([weight * 2.0**scale for weight in weights]) == integers


@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=6), exponent=st.floats(0, 1))
def test_an_exponent_weighs_by_a_power_of_the_samples(sizes, exponent):
    integers, name = domain_weights(exponent, range(len(sizes)), sizes)
    assert name == f"exponent {exponent}"
    for integer, size in zip(integers, sizes, strict=True):
        assert integer / integers[0] == pytest.approx((size / sizes[0]) ** exponent, rel=1e-12)


@given(case=samplers() | cycling(), epoch=st.integers(0, 3), weight=st.floats(1e-6, 1e6))
@settings(deadline=None)
@ignoring_the_warning
def test_equal_weights_and_exponent_0_serve_what_uniform_serves(case, epoch, weight):
    labels, arguments = case
    served = []
    for weighting in ("uniform", 0, dict.fromkeys(labels, weight)):
        sampler = DomainBatchSampler(labels, **{**arguments, "weighting": weighting})
        sampler.set_epoch(epoch)
        served.append(list(sampler))
    assert served[0] == served[1] == served[2]


@ignoring_the_warning
def test_weights_go_by_label_whatever_the_order_in_which_they_are_given():
    weighting = {"c": 0.5, "b": 2, "a": np.float32(0.25), "d": Fraction(1, 3)}
    sampler = small_sampler(weighting=weighting)
    assert sampler.weighting == weighting
    backwards = small_sampler(weighting=dict(reversed(weighting.items())))
    assert backwards.state_dict() == sampler.state_dict()
    assert list(backwards) == list(sampler)
    heavy = DomainBatchSampler(LABELS, 1, 1, {"a": 1, "b": 1, "c": 1, "d": 1e9}, exhausted="cycle")
    assert Counter(LABELS[index] for (index,) in heavy)["d"] > 15


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        (True, r"a number from 0 to 1 .* \(got True\)"),
        (-0.1, r"a number from 0 to 1 .* \(got -0.1\)"),
        (1.5, r"\(got 1.5\)"),
        (math.nan, r"\(got nan\)"),
        (None, r"\(got None\)"),
        ([1, 1, 1, 1], r"\(got \[1, 1, 1, 1\]\)"),
        ({}, r"got no weight for 'b' and 3 more\); the labels are \['b', 'a', 'd', 'c'\]"),
        ({"a": 1, "b": 1, "c": 1}, r"got no weight for 'd'\)"),
        ({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, r"got a weight for the unknown label 'e'\)"),
        *(
            ({"a": 1, "b": 1, "c": weight, "d": 1}, rf"weighting\['c'\] should be a positive .* \(got {shown}\)")
            for weight, shown in [
                (True, "True"), (0, "0"), (-1, "-1"), (math.nan, "nan"), (math.inf, "inf"), ("1", "'1'"),
                (None, "None"), (10**400, r"1000.*000"), (Fraction(1, 10**400), "Fraction.*"),
            ]
        ),
        ({"a": 1e60, "b": 1, "c": 1e-60, "d": 1}, r"within a factor of 1e100 of one another \(got 1e-60 and 1e\+60\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value!r:.40}",
)  # fmt: skip
def test_weights_that_are_none(weighting, message):
    with pytest.raises(ValueError, match=message):
        small_sampler(weighting=weighting)


@pytest.mark.parametrize("exhausted", ["stop", "cycle"])
@pytest.mark.parametrize("weighting", [*WEIGHTINGS, 0.5, "by label"])
def test_a_draw_from_ten_thousand_domains_takes_little_longer_than_one_from_ten(
    weighting, exhausted, record_property, monkeypatch
):
    monkeypatch.setattr(_draw, "BLOCK_BATCHES", 2**13)
    for num_domains in (10, 10_000):
        sizes = np.random.default_rng(1).integers(50, 200, num_domains) * (20_000 // num_domains)
        weights = weighting
        if weighting == "by label":
            weights = dict(enumerate(np.random.default_rng(2).lognormal(0, 2, num_domains).tolist()))
        labels = np.repeat(np.arange(num_domains), sizes)
        sampler = DomainBatchSampler(labels, 16, 5, weights, exhausted=exhausted)
        started = time.perf_counter()
        drawn = sum(domains.size for domains in itertools.islice(sampler._plan.plan.stretches(1, 0), 20))
        seconds = (time.perf_counter() - started) / drawn
        record_property(f"seconds per draw from {num_domains}", seconds)
        sys.stdout.write(f"{weighting}, {exhausted}, {num_domains} domains: {seconds * 1e6:.2f} us per draw\n")


# Arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exhausted": "repeat"}, r"exhausted should be one of 'stop', 'cycle' \(got 'repeat'\)"),
        ({"exhausted": None}, r"exhausted .* \(got None\)"),
        (
            {"batches_per_epoch": 4},
            r"batches_per_epoch should be None with exhausted='stop'.* \(got 4\): pass exhausted=",
        ),
        *(
            ({"exhausted": "cycle", "batches_per_epoch": number, "domains_per_step": 3}, message)
            for number, message in [
                (0, r"batches_per_epoch should be an integer of at least 1 \(got 0\)"),
                (-3, r"\(got -3\)"),
                (3.0, r"\(got 3.0\)"),
                (True, r"\(got True\)"),
                (10, r"a multiple of domains_per_step=3 \(got 10\): 9 or 12 would do"),
                (2, r"a multiple of domains_per_step=3 \(got 2\): 3 would do"),
            ]
        ),
    ],
    ids=str,
)
def test_an_exhausted_or_a_length_that_is_none(changes, message):
    with pytest.raises(ValueError, match=message):
        small_sampler(**changes)
