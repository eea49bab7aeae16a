"""A loader over domains' loaders that is killed at any place and goes on as if it had not been."""

from __future__ import annotations

import itertools

import pytest
import torch
from _samplers import through_a_file
from hypothesis import given, settings
from hypothesis import strategies as st
from test_streams import EXHAUSTED, Stored, batches_of, cases
from torch.utils.data import DataLoader, IterableDataset

from torch_gradmatch import DomainLoader, ResumableLoader, meta_batches

try:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import RandomSampler  # torch's own has no state
except ModuleNotFoundError:
    StatefulDataLoader = None

pytestmark = [
    # From Python 3.12 on, forking a worker from a process with threads warns; these workers only count.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata's constructor calls it
]
WRAPPERS = {
    "plain": lambda loader: loader,
    "meta_batches": lambda loader: meta_batches(loader, loader.domains_per_step),
    "ResumableLoader": ResumableLoader,
    "ResumableLoader of meta_batches": lambda loader: ResumableLoader(meta_batches(loader, loader.domains_per_step)),
}


def plain(item):
    """Batches and lists of them as numbers, strings and lists."""
    if isinstance(item, list):
        return [plain(batch) for batch in item], getattr(item, "domains", None)
    return item.tolist() if isinstance(item, torch.Tensor) else item


def run(loader, wrap, program, states=None):
    """Take so many items from one iterator after the other, None for all, and note the state at every place.

    A state is noted with the number of the iterator and how many items were taken from it.
    """
    loop, log = WRAPPERS[wrap](loader), []
    holder = loop if wrap.startswith("Resumable") else loader
    for number, limit in enumerate(program):
        taken = []
        for item in itertools.islice(loop, limit):
            taken.append(plain(item))
            if states is not None:
                states.append((number, len(taken), through_a_file(holder.state_dict())))
        if states is not None and (limit is None or len(taken) < limit):
            states.append((number + 1, 0, through_a_file(holder.state_dict())))
        log.append(taken)
    return log


def resume(loader, wrap, program, log, number, taken, state):
    """Go on with a program in a new loader; return what this should and does yield, None where it is not defined.

    After an iterator that was broken off, its epoch would be resumed, while without a kill the next one follows.
    """
    loader.load_state_dict(state)
    over = taken > 0 and state["position"] == 0  # the last batch was known to be that
    if taken > 0 and not over and program[number] == taken:
        return None
    rest = [None if program[number] is None else program[number] - taken] if taken and not over else []
    following = number + (taken > 0)
    expected = ([log[number][taken:]] if rest else []) + log[following:]
    return expected, run(loader, wrap, rest + program[following:])


# Loaders with a state of their own


def stored(sizes):
    return {label: Stored(batches_of(label, size), drift=True) for label, size in sizes.items()}


@pytest.mark.parametrize("wrap", WRAPPERS)
@given(case=cases(), program=st.lists(st.none() | st.integers(1, 12), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_it_goes_on_from_every_place_as_if_it_had_not_been_killed(wrap, case, program):
    sizes, arguments = case
    states = []
    log = run(DomainLoader(stored(sizes), **arguments), wrap, program, states)
    assert run(DomainLoader(stored(sizes), **arguments), wrap, program) == log  # states change nothing
    for place in states:
        found = resume(DomainLoader(stored(sizes), **arguments), wrap, program, log, *place)
        if found is not None:
            assert found[0] == found[1]


@given(case=cases(), stop=st.integers(1, 20), again=st.integers(1, 20))
@settings(deadline=None)
def test_a_resumed_loader_saves_the_place_it_was_given(case, stop, again):
    sizes, arguments = case
    loader = DomainLoader(stored(sizes), **arguments)
    list(itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), stop))
    state = loader.state_dict()
    kept = through_a_file(state)
    resumed = DomainLoader(stored(sizes), **arguments)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == kept
    list(itertools.islice(resumed, again))
    list(loader)
    assert state == kept  # neither loader changes what it gave away or was given
    resumed.load_state_dict(state)
    assert resumed.state_dict() == kept


# StatefulDataLoader


class FromPlace(IterableDataset):
    """As in torchdata's own tests: a generator function, and a place that it takes when it begins."""

    def __init__(self, first, size):
        self.first, self.size, self.number, self.resumed = first, size, 0, None

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        self.number, self.resumed = self.resumed or 0, None
        numbers = range(worker, self.size, workers)
        while self.number < len(numbers):
            self.number += 1
            yield self.first + numbers[self.number - 1]

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.resumed = state["number"]


