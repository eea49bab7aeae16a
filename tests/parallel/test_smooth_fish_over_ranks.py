"""SmoothFish on several ranks: the mean of their walks, or one walk of which each rank sees a part of every batch."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import _spread as ranks
import torch
import torch.distributed as dist
from _ranks import on_ranks
from _reference import smooth_fish_gradient
from torch import Tensor, nn

from torch_gradmatch import GradMatch, SmoothFish

NETWORKS = ("batch_norm", "transformer", "tied")
SETTINGS = {"walk": (1.0, False), "mean": (0.0, False), "strong": (2.5, False), "symmetric": (0.3, True)}
LR = 0.05


def own(seed: int, rank: int, domains: int = 3) -> list[ranks.Batch]:
    """A rank's batches in an order of its own."""
    return ranks.domain_batches(domains, 100 * seed + rank)[:: -1 if rank % 2 else 1]


def by(model: nn.Module, gamma: float, optimizer: Any = None, **settings: Any) -> GradMatch[SmoothFish]:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return GradMatch(optimizer, SmoothFish(gamma, LR, model=model, **ranks.world(**settings)))


def steps() -> dict[Any, Any]:
    found = {}
    for name, (kind, (gamma, symmetric)) in itertools.product(NETWORKS, SETTINGS.items()):
        model = ranks.build(name)
        report = by(model, gamma, symmetric=symmetric).meta_step(partial(ranks.loss_of, model), own(1, dist.get_rank()))
        found[name, kind] = [ranks.gradients_of(model), ranks.buffers_of(model)], report.losses
    return found


def test_walks_go_to_their_mean():
    everywhere = on_ranks(2, steps)
    for (name, kind), (found, _) in everywhere[0].items():
        assert ranks.same(found, everywhere[1][name, kind][0]), (name, kind)
        gamma, symmetric = SETTINGS[kind]
        gradients, buffers = [], []
        for rank in range(2):
            model = ranks.build(name)
            gradients.append(smooth_fish_gradient(model, ranks.loss_of, own(1, rank), gamma, LR, symmetric=symmetric))
            buffers.append(ranks.buffers_of(model))
            if kind != "walk":
                here = torch.stack([ranks.loss_of(ranks.build(name), batch) for batch in own(1, rank)]).detach()
                torch.testing.assert_close(everywhere[rank][name, kind][1], here)
        mean = [sum(parts) / 2 for parts in zip(*gradients, strict=True)]
        torch.testing.assert_close(found[0], mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[1], ranks.mean_of_buffers(buffers))


def by_a_line_search() -> Any:
    model = ranks.build("wide")
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    optimizer = by(model, 1.0, lbfgs)
    for seed in range(4):
        optimizer.meta_step(partial(ranks.loss_of, model), own(seed, dist.get_rank()))
    return [dict(model.state_dict()), ranks.gradients_of(model)]


def test_a_line_search_goes_the_same_way_everywhere():
    everywhere = on_ranks(3, by_a_line_search)
    assert all(ranks.same(everywhere[0], other) for other in everywhere)


def with_scaler() -> Any:
    last = dist.get_rank() == dist.get_world_size() - 1
    model = ranks.build("smooth", torch.float32)
    weight = next(model.parameters())
    optimizer = by(model, 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    stood = []
    for seed in range(3):
        batches = [(x.float(), y.float()) for x, y in own(seed, dist.get_rank())]
        steep = batches[-1] if last and seed == 1 else None

        def loss_fn(batch: ranks.Batch, steep: ranks.Batch | None = steep) -> Tensor:
            kink = 0.0 if batch is not steep else (weight - weight.detach()).sum().sqrt()  # zero, of infinite slope
            return ranks.loss_of(model, batch) + kink

        before = weight.detach().clone()
        optimizer.meta_step(loss_fn, batches, scaler)
        stood.append(torch.equal(before, weight.detach()))
    return stood, scaler.get_scale(), [p.detach().clone() for p in model.parameters()]


def test_gradients_that_overflow_on_one_rank_are_skipped_on_all():
    everywhere = on_ranks(2, with_scaler)
    assert ranks.same(*everywhere)
    assert everywhere[0][:2] == ([False, True, False], 512.0)


def drift_apart() -> tuple[str, str, bool]:
    """Ordinary steps on gradients that nobody averages let the ranks drift apart. And a group of one is no group."""
    model = ranks.build("smooth")
    optimizer = by(model, 1.0)
    batches = own(0, dist.get_rank())
    loss_fn = partial(ranks.loss_of, model)
    optimizer.meta_step(loss_fn, batches)
    loss_fn(batches[0]).backward()
    optimizer.step()
    told = ranks.error_of(optimizer.meta_step, loss_fn, batches)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    directions = []
    for group in (alone, None):
        model = ranks.build("tied")
        by(model, 2.0, process_group=group).meta_step(partial(ranks.loss_of, model), batches)
        directions.append(ranks.gradients_of(model))
    return told, ranks.error_of(lambda: SmoothFish(1.0, LR, **ranks.world())), ranks.same(*directions)


def test_ranks_that_drifted_apart_are_told_and_one_process_is_a_group_of_one():
    for told, without_model, alone in on_ranks(2, drift_apart):
        assert "number 0 of the optimizer" in told
        assert "needs model=" in without_model
        assert alone
