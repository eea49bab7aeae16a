"""DomainBatchSampler: what a state dict, a copy and a StatefulDataLoader go on with, and what is refused."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from _feature_training import through_file
from _samplers import LABELS, ORDERS, QUIET, SPLITS, Case, assert_resumes, cases, changing, place_of, small_sampler
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_gradmatch import DomainBatchSampler, meta_batches

pytestmark = QUIET


@given(case=cases(), data=st.data())
@settings(deadline=None)
def test_a_state_of_any_rank_taken_anywhere_continues_exactly_on_every_rank(case, data):
    references = case.ranks()
    epochs = [[list(sampler) for _ in range(4)] for sampler in references]
    epoch = data.draw(st.integers(0, 2))
    position = data.draw(st.integers(0, len(epochs[0][epoch])))
    states = []
    for sampler in references:
        sampler.set_epoch(epoch)
        list(itertools.islice(sampler, position))
        states.append(sampler.state_dict())
    assert all(state == states[0] for state in states)
    set_epoch = data.draw(st.booleans(), label="set_epoch before the epoch, as many loops do")
    further = data.draw(st.integers(0, len(epochs[0][epoch]) - position))
    for resumed, again, expected in zip(case.ranks(), case.ranks(), epochs, strict=True):
        resumed.load_state_dict(through_file(states[-1]))
        # Asking changes nothing, and neither does saving what was just loaded.
        assert resumed.state_dict() == states[0]
        if set_epoch:
            resumed.set_epoch(epoch)
        assert len(resumed) == len(expected[epoch])  # of the whole epoch, as frameworks expect
        assert list(itertools.islice(resumed, further)) == expected[epoch][position : position + further]
        again.load_state_dict(resumed.state_dict())
        assert list(again) == expected[epoch][position + further :]
        assert list(again) == expected[epoch + 1]


def test_choosing_another_epoch_drops_a_resumed_position():
    sampler, reference = small_sampler(), small_sampler()
    next(iter(sampler))
    sampler.load_state_dict(sampler.state_dict())
    for one in (sampler, reference):
        one.set_epoch(2)
    assert list(sampler) == list(reference)


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
    assert place_of(copied) == (0, 1)
    assert [list(copied), list(copied)] == [list(sampler), list(sampler)]


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_goes_on_with_another_number_of_ranks(split: str, ranks: tuple[int, int]):
    """After three groups; together they serve what the ranks before would have, walks as many groups of their own."""
    arguments = {"batch_size": 4, "domains_per_step": 4, "exhausted": "cycle", "batches_per_epoch": 32, "split": split}
    case = Case([index % 8 for index in range(8 * 32)], arguments)
    before, after = (case.ranks(num_replicas=number) for number in ranks)
    rest = []
    for sampler in before:
        iterator = iter(sampler)
        list(itertools.islice(iterator, 3 * sampler.batches_per_group))
        state_dict = sampler.state_dict()
        rest.append(list(iterator))
    for sampler in after:
        sampler.load_state_dict(state_dict)
    goes_on = [list(sampler) for sampler in after]
    assert {len(batches) for batches in goes_on} == {5 * after[0].batches_per_group}
    if split != "walks":
        served = [sorted(index for own in part for batch in own for index in batch) for part in (rest, goes_on)]
        assert served[0] == served[1]
    if split == "domains":
        before[0].load_state_dict({**state_dict, "position": 1})
        with pytest.raises(ValueError, match="in a group of domains: resume on as many"):
            after[0].load_state_dict({**state_dict, "position": 1})


@pytest.mark.parametrize("order", ORDERS)
def test_a_cycle_of_all_domains_begins_at_once_however_far_in_it_is(order):
    sampler = small_sampler(exhausted="cycle", domains_per_step=None, batches_per_epoch=4 * 10**12, order=order)
    groups = 10**12 - 5  # as many batches has every domain served
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 10**6, "position": 4 * groups})
    rest = list(iter(sampler))  # list(sampler) would make room for the whole epoch
    assert len(rest) == 20
    for label, full in {"b": [2, 2, 2, 1], "a": [2, 1], "d": [1], "c": [2] * 5}.items():
        sizes = [len(batch) for batch in rest if LABELS[batch[0]] == label]
        assert sizes == (full * 6)[groups % len(full) :][:5]


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


def test_a_cycle_that_is_as_long_without_being_told_can_be_resumed_either_way():
    state_dict = small_sampler(exhausted="cycle", batches_per_epoch=12).state_dict()
    small_sampler(exhausted="cycle").load_state_dict(state_dict)


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
    sampler, batches = small_sampler(), list(small_sampler())
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


CASES = {
    "two of four": {},
    "all": {"domains_per_step": None, "batch_size": 1, "exhausted": "cycle", "batches_per_epoch": 12},
    "cycle": {"domains_per_step": 3, "exhausted": "cycle", "batches_per_epoch": 9, "weighting": "proportional"},
}


@pytest.mark.parametrize(
    ("case", "workers", "as_sampler", "lists"),
    [
        *itertools.product(CASES, [0], [False, True], [False, True]),
        ("two of four", 2, False, False),
        ("all", 2, False, True),
    ],
)
def test_a_stateful_loader_resumes_behind_every_batch(case, workers, as_sampler, lists):
    module = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def make():
        sampler = small_sampler(**CASES[case])
        options = {"sampler": sampler, "batch_size": None} if as_sampler else {"batch_sampler": sampler}
        options |= {"num_workers": workers, "prefetch_factor": 3} if workers else {}
        loader = module.StatefulDataLoader(torch.arange(21), **options)
        return loader, meta_batches(loader) if lists else loader

    some = lambda length: sorted({1, 2, length // 2, length - 1, length})  # noqa: E731
    assert_resumes(make, 2 if workers else 4, some if workers else lambda length: range(1, length + 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_that_is_saved_before_its_first_batch_goes_on_in_the_epoch_that_is_set(workers: int):
    module = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def make():
        sampler = small_sampler()
        return sampler, module.StatefulDataLoader(torch.arange(21), batch_sampler=sampler, num_workers=workers)

    sampler, loader = make()
    loader.state_dict()  # begins to fetch
    sampler.set_epoch(0)
    served = [batch.tolist() for batch in itertools.islice(loader, 3)]
    again, resumed = make()
    resumed.load_state_dict(loader.state_dict())
    again.set_epoch(0)
    served += [batch.tolist() for batch in resumed]
    assert served == list(small_sampler())