class Walking(IterableDataset):
    """A data set whose iterator has the state, and that draws from one generator in all its passes."""

    class Iterator:
        def __init__(self, dataset):
            self.dataset, self.number = dataset, 0

        def __iter__(self):
            return self

        def __next__(self):
            if self.number == self.dataset.size:
                raise StopIteration
            self.number += 1
            return self.dataset.first + int(torch.randint(1000, (), generator=self.dataset.generator))

        def state_dict(self):
            return {"number": self.number, "generator": self.dataset.generator.get_state()}

        def load_state_dict(self, state):
            self.number = state["number"]
            self.dataset.generator.set_state(state["generator"])

    def __init__(self, first, size):
        self.first, self.size, self.generator = first, size, torch.Generator().manual_seed(first)

    def __iter__(self):
        return Walking.Iterator(self)


def shuffled(first, size, **options):
    return StatefulDataLoader(range(first, first + size), batch_size=2, shuffle=True, **options)


def replaced(first, size, **options):
    numbers = range(first, first + size)
    sampler = RandomSampler(numbers, replacement=True, generator=torch.Generator().manual_seed(first))
    return StatefulDataLoader(numbers, batch_size=7, sampler=sampler, **options)


def streamed(first, size, **options):
    return StatefulDataLoader(FromPlace(first, size), batch_size=2, **options)


def walked(first, size, **options):
    return StatefulDataLoader(Walking(first, size), batch_size=2, **options)


KINDS = {
    "shuffled": (shuffled, (5, 7, 2)),
    "replaced": (replaced, (24, 40, 31)),
    "streamed": (streamed, (5, 7, 2)),
    "walked": (walked, (6, 9, 4)),
}


def stateful_loaders(kind, **options):
    make, sizes = KINDS[kind]
    return {
        label: make(1000 * place, size, **options) for place, (label, size) in enumerate(zip("abc", sizes, strict=True))
    }


needs_torchdata = pytest.mark.skipif(StatefulDataLoader is None, reason="torchdata is not installed")


@needs_torchdata
@pytest.mark.parametrize("wrap", ["plain", "ResumableLoader of meta_batches"])
@pytest.mark.parametrize("exhausted", EXHAUSTED)
@pytest.mark.parametrize("domains_per_step", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_with_stateful_data_loaders(kind, domains_per_step, exhausted, wrap):
    arguments = {"domains_per_step": domains_per_step, "exhausted": exhausted}
    if exhausted == "cycle":
        arguments["batches_per_epoch"] = 4 * domains_per_step
    for program in ([None, None, None], [3, 1, None, 2, None]):
        states = []
        log = run(DomainLoader(stateful_loaders(kind), **arguments), wrap, program, states)
        assert all(log)
        if kind != "shuffled":  # which draws a seed at random and saves it
            assert run(DomainLoader(stateful_loaders(kind), **arguments), wrap, program) == log
        for place in states:
            found = resume(DomainLoader(stateful_loaders(kind), **arguments), wrap, program, log, *place)
            if found is not None:
                assert found[0] == found[1]


@needs_torchdata
@pytest.mark.parametrize(
    ("kind", "exhausted"),
    [
        ("shuffled", "stop"),
        pytest.param("streamed", "cycle", marks=pytest.mark.large),
        pytest.param("shuffled", "cycle", marks=pytest.mark.large),
        pytest.param("streamed", "stop", marks=pytest.mark.large),
    ],
)
def test_with_stateful_data_loaders_and_workers(kind, exhausted):
    arguments = {"domains_per_step": 2, "exhausted": exhausted}
    if exhausted == "cycle":
        arguments["batches_per_epoch"] = 6

    def make():
        return DomainLoader(stateful_loaders(kind, num_workers=2), **arguments)

    program, states = [None, 2, None], []
    log = run(make(), "plain", program, states)
    for place in states:
        found = resume(make(), "plain", program, log, *place)
        if found is not None:
            assert found[0] == found[1]


# States


def good_loader(**arguments):
    return DomainLoader(stored({"a": 3, "b": 4, "c": 5}), 2, **arguments)


def test_a_state_is_made_of_plain_numbers_strings_and_lists():
    loader = good_loader(exhausted="cycle", weighting={"a": 1, "b": 2.5, "c": 3})
    list(itertools.islice(loader, 3))
    state = loader.state_dict()
    assert list(state)[:3] == ["version", "labels", "domains_per_step"]
    for name, value in state.items():
        if name != "loaders":
            assert type(value) in {int, str, bool, list}
    assert {type(label) for label in state["loaders"]} == {str}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version is 2, but this loader's is 1"),
        ({"labels": ["a", "c", "b"]}, r"labels is \['a', 'c', 'b'\], but this loader's"),
        ({"domains_per_step": 3}, "domains_per_step is 3, but this loader's is 2"),
        ({"weighting": "weights 1"}, "weighting is 'weights 1', but"),
        ({"seed": 1}, "seed is 1, but this loader's is 0: resume with the same domains and arguments"),
        ({"order": "random"}, "order is 'random', but"),
        ({"exhausted": "cycle"}, "exhausted is 'cycle', but"),
        ({"batches_per_epoch": 4}, "batches_per_epoch is 4, but this loader's is None"),
        ({"epoch": -1}, "epoch should be an integer of at least 0"),
        ({"position": 1.0}, "position should be an integer of at least 0"),
        ({"position": 2, "group": []}, "group should be 2 different numbers"),
        ({"group": [0]}, "group should be 2 different numbers"),
        ({"group": [0, 0]}, "group should be 2 different numbers"),
        ({"group": [0, 3]}, "group should be 2 different numbers"),
        ({"group": [[0], 1]}, "group should be 2 different numbers"),
        ({"group": None}, "group should be 2 different numbers"),
        ({"unpaired": 1}, "unpaired should be True"),
        ({"unpaired": True, "group": []}, "unpaired should be True"),
        ({"loaders": {"a": {}}}, "loaders should hold a state by every label"),
        ({"loaders": {"a": {}, "b": {}, "c": {}}}, "state of domain 'a' is malformed"),
        ({"more": 1}, "should hold exactly"),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing(change, message):
    loader, twin = good_loader(), good_loader()
    for other in (loader, twin):
        list(itertools.islice(other, 2))
    before = through_a_file(loader.state_dict())
    state = good_loader().state_dict()
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match="should hold exactly"):
        loader.load_state_dict([state])
    assert loader.state_dict() == before
    assert list(loader) == list(twin)


