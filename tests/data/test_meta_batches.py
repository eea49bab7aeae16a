"""Batches behind their labels and in lists that know their domains, from samplers, from streams, through wrappers."""

from __future__ import annotations

import copy
import itertools
import pickle
import weakref

import pytest
import torch
from _samplers import LABELS, QUIET, cases, in_groups, loader_of, place_of, small_sampler
from hypothesis import given, settings
from hypothesis import strategies as st
from test_streams import Stored
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torch.utils.data._utils.pin_memory import pin_memory

from torch_gradmatch import (
    DomainBatchSampler,
    DomainLoader,
    Fish,
    GradMatch,
    check_loader,
    domain_batches,
    meta_batches,
)
from torch_gradmatch.data.meta_batches import MetaBatch

pytestmark = QUIET


def assert_labelled(pairs, labels=LABELS):
    for domain, batch in pairs:
        assert {labels[index] for index in batch} == {domain}


def assert_named(groups, labels=LABELS):
    """Every list names the domains of its batches in their places."""
    for group in groups:
        assert_labelled(zip(group.domains, group, strict=True), labels)


@given(case=cases(), data=st.data())
@settings(deadline=None, max_examples=100)
def test_batches_and_lists_know_their_domains_in_every_epoch_on_every_rank_and_from_any_place(case, data):
    position = data.draw(st.integers(0, len(case.ranks()[0])))
    for sampler, reference in zip(case.ranks(), case.ranks(), strict=True):
        sampler.load_state_dict({**sampler.state_dict(), "position": position})
        for first in (position, 0):
            pairs = list(domain_batches(loader_of(sampler)))
            assert [batch for _, batch in pairs] == list(reference)[first:]
            assert_labelled(pairs, case.labels)
        if case.arguments["accumulate"] > 1:
            continue
        loop, size = meta_batches(loader_of(sampler)), sampler.batches_per_group
        assert len(loop) == len(sampler) // size
        groups = list(loop)
        assert [list(group) for group in groups] == in_groups(list(reference), size)
        assert_named(groups, case.labels)
        sampler.load_state_dict({**sampler.state_dict(), "epoch": 0, "position": position // size * size})
        assert_named(loop, case.labels)


@pytest.mark.parametrize("persistent", [False, True], ids=["", "persistent"])
@pytest.mark.parametrize("prefetch", [1, 50], ids=["in-the-epoch", "to-its-end"])
def test_domains_are_known_although_workers_run_ahead(prefetch, persistent):
    sampler, reference = small_sampler(), small_sampler()
    loader = loader_of(sampler, 2, prefetch_factor=prefetch, persistent_workers=persistent)
    loop = meta_batches(loader, 2)
    assert_named(itertools.islice(loop, 2))
    reference.set_epoch(1)
    for _ in range(2):
        groups = list(loop)
        assert [list(group) for group in groups] == in_groups(list(reference), 2)
        assert_named(groups)
    state = sampler.state_dict()  # after the loop's end
    sampler.load_state_dict({**state, "epoch": 3, "position": 4})
    assert_named(loop)
    assert_labelled(domain_batches(loader))


def test_domains_are_known_although_another_epoch_was_chosen():
    sampler = small_sampler()
    for number, group in enumerate(meta_batches(loader_of(sampler), 2)):
        assert_named([group])
        if number == 1:
            sampler.set_epoch(7)
    assert number > 2
    assert place_of(sampler)[0] == 7


def test_a_sampler_that_is_no_batch_sampler_is_recognized():
    groups = list(meta_batches(DataLoader(torch.arange(21), sampler=small_sampler(), batch_size=None)))
    assert [batch.tolist() for group in groups for batch in group] == list(small_sampler())
    assert_named([MetaBatch([batch.tolist() for batch in group], group.domains) for group in groups])


def test_streams_know_their_domains():
    loader = DomainLoader({label: itertools.repeat(label) for label in "abcde"}, 15, 3)
    assert all(batch == domain for domain, batch in domain_batches(loader))
    for _ in range(3):
        groups = list(meta_batches(loader))
        assert len(groups) == len(meta_batches(loader)) == 5
        assert all(group == list(group.domains) for group in groups)


def test_a_list_that_knows_its_domains_is_a_list_to_all_others():
    batches = MetaBatch([torch.zeros(2), torch.ones(2)], ("a", 7))
    assert isinstance(batches, list)
    assert MetaBatch([1, 2], ("a", 7)) == [1, 2] == MetaBatch([1, 2])
    for same in (copy.copy(batches), copy.deepcopy(batches), pickle.loads(pickle.dumps(batches))):
        assert (type(same), same.domains) == (MetaBatch, ("a", 7))
        assert all(map(torch.equal, same, batches))
    assert MetaBatch(batches).domains is None  # as Accelerate and Lightning make a list anew
    assert type(batches[:1]) is list
    if torch.accelerator.is_available():
        assert pin_memory(batches).domains == ("a", 7)


class ByTwos(BatchSampler):
    """A batch sampler of the user's; that it knows domains is up to them."""


class Holding:
    """Something of the user's that has a sampler, and makes of its batches what it likes."""

    def __init__(self, batch_sampler):
        self.batch_sampler = batch_sampler

    def __iter__(self):
        return iter([[4, 5], [0, 1], [2, 3], [6, 7]])


def torchs():
    return BatchSampler(RandomSampler(range(8)), 2, drop_last=False)


def stateful(*arguments, **options):
    module = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    return module.StatefulDataLoader(*arguments, **options)


Shard = type("BatchSamplerShard", (BatchSampler,), {"__module__": "accelerate.data_loader"})
AS_SAMPLER = DomainBatchSampler(["a", "b"] * 4, batch_size=1)
MIXED = {
    "shuffled": lambda: DataLoader(range(8), batch_size=2, shuffle=True),
    "by a batch sampler of torch, as sampler": lambda: DataLoader(range(8), sampler=torchs(), batch_size=None),
    "by a framework's shard": lambda: DataLoader(range(8), batch_sampler=Shard(RandomSampler(range(8)), 2, False)),
    "a DomainBatchSampler under torch's": lambda: DataLoader(range(8), batch_size=2, sampler=AS_SAMPLER),
    "of a stateful loader": lambda: stateful(range(8), batch_size=2, shuffle=True),
}
NOT_CUT_BY_TORCH = {
    "a batch sampler of the user's": lambda: DataLoader(range(8), batch_sampler=ByTwos(range(8), 2, True)),
    "one that regroups torch's": lambda: DataLoader(range(8), batch_sampler=Holding(torchs())),
    "a loader of the user's": lambda: Holding(AS_SAMPLER),
    "a data set of batches": lambda: DataLoader(range(8), batch_size=None, shuffle=True),
}


@pytest.mark.parametrize("kind", MIXED)
def test_batches_that_torch_cuts_mix_domains_and_are_an_error(kind):
    works = r"DataLoader\(dataset, batch_sampler=DomainBatchSampler\(\.\.\.\)\) or a DomainLoader"
    for domains_per_step in (2, None):
        with pytest.raises(ValueError, match="one domain each .*a BatchSampler of a framework.*" + works):
            meta_batches(MIXED[kind](), domains_per_step)


@pytest.mark.parametrize("kind", NOT_CUT_BY_TORCH)
def test_batches_that_torch_does_not_cut_are_taken_and_nobody_knows_their_domains(kind):
    for group in meta_batches(NOT_CUT_BY_TORCH[kind](), 2):
        assert (type(group), len(group), group.domains) == (MetaBatch, 2, None)
    with pytest.raises(ValueError, match=r"DataLoader over a DomainBatchSampler.* as you made it \(got "):
        next(domain_batches(NOT_CUT_BY_TORCH[kind]()))


@given(length=st.integers(0, 20), group_size=st.integers(1, 6))
@settings(deadline=None)
def test_meta_batches_groups_any_loader(length, group_size):
    loop = meta_batches(list(range(length)), group_size)
    for _ in range(2):
        groups = list(loop)
        assert len(loop) == len(groups) == length // group_size
        assert list(itertools.chain(*groups)) == list(range(length // group_size * group_size))
        assert all(len(group) == group_size for group in groups)
    with pytest.raises(TypeError, match="has no len"):  # as the loader
        len(meta_batches((number for number in range(4)), 2))


def fish_optimizer():
    return GradMatch(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1), Fish(inner_steps=2))


def test_check_loader_and_samplers_that_are_no_batch_samplers_ask_for_the_same_data_set():
    sampler = DomainBatchSampler(["a", "b"] * 4, batch_size=1)
    loader = DataLoader(range(10), sampler=sampler, batch_size=None)
    for action in (lambda: meta_batches(loader), lambda: check_loader(fish_optimizer(), loader)):
        with pytest.raises(ValueError, match="for 8 samples, but the data set has 10"):
            action()


TWO_IN_A_ROW = DomainBatchSampler(["a", "b"] * 4, 1, accumulate=2)


def every_second_step():
    return stateful(range(21), batch_sampler=small_sampler(), snapshot_every_n_steps=2)


@pytest.mark.parametrize(
    ("loader", "domains_per_step", "message"),
    [
        (lambda: loader_of(small_sampler()), 4, r"domains_per_step should be 2, .* \(got 4\)"),
        (lambda: DomainLoader({"a": [1], "b": [2]}, 2), 1, r"should be 2, as in the loader, or None \(got 1\)"),
        (list, 0, r"domains_per_step .* \(got 0\)"),
        (list, None, r"domains_per_step .* \(got None\)"),
        (lambda: loader_of(small_sampler(), num_workers=2, in_order=False), 2, r"in_order=True, .* \(got False\)"),
        (every_second_step, None, r"snapshot_every_n_steps=1, .* \(got 2\)"),
        (lambda: loader_of(TWO_IN_A_ROW), None, r"needs accumulate=1 \(got 2\), .* loops of step\(\)"),
    ],
)
def test_another_number_of_domains_and_another_order_are_refused(loader, domains_per_step, message):
    with pytest.raises(ValueError, match=message):
        meta_batches(loader(), domains_per_step)


def stored_streams():
    return DomainLoader({label: Stored(range(9)) for label in "abc"}, 6, 2)


@pytest.mark.parametrize("make", [small_sampler, stored_streams])
def test_it_refuses_to_start_in_the_middle_of_a_group(make):
    holder, resumed = make(), make()
    for _ in itertools.islice(holder, 3):
        state_dict = holder.state_dict()
    resumed.load_state_dict(state_dict)
    loader = loader_of(resumed) if make is small_sampler else resumed
    with pytest.raises(RuntimeError, match="resumed at batch 3 of epoch 0, inside a group: save between two lists"):
        next(iter(meta_batches(loader)))


@pytest.mark.parametrize("checked", [False, True], ids=["meta_batches", "check_loader"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_fetches_ahead_makes_the_samplers_state_an_error(num_workers, checked):
    sampler = small_sampler()
    loader = loader_of(sampler, num_workers, prefetch_factor=50 if num_workers else None)
    loop = check_loader(fish_optimizer(), loader) or loader if checked else meta_batches(loader)
    step = 1 if checked else 2
    assert place_of(sampler) == (0, 0)
    for number, _ in enumerate(loop, start=1):
        if num_workers == 0:
            assert place_of(sampler) == (0, step * number)
            continue
        with pytest.raises(RuntimeError, match=r"StatefulDataLoader.*pip install torch_gradmatch\[data\].* set_epoch"):
            sampler.state_dict()
    if not checked:
        assert place_of(sampler) == (1, 0)
    sampler.set_epoch(2)
    assert place_of(sampler) == (2, 0)


class Watched(Dataset):
    """Counts the batches that are alive when it is asked for the next."""

    def __init__(self):
        self.batches, self.alive = [], []

    def __len__(self):
        return len(LABELS)

    def __getitems__(self, indices):
        self.alive.append(sum(batch() is not None for batch in self.batches))
        batch = torch.zeros(1)
        self.batches.append(weakref.ref(batch))
        return batch


@pytest.mark.parametrize("loop", [iter, domain_batches, meta_batches], ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("streams", [False, True], ids=["sampler", "streams"])
def test_a_batch_that_the_loop_is_done_with_is_not_kept_while_the_next_is_fetched(streams, loop):
    watched = Watched()
    loader = DataLoader(watched, batch_sampler=small_sampler(), collate_fn=lambda batch: batch)
    if streams:
        loader = DomainLoader({label: map(watched.__getitems__, itertools.count()) for label in "ab"}, 12)
    iterator = iter(loop(loader))
    while next(iterator, None) is not None:
        pass
    alive = [0, 1] if loop is meta_batches else [0, 0]
    assert watched.alive == (alive * len(watched.alive))[: len(watched.alive)]
