"""The check that what the ranks serve fits how the method shares its work."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

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


@contextmanager
def on_rank(rank, num_ranks):
    """As if this process were one of several, which do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_loader(lists=False, **settings):
    sampler = DomainBatchSampler(DOMAINS, batch_size=4, **settings)
    loader = DataLoader(range(32), batch_sampler=sampler)
    return meta_batches(loader, sampler.batches_per_group) if lists else loader


def make_optimizer(make_method):
    model = nn.Linear(2, 1)
    return GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), make_method(model, dist.group.WORLD))


# By the split that it needs: a name, and the method of a model and a process group
def walks(model: nn.Module, group: dist.ProcessGroup) -> dict[str, Any]:
    """What ranks that walk by themselves under Fish ask for."""
    return {"inner_state": "reset", "model": model, "process_group": group}


METHODS = {
    "Fish": ("batch", lambda model, group: Fish(inner_steps=4)),
    "Fish, group": (
        "walks",
        lambda model, group: Fish(inner_steps=4, **walks(model, group)),
    ),
    "SmoothFish": ("batch", lambda model, group: SmoothFish(1.0, 0.1)),
    "SmoothFish, walks": (
        "walks",
        lambda model, group: SmoothFish(1, 0.1, model, process_group=group),
    ),
    "SmoothFish, data": (
        "batch",
        lambda model, group: SmoothFish(1, 0.1, model, process_group=group, parallel="data"),
    ),
    "IDGM": ("batch", lambda model, group: IDGM(model, 1.0)),
    "IDGM, domains": ("domains", lambda model, group: IDGM(model, 1.0, process_group=group, parallel="domains")),
    "IDGM, data": ("batch", lambda model, group: IDGM(model, 1.0, process_group=group, parallel="data")),
}


@pytest.mark.parametrize("split", ["batch", "walks", "domains"])
@pytest.mark.parametrize("name", METHODS)
def test_the_split_has_to_be_the_methods(name, split):
    needed, make_method = METHODS[name]
    with on_rank(1, 2):
        optimizer = make_optimizer(make_method)
        loader = make_loader(not name.startswith("Fish"), num_replicas=2, rank=1, split=split)
        if split == needed:
            check_loader(optimizer, loader)
            return
        with pytest.raises(ValueError, match=rf"split='{split}', but {name[:4]}.* needs split='{needed}'.* pass"):
            check_loader(optimizer, loader)


@pytest.mark.parametrize("name", METHODS)
def test_one_rank_of_a_sampler_is_too_few(name):
    split, make_method = METHODS[name]
    message = rf"num_replicas=1, rank=0 .* {name[:4]}.* needs split='{split}', and this is rank \d of 2: pass them"
    with on_rank(0, 2), pytest.raises(ValueError, match=message):
        check_loader(make_optimizer(make_method), make_loader(not name.startswith("Fish")))


@pytest.mark.parametrize("name", METHODS)
def test_in_a_world_of_one_rank_nothing_is_asked_for(name):
    with on_rank(0, 1):
        check_loader(make_optimizer(METHODS[name][1]), make_loader(not name.startswith("Fish")))


def test_the_number_of_ranks_has_to_be_the_groups():
    with on_rank(1, 4):
        group = dist.new_group([0, 1])
        optimizer = make_optimizer(lambda model, _: Fish(inner_steps=4, **walks(model, group)))
        check_loader(optimizer, make_loader(num_replicas=2, rank=1, split="walks"))
        with pytest.raises(ValueError, match=r"num_replicas=4, .* but Fish with process_group .* of 2"):
            check_loader(optimizer, make_loader(num_replicas=4, rank=1, split="walks"))
        with pytest.raises(ValueError, match=r"rank=0 .* this is rank 1 of 2"):
            check_loader(optimizer, make_loader(num_replicas=2, rank=0, split="walks"))


def test_without_a_group_several_ranks_may_serve_the_same():
    """As those do among which tensors are split."""
    with on_rank(3, 4):
        optimizer = make_optimizer(lambda model, _: Fish(inner_steps=4))
        check_loader(optimizer, make_loader(num_replicas=2, rank=1))
        check_loader(optimizer, make_loader(num_replicas=4, rank=3))
        with pytest.raises(ValueError, match=r"rank=0 .* this is rank 3 of 4"):
            check_loader(optimizer, make_loader(num_replicas=4, rank=0))
    with on_rank(0, 2), pytest.raises(ValueError, match=r"num_replicas=4, .* but Fish.* of 2"):
        check_loader(optimizer, make_loader(num_replicas=4, rank=0))


def test_before_the_ranks_know_of_each_other_the_split_is_checked():
    optimizer = make_optimizer(lambda model, _: Fish(inner_steps=4))
    check_loader(optimizer, make_loader(num_replicas=2, rank=0))
    with pytest.raises(ValueError, match="split='walks', but Fish without process_group needs split='batch'"):
        check_loader(optimizer, make_loader(num_replicas=2, rank=0, split="walks"))


def test_inner_steps_are_the_domains_of_a_group():
    with on_rank(0, 2):
        optimizer = make_optimizer(lambda model, group: Fish(inner_steps=2, **walks(model, group)))
        with pytest.raises(ValueError, match=r"Fish\(inner_steps=2\).*domains_per_step=4"):
            check_loader(optimizer, make_loader(num_replicas=2, rank=0, split="walks"))


def test_lists_have_the_batches_of_a_rank():
    with on_rank(0, 2):
        optimizer = make_optimizer(METHODS["IDGM, domains"][1])
        with pytest.raises(ValueError, match=r"iterate over meta_batches\(loader, 2\)"):
            check_loader(optimizer, make_loader(num_replicas=2, rank=0, split="domains"))


def test_loaders_of_streams_are_left_alone():
    with on_rank(0, 2):
        loader = DomainLoader({"a": [1], "b": [2]}, 2)
        check_loader(
            make_optimizer(lambda model, group: Fish(inner_steps=2, **walks(model, group))),
            loader,
        )
        check_loader(make_optimizer(lambda model, group: IDGM(model, 1.0)), meta_batches(loader, 2))
