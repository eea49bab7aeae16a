"""Lists of batches that know their domains, from samplers, from loaders of streams, and through wrappers."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from _samplers import cycling, loader_of, samplers, small_sampler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from torch.utils.data._utils.pin_memory import pin_memory

from torch_gradmatch import DomainBatchSampler, DomainLoader, ResumableLoader, meta_batches
from torch_gradmatch.data.meta_batches import MetaBatch

# From Python 3.12 on, forking a worker from a process with threads warns; these workers only read a range.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def assert_named(groups, labels):
    """Every batch holds the indices of samples of the domain that its list names in its place."""
    for group in groups:
        assert len(group.domains) == len(group)
        for batch, domain in zip(group, group.domains, strict=True):
            assert {labels[index] for index in batch} == {domain}


@pytest.mark.parametrize("resumable", [False, True], ids=["meta_batches", "ResumableLoader"])
@pytest.mark.filterwarnings("ignore:an epoch serves:UserWarning")  # some of these epochs serve little
@given(case=samplers() | cycling(), stop=st.integers(0, 12))
@settings(deadline=None)
def test_lists_know_their_domains_also_after_a_break_and_when_resumed(resumable, case, stop):
    labels, arguments = case

    def make_loop():
        sampler = DomainBatchSampler(labels, **arguments)
        loop = meta_batches(loader_of(sampler), sampler.domains_per_step)
        return sampler, ResumableLoader(loop) if resumable else loop

    sampler, loop = make_loop()
    assert_named(itertools.islice(loop, stop), labels)
    state = sampler.state_dict()
    assert_named(loop, labels)
    sampler, loop = make_loop()
    sampler.load_state_dict(state)
    for _ in range(2):
        assert_named(loop, labels)


@pytest.mark.parametrize("resumable", [False, True], ids=["meta_batches", "ResumableLoader"])
@pytest.mark.parametrize("persistent", [False, True], ids=["", "persistent"])
@pytest.mark.parametrize("prefetch", [1, 50], ids=["in-the-epoch", "to-its-end"])
def test_lists_know_their_domains_although_workers_run_ahead(prefetch, persistent, resumable):
    labels = ["b"] * 7 + ["a"] * 3 + ["d"] * 1 + ["c"] * 10  # those of small_sampler
    sampler = small_sampler()
    loop = meta_batches(loader_of(sampler, 2, prefetch_factor=prefetch, persistent_workers=persistent), 2)
    loop = ResumableLoader(loop) if resumable else loop
    assert_named(itertools.islice(loop, 2), labels)
    for _ in range(2):
        assert_named(loop, labels)
    state = sampler.state_dict()
    sampler.load_state_dict({**state, "epoch": 3, "position": 4})
    assert_named(loop, labels)


def test_lists_know_their_domains_although_another_epoch_was_chosen():
    labels = ["b"] * 7 + ["a"] * 3 + ["d"] * 1 + ["c"] * 10
    sampler = small_sampler()
    for number, group in enumerate(meta_batches(loader_of(sampler), 2)):
        assert_named([group], labels)
        if number == 1:
            sampler.set_epoch(7)
    assert number > 2


@pytest.mark.parametrize("resumable", [False, True], ids=["meta_batches", "ResumableLoader"])
def test_lists_of_a_domain_loader_know_their_domains(resumable):
    class Endless:
        def __init__(self, label):
            self.label = label

        def __iter__(self):
            return itertools.repeat(self.label)

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    def make_loader():
        return DomainLoader({label: Endless(label) for label in "abcde"}, 3, exhausted="cycle", batches_per_epoch=15)

    loader = make_loader()
    loop = ResumableLoader(meta_batches(loader, 3)) if resumable else meta_batches(loader, 3)
    groups = list(itertools.islice(loop, 2))
    state = loader.state_dict()
    groups += list(loop)
    resumed = make_loader()
    resumed.load_state_dict(state)
    groups += list(meta_batches(resumed, 3))
    assert len(groups) == 2 + 5 + 3
    for group in groups:
        assert group == list(group.domains)


def test_lists_of_any_other_loader_know_none():
    class Cached:  # has a sampler that it does not iterate over
        def __init__(self, batches, batch_sampler):
            self.batches, self.batch_sampler = batches, batch_sampler

        def __iter__(self):
            return iter(self.batches)

    for loader in ([1, 2, 3, 4], DataLoader(range(4), batch_size=None), Cached([1, 2, 3, 4], small_sampler())):
        for group in meta_batches(loader, 2):
            assert (type(group), group.domains) == (MetaBatch, None)


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


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(8))


class ByTwos(BatchSampler):
    """A batch sampler of the user's; that it knows domains is up to them."""


class Sharded:
    """Has the attributes of Accelerate's ``BatchSamplerShard``, and those of its loader."""

    split_batches = True

    def __init__(self, batch_sampler):
        self.batch_sampler = batch_sampler

    def __iter__(self):
        return iter(self.batch_sampler)


