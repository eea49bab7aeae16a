"""Groups of distinct domains from one loader per domain, against lists and an epoch that is written down slowly."""

from __future__ import annotations

import itertools
import random
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from _samplers import ORDERS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from torch_gradmatch import DomainLoader, ResumableLoader, meta_batches

pytestmark = [
    # From Python 3.12 on, forking a worker from a process with threads warns; these workers only count.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata's constructor calls it
]
EXHAUSTED = ["stop", "cycle"]
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

    def __len__(self):
        return len(self.batches)

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


class Unsized:
    """An iterable without a length, as a stream is."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@st.composite
def cases(draw, exhausted=EXHAUSTED, orders=ORDERS, weighted=True):
    """The sizes of some domains and the arguments of a loader over them."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=6))
    labels = draw(st.permutations("abcdef"))[: len(sizes)]
    arguments = {
        "domains_per_step": draw(st.none() | st.integers(1, len(sizes))),
        "seed": draw(st.integers(0, 2**70)),
        "order": draw(st.sampled_from(orders)),
        "exhausted": draw(st.sampled_from(exhausted)),
    }
    if weighted and draw(st.booleans()):
        weights = draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
        arguments["weighting"] = dict(zip(labels, weights, strict=True))
    if arguments["exhausted"] == "cycle" and draw(st.booleans()):
        arguments["batches_per_epoch"] = (arguments["domains_per_step"] or len(sizes)) * draw(st.integers(1, 12))
    return dict(zip(labels, sizes, strict=True)), arguments


def lists(sizes):
    return {label: batches_of(label, size) for label, size in sizes.items()}


