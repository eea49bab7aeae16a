"""Groups of distinct domains from one loader per domain, against the sampler's draw and loops over lists."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from _samplers import ORDERS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from torch_gradmatch import DomainBatchSampler, DomainLoader, meta_batches

ONE = [1]


def batches_of(label, size):
    return [f"{label}{number}" for number in range(size)]


class Stored:
    """A loader with a state that counts, whose ``__iter__`` is a generator function: it begins at the first ``next``.

    With ``drift`` every pass begins as many batches later as were fetched before, so one batch fetched too many shows.
    """

    def __init__(self, batches, drift=False):
        self.batches, self.drift = batches, drift
        self.state = {"next": 0, "fetched": 0, "offset": [0]}
        self.resumed = None

    def __iter__(self):
        if self.resumed is None:
            self.state["next"], self.state["offset"][0] = 0, self.state["fetched"] * self.drift
        self.resumed = None
        while self.state["next"] < len(self.batches):
            self.state["next"] += 1
            self.state["fetched"] += 1
            yield self.batches[(self.state["next"] - 1 + self.state["offset"][0]) % len(self.batches)]

    def state_dict(self):
        return self.state  # itself, which changes with the next batch

    def load_state_dict(self, state):
        self.state = self.resumed = state


@st.composite
def streams(draw):
    """The sizes of some domains and the arguments of a loader over them."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=6))
    labels = draw(st.permutations("abcdef"))[: len(sizes)]
    size = draw(st.none() | st.integers(1, len(sizes)))
    arguments = {
        "batches_per_epoch": (size or len(sizes)) * draw(st.integers(1, 12)),
        "domains_per_step": size,
        "seed": draw(st.integers(0, 2**70)),
        "order": draw(st.sampled_from(ORDERS)),
    }
    if draw(st.booleans()):
        weights = draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
        arguments["weighting"] = dict(zip(labels, weights, strict=True))
    return dict(zip(labels, sizes, strict=True)), arguments


def lists(sizes):
    return {label: batches_of(label, size) for label, size in sizes.items()}


@given(case=streams())
@settings(deadline=None, max_examples=200)
def test_the_draw_is_the_samplers_and_every_loader_goes_round_and_round(case):
    sizes, arguments = case
    loader = DomainLoader(lists(sizes), **arguments)
    labels = [label for label in sizes for _ in range(3)]
    sampler = DomainBatchSampler(labels, 1, exhausted="cycle", **arguments)
    endless = {label: itertools.cycle(batches) for label, batches in lists(sizes).items()}
    assert loader.labels == tuple(sizes)
    assert len(loader) == arguments["batches_per_epoch"]
    for _ in range(3):
        expected = [next(endless[labels[index]]) for (index,) in sampler]
        assert list(loader) == expected


def test_after_an_iterator_that_is_broken_off_the_next_epoch_follows_and_nothing_is_skipped():
    sizes = {"a": 5, "b": 3, "c": 4}
    reference, loader = (DomainLoader(lists(sizes), 8, 2, order="random") for _ in range(2))
    epochs = [[batch[0] for batch in reference] for _ in range(2)]
    served = [*itertools.islice(loader, 3), *loader]
    assert [batch[0] for batch in served] == epochs[0][:3] + epochs[1]
    for label, batches in lists(sizes).items():
        own = [batch for batch in served if batch[0] == label]
        assert own == list(itertools.islice(itertools.cycle(batches), len(own)))


