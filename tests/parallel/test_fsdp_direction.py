"""SmoothFish and IDGM with finite differences over ``fully_shard``: what one process finds, from sharded gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import _spread as ranks
import torch
import torch.distributed as dist
from _ranks import on_ranks
from _reference import smooth_fish_gradient
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torch_gradmatch import IDGM, GradMatch, SmoothFish

GAMMA, LR = 0.3, 0.05


def direction(model: nn.Module, method: Any, batches: list[ranks.Batch], loss: Any = ranks.loss_of) -> Any:
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), method)
    report = optimizer.meta_step(partial(loss, model), batches)
    return ranks.gradients_of(model), vars(report)


def idgm(model: nn.Module, agreement: str, **settings: Any) -> IDGM:
    return IDGM(model, GAMMA, agreement, hvp="finite_difference", track_alignment=True, **settings)


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
