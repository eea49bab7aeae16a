"""What goes wrong on one rank is raised on all, under every method that shares work: nothing changes, nobody waits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from _spread import Batch, build, domain_batches, error_of, loss_of, mine, not_a_number_on_last, same, state_of, world
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from torch_gradmatch import ERM, IDGM, Aggregate, Fish, Fishr, GradMatch, GroupDRO, SmoothFish, VREx

METHODS: dict[str, Callable[..., Any]] = {  # of a model and its head
    "Fish, walks": lambda m, _: Fish(0.3, inner_state="reset", model=m, **world()),
    "SmoothFish, walks": lambda m, _: SmoothFish(1.0, 0.05, model=m, **world()),
    "SmoothFish, data": lambda m, _: SmoothFish(1.0, 0.05, model=m, **world(parallel="data")),
    "SmoothFish, data, DDP": lambda m, _: SmoothFish(1.0, 0.05, DistributedDataParallel(m), **world(parallel="data")),
    "IDGM, domains": lambda m, _: IDGM(m, 0.3, **world()),
    "IDGM, data": lambda m, _: IDGM(m, 0.3, **world(parallel="data")),
    "matched": lambda m, head: IDGM(m, matched=head, **world(parallel="data")),
    "Fishr": lambda m, head: Fishr(m, head, **world()),
    "ERM": lambda m, _: ERM(model=m, **world()),
    "VREx": lambda m, _: VREx(0.7, model=m, **world()),
    "GroupDRO": lambda m, _: GroupDRO(0.5, model=m, **world()),
    "Aggregate": lambda m, _: Aggregate(lambda matrix: matrix.mean(0), model=m, **world()),
}
TWICE = ("IDGM, domains", "IDGM, data")  # evaluate every loss again
UNEQUAL = "the same number of batches, but it is 3 on rank 0 and 2 on rank 1"
EXPECTED = {
    "nan": "the loss of batch",
    "raises": "out of order",
    "unrelated": "depends on none of the parameters",
    "infinite on the way": "inner walk of SmoothFish diverged: the loss of batch 1|the loss of batch 1 is inf",
    "not the same twice": "is not the same twice",
    "empty": "batches is empty",
    "fewer": UNEQUAL,
    "learning rate": r"the same learning rates, but it is \[0.01\] on rank 0 and \[0.02\] on rank 1",
    "setting": "same method",
}


class BoomError(Exception):
    """The user's."""


def go_wrong(name: str) -> tuple[dict[str, str], bool, Any, str]:
    """Rank 1 alone goes wrong, in one way after the other; then all go on, and at last drift apart."""
    last = dist.get_rank() == 1
    model: Any = build("batch_norm")
    method = METHODS[name](model, model[-1])
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=0.01), method)
    loss_fn = partial(loss_of, method.model)
    own = name.endswith(("walks", "domains"))

    def batches(seed: int) -> list[Batch]:
        return domain_batches(3, seed + 100 * dist.get_rank()) if own else mine(domain_batches(3, seed))

    calls, calls_again = itertools.count(1), itertools.count(1)

    def raises(batch: Batch) -> Tensor:
        if last and next(calls) == (4 if name in TWICE else 2):  # in the second pass, or in the middle of the first
            raise BoomError("out of order")
        return loss_fn(batch)

    def unrelated(batch: Batch) -> Tensor:
        return torch.ones((), requires_grad=True) if last else loss_fn(batch)

    def infinite_on_the_way(batch: Batch) -> Tensor:
        at_start = torch.equal(next(model.parameters()), start)
        return loss_fn(batch) * (float("inf") if last and not at_start else 1.0)

    def with_a_memory(batch: Batch) -> Tensor:
        return loss_fn(batch) * (1 + 0.1 * last * next(calls_again))

    optimizer.meta_step(loss_fn, batches(0))
    start = next(model.parameters()).detach().clone()
    before = state_of(model, optimizer)
    named = {f"{label} of {dist.get_rank()}": batch for label, batch in zip("abc", batches(1), strict=True)}
    found = {
        "nan": error_of(optimizer.meta_step, not_a_number_on_last(loss_fn), named if "domains" in name else batches(1)),
        "raises": error_of(optimizer.meta_step, raises, batches(1)),
        "empty": error_of(optimizer.meta_step, loss_fn, [] if last else batches(1)),
    }
    if "Fish, " in name or "IDGM" in name:
        found["unrelated"] = error_of(optimizer.meta_step, unrelated, batches(1))
    if name in ("SmoothFish, walks", "SmoothFish, data, DDP"):
        found["infinite on the way"] = error_of(optimizer.meta_step, infinite_on_the_way, batches(1))
    if name in TWICE:
        found["not the same twice"] = error_of(optimizer.meta_step, with_a_memory, batches(1))
    if name != "IDGM, domains":
        found["fewer"] = error_of(optimizer.meta_step, loss_fn, batches(1)[last:])
    optimizer.param_groups[0]["lr"] = 0.02 if last else 0.01
    found["learning rate"] = error_of(optimizer.meta_step, loss_fn, batches(1))
    optimizer.param_groups[0]["lr"] = 0.01
    setting = "meta_lr" if name.startswith("Fish,") else "gamma" if hasattr(method, "gamma") else None
    if setting is not None:
        kept = getattr(method, setting)
        setattr(method, setting, 0.4 if last else kept)
        found["setting"] = error_of(optimizer.meta_step, loss_fn, batches(1))
        setattr(method, setting, kept)
    unchanged = same(before, state_of(model, optimizer))
    optimizer.meta_step(loss_fn, batches(2))
    after = state_of(model, optimizer)
    with torch.no_grad():
        next(model.parameters()).add_(float(last))
    optimizer.load_state_dict(optimizer.state_dict())
    return found, unchanged, after, error_of(optimizer.meta_step, loss_fn, batches(2))


@pytest.mark.parametrize("name", METHODS)
def test_what_goes_wrong_on_one_rank_is_raised_on_all_and_training_goes_on(name: str):
    everywhere = on_ranks(2, go_wrong, name)
    for rank, (found, unchanged, _, drifted) in enumerate(everywhere):
        assert unchanged
        for way, message in found.items():
            assert re.search(EXPECTED[way], message), (way, message)
        if "walks" in name or "DDP" in name:
            assert found["nan"].startswith(f"ValueError: {'' if rank else 'on rank 1: '}the loss of batch")
        if "domains" in name:
            assert "batch 3 (domain 'a of 1') is nan" in found["nan"]
        assert found["raises"].startswith("BoomError: " if rank else "RuntimeError: on rank 1: BoomError: ")
        assert "parameter number 0 of the optimizer" in drifted
    if "walks" not in name:
        assert same(everywhere[0][2], everywhere[1][2])
