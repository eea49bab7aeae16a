"""SmoothFish on several ranks: the mean of their walks, or one walk of which each rank sees a part of every batch."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from _reference import idgm_direction, smooth_fish_gradient
from _spread import Batch, build, domain_batches, loss_of, loss_over, mine
from test_idgm_over_ranks import (
    Counting,
    buffers_of,
    expected_buffers,
    fails,
    gradients_of,
    same,
    state_of,
    wide,
    world,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from torch_gradmatch import GradMatch, SmoothFish, fish_gamma

NETWORKS = ("batch_norm", "transformer", "tied")
SETTINGS = {"walk": (1.0, False), "mean": (0.0, False), "strong": (2.5, False), "symmetric": (0.3, True)}
LR = 0.05


def own(seed: int, rank: int, domains: int = 3) -> list[Batch]:
    """A rank's batches in an order of its own."""
    return domain_batches(domains, 100 * seed + rank)[:: -1 if rank % 2 else 1]


def one_step(name: str, batches: list[Batch], gamma: float, **settings: Any) -> Any:
    model = build(name)
    method = SmoothFish(gamma, LR, model=model, **world(**settings))
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), method)
    report = optimizer.meta_step(partial(loss_of, model), batches)
    return {"gradients": gradients_of(model), "buffers": buffers_of(model)}, report


def steps(parallel: str) -> dict[Any, Any]:
    found = {}
    for name, (kind, (gamma, symmetric)) in itertools.product(NETWORKS, SETTINGS.items()):
        batches = own(1, dist.get_rank()) if parallel == "walks" else mine(domain_batches(3, 1))
        found[name, kind] = one_step(name, batches, gamma, symmetric=symmetric, parallel=parallel)
    return found


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.large)])
def test_walks_go_to_their_mean(size: int):
    everywhere = on_ranks(size, steps, "walks")
    for (name, kind), (found, _) in everywhere[0].items():
        assert all(same(found, other[name, kind][0]) for other in everywhere), (name, kind)
        gamma, symmetric = SETTINGS[kind]
        gradients, buffers = [], []
        for rank in range(size):
            model = build(name)
            gradients.append(smooth_fish_gradient(model, loss_of, own(1, rank), gamma, LR, symmetric=symmetric))
            buffers.append(buffers_of(model))
            reported = everywhere[rank][name, kind][1]
            if kind != "walk":
                here = [loss_of(build(name), batch) for batch in own(1, rank)]
                torch.testing.assert_close(reported.losses, torch.stack(here).detach())
        for g, parts in zip(found["gradients"], zip(*gradients, strict=True), strict=True):
            torch.testing.assert_close(g, sum(parts) / size, rtol=1e-10, atol=1e-12)
        for key, b in found["buffers"].items():
            every = torch.stack([one[key] for one in buffers])
            torch.testing.assert_close(b, every.mean(0) if b.is_floating_point() else every.max(0).values)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.large)])
def test_parts_of_batches_make_one_walk(size: int):
    everywhere = on_ranks(size, steps, "data")
    domains = domain_batches(3, 1)
    for (name, kind), (found, report) in everywhere[0].items():
        assert all(
            same([found, vars(report)], [other[name, kind][0], vars(other[name, kind][1])]) for other in everywhere
        )
        gamma, symmetric = SETTINGS[kind]
        model = build(name)
        expected = smooth_fish_gradient(model, partial(loss_over, size=size), domains, gamma, LR, symmetric=symmetric)
        for g, wanted in zip(found["gradients"], expected, strict=True):
            torch.testing.assert_close(g, wanted, rtol=1e-10, atol=1e-12)
        if kind != "walk":
            losses = torch.stack([loss_over(build(name), batch, size) for batch in domains]).detach()
            torch.testing.assert_close(report.losses, losses)
            parts = [[(x[r::size], y[r::size]) for x, y in domains] for r in range(size)]
            torch.testing.assert_close(found["buffers"], expected_buffers(name, parts))


# ----------------------------------------------------------------------------------------------------------- the theory


