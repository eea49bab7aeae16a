"""What a meta-iteration sends: few and large reductions, and some numbers by which the ranks agree."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import _spread as ranks
import pytest
import torch.distributed as dist
from _ranks import on_ranks
from torch.optim import Adam

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish


class Case(NamedTuple):
    """Of how many domains, and the reductions: as large as the parameters, and others of a few numbers or buffers."""

    method: Callable[..., Any]
    scheme: str
    domains: int
    large: int
    small: int | None = None
    network: str = "wide"


def fish(model: Any, **shared: Any) -> Fish:
    return Fish(0.3, inner_state="reset", model=model, **shared)


def smooth(gamma: float, **settings: Any) -> Callable[..., SmoothFish]:
    return lambda model, **shared: SmoothFish(gamma, 0.05, model=model, **settings, **shared)


def idgm(agreement: str, parallel: str) -> Callable[..., IDGM]:
    return lambda model, **shared: IDGM(model, 0.3, agreement, parallel=parallel, **shared)


CASES = {
    "Fish, walks, 2 domains": Case(fish, "walks", 2, 1, 0, "smooth"),
    "Fish, walks, 5 domains": Case(fish, "walks", 5, 1, 0, "smooth"),
    "SmoothFish, walks": Case(smooth(2.0), "walks", 3, 1, 4),
    "SmoothFish, one walk each": Case(smooth(1.0), "walks", 3, 1, 4),
    "SmoothFish, data": Case(smooth(1.0, parallel="data"), "data", 3, 3, 4),
    "SmoothFish, data, mean": Case(smooth(2.0, parallel="data"), "data", 3, 5, 4),
    "SmoothFish, DDP": Case(smooth(1.0), "ddp", 3, 3),
    "SmoothFish, DDP, mean": Case(smooth(2.5), "ddp", 3, 5),
    "SmoothFish, DDP, symmetric": Case(smooth(0.3, symmetric=True), "ddp", 3, 7),
    "IDGM, domains, 1 each": Case(idgm("variance", "domains"), "domains", 1, 2, 4),
    "IDGM, domains, 4 each": Case(idgm("inner_product", "domains"), "domains", 4, 2, 4),
    "IDGM, domains, cosine": Case(idgm("cosine", "domains"), "domains", 4, 3, 4),
    "IDGM, data": Case(idgm("variance", "data"), "data", 4, 5, 4),
    "IDGM, data, cosine": Case(idgm("cosine", "data"), "data", 4, 5, 4),
}


def sent(name: str) -> tuple[list[tuple[list[int], int]], Any]:
    """Bytes of each reduction, and how many agreements, in each meta-iteration; and what all ranks have then."""
    case = CASES[name]
    model = ranks.build(case.network)
    called = ranks.spread("ddp", model) if case.scheme == "ddp" else model
    method = case.method(called, **({} if case.scheme == "ddp" else ranks.world()))
    optimizer, found = GradMatch(Adam(model.parameters(), lr=1e-2), method), []
    for seed in range(3):
        own = ranks.domain_batches(case.domains, 10 * seed + dist.get_rank())
        batches = own if case.scheme in ("walks", "domains") else ranks.mine(ranks.domain_batches(case.domains, seed))
        with ranks.Collectives() as collectives:
            optimizer.meta_step(partial(ranks.loss_of, called), batches)
        found.append((collectives.reductions(), collectives.agreements()))
    return found, (ranks.weights(model), None if case.scheme == "ddp" else ranks.buffers_of(model))


@pytest.mark.parametrize("name", CASES)
def test_all_reduces_are_few_and_ranks_stay_the_same(name: str):
    case = CASES[name]
    size = sum(p.nbytes for p in ranks.build(case.network).parameters())
    everywhere = on_ranks(3, sent, name)
    assert all(ranks.same(everywhere[0][1], state) for _, state in everywhere)
    (_, of_first), *_, (reductions, of_last) = everywhere[0][0]
    assert [n for n in reductions if n > size / 4] == [size] * case.large
    if case.small is not None:
        assert len(reductions) == case.large + case.small  # losses or flags, which buffers moved, buffers of two kinds
        assert of_last == of_first - 2  # parameters are compared once
