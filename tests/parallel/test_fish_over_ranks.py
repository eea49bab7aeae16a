"""Fish on several ranks: over DDP and ``fully_shard`` as on one process, and by walks whose mean counts."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import _spread as ranks
import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from torch_gradmatch import Fish, GradMatch

NETWORKS = ("batch_norm", "transformer", "tied")
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def adam(model: nn.Module, method: Fish) -> GradMatch[Fish]:
    return GradMatch(OPTIMIZERS["adam"](model.parameters()), method)


def iterate(model: nn.Module, optimizer: GradMatch[Fish], batches: list[ranks.Batch], *, manual: bool = False) -> Any:
    """One meta-iteration, by ``meta_step`` or by a loop of the user's."""
    if not manual:
        return optimizer.meta_step(partial(ranks.loss_of, model), batches)
    for batch in batches:
        optimizer.zero_grad()
        ranks.loss_of(model, batch).backward()
        optimizer.step()
    return optimizer.last_meta_step


# ------------------------------------------------------------------------------------------------------- in lockstep


def sent_in_lockstep(scheme: str, domains: int) -> tuple[list[Any], int, int]:
    """What a meta-iteration sends that its inner steps by themselves do not, and how much those send."""
    model = ranks.spread(scheme, ranks.build("smooth"))
    optimizer = adam(model, Fish(0.3, model=model))
    batches = ranks.mine(ranks.domain_batches(domains, 0))
    iterate(model, optimizer, batches)
    with ranks.Collectives() as of_fish:
        iterate(model, optimizer, batches)
    with ranks.Collectives() as of_steps:
        for batch in batches:
            optimizer.optimizer.zero_grad()
            ranks.loss_of(model, batch).backward()
            optimizer.optimizer.step()
    more = list(of_fish.sent)
    for one in of_steps.sent:
        more.remove(one)
    return more, len(of_steps.sent), sum(of_steps.reductions())


@pytest.mark.parametrize("scheme", ["ddp", "fsdp"])
def test_it_sends_what_its_steps_send_and_a_few_numbers(scheme: str):
    size = sum(p.numel() * 8 for p in ranks.build("smooth").parameters())
    for domains in (2, 5):
        more, number, reduced = on_ranks(2, sent_in_lockstep, scheme, domains)[0]
        assert len(more) <= 3
        assert all(bytes_sent < 100 for _, bytes_sent in more)
        assert number >= domains
        assert reduced == (domains * size if scheme == "ddp" else 0)


def wide_slow_weights() -> Any:
    models = ranks.sharded(ranks.build("smooth", torch.bfloat16)), ranks.build("smooth", torch.bfloat16)
    optimizers = [
        GradMatch(torch.optim.SGD(m.parameters(), lr=0.1), Fish(0.01, meta_dtype=torch.float32)) for m in models
    ]
    for iteration in range(4):
        batches = ranks.domain_batches(3, iteration, dtype=torch.bfloat16)  # the same on every rank: their mean is it
        for model, optimizer in zip(models, optimizers, strict=True):
            iterate(model, optimizer, batches)
    slow = [optimizer.state_dict()["gradmatch"]["slow_weights"] for optimizer in optimizers]
    placements = [str(s.placements) for s in slow[0].values()]
    wide = [{str(key): ranks.full(s) for key, s in one.items()} for one in slow]
    return placements, wide, ranks.distance(*map(ranks.weights, models))


def test_slow_weights_in_single_precision_are_sharded_like_the_parameters():
    for placements, (sharded_slow, slow), of_fast in on_ranks(2, wide_slow_weights):
        assert placements == ["(Shard(dim=0),)"] * 4
        assert all(s.dtype is torch.float32 for s in sharded_slow.values())
        assert ranks.distance(sharded_slow, slow) < 2e-3  # of a step's size .1, in bf16
        assert of_fast < 1e-2


# ------------------------------------------------------------------------------------------ what goes wrong in lockstep


