"""A loader over domains' loaders that is killed at any place and goes on as if it had not been."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from _feature_training import through_file
from _samplers import QUIET, assert_resumes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_streams import Flaky, Stored, batches_of, streams
from torch.utils.data import DataLoader, IterableDataset

from torch_gradmatch import DomainLoader, meta_batches

try:
    from torchdata.stateful_dataloader import StatefulDataLoader
except ModuleNotFoundError:
    StatefulDataLoader = None

pytestmark = QUIET
needs_torchdata = pytest.mark.skipif(StatefulDataLoader is None, reason="torchdata is not installed")


def stored(sizes, kind=Stored):
    return {label: kind(batches_of(label, size), drift=True) for label, size in sizes.items()}


class NextPass(Stored):
    """Behind the last batch of a pass, its state is the start of the next."""

    def state_dict(self):
        state = copy.deepcopy(self.state)
        if state["next"] == len(self.batches):
            state.update(next=0, offset=[state["fetched"] * self.drift])
        return state


@given(case=streams(), kind=st.sampled_from([Stored, NextPass]), grouped=st.booleans())
@settings(deadline=None, max_examples=20)
def test_it_goes_on_from_every_place_as_if_it_had_not_been_killed(case, kind, grouped):
    sizes, arguments = case

    def make():
        loader = DomainLoader(stored(sizes, kind), **arguments)
        return loader, meta_batches(loader) if grouped else loader

    assert_resumes(make, 3, lambda length: range(length + 1))


@given(case=streams(), stop=st.integers(1, 20), again=st.integers(1, 20))
@settings(deadline=None)
def test_a_resumed_loader_saves_the_place_it_was_given(case, stop, again):
    sizes, arguments = case
    loader = DomainLoader(stored(sizes), **arguments)
    list(itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), stop))
    state = loader.state_dict()
    kept = through_file(state)
    resumed = DomainLoader(stored(sizes), **arguments)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == kept
    assert len(resumed) == arguments["batches_per_epoch"]
    list(itertools.islice(resumed, again))
    list(loader)
    assert state == kept  # neither loader changes what it gave away or was given
    resumed.load_state_dict(state)
    assert resumed.state_dict() == kept


class Saving(NextPass, IterableDataset):
    """A data set with a place; without one of their own, all workers have the same samples."""


def shuffled(first, size, **options):
    return StatefulDataLoader(range(first, first + size), batch_size=2, shuffle=True, **options)


def streamed(first, size, **options):
    return StatefulDataLoader(Saving(range(first, first + size), drift=True), batch_size=2, **options)


PLACES = [("a", 0, 5), ("b", 1000, 7), ("c", 2000, 2)]


@needs_torchdata
@pytest.mark.parametrize(
    ("domains_per_step", "grouped", "workers", "epochs", "stops"),
    [
        (2, False, 0, 3, range(13)),
        (2, True, 0, 3, range(7)),
        (3, False, 0, 3, range(19)),
        (3, True, 0, 3, range(7)),
        (2, False, 2, 2, (1, 5, 8)),
    ],
    ids=["two", "lists-of-two", "three", "lists-of-three", "workers"],
)
@pytest.mark.parametrize("kind", [shuffled, streamed])
def test_with_stateful_data_loaders(kind, domains_per_step, grouped, workers, epochs, stops):
    """The passes end in all epochs, so their ends are among the places; a state holds the seeds that were drawn."""

    def fresh():
        loaders = {label: kind(first, size, num_workers=workers) for label, first, size in PLACES}
        return DomainLoader(loaders, 8 if workers else 6 * domains_per_step, domains_per_step)

    seeds = fresh().state_dict()

    def make():
        loader = fresh()
        loader.load_state_dict(seeds)
        return loader, meta_batches(loader) if grouped else loader

    assert_resumes(make, epochs, lambda _: stops)


def good_loader(**arguments):
    return DomainLoader(stored({"a": 3, "b": 4, "c": 5}), 8, 2, **arguments)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"position": 9}, "position 9 is behind the end of epoch 0"),
        ({"loaders": {"a": {}}}, "loaders should hold a state by every label"),
        ({"loaders": None}, "loaders should hold a state by every label"),
        ({"more": 1}, "should hold exactly"),
        (None, "loaders should hold a state by every label"),
        *(
            (good_loader(**other).state_dict(), "saved with other domains or arguments")
            for other in ({"seed": 1}, {"order": "random"}, {"weighting": {"a": 1, "b": 1, "c": 2}})
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing(state, message):
    loader, twin = good_loader(), good_loader()
    for other in (loader, twin):
        list(itertools.islice(other, 2))
    before = through_file(loader.state_dict())
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict(state and {**good_loader().state_dict(), **state})
    assert loader.state_dict() == before
    assert list(loader) == list(twin)


@pytest.mark.parametrize("loader", [[2], DataLoader([2])], ids=["list", "DataLoader"])
def test_loaders_that_cannot_save_their_place_are_an_error(loader):
    streams = DomainLoader({"a": Stored([1]), "b": loader}, 2)
    message = rf"domain 'b', a {type(loader).__name__}, cannot save its place.*torch_gradmatch\[data\]"
    for action in (streams.state_dict, lambda: streams.load_state_dict({})):
        with pytest.raises(TypeError, match=message):
            action()
    assert len(list(streams)) == 2


@needs_torchdata
def test_loaders_whose_places_are_not_their_own_are_an_error():
    generator = torch.Generator()
    same = {label: StatefulDataLoader(range(4), shuffle=True, generator=generator) for label in "ab"}
    with pytest.raises(ValueError, match=r"domain 'b', a StatefulDataLoader, should have .* a generator of its own"):
        DomainLoader(same, 2).state_dict()
    unordered = {label: StatefulDataLoader(range(4), num_workers=1, in_order=False) for label in "ab"}
    with pytest.raises(ValueError, match=r"domain 'a', a StatefulDataLoader, should have in_order=True"):
        DomainLoader(unordered, 2).state_dict()


class Failing(Flaky):
    """It fails in the first batch, and in loading a state that is not empty."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        if state:
            raise OSError("disk")


def test_a_loader_that_raised_has_no_place_until_it_has_served_a_batch():
    loader = DomainLoader({"bad": Failing("b", 0), "good": Stored(batches_of("g", 9))}, 8)
    state = loader.state_dict()
    loader.load_state_dict(state)
    for error, action in (
        ("the network is gone", lambda: list(loader)),
        ("disk", lambda: loader.load_state_dict({**state, "loaders": {**state["loaders"], "bad": {"place": 1}}})),
    ):
        with pytest.raises(OSError, match=error):
            action()
        with pytest.raises(RuntimeError, match=r"loader of domain 'bad' raised an error: save after its next batch"):
            loader.state_dict()
        list(itertools.islice(loader, 2))
        assert loader.state_dict()["position"] == 2