def opposite_orders() -> list[Tensor]:
    """The direction's error against the exact one, while alpha is halved, and of one walk by itself."""
    batches = domain_batches(5, 3)
    batches = batches[::-1] if dist.get_rank() else batches
    directions = []
    for group in (dist.group.WORLD, None):
        for halvings in range(3, 7):
            model = build("smooth")
            method = SmoothFish(1.0, 0.5**halvings, process_group=group)
            optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), method)
            optimizer.meta_step(partial(loss_of, model), batches)
            directions.append(torch.cat([g.reshape(-1) for g in gradients_of(model)]))
    return directions


def test_two_ranks_that_walk_in_opposite_orders_follow_the_exact_direction():
    """Halve alpha: the error of the mean of two opposite walks is a quarter, that of one walk half."""
    directions = on_ranks(2, opposite_orders)[0]
    model = build("smooth")
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def loss_at(batch: Batch, vector: Tensor) -> Tensor:
        split = vector.split([p.numel() for p in model.parameters()])
        named = {n: part.view(p.shape) for (n, p), part in zip(model.named_parameters(), split, strict=True)}
        return (torch.func.functional_call(model, named, (batch[0],)) - batch[1]).square().mean()

    losses = [partial(loss_at, batch) for batch in domain_batches(5, 3)]
    exact = [idgm_direction(losses, theta, fish_gamma(0.5**halvings, 5)) for halvings in range(3, 7)]
    errors = [float((d - e).norm()) for d, e in zip(directions, [*exact, *exact], strict=True)]
    together, alone = errors[:4], errors[4:]
    assert all(3.6 <= coarse / fine <= 4.4 for coarse, fine in itertools.pairwise(together)), together
    assert all(1.7 <= coarse / fine <= 2.3 for coarse, fine in itertools.pairwise(alone)), alone
    assert together[-1] < 0.1 * alone[-1]


# ------------------------------------------------------------------------------------- many iterations, and collectives


def count_and_train(parallel: str, gamma: float, optimizer_class: Any) -> Any:
    model = wide()
    method = SmoothFish(gamma, LR, model=model, **world(parallel=parallel))
    settings = (
        {"max_iter": 5, "line_search_fn": "strong_wolfe"} if optimizer_class is torch.optim.LBFGS else {"lr": 1e-2}
    )
    optimizer = GradMatch(optimizer_class(model.parameters(), **settings), method)
    for seed in range(4):
        batches = own(seed, dist.get_rank()) if parallel == "walks" else mine(domain_batches(3, seed))
        with Counting() as counted:
            optimizer.meta_step(partial(loss_of, model), batches)
    return counted.large(model), len(counted.bytes), copy.deepcopy([model.state_dict(), gradients_of(model)])


@pytest.mark.parametrize(
    ("parallel", "gamma", "large", "number"),
    [("walks", 1.0, 1, 4), ("walks", 2.0, 1, 4), ("data", 1.0, 3, 6), ("data", 2.0, 5, 8)],
)
def test_all_reduces_are_few_and_ranks_stay_the_same(parallel: str, gamma: float, large: int, number: int):
    everywhere = on_ranks(3, count_and_train, parallel, gamma, torch.optim.Adam)
    assert all(same(everywhere[0], other) for other in everywhere)
    assert everywhere[0][0] == [1.0] * large
    assert everywhere[0][1] == number  # flags or losses, and buffers of two kinds


def test_a_line_search_goes_the_same_way_everywhere():
    everywhere = on_ranks(3, count_and_train, "walks", 1.0, torch.optim.LBFGS)
    assert all(same(everywhere[0][2], other[2]) for other in everywhere)


