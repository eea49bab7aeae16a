"""A loader that knows its place in the epoch, and the check that it fits the optimizer."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from torch_gradmatch import (
    IDGM,
    DomainBatchSampler,
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


def test_a_loader_without_a_domain_sampler_is_an_error():
    with pytest.raises(ValueError, match="DomainBatchSampler"):
        ResumableLoader(DataLoader(range(4), batch_size=2))
    with pytest.raises(ValueError, match="DomainBatchSampler"):
        ResumableLoader([[1], [2]])


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
        check_loader(wrap(make_optimizer(inner_steps=None)), loader)
        with pytest.raises(ValueError, match=r"Fish\(inner_steps=5\).*domains_per_step=3"):
            check_loader(wrap(make_optimizer(inner_steps=5)), loader)


def test_with_fewer_domains_per_step_than_domains():
    loader = make_loader(make_sampler(domains_per_step=2))
    check_loader(make_optimizer(inner_steps=2), loader)
    with pytest.raises(ValueError, match=r"inner_steps=3\).*domains_per_step=2"):
        check_loader(make_optimizer(inner_steps=3), loader)


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