def look_and_go_back() -> list[bool]:
    """With an evaluation everywhere, which leaves whole parameters that do not see what is written to the shards."""
    model = ranks.sharded(ranks.build("batch_norm"))
    optimizer = adam(model, Fish(0.5, inner_steps=3, model=model))

    def look() -> Any:
        model.eval()
        with torch.no_grad():
            output = model(ranks.domain_batches(1, 9)[0][0])
        model.train()
        return output, copy.deepcopy(dict(model.state_dict()))

    before = look()
    iterate(model, optimizer, ranks.mine(ranks.domain_batches(2, 0)), manual=True)
    fast = look()
    found = [not ranks.same(fast, before)]
    with optimizer.slow_weights():
        found.append(ranks.same(look(), before))
    found.append(ranks.same(look(), fast))
    optimizer.rollback()
    return [*found, ranks.same(look(), before)]


def test_slow_weights_and_rollback_are_exact_over_shards():
    assert on_ranks(2, look_and_go_back) == [[True] * 4] * 2


def diverge_and_overflow() -> Any:
    """Infinity in the rows that one rank holds, and nowhere else: at the end, or under a ``GradScaler`` half way."""
    last = dist.get_rank() == 1
    model = ranks.sharded(ranks.build("smooth"))
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), Fish(0.3, inner_steps=2))
    message = ""
    for number, batch in enumerate(ranks.mine(ranks.domain_batches(2, 0))):
        optimizer.zero_grad()
        ranks.loss_of(model, batch).backward()
        if number == 1 and last:
            next(model.parameters()).grad.to_local().fill_(torch.inf)
        message = ranks.error_of(optimizer.step)
    optimizer.rollback()
    assert all(torch.isfinite(p).all() for p in ranks.weights(model).values())
    scales = []
    for tracked in (False, True):
        model = ranks.sharded(ranks.build("smooth", torch.float32))
        scaler = torch.amp.GradScaler("cpu")
        method = Fish(0.5, inner_steps=4, track_alignment=tracked)
        optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), method)
        for number, batch in enumerate(ranks.mine(ranks.domain_batches(3, 0, dtype=torch.float32))):
            optimizer.zero_grad()
            scaler.scale(ranks.loss_of(model, batch)).backward()
            if number == 1 and last:
                next(model.parameters()).grad.to_local().fill_(torch.inf)
            before = ranks.weights(model)
            scaler.step(optimizer)
            scaler.update()
            scales.append((ranks.distance(ranks.weights(model), before) > 0, scaler.get_scale()))
        assert optimizer.inner_step == 3
    return message, scales


def test_infinity_in_one_shard_is_seen_by_all_ranks():
    expected = [(True, 2.0**16), (False, 2.0**15), (True, 2.0**15)]
    for message, scales in on_ranks(2, diverge_and_overflow):
        assert "the inner loop diverged: after 2 inner steps" in message
        assert scales == 2 * expected


# ------------------------------------------------------------------------------------------------------------ walks


def walking(model: nn.Module, **settings: Any) -> Fish:
    return Fish(0.3, inner_state="reset", model=model, **ranks.world(**settings))


def own_batches(iteration: int, rank: int) -> list[ranks.Batch]:
    """Every rank its own samples of the same domains, in opposite orders."""
    batches = ranks.domain_batches(3, 1000 * rank + iteration)
    return batches if rank % 2 == 0 else batches[::-1]


def mean_of_walks_by_hand(name: str, kind: str, size: int) -> dict[str, Tensor]:
    """One process walks for all ranks one after the other, each time from the same point by a new optimizer."""
    model = ranks.build(name)
    names = [*dict(model.named_parameters()), *(n for n, b in model.named_buffers() if b.is_floating_point())]
    for iteration in range(3):
        ends: list[dict[str, Tensor]] = []
        for rank in range(size):
            walker = copy.deepcopy(model)
            optimizer = OPTIMIZERS[kind](walker.parameters())
            for batch in own_batches(iteration, rank):
                optimizer.zero_grad()
                ranks.loss_of(walker, batch).backward()
                optimizer.step()
            ends.append({n: walker.state_dict()[n].clone() for n in names})
        state = model.state_dict()
        for n in names:
            state[n].copy_(state[n] + 0.3 * (torch.stack([end[n] for end in ends]).mean(0) - state[n]))
    return {n: model.state_dict()[n] for n in names}