def slow_epochs(sizes, number, exhausted, domains_per_step=None, weighting=None, seed=0, order="flipflop", **options):
    """The epochs as they are described, from lists that can be looked into.

    The random numbers are the loader's: a time for each domain, ended by whom comes first, and an order.
    """
    size = domains_per_step or len(sizes)
    weights = np.array([1.0 if weighting is None else weighting[label] for label in sizes])
    total = sum(sizes.values())
    length = options.get("batches_per_epoch", size * max(*sizes.values(), -(-total // size)))
    endless = {label: itertools.cycle(batches_of(label, sizes[label])) for label in sizes}
    unpaired = None
    for epoch in range(number):
        left = {label: iter(batches_of(label, sizes[label])) for label in sizes} if exhausted == "stop" else endless
        served, count = [], Counter()

        def has_batch(label, count=count):
            return exhausted == "cycle" or count[label] < sizes[label]

        while sum(map(has_batch, sizes)) >= size and (exhausted == "stop" or len(served) < length):
            if unpaired is not None and all(map(has_batch, unpaired)):
                group, unpaired = unpaired[::-1], None
            else:
                key = (epoch, len(served) // size)
                generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
                times = dict(zip(sizes, generator.standard_exponential(len(sizes)) / weights, strict=True))
                first = sorted(filter(has_batch, sizes), key=times.get)[:size]
                group = [first[place] for place in generator.permutation(size)]
                unpaired = group if order == "flipflop" else None
            served += [next(left[label]) for label in group]
            count.update(group)
        yield served


# Groups and epochs


@given(case=cases(), sized=st.booleans())
@settings(deadline=None, max_examples=300)
def test_epochs_are_those_written_down_slowly(case, sized):
    sizes, arguments = case
    expected = list(slow_epochs(sizes, 4, **arguments))
    loaders = lists(sizes)
    if not sized and (arguments["exhausted"] == "stop" or "batches_per_epoch" in arguments):
        loaders = {label: Unsized(batches) for label, batches in loaders.items()}
    loader = DomainLoader(loaders, **arguments)
    assert [list(loader) for _ in range(4)] == expected


@given(case=cases())
@settings(deadline=None)
def test_a_group_has_distinct_domains_and_every_domain_keeps_the_order_of_its_loader(case):
    sizes, arguments = case
    loader = DomainLoader(lists(sizes), **arguments)
    size = loader.domains_per_step
    epochs = [list(loader) for _ in range(3)]
    for epoch in epochs:
        assert len(epoch) % size == 0
        for start in range(0, len(epoch), size):
            assert len({batch[0] for batch in epoch[start : start + size]}) == size
    if arguments["exhausted"] == "stop":
        for epoch in epochs:
            served = {label: [batch for batch in epoch if batch[0] == label] for label in sizes}
            assert all(served[label] == batches_of(label, sizes[label])[: len(served[label])] for label in sizes)
            assert sum(len(served[label]) < sizes[label] for label in sizes) < size
    else:
        for label in sizes:
            served = [batch for epoch in epochs for batch in epoch if batch[0] == label]
            assert served == list(itertools.islice(itertools.cycle(batches_of(label, sizes[label])), len(served)))


@given(case=cases(orders=["flipflop"]))
@settings(deadline=None)
def test_the_second_group_of_a_pair_is_the_reverse_of_the_first_wherever_that_is_possible(case):
    sizes, arguments = case
    loader = DomainLoader(lists(sizes), **arguments)
    size, first = loader.domains_per_step, None
    for _ in range(3):
        left = Counter(sizes) if arguments["exhausted"] == "stop" else dict.fromkeys(sizes, 10**6)
        epoch = "".join(batch[0] for batch in loader)
        for start in range(0, len(epoch), size):
            group = epoch[start : start + size]
            if first is not None and all(left[label] for label in first):
                assert group == first[::-1]
                first = None
            else:
                first = group
            for label in group:
                left[label] -= 1


def sequential_probability(group, weights):
    """Of drawing these domains, in any order, one after the other without replacement."""
    total = 0.0
    for order in itertools.permutations(group):
        probability, rest = 1.0, sum(weights.values())
        for label in order:
            probability *= weights[label] / rest
            rest -= weights[label]
        total += probability
    return total


@pytest.mark.parametrize("weights", [None, {"a": 1.0, "b": 5.0, "c": 2.0, "d": 0.5}], ids=["uniform", "weights"])
def test_groups_come_as_often_as_draws_without_replacement_and_their_orders_equally_often(weights):
    draws = 20_000
    arguments = {} if weights is None else {"weighting": weights}
    loader = DomainLoader(
        {label: [label] for label in "abcd"}, 2, **arguments, order="random", exhausted="cycle",
        batches_per_epoch=2 * draws, seed=17,
    )  # fmt: skip
    counts = Counter(zip(*[iter(loader)] * 2, strict=True))
    for group in itertools.permutations("abcd", 2):
        expected = sequential_probability(group, weights or dict.fromkeys("abcd", 1.0)) / 2
        deviation = (expected * (1 - expected) / draws) ** 0.5
        assert abs(counts[group] / draws - expected) < 5 * deviation


@given(case=cases(), seeds=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)))
@settings(deadline=None, max_examples=50)
def test_global_random_state_is_neither_read_nor_changed(case, seeds):
    sizes, arguments = case
    found = []
    for seed in seeds:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the state that must not be touched
        torch.manual_seed(seed)
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
        loader = DomainLoader(lists(sizes), **arguments)
        found.append([list(loader) for _ in range(2)])
        after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
        assert before == after
    assert found[0] == found[1]


def test_seeds_and_epochs_differ():
    def epochs(seed):
        loader = DomainLoader(lists(dict.fromkeys("abcdef", 8)), 3, seed=seed, order="random")
        return ["".join(batch[0] for batch in loader) for _ in range(2)]

    assert len({*epochs(0), *epochs(1)}) == 4


def test_labels_are_those_of_the_mapping():
    assert DomainLoader({"b": [1], "a": [2]}).labels == ("b", "a")
    labels = DomainLoader({np.int64(3): [1], 1: [2]}).labels
    assert labels == (3, 1)
    assert {type(label) for label in labels} == {int}


# Where loaders end


def test_a_stream_without_end_never_ends_the_epoch():
    loader = DomainLoader({"a": itertools.count(), "b": itertools.count(1000)})
    groups = list(itertools.islice(meta_batches(loader, 2), 500))
    assert [min(group) for group in groups] == list(range(500))


def test_epochs_of_a_cycle_go_on_where_the_one_before_ended():
    loader = DomainLoader({"a": itertools.count(), "b": itertools.count()}, exhausted="cycle", batches_per_epoch=6)
    assert [sorted(loader) for _ in range(3)] == [[n, n, n + 1, n + 1, n + 2, n + 2] for n in (0, 3, 6)]


def test_at_most_one_batch_of_a_domain_is_fetched_ahead_and_none_in_a_cycle():
    fetched = Counter()

    def stream(label):
        for number in itertools.count(1):
            fetched[label] += 1
            yield label, number

    for arguments in ({}, {"exhausted": "cycle", "batches_per_epoch": 999}):
        fetched.clear()
        served = Counter()
        loader = DomainLoader({label: stream(label) for label in "abcde"}, 3, **arguments)
        for label, number in itertools.islice(loader, 200):
            served[label] += 1
            assert number == served[label]
            assert all(0 <= fetched[label] - served[label] <= (0 if arguments else 1) for label in "abcde")


@pytest.mark.parametrize("exhausted", EXHAUSTED)
def test_an_empty_loader_is_an_error_that_names_the_domain(exhausted):
    loader = DomainLoader({"full": [1, 2], "empty": []}, exhausted=exhausted)
    with pytest.raises(RuntimeError, match=r"loader of domain 'empty' yields no batch.*got list"):
        list(loader)


@pytest.mark.parametrize(("exhausted", "options"), [("stop", {}), ("cycle", {"batches_per_epoch": 6})])
def test_a_loader_that_can_be_iterated_over_only_once_is_an_error_when_it_should_begin_again(exhausted, options):
    loader = DomainLoader({"list": [1, 2], "once": (n for n in (3, 4))}, exhausted=exhausted, **options)
    two_epochs, taken = itertools.chain(loader, loader), []
    with pytest.raises(RuntimeError, match=r"loader of domain 'once' yields no batch.*got generator"):
        taken.extend(two_epochs)
    assert {3, 4} <= set(taken)


def test_after_an_iterator_that_is_broken_off_the_next_epoch_follows():
    sizes = {"a": 5, "b": 3, "c": 4}
    for exhausted in EXHAUSTED:
        loader = DomainLoader(lists(sizes), 2, exhausted=exhausted, order="random")
        epochs = list(slow_epochs(sizes, 3, exhausted, 2, order="random"))
        taken = list(itertools.islice(loader, 3))
        assert taken == epochs[0][:3]
        rest = list(loader)
        assert [batch[0] for batch in rest[:2]] == [batch[0] for batch in epochs[1][:2]]
        if exhausted == "stop":
            assert rest == epochs[1]
        else:  # nothing is skipped
            for label in sizes:
                served = [batch for batch in taken + rest if batch[0] == label]
                assert served == list(itertools.islice(itertools.cycle(batches_of(label, sizes[label])), len(served)))


@pytest.mark.parametrize(
    ("stop", "reverses"), [(1, False), (2, False), (3, True), (4, False), (6, False), (8, False), (9, True)]
)
def test_only_a_group_that_was_served_whole_and_has_no_second_is_reversed_by_the_next_iterator(stop, reverses):
    loader = DomainLoader({label: Unsized(batches_of(label, 99)) for label in "abcdefg"}, 3, seed=4)
    list(itertools.islice(loader, stop))
    group = loader._group_labels()
    following = tuple(batch[0] for batch in itertools.islice(loader, 3))
    assert (following == group[::-1]) == reverses


def test_a_batch_that_the_loop_is_done_with_is_not_kept_while_the_next_is_fetched():
    batches, alive = [], []

    class Stream:
        def __iter__(self):
            return self

        def __next__(self):  # a generator would keep its latest batch
            alive.append(sum(batch() is not None for batch in batches))
            batch = torch.zeros(1)
            batches.append(weakref.ref(batch))
            return batch

    for grouped, expected in ((False, [0] * 12), (True, [0, 1, 2] + [1, 1, 2] * 3)):
        batches.clear()
        alive.clear()
        loader = DomainLoader({label: Stream() for label in "abc"}, exhausted="cycle", batches_per_epoch=12)
        iterator = iter(meta_batches(loader, 3) if grouped else loader)
        while next(iterator, None) is not None:
            pass
        assert alive == expected


def test_only_the_iterator_that_was_started_last_goes_on():
    loader = DomainLoader({"a": range(9), "b": range(9)})
    first, second = iter(loader), iter(loader)
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="cannot go on: another one was started"):
        next(first)
    assert len(list(second)) == 17
    state_loader = DomainLoader({label: Stored(batches_of(label, 9)) for label in "ab"})
    third = iter(state_loader)
    next(third)
    state_loader.load_state_dict(state_loader.state_dict())
    with pytest.raises(RuntimeError, match="a state loaded"):
        next(third)
    assert len(list(state_loader)) == 17


# Length


@given(case=cases(), stop=st.integers(0, 60))
@settings(deadline=None, max_examples=200)
def test_the_length_is_what_is_served(case, stop):
    sizes, arguments = case
    epochs = list(slow_epochs(sizes, 3, **arguments))
    loaders = {label: Stored(batches) for label, batches in lists(sizes).items()}
    loader = DomainLoader(loaders, **arguments)
    for epoch in epochs:
        assert len(loader) == len(epoch)
        for _ in loader:
            assert len(loader) == len(epoch)
    loader, states = DomainLoader({label: Stored(batches) for label, batches in lists(sizes).items()}, **arguments), []
    served = 0
    for _ in itertools.islice(loader, stop):
        served += 1
        states.append(loader.state_dict())
    assert len(loader) == len(list(loader))  # of the next epoch, after one that was broken off
    if served:
        resumed = DomainLoader(loaders, **arguments)
        resumed.load_state_dict(states[-1])
        position = states[-1]["position"]
        whole = len(resumed) + position
        assert whole == len(ResumableLoader(resumed))
        if states[-1]["epoch"] == 0:
            assert whole == len(epochs[0])
        assert len(resumed) == len(list(resumed))


class CountStream(IterableDataset):
    def __len__(self):
        return 7

    def __iter__(self):
        return iter(range(10))


@pytest.mark.parametrize("loader", [Unsized([1]), DataLoader(CountStream())], ids=["unsized", "IterableDataset"])
def test_an_unknown_length_is_a_type_error_that_names_the_domain(loader):
    mixed = {"list": [1, 2], "stream": loader}
    for loop in (DomainLoader(mixed), meta_batches(DomainLoader(mixed), 2)):
        with pytest.raises(TypeError, match="length of an epoch is unknown: the loader of domain 'stream'"):
            len(loop)
        list(loop)
    assert len(DomainLoader(mixed, exhausted="cycle", batches_per_epoch=4)) == 4
    with pytest.raises(ValueError, match=r"batches_per_epoch is needed.*'stream'"):
        DomainLoader(mixed, exhausted="cycle")


# Errors


@pytest.mark.parametrize(
    ("loaders", "error", "message"),
    [
        ([[1], [2]], TypeError, "should be a mapping"),
        ({"a": [1]}, ValueError, "at least 2 domains"),
        ({}, ValueError, "at least 2 domains"),
        ({"a": [1], None: [2]}, ValueError, "a key of loaders is None"),
        ({"a": [1], True: [2]}, ValueError, "a key of loaders is True"),
        ({"a": [1], "b": 3}, TypeError, r"loaders\['b'\] should be a loader.*got 3"),
        ({"a": [1], "b": "text"}, TypeError, r"loaders\['b'\] should be a loader"),
        ({"a": [1], "b": CountStream()}, TypeError, r"loaders\['b'\] is a data set, a CountStream.*batch_size=None"),
        (dict.fromkeys("ab", ONE), ValueError, r"loaders\['b'\] is the same object as loaders\['a'\]"),
    ],
)
def test_loaders_that_are_not_one_for_every_domain_are_an_error(loaders, error, message):
    with pytest.raises(error, match=message):
        DomainLoader(loaders)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domains_per_step": 0}, "domains_per_step should be an integer of at least 1"),
        ({"domains_per_step": 4}, r"domains_per_step should be at most 3.*got 4"),
        ({"weighting": "proportional"}, "weighting should be 'uniform' or a mapping"),
        ({"weighting": 0.5}, "weighting should be 'uniform' or a mapping"),
        ({"weighting": np.ones(3)}, "weighting should be 'uniform' or a mapping"),
        ({"weighting": {"a": 1, "b": 1}}, "no weight for 'c'"),
        ({"weighting": {"a": 1, "b": 1, "c": 0}}, r"weighting\['c'\] should be a positive"),
        ({"seed": -1}, "seed should be"),
        ({"order": "sorted"}, "order should be one of"),
        ({"exhausted": "go"}, "exhausted should be one of"),
        ({"batches_per_epoch": 3}, "batches_per_epoch should be None with exhausted='stop'"),
        ({"exhausted": "cycle", "batches_per_epoch": 4}, r"multiple of domains_per_step=3 \(got 4\): 6 would do"),
        ({"exhausted": "cycle", "batches_per_epoch": 0}, "batches_per_epoch should be an integer of at least 1"),
    ],
)
def test_arguments_out_of_range_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        DomainLoader(lists({"a": 1, "b": 2, "c": 3}), **arguments)