def test_a_place_behind_the_end_of_an_epoch_is_an_error():
    loader = good_loader(exhausted="cycle", batches_per_epoch=4)
    list(itertools.islice(loader, 2))
    state = loader.state_dict()
    with pytest.raises(ValueError, match=r"position should be less than 4.*got 4"):
        loader.load_state_dict({**state, "position": 4})


@pytest.mark.parametrize(
    ("loaders", "error", "message"),
    [
        ({"a": Stored([1]), "b": [2]}, TypeError, "domain 'b', a list, cannot save its place.*StatefulDataLoader"),
        ({"a": Stored([1]), "b": DataLoader([2])}, TypeError, "domain 'b', a DataLoader, cannot save its place"),
    ],
)
def test_loaders_that_cannot_save_their_place_are_an_error(loaders, error, message):
    loader = DomainLoader(loaders)
    for action in (loader.state_dict, lambda: loader.load_state_dict({}), lambda: ResumableLoader(loader)):
        with pytest.raises(error, match=message):
            action()
    assert len(list(loader)) == 2


@needs_torchdata
def test_loaders_whose_places_are_not_their_own_are_an_error():
    generator = torch.Generator()
    same = {label: StatefulDataLoader(range(4), shuffle=True, generator=generator) for label in "ab"}
    with pytest.raises(ValueError, match=r"domain 'b', a StatefulDataLoader, has the same generator as that of .*'a'"):
        DomainLoader(same).state_dict()
    unordered = {label: StatefulDataLoader(range(4), num_workers=1, in_order=False) for label in "ab"}
    with pytest.raises(ValueError, match=r"domain 'a', a StatefulDataLoader, should keep its order"):
        DomainLoader(unordered).state_dict()


def test_a_loader_that_has_other_data_when_it_is_resumed_is_an_error():
    loader = DomainLoader({label: Stored(batches_of(label, 3)) for label in "ab"})
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    resumed = DomainLoader({"a": Stored([]), "b": Stored([])})
    resumed.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"yields no batch|has no batch left where it had one"):
        list(resumed)


def test_a_loader_that_begins_anew_instead_of_coming_to_its_end_is_an_error():
    class Forgetful(Stored):
        def load_state_dict(self, state):
            super().load_state_dict({"next": 0, "fetched": 0, "offset": [0]})

    loaders = [DomainLoader({"a": Unknown(Forgetful("xy")), "b": Unknown(Stored("xyz"))}) for _ in range(2)]
    list(loaders[0])
    loaders[1].load_state_dict(loaders[0].state_dict())
    with pytest.raises(RuntimeError, match="did not find its place again") as caught:
        list(loaders[1])
    assert caught.value.__notes__ == ["raised by the loader of domain 'a'"]


class Unknown:
    """A loader that does not tell its length."""

    def __init__(self, loader):
        self.loader = loader
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def __iter__(self):
        return iter(self.loader)


@given(case=cases(exhausted=["stop"]), program=st.lists(st.none() | st.integers(1, 12), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_it_goes_on_from_every_place_also_where_lengths_are_unknown(case, program):
    sizes, arguments = case

    def make():
        return DomainLoader({label: Unknown(loader) for label, loader in stored(sizes).items()}, **arguments)

    states = []
    log = run(make(), "plain", program, states)
    for place in states:
        found = resume(make(), "plain", program, log, *place)
        if found is not None:
            assert found[0] == found[1]
