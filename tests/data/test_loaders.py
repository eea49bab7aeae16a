"""The check that a loader, a loop and an optimizer fit: the numbers of domains, what is accumulated, and the ranks."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from _samplers import SPLITS
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import BatchSampler, DataLoader

from torch_gradmatch import IDGM, DomainBatchSampler, DomainLoader, Fish, GradMatch, SmoothFish, meta_batches
from torch_gradmatch import check_loader as check


def make_loader(lists=False, **settings):
    sampler = DomainBatchSampler([name for name in "abcd" for _ in range(8)], batch_size=4, **settings)
    loader = DataLoader(range(32), batch_sampler=sampler)
    return meta_batches(loader) if lists else loader


STREAMS = {name: [name] for name in "abcd"}
KINDS = {
    "plain": make_loader,
    "sampler": lambda: DataLoader(torch.arange(32), sampler=make_loader().batch_sampler, batch_size=None),
    "lists": lambda: make_loader(lists=True),
    "streams": lambda: DomainLoader(STREAMS, 4),
    "lists of streams": lambda: meta_batches(DomainLoader(STREAMS, 4)),
}
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


def optimizer_of(name="Fish", group=None, **settings):
    model = nn.Linear(2, 1)
    method = Fish(**settings) if settings else METHODS[name][1](model, group)
    return GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), method)


class Wrapping:
    """As Accelerate's and Lightning's wrappers, which call what they wrap ``optimizer``."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_domains_has_to_be_that_of_inner_steps(kind):
    for wrap in (lambda o: o, Wrapping, lambda o: Wrapping(Wrapping(o))):
        check(wrap(optimizer_of(inner_steps=4)), KINDS[kind]())
        with pytest.raises(ValueError, match=r"Fish\(inner_steps=5\).*domains_per_step=4: make both equal"):
            check(wrap(optimizer_of(inner_steps=5)), KINDS[kind]())
    with pytest.raises(ValueError, match=r"inner_steps=4\).*domains_per_step=2"):
        check(optimizer_of(inner_steps=4), make_loader(domains_per_step=2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_without_inner_steps_needs_lists(kind):
    message = r"without inner_steps .* pass Fish\(inner_steps=4\), or .* meta_batches\(loader, 4\).* meta_step"
    for optimizer in (optimizer_of(meta_lr=0.5), optimizer_of("IDGM"), optimizer_of("SmoothFish")):
        if "lists" in kind:
            check(optimizer, KINDS[kind]())
            continue
        with pytest.raises(ValueError, match=message):
            check(optimizer, KINDS[kind]())


def test_a_plain_optimizer_is_an_error():
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    for optimizer in (plain, Wrapping(plain), None):
        with pytest.raises(TypeError, match="GradMatch"):
            check(optimizer, make_loader())


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_the_framework_accumulates_is_of_one_domain(steps, accumulate):
    loader = make_loader(accumulate=accumulate)
    if steps == accumulate:
        check(optimizer_of(), loader, steps)
        return
    message = rf"accumulation_steps={steps} .* serves {accumulate} of a domain .*accumulate={steps}\)"
    message = message if steps else r"accumulation_steps should be an integer of at least 1 \(got 0\)"
    with pytest.raises(ValueError, match=message):
        check(optimizer_of(), loader, steps)


Prepared = type("DataLoaderShard", (DataLoader,), {"__module__": "accelerate.data_loader"})
CHANGED = {
    "sharded": lambda: DataLoader(range(32), batch_sampler=BatchSampler(make_loader().batch_sampler, 1, False)),
    "prepared": lambda: Prepared(range(32), batch_sampler=make_loader().batch_sampler),
    "without domains": lambda: DataLoader(range(32), batch_size=2),
    "lists of a list": lambda: meta_batches([[1], [2], [3]], 3),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_loader_that_a_framework_has_changed_is_an_error(kind):
    with pytest.raises(ValueError, match=r"as you made it \(got .*: leave it out of what the framework prepares"):
        check(optimizer_of(), CHANGED[kind]())


@contextmanager
def on_rank(rank, num_ranks):
    """As if this process were one of several, which do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", METHODS)
def test_the_split_has_to_be_the_methods(name, split):
    needed, lists = METHODS[name][0], not name.startswith("Fish")
    with on_rank(1, 2) as group:
        optimizer = optimizer_of(name, group)
        loader = make_loader(lists, num_replicas=2, rank=1, split=split)
        if split == needed:
            check(optimizer, loader)
        else:
            with pytest.raises(ValueError, match=rf"split='{split}', but {name[:4]}.* needs split='{needed}'.* pass"):
                check(optimizer, loader)
        alone = rf"num_replicas=1, rank=0 .* {name[:4]}.* needs split='{needed}', and this is rank 1 of 2: pass them"
        with pytest.raises(ValueError, match=alone):
            check(optimizer, make_loader(lists))
    with on_rank(0, 1) as group:  # nothing is asked for
        check(optimizer_of(name, group), make_loader(lists))


def test_the_number_of_ranks_has_to_be_the_groups():
    with on_rank(1, 4):
        optimizer = optimizer_of("Fish, group", dist.new_group([0, 1]))
        check(optimizer, make_loader(num_replicas=2, rank=1, split="walks"))
        with pytest.raises(ValueError, match=r"num_replicas=4, .* but Fish with process_group .* of 2"):
            check(optimizer, make_loader(num_replicas=4, rank=1, split="walks"))
        with pytest.raises(ValueError, match=r"rank=0 .* this is rank 1 of 2"):
            check(optimizer, make_loader(num_replicas=2, rank=0, split="walks"))


def test_without_a_group_several_ranks_may_serve_the_same():
    """As those do among which tensors are split."""
    with on_rank(3, 4):
        check(optimizer_of(), make_loader(num_replicas=2, rank=1))
        check(optimizer_of(), make_loader(num_replicas=4, rank=3))
        with pytest.raises(ValueError, match=r"rank=0 .* this is rank 3 of 4"):
            check(optimizer_of(), make_loader(num_replicas=4, rank=0))
    with on_rank(0, 2), pytest.raises(ValueError, match=r"num_replicas=4, .* but Fish.* of 2"):
        check(optimizer_of(), make_loader(num_replicas=4, rank=0))
    check(optimizer_of(), make_loader(num_replicas=2, rank=0))  # before the ranks know of each other
    with pytest.raises(ValueError, match="split='walks', but Fish without process_group needs split='batch'"):
        check(optimizer_of(), make_loader(num_replicas=2, rank=0, split="walks"))


def test_the_numbers_are_those_of_a_group_and_of_this_ranks_part():
    with on_rank(0, 2) as group:
        with pytest.raises(ValueError, match=r"iterate over meta_batches\(loader, 2\)"):
            check(optimizer_of("IDGM, domains", group), make_loader(num_replicas=2, split="domains"))
        for kind in ("streams", "lists of streams"):  # nobody knows what each rank has
            check(optimizer_of("Fish, group", group), KINDS[kind]())
