"""The check that a loader, a loop and an optimizer fit: the numbers of domains, what is accumulated, and the ranks."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
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

DOMAINS = [name for name in "abcd" for _ in range(8)]


def make_sampler(**settings):
    return DomainBatchSampler(DOMAINS, batch_size=4, **settings)


def make_loader(sampler=None, lists=False, workers=0, **settings):
    loader = DataLoader(range(32), batch_sampler=sampler or make_sampler(**settings), num_workers=workers)
    return meta_batches(loader) if lists else loader


def optimizer_of(make_method=None, group=None, **settings):
    model = nn.Linear(2, 1)
    method = make_method(model, group) if make_method else Fish(**settings)
    return GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), method)


class Wrapping:
    """As Accelerate's and Lightning's wrappers, which call what they wrap ``optimizer``."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


STREAMS = {name: [name] for name in "abcd"}
KINDS = {
    "plain": make_loader,
    "sampler": lambda: DataLoader(torch.arange(32), sampler=make_sampler(), batch_size=None),
    "lists": lambda: make_loader(lists=True),
    "streams": lambda: DomainLoader(STREAMS, 4),
    "lists of streams": lambda: meta_batches(DomainLoader(STREAMS, 4)),
}


@pytest.mark.parametrize("wrap", [lambda o: o, Wrapping, lambda o: Wrapping(Wrapping(o))], ids=["", "once", "twice"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_domains_has_to_be_that_of_inner_steps(wrap, kind):
    check_loader(wrap(optimizer_of(inner_steps=4)), KINDS[kind]())
    with pytest.raises(ValueError, match=r"Fish\(inner_steps=5\).*domains_per_step=4: make both equal"):
        check_loader(wrap(optimizer_of(inner_steps=5)), KINDS[kind]())
    with pytest.raises(ValueError, match=r"inner_steps=4\).*domains_per_step=2"):
        check_loader(wrap(optimizer_of(inner_steps=4)), make_loader(domains_per_step=2))


METHODS = {  # of a model and a process group, by the split that it needs
    "Fish": ("batch", lambda model, group: Fish(inner_steps=4)),
    "Fish, group": ("walks", lambda m, g: Fish(inner_steps=4, inner_state="reset", model=m, process_group=g)),
    "SmoothFish": ("batch", lambda model, group: SmoothFish(1.0, 0.1)),
    "SmoothFish, walks": ("walks", lambda model, group: SmoothFish(1, 0.1, model, process_group=group)),
    "SmoothFish, data": ("batch", lambda m, g: SmoothFish(1, 0.1, m, process_group=g, parallel="data")),
    "IDGM": ("batch", lambda model, group: IDGM(model, 1.0)),
    "IDGM, domains": ("domains", lambda m, g: IDGM(m, 1.0, process_group=g, parallel="domains")),
    "IDGM, data": ("batch", lambda m, g: IDGM(m, 1.0, process_group=g, parallel="data")),
}


@pytest.mark.parametrize("make_method", [lambda m, g: Fish(), METHODS["IDGM"][1], METHODS["SmoothFish"][1]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_method_without_inner_steps_needs_lists(make_method, kind):
    optimizer = optimizer_of(make_method)
    if "lists" in kind:
        check_loader(optimizer, KINDS[kind]())
        return
    message = r"without inner_steps .* pass Fish\(inner_steps=4\), or .* meta_batches\(loader, 4\).* meta_step"
    with pytest.raises(ValueError, match=message):
        check_loader(optimizer, KINDS[kind]())


def test_a_plain_optimizer_is_an_error():
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    for optimizer in (plain, Wrapping(plain), None):
        with pytest.raises(TypeError, match="GradMatch"):
            check_loader(optimizer, make_loader())


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_the_framework_accumulates_is_of_one_domain(steps, accumulate):
    loader = make_loader(accumulate=accumulate)
    if steps == accumulate:
        check_loader(optimizer_of(inner_steps=4), loader, steps)
        return
    message = rf"accumulation_steps={steps} .* serves {accumulate} of a domain .*accumulate={steps}\)"
    message = message if steps else r"accumulation_steps should be an integer of at least 1 \(got 0\)"
    with pytest.raises(ValueError, match=message):
        check_loader(optimizer_of(inner_steps=4), loader, steps)


class Sharded:
    """A batch sampler that a framework puts around another, to give each process some of its batches."""

    def __init__(self, batch_sampler):
        self.batch_sampler = batch_sampler

    def __iter__(self):
        return itertools.islice(self.batch_sampler, 0, None, 2)


Prepared = type("DataLoaderShard", (DataLoader,), {"__module__": "accelerate.data_loader"})
CHANGED = {
    "sharded": lambda: DataLoader(range(32), batch_sampler=Sharded(make_sampler())),
    "prepared": lambda: Prepared(range(32), batch_sampler=make_sampler()),
    "without domains": lambda: DataLoader(range(32), batch_size=2),
    "lists of a list": lambda: meta_batches([[1], [2], [3]], 3),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_loader_that_a_framework_has_changed_is_an_error(kind):
    with pytest.raises(ValueError, match=r"as you made it \(got .*: leave it out of what the framework prepares"):
        check_loader(optimizer_of(inner_steps=4), CHANGED[kind]())


# What several ranks serve together


@contextmanager
def on_rank(rank, num_ranks):
    """As if this process were one of several, which do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("split", ["batch", "walks", "domains"])
@pytest.mark.parametrize("name", METHODS)
def test_the_split_has_to_be_the_methods(name, split):
    needed, make_method = METHODS[name]
    lists = not name.startswith("Fish")
    with on_rank(1, 2) as group:
        optimizer = optimizer_of(make_method, group)
        loader = make_loader(lists=lists, num_replicas=2, rank=1, split=split)
        if split == needed:
            check_loader(optimizer, loader)
        else:
            with pytest.raises(ValueError, match=rf"split='{split}', but {name[:4]}.* needs split='{needed}'.* pass"):
                check_loader(optimizer, loader)
        alone = rf"num_replicas=1, rank=0 .* {name[:4]}.* needs split='{needed}', and this is rank 1 of 2: pass them"
        with pytest.raises(ValueError, match=alone):
            check_loader(optimizer, make_loader(lists=lists))
    with on_rank(0, 1) as group:  # nothing is asked for
        check_loader(optimizer_of(make_method, group), make_loader(lists=lists))


def test_the_number_of_ranks_has_to_be_the_groups():
    with on_rank(1, 4):
        optimizer = optimizer_of(METHODS["Fish, group"][1], dist.new_group([0, 1]))
        check_loader(optimizer, make_loader(num_replicas=2, rank=1, split="walks"))
        with pytest.raises(ValueError, match=r"num_replicas=4, .* but Fish with process_group .* of 2"):
            check_loader(optimizer, make_loader(num_replicas=4, rank=1, split="walks"))
        with pytest.raises(ValueError, match=r"rank=0 .* this is rank 1 of 2"):
            check_loader(optimizer, make_loader(num_replicas=2, rank=0, split="walks"))


def test_without_a_group_several_ranks_may_serve_the_same():
    """As those do among which tensors are split."""
    optimizer = optimizer_of(inner_steps=4)
    with on_rank(3, 4):
        check_loader(optimizer, make_loader(num_replicas=2, rank=1))
        check_loader(optimizer, make_loader(num_replicas=4, rank=3))
        with pytest.raises(ValueError, match=r"rank=0 .* this is rank 3 of 4"):
            check_loader(optimizer, make_loader(num_replicas=4, rank=0))
    with on_rank(0, 2), pytest.raises(ValueError, match=r"num_replicas=4, .* but Fish.* of 2"):
        check_loader(optimizer, make_loader(num_replicas=4, rank=0))


def test_before_the_ranks_know_of_each_other_the_split_is_checked():
    optimizer = optimizer_of(inner_steps=4)
    check_loader(optimizer, make_loader(num_replicas=2, rank=0))
    with pytest.raises(ValueError, match="split='walks', but Fish without process_group needs split='batch'"):
        check_loader(optimizer, make_loader(num_replicas=2, rank=0, split="walks"))


def test_the_numbers_are_those_of_a_group_and_of_this_ranks_part():
    with on_rank(0, 2) as group:
        with pytest.raises(ValueError, match=r"iterate over meta_batches\(loader, 2\)"):
            check_loader(optimizer_of(METHODS["IDGM, domains"][1], group), make_loader(num_replicas=2, split="domains"))
        for kind in ("streams", "lists of streams"):  # nobody knows what each rank has
            check_loader(optimizer_of(METHODS["Fish, group"][1], group), KINDS[kind]())