def with_scaler() -> Any:
    last = dist.get_rank() == dist.get_world_size() - 1
    model = build("smooth", torch.float32)
    weight = next(model.parameters())
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), SmoothFish(1.0, LR, **world()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    stood = []
    for seed in range(3):
        batches = [(x.float(), y.float()) for x, y in own(seed, dist.get_rank())]
        steep = batches[-1] if last and seed == 1 else None

        def loss_fn(batch: Batch, steep: Batch | None = steep) -> Tensor:
            kink = 0.0 if batch is not steep else (weight - weight.detach()).sum().sqrt()  # zero, of infinite slope
            return loss_of(model, batch) + kink

        before = weight.detach().clone()
        optimizer.meta_step(loss_fn, batches, scaler)
        stood.append(torch.equal(before, weight.detach()))
    return stood, scaler.get_scale(), [p.detach().clone() for p in model.parameters()]


def test_gradients_that_overflow_on_one_rank_are_skipped_on_all():
    everywhere = on_ranks(2, with_scaler)
    assert same(*everywhere)
    assert everywhere[0][:2] == ([False, True, False], 512.0)


# --------------------------------------------------------------------------------------------------------------- errors


def go_wrong(parallel: str) -> Any:
    last = dist.get_rank() == dist.get_world_size() - 1
    model = build("batch_norm")
    used = DistributedDataParallel(model) if parallel == "data" else model
    optimizer = GradMatch(
        torch.optim.Adam(model.parameters(), lr=1e-2), SmoothFish(1.0, LR, model=used, **world(parallel=parallel))
    )
    loss_fn = partial(loss_of, used)

    def batches(seed: int) -> list[Batch]:
        return mine(domain_batches(3, seed)) if parallel == "data" else own(seed, dist.get_rank())

    def infinite_along_the_walk(batch: Batch) -> Tensor:
        at_start = torch.equal(next(model.parameters()), start)
        return loss_fn(batch) * (float("inf") if last and not at_start else 1.0)

    calls = itertools.count()

    def boom(batch: Batch) -> Tensor:
        if next(calls) == 1 and last:
            raise OSError("no such file")
        return loss_fn(batch)

    found = [fails(optimizer, loss_fn, batches(0))]
    start = next(model.parameters()).detach().clone()
    before = state_of(model, optimizer)
    found += [fails(optimizer, wrong, batches(1)) for wrong in (infinite_along_the_walk, boom)]
    found.append(fails(optimizer, loss_fn, batches(1)[last:]))
    optimizer.method.symmetric = last
    found.append(fails(optimizer, loss_fn, batches(1)))
    optimizer.method.symmetric = False
    unchanged = same(before, state_of(model, optimizer))
    found.append(fails(optimizer, loss_fn, batches(2)))
    return found, unchanged, state_of(model, optimizer)


@pytest.mark.parametrize("parallel", ["walks", "data"])
def test_what_goes_wrong_on_one_rank_is_raised_on_all_and_changes_nothing(parallel: str):
    everywhere = on_ranks(2, go_wrong, parallel)
    for found, unchanged, _ in everywhere:
        assert unchanged
        fine, diverged, failed, unequal, other, again = found
        assert fine is None
        assert again is None
        if parallel == "walks":
            assert "inner walk of SmoothFish diverged: the loss of batch 1" in diverged[1]
        else:
            assert "the loss of batch 1 is inf" in diverged[1]
        assert "no such file" in failed[1]
        assert "the same number of batches, but it is 3 on rank 0 and 2 on rank 1" in unequal[1]
        assert "the same method" in other[1]
    assert same(everywhere[0][2], everywhere[1][2])


def warm_up() -> tuple[str, str] | None:
    """Ordinary steps on gradients that nobody averages let the ranks drift apart."""
    model = build("smooth")
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), SmoothFish(1.0, LR, **world()))
    batches = own(0, dist.get_rank())
    loss_fn = partial(loss_of, model)
    optimizer.meta_step(loss_fn, batches)
    loss_fn(batches[0]).backward()
    optimizer.step()
    return fails(optimizer, loss_fn, batches)


def test_ranks_that_drifted_apart_are_told():
    for error in on_ranks(2, warm_up):
        assert "number 0 of the optimizer" in error[1]


def without_the_model() -> tuple[str, str] | None:
    model = build("batch_norm")
    before = copy.deepcopy(model.state_dict())
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), SmoothFish(1.0, LR, **world()))
    error = fails(optimizer, partial(loss_of, model), own(0, dist.get_rank()))
    assert same(before, model.state_dict())
    return error


def test_buffers_that_nobody_averages_are_refused():
    for error in on_ranks(2, without_the_model):
        assert "pass the model, SmoothFish(..., model=model)" in error[1]


def test_one_process_is_a_group_of_one():
    assert on_ranks(2, alone) == [True, True]


def alone() -> bool:
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    directions = []
    for chosen in (group, None):
        model = build("tied")
        optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), SmoothFish(2.0, LR, process_group=chosen))
        optimizer.meta_step(partial(loss_of, model), own(0, dist.get_rank()))
        directions.append(copy.deepcopy(gradients_of(model)))
    return same(*directions)
