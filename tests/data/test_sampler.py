"""DomainBatchSampler: the laws of an epoch on all ranks, its length, workers, and every argument that is refused."""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from _feature_training import through_file
from _samplers import LABELS, QUIET, Case, cases, changing, in_groups, place_of, small_sampler
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import Sampler

from torch_gradmatch.data import _draw
from torch_gradmatch.data.sampler import DomainBatchSampler

pytestmark = QUIET


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Of as few groups as can be, so that an epoch has many."""
    monkeypatch.setattr(_draw, "BLOCK", 1)


@given(case=cases())
@settings(deadline=None, max_examples=300)
def test_every_epoch_is_as_long_as_all_ranks_say_and_has_whole_groups_of_distinct_domains(case):
    samplers, size = case.ranks(), case.arguments["domains_per_step"]
    lengths = []
    for _ in range(3):
        (length,) = {len(sampler) for sampler in samplers}
        lengths.append(length)
        served = [list(sampler) for sampler in samplers]
        assert {len(batches) for batches in served} == {length}
        assert all(type(index) is int for batches in served for batch in batches for index in batch)
        left = Counter(case.runs)
        for groups in zip(*(in_groups(batches, samplers[0].batches_per_group) for batches in served), strict=True):
            walks = [case.walk(group) for group in groups]
            assert all(len(set(walk)) == len(walk) for walk in walks)
            domains = set().union(*walks)
            assert len(domains) == size
            if case.arguments["split"] == "walks":  # pairs of ranks walk in opposite orders
                assert all(one == other[::-1] for one, other in zip(walks[::2], walks[1::2], strict=False))
            left.subtract(domains)
        if case.arguments["exhausted"] == "stop":
            assert min(left.values()) >= 0
            assert sum(number > 0 for number in left.values()) < size
        else:
            fewest = max(*case.runs.values(), 0, math.ceil(Fraction(sum(case.runs.values()), size)))
            expected = fewest * samplers[0].batches_per_group
            if "batches_per_epoch" in case.arguments:
                dealt = case.arguments["num_replicas"] if case.arguments["split"] == "domains" else 1
                expected = case.arguments["batches_per_epoch"] // dealt
            assert length == expected
    for sampler in samplers:
        assert [sampler.total_batches(epochs) for epochs in range(4)] == [0, *itertools.accumulate(lengths)]


def wholes_of(case, served):
    """What all ranks together have of each domain at a time, in parts, in the order served."""
    if case.arguments["split"] == "domains":
        dealt = case.arguments["domains_per_step"] * case.arguments["accumulate"] // len(served)
        groups = zip(*(in_groups(batches, dealt) for batches in served), strict=True)
        served = [itertools.chain.from_iterable(itertools.chain.from_iterable(groups))]
    of_ranks = [case.by_domain(batches) for batches in served]
    return {label: list(zip(*(own[label] for own in of_ranks), strict=True)) for label in of_ranks[0]}


@given(case=cases())
@settings(deadline=None, max_examples=300)
def test_a_domain_serves_all_its_samples_in_equal_parts_before_it_serves_one_again(case):
    samplers, k = case.ranks(), case.arguments["accumulate"]
    for _ in range(2):
        for label, wholes in wholes_of(case, [list(sampler) for sampler in samplers]).items():
            number = case.runs[label] * k
            for start in range(0, len(wholes), number):
                of_round = wholes[start : start + number]
                assert all(len({len(part) for part in parts}) == 1 for parts in of_round)
                served = [list(itertools.chain(*parts)) for parts in of_round]
                assert all(len(whole) == case.whole for whole in served[: number - 1])
                samples = list(itertools.chain(*served))
                assert len(samples) == len(set(samples))
                assert {case.labels[index] for index in samples} == {label}
                if len(of_round) == number:
                    assert len(samples) == min(case.of_round[label], number * case.whole)


@given(case=cases(split=["batch"]))
@settings(deadline=None)
def test_parts_are_cut_from_the_batches_of_one_process(case):
    """Where no domain loses a whole batch, short of fewer than R samples."""
    ranks = case.arguments["num_replicas"]
    for size in Counter(case.labels).values():
        assume(case.arguments["drop_last"] or not 0 < size % case.whole < ranks)
    for parts, batch in zip(zip(*case.ranks(), strict=True), case.alone(), strict=True):
        assert list(itertools.chain(*parts)) == batch[: len(batch) - len(batch) % ranks]


@given(case=cases(split=["domains"]))
@settings(deadline=None)
def test_the_batches_of_a_group_of_one_process_are_dealt_to_the_ranks(case):
    samplers, alone = case.ranks(), case.alone()
    assert {sampler.domains_per_step for sampler in samplers} == {case.arguments["domains_per_step"]}
    for _ in range(3):
        served = [in_groups(list(sampler), sampler.batches_per_group) for sampler in samplers]
        dealt = [list(itertools.chain(*groups)) for groups in zip(*served, strict=True)]
        assert dealt == in_groups(list(alone), alone.batches_per_group)


@given(case=cases(accumulate=[1], num_replicas=[1]), k=st.integers(2, 3))
@settings(deadline=None)
def test_runs_of_k_batches_are_what_batches_k_times_as_large_would_be(case, k):
    """Where k batches divide the domains."""
    size, length = case.arguments["batch_size"], case.arguments.get("batches_per_epoch")
    case = Case(case.labels * k * size, case.arguments)
    large = case.alone(batch_size=k * size)
    small = case.alone(accumulate=k, batches_per_epoch=None if length is None else k * length)
    for _ in range(2):
        assert [list(itertools.chain(*run)) for run in in_groups(list(small), k)] == list(large)


def test_batches_beyond_a_multiple_of_k_are_others_in_each_epoch():
    sampler = DomainBatchSampler(["a"] * 5 + ["b"] * 5, 1, accumulate=2)
    unserved = [set(range(10)) - {index for (index,) in sampler} for _ in range(20)]
    assert set.union(*unserved) == set(range(10))


@given(case=cases(num_replicas=[1]), changes=st.sampled_from([{"order": "random"}, {"weighting": "uniform"}]))
@settings(deadline=None)
def test_the_batches_of_a_domains_first_round_are_the_same_whatever_is_drawn(case, changes):
    for changed in (changes, {"exhausted": "stop", "batches_per_epoch": None}):
        served, reference = case.by_domain(case.alone()), case.by_domain(case.alone(**changed))
        for label, number in case.runs.items():
            number *= case.arguments["accumulate"]
            common = min(len(served[label]), len(reference[label]), number)
            assert served[label][:common] == reference[label][:common]


@given(case=cases(num_replicas=[1]), epoch=st.integers(0, 5))
@settings(deadline=None)
def test_an_epoch_depends_on_its_number_and_arguments_alone_not_on_names_of_domains_or_numbers_of_samples(case, epoch):
    mapping: dict[str, list[int]] = {}
    for index, label in enumerate(case.labels):
        mapping.setdefault(f"hospital {label}", []).append(index * 3 + 1)
    arguments = dict(case.arguments)
    if isinstance(arguments["weighting"], dict):
        arguments["weighting"] = {f"hospital {label}": weight for label, weight in arguments["weighting"].items()}
    sampler, renumbered = case.alone(), DomainBatchSampler(mapping, **arguments)
    served = [list(sampler) for _ in range(epoch + 1)][-1]
    renumbered.set_epoch(epoch)
    assert list(renumbered) == [[index * 3 + 1 for index in batch] for batch in served]


def test_epochs_and_seeds_differ_in_domains_and_in_samples():
    sampler = small_sampler(domains_per_step=1)
    others = [small_sampler(domains_per_step=1, seed=seed) for seed in (4, 5)]
    epochs = [list(itertools.chain(*served)) for served in [*(list(sampler) for _ in range(5)), *map(list, others)]]
    for one, other in itertools.combinations(epochs, 2):
        assert [LABELS[index] for index in one] != [LABELS[index] for index in other]
        assert [index for index in one if index < 7] != [index for index in other if index < 7]


def test_weights_go_by_label_whatever_the_order_in_which_they_are_given():
    weighting = {"c": 0.5, "b": 2, "a": np.float32(0.25), "d": Fraction(1, 3)}
    sampler = small_sampler(weighting=weighting)
    backwards = small_sampler(weighting=dict(reversed(weighting.items())))
    assert backwards.state_dict() == sampler.state_dict()
    assert list(backwards) == list(sampler)


def test_epochs_advance_after_an_end_and_after_a_break_and_can_be_chosen():
    sampler, reference = small_sampler(), small_sampler()
    epochs = [list(reference) for _ in range(5)]
    assert list(sampler) == epochs[0]
    next(iter(sampler))
    assert list(sampler) == epochs[2]
    for epoch in (4, 0):
        sampler.set_epoch(epoch)
        assert list(sampler) == epochs[epoch]


def test_length_is_that_of_the_epoch_in_progress_or_else_the_next_and_asking_changes_nothing():
    reference = small_sampler(seed=0)
    epochs = [list(reference) for _ in range(20)]
    assert len({*map(len, epochs)}) > 1
    sampler = small_sampler(seed=0)
    for epoch, batches in enumerate(epochs):
        assert len(sampler) == len(batches)
        iterator = iter(sampler)
        for position, batch in enumerate(iterator):
            assert (batch, len(sampler)) == (batches[position], len(batches))
            assert sampler.total_batches(2) == len(epochs[0]) + len(epochs[1])
            if epoch % 2 and position == 2:
                break
        del iterator  # breaking off and letting go ends the epoch


@pytest.mark.parametrize("changes", [{"exhausted": "cycle"}, {"domains_per_step": None}])
def test_where_all_epochs_are_equally_long_none_is_planned(changes, monkeypatch):
    sampler = small_sampler(**changes)
    monkeypatch.setattr(_draw.Groups, "of_epoch", None)
    assert sampler.total_batches(10**4) == 10**4 * len(sampler)


def test_the_state_is_of_the_iterator_that_was_started_last_and_iterators_do_not_disturb_each_other():
    sampler, reference = small_sampler(), small_sampler()
    epochs = [list(reference) for _ in range(2)]
    iterators = iter(sampler), iter(sampler)
    served = [[], []]
    for number, place in ((0, (0, 1)), (1, (1, 1)), (0, (1, 1)), (1, (1, 2))):
        served[number].append(next(iterators[number]))
        assert place_of(sampler) == place
    sampler.set_epoch(5)
    for own, iterator, epoch in zip(served, iterators, epochs, strict=True):
        assert own + list(iterator) == epoch
    assert place_of(sampler) == (5, 0)


def test_it_is_a_sampler_and_uses_no_global_randomness():
    def global_state():
        return torch.get_rng_state().tolist(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002

    before = global_state()
    sampler = small_sampler(weighting="proportional")
    assert isinstance(sampler, Sampler)
    served = list(sampler)
    assert global_state() == before
    for draw in (lambda: torch.rand(1), random.random, np.random.rand):
        draw()
    assert list(small_sampler(weighting="proportional")) == served


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        changing(r"batch_size should be an integer of at least 1 \(got 0\)", batch_size=0),
        changing(r"domains_per_step should be an integer of at least 1 \(got 0\)", domains_per_step=0),
        changing(r"domains_per_step should be at most 4, the number of domains \(got 5\)", domains_per_step=5),
        changing(r"seed should be an integer of at least 0 \(got -1\)", seed=-1),
        changing(r"drop_last should be True or False \(got 1\)", drop_last=1),
        changing(r"order should be one of 'flipflop', 'random' \(got 'reverse'\)", order="reverse"),
        changing(r"accumulate should be an integer of at least 1 \(got 0\)", accumulate=0),
        changing(r"exhausted should be one of 'stop', 'cycle' \(got 'repeat'\)", exhausted="repeat"),
        changing("batches_per_epoch=4 needs exhausted='cycle'", batches_per_epoch=4),
        changing("batches_per_epoch=3 .* multiples of 2", batches_per_epoch=3, exhausted="cycle"),
        changing(r"at least 1 \(got 0\)", batches_per_epoch=0, exhausted="cycle"),
        changing(r"batches_per_epoch .* \(got 3.0\)", batches_per_epoch=3.0, exhausted="cycle"),
        changing(r"num_replicas should be an integer of at least 1 \(got 0\)", num_replicas=0),
        changing(r"rank should be an integer of at least 0 \(got -1\)", rank=-1),
        changing(r"rank should be less than num_replicas=2 \(got 2\)", num_replicas=2, rank=2),
        changing(r"split should be one of 'batch', 'walks', 'domains' \(got 'samples'\)", split="samples"),
        changing("batch_size=2 should be a multiple of num_replicas=3 with split='batch'", num_replicas=3),
        changing("domains_per_step=2 should be a multiple of num_rep.*'domains'", num_replicas=3, split="domains"),
        changing("'a' has 3 samples, too few .* batch_size=4, .* drop_last=True", drop_last=True, batch_size=4),
        changing("'a' has 3 samples, too few for accumulate=3, batch_size=2", accumulate=3),
        changing("'d' has 1 samples, too few for .* num_replicas=2", num_replicas=2),
        changing("'a' has 3 samples, too few for .* num_replicas=4", num_replicas=4, split="walks"),
        changing("weighting, if no mapping .*'uniform', 'proportional' .got 'strat", weighting="stratified"),
        changing(r"weighting.* \(got \[1, 1, 1, 1\]\)", weighting=[1, 1, 1, 1]),
        changing(r"it lacks 'd'\)", weighting={"a": 1, "b": 1, "c": 1}),
        changing(r"it has the unknown 'e'\)", weighting=dict.fromkeys("abcde", 1)),
        *(
            changing(r"weighting\['c'\] should be .* greater than 0", weighting={"c": weight, "a": 1, "b": 1, "d": 1})
            for weight in (True, 0, -1, math.nan, math.inf, "1", None, Fraction(1, 10**400))
        ),
    ],
)
def test_arguments_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        small_sampler(**changes)


@pytest.mark.parametrize("number", [-1, 1.0, True, None])
def test_an_epoch_and_a_number_of_epochs_that_are_none(number):
    sampler = small_sampler()
    with pytest.raises(ValueError, match=rf"epoch should be an integer of at least 0 \(got {number!r}\)"):
        sampler.set_epoch(number)
    with pytest.raises(ValueError, match=rf"epochs should be an integer of at least 0 \(got {number!r}\)"):
        sampler.total_batches(number)
    assert list(sampler) == list(small_sampler())


def test_numpy_integers_are_accepted_as_arguments():
    sampler = small_sampler(batch_size=np.int64(2), domains_per_step=np.int32(2), seed=np.uint8(3))
    assert list(sampler) == list(small_sampler())
    through_file(sampler.state_dict())
