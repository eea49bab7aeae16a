"""DomainBatchSampler: what a state dict, a copy and a loop over workers go on with, and what is refused."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
from _samplers import (
    LABELS,
    changing,
    cycling,
    loader_of,
    samplers,
    small_sampler,
    through_a_file,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_gradmatch.data.meta_batches import meta_batches
from torch_gradmatch.data.sampler import DomainBatchSampler

# From Python 3.12 on, forking a worker from a process with threads warns; these workers only read a range.
# Domains are drawn of any sizes, so that an epoch may well serve little; test_unequal.py tests that warning.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*:DeprecationWarning", "ignore:an epoch serves:UserWarning"
)


@given(case=samplers() | cycling(), data=st.data())
@settings(deadline=None)
def test_a_state_dict_taken_anywhere_continues_exactly(case, data):
    labels, arguments = case
    reference = DomainBatchSampler(labels, **arguments)
    epochs = [list(reference) for _ in range(4)]
    epoch = data.draw(st.integers(0, 2))
    position = data.draw(st.integers(0, len(epochs[epoch])))
    sampler = DomainBatchSampler(labels, **arguments)
    sampler.set_epoch(epoch)
    list(itertools.islice(sampler, position))

    resumed = DomainBatchSampler(labels, **arguments)
    resumed.load_state_dict(through_a_file(sampler.state_dict()))
    # Asking changes nothing, and neither does saving what was just loaded.
    assert resumed.state_dict() == sampler.state_dict()
    if data.draw(st.booleans(), label="set_epoch before the epoch, as many loops do"):
        resumed.set_epoch(epoch)
    assert len(resumed) == len(epochs[epoch]) - position
    # Once more in the middle of what was resumed; ``served`` counts from the resume.
    further = data.draw(st.integers(0, len(epochs[epoch]) - position))
    assert list(itertools.islice(resumed, further)) == epochs[epoch][position : position + further]
    again = DomainBatchSampler(labels, **arguments)
    again.load_state_dict(resumed.state_dict(served=further) if further else resumed.state_dict())
    assert list(again) == epochs[epoch][position + further :]
    assert list(again) == epochs[epoch + 1]


def test_after_the_end_of_an_epoch_the_state_is_the_start_of_the_next():
    sampler = small_sampler()
    length = len(list(sampler))
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (1, 0)
    # A loop that counts from 0 again is about to start the next epoch; one that counts to the end is still in the last.
    assert sampler.state_dict(served=0) == sampler.state_dict()
    assert (sampler.state_dict(served=length)["epoch"], sampler.state_dict(served=length)["position"]) == (0, length)


def test_prefetched_but_not_yet_served():
    sampler = small_sampler()
    next(iterator := iter(sampler))
    assert sampler.state_dict(served=0) == small_sampler().state_dict()
    assert sampler.state_dict(served=1)["position"] == 1
    next(iterator)


def test_choosing_another_epoch_drops_a_resumed_position():
    reference = small_sampler()
    epochs = [list(reference) for _ in range(3)]
    sampler = small_sampler()
    next(iterator := iter(sampler))
    state_dict = sampler.state_dict()
    del iterator
    sampler.load_state_dict(state_dict)
    sampler.set_epoch(2)
    assert list(sampler) == epochs[2]
    sampler.load_state_dict(state_dict)
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0][1:]
    assert list(sampler) == epochs[1]


def test_the_state_is_numbers_and_strings():
    state_dict = small_sampler(weighting="proportional", drop_last=False).state_dict()
    assert {type(value) for value in state_dict.values()} == {int, str, bool}


def resume_and_finish(state_dict, num_epochs, num_workers):
    sampler = small_sampler()
    sampler.load_state_dict(state_dict)
    loop = meta_batches(loader_of(sampler, num_workers), 2)
    served = []
    while sampler.state_dict()["epoch"] < num_epochs:
        served += list(loop)
    return served


@pytest.mark.parametrize("num_workers", [0, 2])
def test_meta_batches_knows_what_the_loop_received_although_workers_run_ahead(num_workers):
    reference = small_sampler()
    groups, states = [], []
    for epoch in range(2):
        batches = list(reference)
        groups += [batches[start : start + 2] for start in range(0, len(batches), 2)]
        states += [(epoch, stop) for stop in range(2, len(batches) + 1, 2)]
    sampler = small_sampler()
    loop = meta_batches(loader_of(sampler, num_workers, prefetch_factor=50 if num_workers else None), 2)
    saved = []
    served = []
    for _ in range(2):
        for group in loop:
            served.append(group)
            saved.append(sampler.state_dict())
    assert served == groups
    assert [(state["epoch"], state["position"]) for state in saved] == states
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (2, 0)
    for stop in (0, len(groups) // 2 - 1, len(groups) // 2, len(groups) - 1):
        assert resume_and_finish(through_a_file(saved[stop]), 2, num_workers) == groups[stop + 1 :]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loop_broken_off_under_meta_batches_can_be_resumed(num_workers):
    reference = list(small_sampler())
    sampler = small_sampler()
    for number, _ in enumerate(meta_batches(loader_of(sampler, num_workers), 2)):
        if number == 1:
            break
    resumed = small_sampler()
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == reference[4:]
    assert list(sampler) == list(resumed)  # the one that was broken off goes on to the next epoch


def test_a_plain_loop_over_workers_resumes_with_served():
    batches = list(small_sampler())
    sampler = small_sampler()
    loader = loader_of(sampler, num_workers=2, prefetch_factor=50)
    for number, _ in enumerate(loader):
        resumed = small_sampler()
        resumed.load_state_dict(sampler.state_dict(served=number + 1))
        assert list(resumed) == batches[number + 1 :]
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (1, 0)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_the_same_state_and_the_same_future(duplicate):
    sampler = small_sampler()
    iterator = iter(sampler)
    next(iterator)
    copied = duplicate(sampler)
    assert copied.state_dict() == sampler.state_dict()
    next(iterator)
    assert copied.state_dict()["position"] == 1
    assert [list(copied), list(copied)] == [list(sampler), list(sampler)]


@pytest.mark.parametrize("served", [-1, 1.0, True, 4])
def test_more_served_than_the_sampler_has(served):
    sampler = small_sampler()
    list(itertools.islice(sampler, 3))
    with pytest.raises(ValueError, match=rf"served should be .*\(got {served!r}\)"):
        sampler.state_dict(served=served)
    with pytest.raises(ValueError, match=r"served should be at most 0"):
        small_sampler().state_dict(served=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        changing("version is 5, but this sampler's is 4", version=5),
        changing("version is 3, but this sampler's is 4", version=3),  # a state of version 3 has no num_replicas
        changing("version is 2, but this sampler's is 4", version=2),  # a state of version 2 has no exhausted
        changing("version is 1, but this sampler's is 4", version=1),  # a state of version 1 has no order
        changing("order is 'random', but this sampler's is 'flipflop'", order="random"),
        changing("order is 'reverse', but this sampler's is 'flipflop': resume with the same", order="reverse"),
        changing("seed is 4, but this sampler's is 3", seed=4),
        changing("seed is 3.0, but this sampler's is 3", seed=3.0),
        changing("batch_size is 3", batch_size=3),
        changing("domains_per_step is 1", domains_per_step=1),
        changing("weighting is 'proportional', but this sampler's is 'uniform'", weighting="proportional"),
        changing("drop_last is True", drop_last=True),
        changing("num_domains is 5", num_domains=5),
        changing("num_samples is 5", num_samples=5),
        changing("domains_checksum is '0'", domains_checksum="0"),
        changing(r"epoch should be an integer of at least 0 \(got -1\)", epoch=-1),
        changing(r"epoch .* \(got '1'\)", epoch="1"),
        changing(r"position .* \(got 1.5\)", position=1.5),
        changing(r"position .* \(got True\)", position=True),
        changing("position is 1000, but epoch 0 has 12 batches", position=1000),
        changing("should hold exactly", more=1),
        changing("should hold exactly", position=...),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(changes, message):
    batches = list(small_sampler())
    sampler = small_sampler()
    iterator = iter(sampler)
    next(iterator)
    before = sampler.state_dict()
    malformed = {name: value for name, value in {**before, **changes}.items() if value is not ...}
    with pytest.raises(ValueError, match=f"the state dict.*{message}"):
        sampler.load_state_dict(malformed)
    assert sampler.state_dict() == before
    assert list(iterator) == batches[1:]


@pytest.mark.parametrize("state_dict", [None, [], "state"])
def test_a_state_dict_that_is_none(state_dict):
    with pytest.raises(ValueError, match="the state dict should hold exactly"):
        small_sampler().load_state_dict(state_dict)


@pytest.mark.parametrize(
    "labels",
    [LABELS[1:] + LABELS[:1], ["b"] * 6 + ["a"] * 4 + ["d"] * 1 + ["c"] * 10],
    ids=["other-samples", "other-sizes"],
)
def test_a_state_dict_of_other_domains(labels):
    state_dict = small_sampler().state_dict()
    with pytest.raises(ValueError, match="the state dict's domains_checksum"):
        DomainBatchSampler(labels, 2, domains_per_step=2, seed=3).load_state_dict(state_dict)
