"""SmoothFish and IDGM with finite differences over ``fully_shard``: what one process finds, from sharded gradients."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import _spread as ranks
import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from _reference import smooth_fish_gradient
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torch_gradmatch import IDGM, GradMatch, SmoothFish

GAMMA, LR = 0.3, 0.05
NETWORKS = ("batch_norm", "transformer", "tied")
SETTINGS = {"walk": (1.0, False), "strong": (2.5, False), "symmetric": (0.3, True)}
AGREEMENTS = ("inner_product", "variance", "cosine")


def direction(model: nn.Module, method: Any, batches: list[ranks.Batch], loss: Any = ranks.loss_of) -> Any:
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), method)
    report = optimizer.meta_step(partial(loss, model), batches)
    return ranks.gradients_of(model), vars(report)


def idgm(model: nn.Module, agreement: str, **settings: Any) -> IDGM:
    return IDGM(model, GAMMA, agreement, hvp="finite_difference", track_alignment=True, **settings)


def in_lockstep(scheme: str) -> dict[Any, Any]:
    found = {}
    batches = ranks.mine(ranks.domain_batches(3, 1))
    for name in NETWORKS if scheme == "fsdp" else NETWORKS[:1]:
        for kind, (gamma, symmetric) in SETTINGS.items():
            method = SmoothFish(gamma, LR, symmetric=symmetric, track_alignment="pairs")
            found[name, kind] = direction(ranks.spread(scheme, ranks.build(name)), method, batches)
        for agreement in AGREEMENTS:
            model = ranks.spread(scheme, ranks.build(name))
            found[name, agreement] = direction(model, idgm(model, agreement), batches)
    model = ranks.spread(scheme, ranks.build("batch_norm"))
    found["batch_norm", "one pass"] = direction(model, idgm(model, "variance", one_pass=True), batches)
    return found


@pytest.mark.parametrize(("scheme", "size"), [("fsdp", 2), ("kept", 2), ("hsdp", 4)])
def test_the_direction_is_that_of_one_process(scheme: str, size: int):
    everywhere = on_ranks(size, in_lockstep, scheme)
    domains, loss = ranks.domain_batches(3, 1), partial(ranks.loss_over, size=size)
    for (name, kind), (found, report) in everywhere[0].items():
        model = ranks.build(name)
        if kind not in SETTINGS:
            method = idgm(model, "variance", one_pass=True) if kind == "one pass" else idgm(model, kind)
            expected, one = direction(model, method, domains, loss)
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
            for measured in ("inner_product", "cosine", "grad_norms"):
                torch.testing.assert_close(report[measured], one[measured])
            continue
        gamma, symmetric = SETTINGS[kind]
        expected = smooth_fish_gradient(model, loss, domains, gamma, LR, symmetric=symmetric)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        if kind == "walk":  # along which it is measured
            continue
        here = [torch.autograd.grad(loss(model, b), list(model.parameters())) for b in domains]
        vectors = [torch.cat([g.reshape(-1) for g in gs]) for gs in here]
        torch.testing.assert_close(report["grad_norms"], torch.stack([v.norm() for v in vectors]))
        cosines = torch.stack([torch.stack([torch.cosine_similarity(a, b, dim=0) for a in vectors]) for b in vectors])
        torch.testing.assert_close(report["cosines"], cosines)
        torch.testing.assert_close(report["cosine"], (cosines.sum() - 3) / 6)
        with torch.no_grad():
            own = [
                torch.stack([ranks.loss_of(model, ranks.part(b, rank, size)) for b in domains]) for rank in range(size)
            ]
        torch.testing.assert_close([there[name, kind][1]["losses"] for there in everywhere], own)


# ---------------------------------------------------------------------------------- walks, domains, samples over shards


def over_shards() -> dict[str, Any]:
    """A 2 by 2 mesh: ``fully_shard`` in each row, walks (or domains, or samples) across the rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    row, column = mesh.get_local_rank("outer"), mesh.get_local_rank("inner")
    outer = {"process_group": mesh.get_group("outer")}
    found = {}
    own = [ranks.part(batch, column, 2) for batch in ranks.domain_batches(3, row)]
    quarter = [ranks.part(ranks.part(batch, column, 2), row, 2) for batch in ranks.domain_batches(3, 0)]
    for name, batches, make in [
        ("walks", own, lambda model: SmoothFish(0.3, LR, model=model, symmetric=True, **outer)),
        ("domains", own[: 2 + row], lambda model: idgm(model, "cosine", **outer)),
        ("variance", own[: 2 + row], lambda model: idgm(model, "variance", **outer)),
        ("data", quarter, lambda model: idgm(model, "inner_product", parallel="data", **outer)),
        ("one walk", quarter, lambda model: SmoothFish(1.0, LR, model=model, parallel="data", **outer)),
    ]:
        model = ranks.sharded(ranks.build("batch_norm"), mesh["inner"])
        found[name] = direction(model, make(model), batches)[0], [b.clone() for b in model.buffers()]
    model = ranks.sharded(ranks.build("batch_norm"), mesh["inner"])
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), SmoothFish(1.0, LR, model=model, **outer))
    found["nan"] = ranks.error_of(optimizer.meta_step, ranks.not_a_number_on_last(partial(ranks.loss_of, model)), own)
    with torch.no_grad():
        next(model.parameters()).to_local().add_(float(dist.get_rank() == 3))
    optimizer.load_state_dict(optimizer.state_dict())
    found["other weights"] = ranks.error_of(optimizer.meta_step, partial(ranks.loss_of, model), own)
    return found