@pytest.mark.parametrize("exhausted", EXHAUSTED)
def test_an_error_in_a_loader_names_its_domain(exhausted):
    class Failing(Stored):
        def __iter__(self):
            yield 1
            raise OSError("disk")

    loader = DomainLoader({"good": Stored([1, 2, 3]), "bad": Failing([1, 2, 3])}, exhausted=exhausted)
    with pytest.raises(OSError, match="disk") as caught:
        list(loader)
    assert caught.value.__notes__ == ["raised by the loader of domain 'bad'"]


def test_an_error_while_a_state_is_saved_or_loaded_names_the_domain():
    class Failing(Stored):
        def state_dict(self):
            raise OSError("disk")

        def load_state_dict(self, state):
            raise OSError("disk")

    good = DomainLoader({"a": Stored([1]), "b": Stored([2])})
    bad = DomainLoader({"a": Stored([1]), "b": Failing([2])})
    for action in (bad.state_dict, lambda: bad.load_state_dict(good.state_dict())):
        with pytest.raises(OSError, match="disk") as caught:
            action()
        assert "raised by the loader of domain 'b' while it" in caught.value.__notes__[0]


def test_no_message_is_long():
    long = "x" * 5000
    loaders = {long: [1], long + "y": [2]}
    for action in (
        lambda: DomainLoader(list(loaders)),
        lambda: DomainLoader({long: [1], (long,): [2]}),
        lambda: DomainLoader({long: [1], "b": long}),
        lambda: DomainLoader({long: [1], "b": CountStream()}, weighting={long: 1}),
        lambda: DomainLoader(loaders, weighting={long: 1}),
        lambda: DomainLoader(loaders, weighting=long),
        lambda: DomainLoader(loaders, exhausted=long),
        lambda: DomainLoader(loaders, domains_per_step=10**3000),
        lambda: DomainLoader(loaders, exhausted="cycle", batches_per_epoch=10**3000 + 1),
        lambda: len(DomainLoader({label: Unsized([1]) for label in loaders})),
        lambda: list(DomainLoader({label: [] for label in loaders})),
        lambda: DomainLoader(loaders).state_dict(),
        lambda: DomainLoader({label: Stored([1]) for label in loaders}).load_state_dict({long: 1}),
        lambda: DomainLoader({label: Stored([1]) for label in loaders}).load_state_dict(
            DomainLoader({label: Stored([1]) for label in [long + "z", "b"]}).state_dict()
        ),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            action()
        assert len(str(caught.value)) <= 1000
