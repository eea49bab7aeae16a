"""DomainBatchSampler: what a state dict, a copy and a StatefulDataLoader go on with, and what is refused."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from _feature_training import through_file
from _loops import QUIET, assert_resumes
from _samplers import LABELS, changing, cycling, samplers, small_sampler
from _splits import accumulating, ranks_of, spread
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_gradmatch import DomainBatchSampler, meta_batches

pytestmark = QUIET


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
    resumed.load_state_dict(through_file(sampler.state_dict()))
    # Asking changes nothing, and neither does saving what was just loaded.
    assert resumed.state_dict() == sampler.state_dict()
    if data.draw(st.booleans(), label="set_epoch before the epoch, as many loops do"):
        resumed.set_epoch(epoch)
    assert len(resumed) == len(epochs[epoch])  # of the whole epoch, as frameworks expect
    further = data.draw(st.integers(0, len(epochs[epoch]) - position))
    assert list(itertools.islice(resumed, further)) == epochs[epoch][position : position + further]
    again = DomainBatchSampler(labels, **arguments)
    again.load_state_dict(resumed.state_dict())
    assert list(again) == epochs[epoch][position + further :]
    assert list(again) == epochs[epoch + 1]


@given(case=spread() | accumulating(), data=st.data())
@settings(deadline=None, max_examples=50)
def test_a_state_of_any_rank_continues_exactly_on_every_rank(case, data):
    epoch = data.draw(st.integers(0, 2))
    samplers_of_ranks = ranks_of(*case)
    for sampler in samplers_of_ranks:
        sampler.set_epoch(epoch)
    position = data.draw(st.integers(0, len(samplers_of_ranks[0])))
    states = []
    for sampler in samplers_of_ranks:
        list(itertools.islice(sampler, position))
        states.append(sampler.state_dict())
    assert all(state == states[0] for state in states)
    for resumed, reference in zip(ranks_of(*case), samplers_of_ranks, strict=True):
        resumed.load_state_dict(states[-1])
        reference.set_epoch(epoch)
        assert list(resumed) == list(reference)[position:]


def test_choosing_another_epoch_drops_a_resumed_position():
    reference = small_sampler()
    epochs = [list(reference) for _ in range(3)]
    sampler = small_sampler()
    next(iter(sampler))
    state_dict = sampler.state_dict()
    sampler.load_state_dict(state_dict)
    sampler.set_epoch(2)
    assert list(sampler) == epochs[2]
    sampler.load_state_dict(state_dict)
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0][1:]
    assert list(sampler) == epochs[1]


def test_the_state_is_of_the_iterator_that_was_started_last():
    sampler = small_sampler()
    first, second = iter(sampler), iter(sampler)
    for iterator, expected in ((first, (0, 1)), (second, (1, 1)), (first, (1, 1)), (second, (1, 2))):
        next(iterator)
        state = sampler.state_dict()
        assert (state["epoch"], state["position"]) == expected
    sampler.set_epoch(5)
    next(second)
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (5, 0)


def test_the_state_is_numbers_and_strings():
    state_dict = small_sampler(weighting="proportional", drop_last=False).state_dict()
    assert {name: type(value) for name, value in state_dict.items()} == {
        "epoch": int,
        "position": int,
        "ranks": int,
        "settings": str,
    }


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


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("split", ["batch", "domains", "walks"])
def test_goes_on_with_another_number_of_ranks(split: str, ranks: tuple[int, int]):
    """After three groups; together they serve what the ranks before would have, walks as many groups of their own."""
    labels = [index % 8 for index in range(8 * 32)]
    arguments = {"batch_size": 4, "domains_per_step": 4, "exhausted": "cycle", "batches_per_epoch": 32}
    before, after = (ranks_of(labels, arguments, number, split) for number in ranks)
    per_group = [4 // number if split == "domains" else 4 for number in ranks]
    rest = []
    for sampler in before:
        iterator = iter(sampler)
        for _ in range(3 * per_group[0]):
            next(iterator)
        state_dict = sampler.state_dict()
        rest.append(list(iterator))
    for sampler in after:
        sampler.load_state_dict(state_dict)
    goes_on = [list(sampler) for sampler in after]
    assert {len(batches) for batches in goes_on} == {5 * per_group[1]}
    if split != "walks":
        served = [sorted(index for own in part for batch in own for index in batch) for part in (rest, goes_on)]
        assert served[0] == served[1]
    if split == "domains":
        before[0].load_state_dict({**state_dict, "position": 1})
        with pytest.raises(ValueError, match="in a group of domains: resume on as many"):
            after[0].load_state_dict({**state_dict, "position": 1})


OTHER = "saved with other domains or arguments"


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 4}, {"domains_per_step": 1}, {"weighting": "proportional"}, {"order": "random"},
        {"exhausted": "cycle"}, {"seed": 4}, {"drop_last": True}, {"accumulate": 2},
        {"split": "walks"}, {"weighting": {"a": 1, "b": 1, "c": 1, "d": 2}}, {"labels": LABELS[1:] + LABELS[:1]},
        {"labels": ["b"] * 6 + ["a"] * 4 + ["d"] * 4 + ["c"] * 10}, {"labels": {"x": [*range(12)], "y": [12, 13]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_dict_of_other_domains_and_arguments(changes):
    def make(labels=(*LABELS, "d", "d", "d"), **arguments):
        return DomainBatchSampler(labels, **{"batch_size": 2, "domains_per_step": 2, "seed": 3} | arguments)

    for one, other in itertools.permutations([make(), make(**changes)]):
        with pytest.raises(ValueError, match=OTHER):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        changing(OTHER, settings="0"),
        changing(r"epoch should be an integer of at least 0 \(got -1\)", epoch=-1),
        changing(r"epoch .* \(got '1'\)", epoch="1"),
        changing(r"position .* \(got 1.5\)", position=1.5),
        changing("position 1000 is behind the end of epoch 0", position=1000),
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
    with pytest.raises(ValueError, match="the state dict should hold exactly"):
        sampler.load_state_dict(None)
    assert sampler.state_dict() == before
    assert list(iterator) == batches[1:]


# torchdata's StatefulDataLoader, whose state holds the sampler's


def stateful(num_workers, lists, as_sampler=False, **changes):
    module = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    sampler = small_sampler(**changes)
    options = {"sampler": sampler, "batch_size": None} if as_sampler else {"batch_sampler": sampler}
    if num_workers:
        options["prefetch_factor"] = 3
    loader = module.StatefulDataLoader(torch.arange(21), num_workers=num_workers, **options)
    return loader, meta_batches(loader) if lists else loader


CASES = {
    "two of four": {},
    "all": {"domains_per_step": None, "batch_size": 1, "exhausted": "cycle", "batches_per_epoch": 12},
    "cycle": {"domains_per_step": 3, "exhausted": "cycle", "batches_per_epoch": 9, "weighting": "proportional"},
}


@pytest.mark.parametrize("as_sampler", [False, True], ids=["batch_sampler", "sampler"])
@pytest.mark.parametrize("lists", [False, True], ids=["plain", "meta_batches"])
@pytest.mark.parametrize("case", CASES)
def test_a_stateful_loader_resumes_behind_every_batch(case, lists, as_sampler):
    def make():
        return stateful(0, lists, as_sampler, **CASES[case])

    assert_resumes(make, 4, lambda length: range(1, length + 1))


@pytest.mark.parametrize("lists", [False, True], ids=["plain", "meta_batches"])
@pytest.mark.parametrize("case", ["two of four", "all"])
def test_a_stateful_loader_with_workers_resumes(case, lists):
    def make():
        return stateful(2, lists, **CASES[case])

    assert_resumes(make, 2, lambda length: sorted({1, 2, length // 2, length - 1, length}))