def walk(kind: str) -> dict[Any, Any]:
    found = {}
    for name, manual in itertools.product(NETWORKS, [False, True]):
        model = ranks.build(name)
        method = walking(model, inner_steps=3 if manual else None, track_alignment=manual)
        optimizer = GradMatch(OPTIMIZERS[kind](model.parameters()), method)
        for iteration in range(3):
            iterate(model, optimizer, own_batches(iteration, dist.get_rank()), manual=manual)
        assert not optimizer.state
        found[name, manual] = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return found


@pytest.mark.parametrize(("size", "kind"), [(2, "adam"), (3, "sgd")])
def test_walks_are_the_mean_of_each_and_the_same_bits_everywhere(size: int, kind: str):
    everywhere = on_ranks(size, walk, kind)
    assert all(ranks.same(everywhere[0], other) for other in everywhere)
    for name in NETWORKS:
        expected = mean_of_walks_by_hand(name, kind, size)
        for manual in (False, True):
            found = everywhere[0][name, manual]
            assert ranks.distance({n: found[n] for n in expected}, expected) < 1e-9, name


def walk_over_shards() -> dict[str, Tensor]:
    """Four ranks: shards within two nodes of two, walks across them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("walks", "shards"))
    model = ranks.sharded(ranks.build("transformer"), mesh["shards"])
    node, shard = mesh.get_local_rank("walks"), mesh.get_local_rank("shards")
    optimizer = adam(model, Fish(0.3, inner_state="reset", model=model, process_group=mesh.get_group("walks")))
    for iteration in range(3):
        iterate(model, optimizer, [ranks.part(batch, shard, 2) for batch in own_batches(iteration, node)])
    return ranks.weights(model)


def test_walks_across_nodes_with_shards_within():
    everywhere = on_ranks(4, walk_over_shards)
    assert all(ranks.same(everywhere[0], other) for other in everywhere)
    assert ranks.distance(everywhere[0], mean_of_walks_by_hand("transformer", "adam", 2)) < 1e-9


def refusals_and_copies() -> dict[str, str]:
    last = dist.get_rank() == 1
    model = ranks.build("smooth")
    found = {
        "carry": ranks.error_of(lambda: Fish(model=model, **ranks.world())),
        "no model": ranks.error_of(lambda: Fish(inner_state="reset", **ranks.world())),
    }
    ddp = DistributedDataParallel(ranks.build("smooth"))
    found["ddp"] = ranks.error_of(lambda: adam(ddp, walking(ddp)))
    other = ranks.build("smooth")
    with torch.no_grad():
        next(other.parameters()).add_(1e-12 * last)
    before, optimizer = ranks.weights(other), adam(other, walking(other))
    found["other parameters"] = ranks.error_of(iterate, other, optimizer, ranks.domain_batches(2, 0))
    assert ranks.same(ranks.weights(other), before)

    optimizer = adam(model, walking(model, inner_steps=2))
    found["half way"] = ""
    for batch in ranks.domain_batches(2, dist.get_rank()):
        iterate(model, optimizer, [batch], manual=True)
        found["half way"] += ranks.error_of(optimizer.state_dict)
    assert optimizer.inner_step == 0
    copied, duplicate = copy.deepcopy((model, optimizer))
    assert duplicate.method.process_group is optimizer.method.process_group
    for walker, its in ((model, optimizer), (copied, duplicate)):
        iterate(walker, its, ranks.domain_batches(2, 1))
    assert ranks.same(ranks.weights(model), ranks.weights(copied))
    return found


def test_what_walks_cannot_do_right_they_refuse_and_a_copy_walks_with_the_same_ranks():
    for found in on_ranks(2, refusals_and_copies):
        assert 'needs inner_state="reset"' in found["carry"]
        assert "needs model=" in found["no model"]
        assert "averages their gradients in every step: leave one of the two out" in found["ddp"]
        assert "number 0 of the optimizer" in found["other parameters"]
        assert found["half way"].startswith("RuntimeError: state_dict() in the middle of a walk (1 steps taken)")
        assert found["half way"].count("state_dict()") == 1
