"""One sampler over several ranks: the laws of each split, and every error."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from fractions import Fraction

import pytest
from _loops import QUIET
from _samplers import assert_distributed, loader_of
from _splits import grouped, ranks_of, spread, walk
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_gradmatch import DomainBatchSampler, meta_batches

pytestmark = QUIET

LABELS = ["a"] * 16 + ["b"] * 8 + ["c"] * 8 + ["d"] * 24
PLAIN = {"batch_size": 4, "domains_per_step": 4, "seed": 1}


# What holds for every split


@given(case=spread())
@settings(deadline=None)
def test_every_rank_has_as_many_batches_and_as_large_ones_as_the_others_and_knows_it(case):
    labels, arguments, _, kind = case
    samplers = ranks_of(*case)
    total = [samplers[0].total_batches(epochs) for epochs in range(4)]
    for epoch in range(3):
        length = total[epoch + 1] - total[epoch]
        assert {len(sampler) for sampler in samplers} == {length}
        served = [list(sampler) for sampler in samplers]
        assert {len(batches) for batches in served} == {length}
        size = arguments["domains_per_step"] if kind == "walks" else 1
        if kind != "domains":
            for groups in zip(*(grouped(batches, size) for batches in served), strict=True):
                assert len({tuple(sorted((labels[batch[0]], len(batch)) for batch in group)) for group in groups}) == 1
        assert all(type(index) is int for index in itertools.chain(*itertools.chain(*served)))
    assert all([sampler.total_batches(epochs) for epochs in range(4)] == total for sampler in samplers)


@given(case=spread())
@settings(deadline=None)
def test_no_sample_is_served_again_before_its_domain_has_run_out(case):
    labels, arguments, num_replicas, kind = case
    sizes = Counter(labels)
    if kind == "domains":
        parts, whole = 1, arguments["batch_size"]
    else:
        parts, whole = num_replicas, arguments["batch_size"] * (num_replicas if kind == "walks" else 1)
    rests = {label: size % whole for label, size in sizes.items()}
    of_round = {
        label: size - (rests[label] if arguments["drop_last"] else rests[label] % parts)
        for label, size in sizes.items()
    }
    samplers = ranks_of(*case)
    for _ in range(2):
        served = Counter(index for sampler in samplers for batch in sampler for index in batch)
        for label, number in Counter(labels[index] for index in served.elements()).items():
            rounds = -(-number // of_round[label])
            assert max(times for index, times in served.items() if labels[index] == label) <= rounds
            if arguments["exhausted"] == "stop":
                assert rounds == 1


# Parts of batches


@given(case=spread("batch") | spread("batch", even=True))
@settings(deadline=None)
def test_parts_are_cut_from_a_batch_of_one_process_and_of_its_domain(case):
    """Where no domain loses a whole batch, the batches are those of one process, short of fewer than R samples."""
    labels, arguments, num_replicas, _ = case
    size = arguments["batch_size"]
    for count in Counter(labels).values():
        if 0 < count % size < num_replicas and not arguments["drop_last"]:
            return
    whole = DomainBatchSampler(labels, **arguments)
    for parts, batch in zip(zip(*ranks_of(*case), strict=True), whole, strict=True):
        served = list(itertools.chain(*parts))
        assert served == batch[: len(batch) - len(batch) % num_replicas]


# Walks


@given(case=spread("walks"))
@settings(deadline=None)
def test_all_ranks_walk_through_the_same_domains_pairs_of_them_in_opposite_orders(case):
    labels, arguments, _, _ = case
    samplers = ranks_of(*case)
    for _ in range(3):
        served = [grouped(list(sampler), arguments["domains_per_step"]) for sampler in samplers]
        for groups in zip(*served, strict=True):
            walks = [walk(labels, group) for group in groups]
            assert len({frozenset(order) for order in walks}) == 1
            assert len(set(walks[0])) == arguments["domains_per_step"]
            for one, other in zip(walks[::2], walks[1::2], strict=False):
                assert one == other[::-1]
            samples = [index for group in groups for batch in group for index in batch]
            assert len(samples) == len(set(samples))


@given(case=spread("walks", even=True))
@settings(deadline=None)
def test_rank_r_has_batches_r_and_so_on_of_one_process(case):
    """With one domain per step and in the order of the domains, those of one process in its order of the domains."""
    labels, arguments, num_replicas, _ = case
    arguments |= {"domains_per_step": len(set(labels)), "exhausted": "stop"}
    arguments.pop("batches_per_epoch", None)

    def by_domain(sampler):
        batches = {}
        for batch in sampler:
            batches.setdefault(labels[batch[0]], []).append(batch)
        return batches

    plain = by_domain(DomainBatchSampler(labels, **arguments))
    for rank, sampler in enumerate(ranks_of(labels, arguments, num_replicas, "walks")):
        for domain, batches in by_domain(sampler).items():
            assert batches == plain[domain][rank::num_replicas][: len(batches)]


@given(case=spread("walks"))
@settings(deadline=None)
def test_the_second_group_of_a_pair_is_the_reverse_of_the_first_on_every_rank(case):
    labels, arguments, _, _ = case
    arguments |= {"order": "flipflop"}
    size, all_domains = arguments["domains_per_step"], arguments["domains_per_step"] == len(set(labels))
    endless = arguments["exhausted"] == "cycle" or all_domains  # pairs go on across epochs
    for sampler in ranks_of(*case):
        epochs = [[walk(labels, group) for group in grouped(list(sampler), size)] for _ in range(4)]
        for walks in [list(itertools.chain(*epochs))] if endless else epochs:
            for first, second in zip(walks[::2], walks[1::2], strict=False):
                if set(first) == set(second):
                    assert second == first[::-1]
                assert set(first) == set(second) or arguments["exhausted"] == "stop"


@pytest.mark.parametrize("order", ["flipflop", "random"])
def test_pairs_of_ranks_have_independent_orders_all_equally_likely(order):
    arguments = {"batch_size": 1, "order": order, "exhausted": "cycle", "batches_per_epoch": 6}
    samplers = ranks_of([0, 1, 2] * 6, arguments, 6, "walks")[::2]
    outcomes = [
        tuple(tuple(sampler._groups.group(epoch, 0)) for sampler in samplers)
        for epoch in range(4000)  # a first group, so not the reverse of another one's
    ]
    orders = list(itertools.permutations(range(3)))
    assert_distributed(outcomes, {walks: Fraction(1, 6**3) for walks in itertools.product(orders, repeat=3)})


# Domains


@given(case=spread("domains"))
@settings(deadline=None)
def test_the_batches_of_a_group_are_dealt_to_the_ranks(case):
    labels, arguments, num_replicas, _ = case
    whole = DomainBatchSampler(labels, **arguments)
    samplers = ranks_of(*case)
    size = arguments["domains_per_step"] // num_replicas
    assert {sampler.batches_per_group for sampler in samplers} == {size}
    assert {sampler.domains_per_step for sampler in samplers} == {size * num_replicas}
    for _ in range(3):
        served = [grouped(list(sampler), size) for sampler in samplers]
        dealt = [list(itertools.chain(*groups)) for groups in zip(*served, strict=True)]
        assert dealt == grouped(list(whole), size * num_replicas)


# Lists that know their domains


@given(case=spread(), stop=st.integers(0, 4))
@settings(deadline=None, max_examples=50)
def test_lists_know_the_domains_of_this_ranks_batches(case, stop):
    labels, *_ = case
    for sampler in ranks_of(*case):
        reference = copy.deepcopy(sampler)
        loop = meta_batches(loader_of(sampler))
        assert len(loop) == len(sampler) // sampler.batches_per_group
        for _ in range(2):
            groups = list(loop)
            assert [list(group) for group in groups] == grouped(list(reference), sampler.batches_per_group)
            assert all(list(group.domains) == walk(labels, group) for group in groups)
        state = sampler.state_dict()
        list(itertools.islice(loop, stop))
        sampler.load_state_dict(state)
        for group in loop:
            assert list(group.domains) == walk(labels, group)