class Regrouped:
    """A batch sampler of the user's that makes its own of the batches of another."""

    def __init__(self, batch_sampler):
        self.batch_sampler = batch_sampler

    def __iter__(self):
        return iter(sorted(self.batch_sampler))


def torchs():
    return BatchSampler(RandomSampler(range(8)), 2, drop_last=False)


MIXED = {
    "shuffled": lambda: DataLoader(range(8), batch_size=2, shuffle=True),
    "in the data set's order": lambda: DataLoader(range(8), batch_size=2),
    "of one sample": lambda: DataLoader(range(8), shuffle=True),
    "by a sampler": lambda: DataLoader(range(8), batch_size=2, sampler=RandomSampler(range(8))),
    "by a batch sampler of torch": lambda: DataLoader(range(8), batch_sampler=torchs()),
    "by a batch sampler of torch, as sampler": lambda: DataLoader(range(8), sampler=torchs(), batch_size=None),
    "of a stream": lambda: DataLoader(Stream(), batch_size=2),
    "sharded": lambda: DataLoader(range(8), batch_sampler=Sharded(Sharded(torchs()))),
    "dispatched": lambda: Sharded(torchs()),
}


@pytest.mark.parametrize("kind", MIXED)
def test_batches_that_torch_cuts_mix_domains_and_are_an_error(kind):
    works = [
        r"DataLoader\(dataset, batch_sampler=DomainBatchSampler\(\.\.\.\)\)",
        "DomainLoader",
        "meta_step with a mapping or list of one batch per domain",
    ]
    for domains_per_step in (2, None):
        with pytest.raises(ValueError, match="one domain each .*torch's BatchSampler.*" + ".*".join(works)):
            meta_batches(MIXED[kind](), domains_per_step)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # of torchdata
def test_batches_of_a_stateful_loader_mix_domains_too():
    module = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    with pytest.raises(ValueError, match=r"got StatefulDataLoader over torch's BatchSampler"):
        meta_batches(module.StatefulDataLoader(range(8), batch_size=2, shuffle=True), 2)


NOT_CUT_BY_TORCH = {
    "a batch sampler of the user's": lambda: DataLoader(
        range(8), batch_sampler=ByTwos(RandomSampler(range(8)), 2, True)
    ),
    "one that regroups torch's": lambda: DataLoader(range(8), batch_sampler=Regrouped(torchs())),
    "a stream of batches": lambda: DataLoader(Stream(), batch_size=None),
    "a data set of batches": lambda: DataLoader(range(8), batch_size=None, shuffle=True),
    "a DomainBatchSampler as sampler": lambda: DataLoader(
        torch.arange(8), batch_size=None, sampler=DomainBatchSampler(["a", "b"] * 4, batch_size=1)
    ),
    "a DomainBatchSampler under torch's": lambda: DataLoader(
        torch.arange(8), batch_size=1, sampler=DomainBatchSampler(["a", "b"] * 4, batch_size=1)
    ),
    "a DomainLoader of torch's loaders": lambda: DomainLoader({name: DataLoader(range(8), 2) for name in "ab"}),
    "a generator over a loader": lambda: (batch for batch in DataLoader(range(8), batch_size=2)),
    "a list": lambda: [1, 2, 3, 4],
}


@pytest.mark.parametrize("kind", NOT_CUT_BY_TORCH)
def test_batches_that_torch_does_not_cut_are_taken(kind):
    assert {len(group) for group in meta_batches(NOT_CUT_BY_TORCH[kind](), 2)} == {2}


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (["a", "b"] * 4, "holds 8 labels, but the loader's data set 10 samples"),
        (["a", "b"] * 6, "holds 12 labels, but the loader's data set 10 samples"),
        ({"a": [0, 1], "b": [2, 10]}, r"domains\['b'\] has the index 10, but the loader's data set has 10 samples"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda loader: meta_batches(loader, 2), ResumableLoader], ids=["lists", "resumable"])
def test_domains_of_another_data_set_are_an_error(wrap, domains, message):
    with pytest.raises(ValueError, match=message):
        wrap(DataLoader(range(10), batch_sampler=DomainBatchSampler(domains, batch_size=1)))


def test_a_data_set_without_a_length_is_left_alone():
    class Unsized(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return index

    loader = DataLoader(Unsized(), batch_sampler=DomainBatchSampler(["a", "b"], batch_size=1))
    assert len(list(meta_batches(loader, 2))) == len(list(ResumableLoader(loader))) // 2 == 1


def test_another_number_of_domains_than_the_domain_loaders_is_an_error():
    loader = DomainLoader({"a": [1], "b": [2], "c": [3]})
    with pytest.raises(ValueError, match=r"should be 3, as in the DomainLoader \(got 2\)"):
        meta_batches(loader, 2)
