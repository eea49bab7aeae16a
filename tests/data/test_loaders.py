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
    DomainLoader,
    Fish,
    GradMatch,
    SmoothFish,
    check_loader,
    meta_batches,
)

DOMAINS = [name for name in "abc" for _ in range(8)]  # 12 batches of 2 in an epoch


def make_sampler(**settings):
    return DomainBatchSampler(DOMAINS, batch_size=2, **settings)


def make_loader(sampler=None, workers=0, **settings):
    return DataLoader(range(24), batch_sampler=sampler or make_sampler(), num_workers=workers, **settings)


KINDS = {
    "plain": make_loader,
    "sampler": lambda: DataLoader(torch.arange(24), sampler=make_sampler(), batch_size=None),
    "workers": lambda: make_loader(workers=1, prefetch_factor=4),
    "meta": lambda: meta_batches(make_loader(), 3),
}


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
    check_loader(wrap(make_optimizer(inner_steps=3)), KINDS[kind]())
    with pytest.raises(ValueError, match=r"Fish\(inner_steps=5\).*domains_per_step=3"):
        check_loader(wrap(make_optimizer(inner_steps=5)), KINDS[kind]())


@pytest.mark.parametrize("wrap", [lambda o: o, Wrapping])
@pytest.mark.parametrize("kind", KINDS)
def test_without_inner_steps_a_loop_of_steps_would_never_interpolate(wrap, kind):
    optimizer = wrap(make_optimizer(inner_steps=None))
    if kind == "meta":  # for meta_step, which interpolates by itself
        check_loader(optimizer, KINDS[kind]())
        return
    message = r"Fish without inner_steps .*: pass Fish\(inner_steps=3\), or .* meta_batches\(loader, 3\).* meta_step"
    with pytest.raises(ValueError, match=message):
        check_loader(optimizer, KINDS[kind]())


def test_with_fewer_domains_per_step_than_domains():
    loader = make_loader(make_sampler(domains_per_step=2))
    check_loader(make_optimizer(inner_steps=2), loader)
    with pytest.raises(ValueError, match=r"inner_steps=3\).*domains_per_step=2"):
        check_loader(make_optimizer(inner_steps=3), loader)


def test_with_a_loader_per_domain():
    streams = DomainLoader({"a": [1], "b": [2], "c": [3]}, 4, domains_per_step=2)
    for loader in (streams, meta_batches(streams, 2)):
        check_loader(make_optimizer(inner_steps=2), loader)
        with pytest.raises(ValueError, match=r"inner_steps=3\) .* domains_per_step=2: make"):
            check_loader(make_optimizer(inner_steps=3), loader)
    with pytest.raises(ValueError, match=r"accumulation_steps=2 .* loader serves 1 of"):
        check_loader(make_optimizer(inner_steps=2), streams, 2)
    for method in (lambda m: IDGM(m, 1.0), lambda _: Fish()):
        with pytest.raises(ValueError, match=r"meta_batches\(loader, 2\)"):
            check_loader(make_optimizer(method), streams)
    check_loader(make_optimizer(lambda m: IDGM(m, 1.0)), meta_batches(streams, 2))


def test_domains_of_another_data_set_are_an_error():
    loader = DataLoader(range(25), batch_sampler=make_sampler())
    with pytest.raises(ValueError, match="for 24 samples, but the data set has 25"):
        check_loader(make_optimizer(inner_steps=3), loader)


@pytest.mark.parametrize("method", [lambda m: IDGM(m, 1.0), lambda m: SmoothFish(1.0, 0.1)], ids=["IDGM", "SmoothFish"])
def test_a_method_without_inner_steps_needs_lists(method):
    with pytest.raises(ValueError, match=r"meta_batches\(loader, 3\)"):
        check_loader(make_optimizer(method), make_loader())
    check_loader(make_optimizer(method), meta_batches(make_loader(), 3))


def test_a_plain_optimizer_is_an_error():
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    for optimizer in (plain, Wrapping(plain), None):
        with pytest.raises(TypeError, match="GradMatch"):
            check_loader(optimizer, make_loader())


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_the_framework_accumulates_is_of_one_domain(steps, accumulate):
    loader = make_loader(make_sampler(accumulate=accumulate))
    if steps == accumulate:
        check_loader(make_optimizer(inner_steps=3), loader, steps)
        return
    message = rf"accumulation_steps={steps} .* serves {accumulate} of a domain .*accumulate={steps}\)"
    with pytest.raises(ValueError, match=message):
        check_loader(make_optimizer(inner_steps=3), loader, steps)


def test_a_number_of_accumulated_batches_that_is_none():
    with pytest.raises(ValueError, match=r"accumulation_steps should be an integer of at least 1 \(got 0\)"):
        check_loader(make_optimizer(inner_steps=3), make_loader(), 0)


class Sharded:
    """A batch sampler that a framework puts around another, to give each process some of its batches."""

    def __init__(self, batch_sampler):
        self.batch_sampler = batch_sampler

    def __iter__(self):
        return itertools.islice(self.batch_sampler, 0, None, 2)


Prepared = type("DataLoaderShard", (DataLoader,), {"__module__": "accelerate.data_loader"})
CHANGED = {
    "sharded": lambda: DataLoader(range(24), batch_sampler=Sharded(make_sampler())),
    "prepared": lambda: Prepared(range(24), batch_sampler=make_sampler()),
    "without domains": lambda: DataLoader(range(24), batch_size=2),
    "a list": lambda: [[1], [2]],
    "lists of a list": lambda: meta_batches([[1], [2], [3]], 3),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_loader_that_a_framework_has_changed_is_an_error(kind):
    message = r"as you made it \(got .*: leave it out of what the framework prepares"
    with pytest.raises(ValueError, match=message):
        check_loader(make_optimizer(inner_steps=3), CHANGED[kind]())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_the_sampler_learns_that_a_loader_fetches_ahead():
    loader = make_loader(workers=1)
    check_loader(make_optimizer(inner_steps=3), loader)
    sampler = loader.batch_sampler
    for _batch in loader:
        with pytest.raises(RuntimeError, match=r"use torchdata's StatefulDataLoader .*torch_gradmatch\[data\]"):
            sampler.state_dict()
    sampler.set_epoch(1)
    assert sampler.state_dict()["epoch"] == 1
    plain = make_loader()
    check_loader(make_optimizer(inner_steps=3), plain)
    for number, _ in enumerate(plain, start=1):
        assert plain.batch_sampler.state_dict()["position"] == number