def test_walks_domains_and_samples_over_shards():
    everywhere = on_ranks(4, over_shards)
    domains = [ranks.domain_batches(3, row) for row in range(2)]
    halves = partial(ranks.loss_over, size=2)

    def quarters(model: nn.Module, batch: ranks.Batch) -> Tensor:
        parts = [ranks.part(ranks.part(batch, column, 2), row, 2) for column in range(2) for row in range(2)]
        return torch.stack([ranks.loss_of(model, one) for one in parts]).mean()

    def of_idgm(loss: Any, batches: list[ranks.Batch], agreement: str) -> list[Tensor]:
        model = ranks.build("batch_norm")
        return direction(model, idgm(model, agreement), batches, loss)[0]

    def of_walk(loss: Any, batches: list[ranks.Batch], gamma: float, *, symmetric: bool) -> Any:
        return smooth_fish_gradient(ranks.build("batch_norm"), loss, batches, gamma, LR, symmetric=symmetric)

    walks = [of_walk(halves, own, 0.3, symmetric=True) for own in domains]
    for name, wanted in {
        "walks": [sum(gs) / 2 for gs in zip(*walks, strict=True)],
        "domains": of_idgm(halves, domains[0][:2] + domains[1], "cosine"),
        "variance": of_idgm(halves, domains[0][:2] + domains[1], "variance"),
        "data": of_idgm(quarters, domains[0], "inner_product"),
        "one walk": of_walk(quarters, domains[0], 1.0, symmetric=False),
    }.items():
        found = everywhere[0][name][0]
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert ranks.same(found, everywhere[3][name][0])
        for column in range(2):  # buffers are those of the ranks with the same part of the shards
            assert ranks.same(everywhere[column][name][1], everywhere[2 + column][name][1])
    for one in everywhere:
        assert "is nan" in one["nan"]
        assert "number 0 of the optimizer" in one["other weights"]


# ----------------------------------------------------------------------------------------------- training, and refusals


def method_of(kind: str, model: nn.Module) -> Any:
    return idgm(model, "variance") if kind == "IDGM" else SmoothFish(0.3, LR, symmetric=True)


def train() -> dict[Any, dict[str, Tensor]]:
    found = {}
    for kind, reshard in itertools.product(["IDGM", "SmoothFish"], [True, False]):
        model = ranks.sharded(ranks.build("smooth"), reshard=reshard)
        optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=1e-2), method_of(kind, model))
        loss_fn = partial(ranks.loss_of, model)
        for seed in range(3):
            batches = ranks.mine(ranks.domain_batches(3, seed))
            with torch.no_grad():
                loss_fn(batches[0])  # leaves all of the root's parameters where its shards were
            optimizer.meta_step(loss_fn, batches)
        loss_fn(batches[0]).backward()
        found[kind, reshard] = ranks.weights(model)
    return found


def test_training_goes_on_as_in_one_process():
    """Also after an evaluation."""
    everywhere = on_ranks(2, train)
    assert ranks.same(*everywhere)
    for (kind, _), found in everywhere[0].items():
        model = ranks.build("smooth")
        optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=1e-2), method_of(kind, model))
        for seed in range(3):
            optimizer.meta_step(partial(ranks.loss_over, model, size=2), ranks.domain_batches(3, seed))
        torch.testing.assert_close(found, {n: p.detach() for n, p in model.named_parameters()}, rtol=1e-6, atol=1e-8)


def refusals() -> dict[str, str]:
    plain, model = ranks.build("smooth"), ranks.sharded(ranks.build("smooth"))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {
        hvp: ranks.error_of(lambda hvp=hvp: GradMatch(sgd, IDGM(model, GAMMA, hvp=hvp)))
        for hvp in ("reverse", "forward")
    }
    method = IDGM(plain, GAMMA)
    fully_shard(plain)
    found["sharded later"] = ranks.error_of(lambda: GradMatch(torch.optim.SGD(plain.parameters(), lr=0.1), method))
    optimizer, batches = GradMatch(sgd, idgm(model, "variance")), ranks.mine(ranks.domain_batches(2, 0))
    optimizer.method.hvp = "reverse"
    found["set later"] = ranks.error_of(optimizer.meta_step, partial(ranks.loss_of, model), batches)
    optimizer.method.hvp = "finite_difference"
    optimizer.method.agreement = lambda gradients: sum(g.square().sum() for g in gradients[0].values())
    found["function"] = ranks.error_of(optimizer.meta_step, partial(ranks.loss_of, model), batches)
    return found


def test_what_shards_cannot_do_is_refused():
    for found in on_ranks(2, refusals):
        for name in ("reverse", "forward", "sharded later", "set later"):
            assert found[name].startswith("ValueError")
            for remedy in ("hvp='finite_difference'", "SmoothFish", "Fish"):
                assert remedy in found[name]
        assert "where parameters are sharded (got a function, which" in found["function"]


def in_half_precision() -> list[Tensor]:
    model = ranks.sharded(ranks.build("smooth", torch.float32), param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return direction(model, SmoothFish(1.0, LR), ranks.mine(ranks.domain_batches(3, 1, dtype=torch.float32)))[0]


def test_a_policy_of_mixed_precision_is_followed():
    found = on_ranks(2, in_half_precision)[0]
    expected = smooth_fish_gradient(
        ranks.build("smooth"), partial(ranks.loss_over, size=2), ranks.domain_batches(3, 1), 1.0, LR
    )
    flat, wanted = (torch.cat([g.reshape(-1) for g in gs]) for gs in (found, expected))
    assert flat.dtype is torch.float32
    assert float((flat - wanted).norm() / wanted.norm()) < 0.03