class Flaky:
    """A loader one of whose batches raises an error the first time that it is asked for."""

    def __init__(self, label, fails_at):
        self.label, self.fails_at = label, fails_at

    def __iter__(self):
        for number in range(4):
            if number == self.fails_at:
                self.fails_at = None
                raise OSError("the network is gone")
            yield f"{self.label}{number}"


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "meta_batches"])
@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_after_an_error_that_passes_the_loader_begins_a_new_pass_and_the_group_again(fails_at, grouped):
    loader = DomainLoader({"bad": Flaky("b", fails_at), "good": ["g0", "g1", "g2"]}, 20)
    loop, taken = meta_batches(loader) if grouped else loader, []
    with pytest.raises(OSError, match="the network is gone") as caught:
        taken.extend(loop)
    assert caught.value.__notes__ == [
        "raised by the loader of domain 'bad', whose next batch will be the first of a new pass over it"
    ]
    whole = len(taken) if grouped else len(taken) // 2  # groups
    rest = list(loop)
    assert len(rest) == (10 - whole) * (1 if grouped else 2)
    served = list(itertools.chain(*rest)) if grouped else rest
    assert [batch for batch in served if batch[0] == "b"][:5] == ["b0", "b1", "b2", "b3", "b0"]
    assert len({batch[0] for batch in served[:2]}) == 2


def test_only_the_iterator_that_was_started_last_goes_on():
    loader = DomainLoader({label: Stored(batches_of(label, 9)) for label in "ab"}, 18)
    for begin in (lambda: next(iter(loader)), lambda: loader.load_state_dict(loader.state_dict())):
        iterator = iter(loader)
        next(iterator)
        begin()
        with pytest.raises(RuntimeError, match="another iterator was started since, or a state loaded: iterate with"):
            next(iterator)
    assert len(list(loader)) == 17


class CountStream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


class Rows:
    """As a data set of Hugging Face: rows by number, and iterable."""

    def __getitem__(self, index):
        return {"x": index}

    def __iter__(self):
        return iter([{"x": 0}, {"x": 1}])


@pytest.mark.parametrize(
    ("loaders", "arguments", "error", "message"),
    [
        ([[1], [2]], {}, TypeError, "should be a mapping"),
        ({"a": [1]}, {}, ValueError, "one label, 'a'"),
        ({}, {}, ValueError, "got none"),
        ({"a": [1], True: [2]}, {}, ValueError, "a key of domains is True"),
        ({"a": [1], "b": 3}, {}, TypeError, r"loaders\['b'\] should be a loader.*got 3"),
        ({"a": [1], "b": "text"}, {}, TypeError, r"loaders\['b'\] should be a loader or list .*'text'"),
        ({"a": [1], "b": CountStream()}, {}, TypeError, r"loaders\['b'\] .*CountStream.*batch_size=None"),
        ({"a": [1], "b": Rows()}, {}, TypeError, r"loaders\['b'\] .*Rows.*pass DataLoader"),
        (dict.fromkeys("ab", ONE), {}, ValueError, "an object of its own for every domain"),
        ({"full": [1, 2], "empty": []}, {}, RuntimeError, "loader of domain 'empty' yields no batch"),
        ({"list": [1], "once": iter([3, 4])}, {}, RuntimeError, "'once' yields no batch, or only once: pass"),
        ({"a": [1], "b": [2]}, {"domains_per_step": 3}, ValueError, r"domains_per_step should be at most 2.*got 3"),
        ({"a": [1], "b": [2]}, {"weighting": "proportional"}, ValueError, "weighting, if .* one of 'uniform' .got"),
        ({"a": [1], "b": [2]}, {"weighting": {"a": 1}}, ValueError, "it lacks 'b'"),
        ({"a": [1], "b": [2]}, {"batches_per_epoch": 3}, ValueError, r"batches_per_epoch=3 .* multiples of 2"),
        ({"a": [1], "b": [2]}, {"batches_per_epoch": None}, ValueError, "batches_per_epoch should be an integer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_loaders_that_are_not_one_for_every_domain_and_other_arguments_are_an_error(loaders, arguments, error, message):
    with pytest.raises(error, match=message):
        list(DomainLoader(loaders, **{"batches_per_epoch": 6} | arguments))


@pytest.mark.parametrize(
    "loader", [[1], (1,), DataLoader(range(2)), iter([1]), CountStream().__iter__()], ids=lambda v: type(v).__name__
)
def test_loaders_and_lists_of_batches_are_taken(loader):
    loader = DomainLoader({np.int64(3): loader, 1: [1, 2]}, 2)
    assert len(list(loader)) == len(loader) == 2
    assert [(label, type(label)) for label in loader.labels] == [(3, int), (1, int)]
