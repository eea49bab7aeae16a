"""A loader that knows its place in the epoch, and the check that it fits the optimizer."""

from __future__ import annotations

import itertools
import weakref
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from torch_gradmatch import (
    IDGM,
    DomainBatchSampler,
    DomainLoader,
    Fish,
    GradMatch,
    ResumableLoader,
    SmoothFish,
    check_loader,
    meta_batches,
)

DOMAINS = [name for name in "abc" for _ in range(8)]  # 12 batches of 2 in an epoch


def make_sampler(**settings):
    return DomainBatchSampler(DOMAINS, batch_size=2, **settings)


def make_loader(sampler=None, workers=0, **settings):
    return DataLoader(range(24), batch_sampler=sampler or make_sampler(), num_workers=workers, **settings)


def lists(batches):
    return [[b.tolist() for b in batch] if isinstance(batch, list) else batch.tolist() for batch in batches]


class AheadLoader:
    """Like the loaders that Accelerate prepares: one batch ahead, and with a count of epochs that it imposes."""

    def __init__(self, loader):
        self.loader, self.iteration = loader, 0

    @property
    def batch_sampler(self):
        return self.loader.batch_sampler

    def set_epoch(self, epoch):
        self.iteration = epoch
        self.batch_sampler.set_epoch(epoch)

    def __iter__(self):
        self.set_epoch(self.iteration)
        iterator = iter(self.loader)
        current = next(iterator, None)
        while current is not None:
            following = next(iterator, None)
            yield current
            current = following
        self.iteration += 1


KINDS = {
    "plain": make_loader,
    "ahead": lambda: AheadLoader(make_loader()),
    "workers": lambda: make_loader(workers=1, prefetch_factor=4),
    "meta": lambda: meta_batches(make_loader(), 3),
    "meta, ahead": lambda: meta_batches(AheadLoader(make_loader()), 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_behind_the_last_batch_handed_out(kind):
    loader = ResumableLoader(KINDS[kind]())
    epochs = [lists(loader) for _ in range(3)]
    length = len(epochs[0])
    assert len(loader) == length == (4 if kind.startswith("meta") else 12)
    assert epochs[0] != epochs[1]
    stops = range(1, 3 * length) if kind != "workers" else (1, 11, 12, 20)
    for stop in stops:
        loader = ResumableLoader(KINDS[kind]())
        batches = itertools.chain.from_iterable(loader for _ in range(3))
        taken = lists(itertools.islice(batches, stop))
        state = loader.state_dict()
        assert divmod(stop, length)[0] == state["epoch"]
        resumed = ResumableLoader(KINDS[kind]())
        resumed.load_state_dict(state)
        assert len(resumed) == length  # of the whole epoch
        rest = lists(itertools.chain.from_iterable(resumed for _ in range(3 - stop // length)))
        assert taken + rest == [batch for epoch in epochs for batch in epoch]


def test_epochs_that_differ_in_length_have_their_own():
    sampler = DomainBatchSampler(["a"] * 9 + ["b"] * 3 + ["c"] * 6, batch_size=1, domains_per_step=2, seed=3)
    loader = ResumableLoader(DataLoader(range(18), batch_sampler=sampler))
    found = [(len(loader), len(lists(loader))) for _ in range(20)]
    assert all(announced == served for announced, served in found)
    assert len({served for _, served in found}) > 1


class PrefetchLoader:
    """Like a DataLoader whose workers fetch ``depth`` batches ahead of the loop, without processes."""

    def __init__(self, sampler, depth):
        self.batch_sampler, self.depth = sampler, depth

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        iterator = iter(self.batch_sampler)
        fetched = deque(itertools.islice(iterator, self.depth + 1))
        while fetched:
            yield fetched.popleft()
            fetched.extend(itertools.islice(iterator, 1))


WRAPPERS = {
    "meta_batches": meta_batches,
    "ResumableLoader": lambda loader, _: ResumableLoader(loader),
    "ResumableLoader of meta_batches": lambda loader, domains: ResumableLoader(meta_batches(loader, domains)),
}


def place(loop_or_sampler):
    state = loop_or_sampler.state_dict()
    return state["epoch"], state["position"]


class LoopModel:
    """A training loop over a loader that reads ahead, and beside it two pairs of numbers that say where it should be.

    ``place`` is what a checkpoint should say, ``following`` where the next iterator should start.
    """

    def __init__(self, kind, labels, domains_per_step, depth):
        self.kind, self.depth = kind, depth
        self.arguments = {"domains": labels, "batch_size": 1, "domains_per_step": domains_per_step}
        self.size = 1 if kind == "ResumableLoader" else domains_per_step
        self.place = self.following = (0, 0)
        self.restart(state=None)

    def restart(self, state):
        self.sampler = DomainBatchSampler(**self.arguments)
        self.loop = WRAPPERS[self.kind](PrefetchLoader(self.sampler, self.depth), self.sampler.domains_per_step)
        self.holder = self.sampler if self.kind == "meta_batches" else self.loop
        if state is not None:
            self.holder.load_state_dict(state)
        self.following = self.place

    def epoch(self, number):
        sampler = DomainBatchSampler(**self.arguments)
        sampler.set_epoch(number)
        return list(sampler)

    def assert_length(self, epoch, start):
        length = len(self.epoch(epoch))
        assert len(self.sampler) == length - start
        assert len(self.loop) == (length - (start if self.kind == "meta_batches" else 0)) // self.size

    def reached(self, epoch, position):
        at_end = self.kind != "meta_batches" and position == len(self.epoch(epoch))
        return (epoch + 1, 0) if at_end else (epoch, position)

    def take(self, number):
        """Iterate over so many items, or to the end if there are fewer, and let go of the iterator."""
        epoch, start = self.following
        batches = self.epoch(epoch)
        self.assert_length(epoch, start)
        iterator = iter(self.loop)
        position = start
        for item in itertools.islice(iterator, number):
            group = batches[position : position + self.size]
            assert item == (group[0] if self.kind == "ResumableLoader" else group)
            position += self.size
            self.place = self.reached(epoch, position)
            assert place(self.holder) == self.place
            self.assert_length(epoch, start)
        del iterator
        if number > (position - start) // self.size:  # asked for more than there was
            assert position == len(batches)
            self.place = (epoch + 1, 0)
        if number > 0:
            self.following = (epoch + 1, 0)
        self.assert_length(*self.following)

    def choose(self, epoch):
        self.sampler.set_epoch(epoch)
        if epoch != self.following[0]:
            self.following = (epoch, 0)
        self.place = self.following


ACTIONS = st.one_of(
    st.tuples(st.just("take"), st.integers(0, 12)),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("choose"), st.integers(0, 3)),
)


@pytest.mark.parametrize("kind", WRAPPERS)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    depth=st.integers(0, 20),
    actions=st.lists(ACTIONS, max_size=8),
    data=st.data(),
)
@settings(deadline=None)
def test_the_place_is_what_the_loop_received_however_far_the_loader_reads_ahead(kind, sizes, depth, actions, data):
    labels = [domain for domain, size in enumerate(sizes) for _ in range(size)]
    model = LoopModel(kind, labels, data.draw(st.integers(1, len(sizes))), depth)
    for action, number in actions:
        if action == "take":
            model.take(number)
        elif action == "restart":
            model.restart(model.holder.state_dict())
        else:
            model.choose(number)
        assert place(model.holder) == model.place


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_loop_that_goes_on_after_another_epoch_was_chosen_moves_nothing(kind):
    sampler = make_sampler()
    iterator = iter(WRAPPERS[kind](PrefetchLoader(sampler, 4), 3))
    next(iterator)
    sampler.set_epoch(5)
    next(iterator)
    assert place(sampler) == (5, 0)
    list(iterator)
    assert place(sampler) == (5, 0)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_state_is_of_the_iterator_that_was_started_last(kind):
    sampler = make_sampler()
    loop = WRAPPERS[kind](PrefetchLoader(sampler, 4), 3)
    size = 1 if kind == "ResumableLoader" else 3
    first, second = iter(loop), iter(loop)
    next(first)
    assert place(sampler) == (0, size)
    next(second)
    assert place(sampler) == (1, size)
    next(first)
    assert place(sampler) == (1, size)
    del first
    assert place(sampler) == (1, size)
    assert len(list(second)) == 12 // size - 1
    assert place(sampler) == (2, 0)


def test_a_group_that_the_loop_is_done_with_is_not_kept_while_the_next_is_fetched():
    batches, alive = [], []

    class Counting(PrefetchLoader):
        def __iter__(self):
            for indices in self.batch_sampler:
                alive.append(sum(batch() is not None for batch in batches))
                batch = torch.tensor(indices)
                batches.append(weakref.ref(batch))
                yield batch
                del batch

    iterator = iter(meta_batches(Counting(make_sampler(), depth=0), 3))
    while next(iterator, None) is not None:
        pass
    assert alive == [0, 1, 2] + [1, 1, 2] * 3  # of the group before, at most the last batch


@pytest.mark.parametrize("kind", ["plain", "ahead", "meta", "meta, ahead"])
def test_after_a_loop_that_is_broken_off_the_next_epoch_follows(kind):
    reference = ResumableLoader(KINDS[kind]())
    epochs = [lists(reference) for _ in range(3)]
    loader = ResumableLoader(KINDS[kind]())
    for _ in range(2):
        next(iter(loader))
    assert lists(loader) == epochs[2]


# From Python 3.12 on, forking a worker from a process with threads warns; these workers only read a range.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("prefetch", [1, 50], ids=["in-the-epoch", "to-its-end"])
@pytest.mark.parametrize("persistent", [False, True], ids=["workers", "persistent-workers"])
@pytest.mark.parametrize("kind", ["ResumableLoader", "ResumableLoader of meta_batches"])
def test_a_loop_over_workers_that_is_broken_off_resumes(kind, persistent, prefetch):
    def make_loop():
        workers = {"workers": 2, "persistent_workers": persistent, "prefetch_factor": prefetch}
        return WRAPPERS[kind](make_loader(**workers), 3)

    size = 1 if kind == "ResumableLoader" else 3
    reference = make_loop()
    epochs = [lists(reference) for _ in range(2)]
    loop = make_loop()
    for taken, _ in enumerate(loop, start=1):
        if taken == 2:
            break
    state = loop.state_dict()
    assert place(loop) == place(loop.sampler) == (0, 2 * size)
    assert len(loop) == 12 // size
    assert lists(loop) == epochs[1]  # the loop that was broken off goes on to the next epoch
    assert place(loop) == (2, 0)

    resumed = make_loop()
    resumed.load_state_dict(state)
    for taken, _ in enumerate(resumed, start=1):
        assert place(resumed) == (0, (2 + taken) * size)
        if taken == 1:
            break
    again = make_loop()
    again.load_state_dict(resumed.state_dict())
    assert lists(again) == epochs[0][3:]
    assert lists(again) == epochs[1]


def test_a_loader_without_a_domain_sampler_is_an_error():
    with pytest.raises(ValueError, match="DomainBatchSampler"):
        ResumableLoader(DataLoader(range(4), batch_size=2))
    with pytest.raises(ValueError, match="DomainBatchSampler"):
        ResumableLoader([[1], [2]])


def test_domains_of_streams_have_to_be_able_to_save_their_place():
    loader = DomainLoader({"a": [1], "b": [2]})
    for under in (loader, meta_batches(loader, 2)):
        with pytest.raises(TypeError, match=r"loader of domain 'a', a list, cannot save its place.*StatefulDataLoader"):
            ResumableLoader(under)


def test_a_loader_out_of_order_is_an_error():
    with pytest.raises(ValueError, match="in_order=False"):
        ResumableLoader(make_loader(workers=1, in_order=False))


def test_a_state_of_other_data_is_an_error():
    loader = ResumableLoader(make_loader())
    with pytest.raises(ValueError, match="batch_size"):
        loader.load_state_dict(loader.state_dict() | {"batch_size": 3})


# ------------------------------------------------------------------------------------------------------------- check


def make_optimizer(method=None, **settings):
    model = nn.Linear(2, 1)
    method = Fish(**settings) if method is None else method(model)
    return GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), method)


class Wrapping:
    """As Accelerate's and Lightning's wrappers, which call what they wrap ``optimizer``."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("wrap", [lambda o: o, Wrapping, lambda o: Wrapping(Wrapping(o))])
@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_domains_has_to_be_that_of_inner_steps(wrap, kind):
    for loader in (KINDS[kind](), ResumableLoader(KINDS[kind]())):
        check_loader(wrap(make_optimizer(inner_steps=3)), loader)
        with pytest.raises(ValueError, match=r"Fish\(inner_steps=5\).*domains_per_step=3"):
            check_loader(wrap(make_optimizer(inner_steps=5)), loader)


@pytest.mark.parametrize("wrap", [lambda o: o, Wrapping])
@pytest.mark.parametrize("kind", KINDS)
def test_without_inner_steps_a_loop_of_steps_would_never_interpolate(wrap, kind):
    optimizer = wrap(make_optimizer(inner_steps=None))
    for loader in (KINDS[kind](), ResumableLoader(KINDS[kind]())):
        if kind.startswith("meta"):  # for meta_step, which interpolates by itself
            check_loader(optimizer, loader)
            continue
        message = (
            r"Fish without inner_steps .*: pass Fish\(inner_steps=3\), or .* meta_batches\(loader, 3\).* meta_step"
        )
        with pytest.raises(ValueError, match=message):
            check_loader(optimizer, loader)


def test_with_fewer_domains_per_step_than_domains():
    loader = make_loader(make_sampler(domains_per_step=2))
    check_loader(make_optimizer(inner_steps=2), loader)
    with pytest.raises(ValueError, match=r"inner_steps=3\).*domains_per_step=2"):
        check_loader(make_optimizer(inner_steps=3), loader)


def test_with_a_loader_per_domain():
    streams = DomainLoader({"a": [1], "b": [2], "c": [3]}, domains_per_step=2)
    for loader in (streams, meta_batches(streams, 2)):
        check_loader(make_optimizer(inner_steps=2), loader)
        with pytest.raises(ValueError, match=r"inner_steps=3\).*DomainLoader serves.*=2.*loader\.domains_per_step"):
            check_loader(make_optimizer(inner_steps=3), loader)
    with pytest.raises(ValueError, match=r"accumulation_steps=2.*batch_size in every loader"):
        check_loader(make_optimizer(inner_steps=2), streams, 2)
    for method in (lambda m: IDGM(m, 1.0), lambda _: Fish()):
        with pytest.raises(ValueError, match=r"meta_batches\(loader, 2\)"):
            check_loader(make_optimizer(method), streams)
    check_loader(make_optimizer(lambda m: IDGM(m, 1.0)), meta_batches(streams, 2))


def test_domains_of_another_data_set_are_an_error():
    for wrap in (lambda loader: loader, AheadLoader):
        loader = wrap(DataLoader(range(25), batch_sampler=make_sampler()))
        with pytest.raises(ValueError, match="holds 24 labels, but the loader's data set 25 samples"):
            check_loader(make_optimizer(inner_steps=3), loader)
        with pytest.raises(ValueError, match="holds 24 labels"):
            ResumableLoader(loader)


def test_accumulated_gradients_are_an_error():
    with pytest.raises(ValueError, match="accumulation_steps=4"):
        check_loader(make_optimizer(inner_steps=3), make_loader(), 4)
    with pytest.raises(ValueError, match="accumulation_steps should be"):
        check_loader(make_optimizer(inner_steps=3), make_loader(), 0)


@pytest.mark.parametrize("method", [lambda m: IDGM(m, 1.0), lambda m: SmoothFish(1.0, 0.1)], ids=["IDGM", "SmoothFish"])
def test_a_method_without_inner_steps_needs_lists(method):
    for loader in (make_loader(), ResumableLoader(make_loader())):
        with pytest.raises(ValueError, match=r"meta_batches\(loader, 3\)"):
            check_loader(make_optimizer(method), loader)
    grouped = meta_batches(make_loader(), 3)
    check_loader(make_optimizer(method), grouped)
    check_loader(make_optimizer(method), ResumableLoader(grouped))


def test_a_plain_optimizer_is_an_error():
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    for optimizer in (plain, Wrapping(plain), None):
        with pytest.raises(TypeError, match="GradMatch"):
            check_loader(optimizer, make_loader())


def test_processes_with_different_domains_are_an_error():
    class Shard:  # Accelerate's BatchSamplerShard has these attributes
        def __init__(self, split_batches):
            self.batch_sampler, self.num_processes, self.split_batches = make_sampler(), 2, split_batches

        def __iter__(self):
            return iter(self.batch_sampler)

    with pytest.raises(ValueError, match="2 processes"):
        check_loader(make_optimizer(inner_steps=3), make_loader(Shard(split_batches=False)))
    check_loader(make_optimizer(inner_steps=3), make_loader(Shard(split_batches=True)))
