"""SmoothFish and IDGM with finite differences over ``fully_shard``: what one process finds, from sharded gradients."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from _reference import smooth_fish_gradient
from _spread import Batch, build, domain_batches, full, loss_of, loss_over, mine, part, sharded, spread, weights
from test_idgm_over_ranks import fails, same
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torch_gradmatch import IDGM, GradMatch, SmoothFish

GAMMA, LR = 0.3, 0.05
NETWORKS = ("batch_norm", "transformer", "tied")
SETTINGS = {"walk": (1.0, False), "strong": (2.5, False), "symmetric": (0.3, True)}
AGREEMENTS = ("inner_product", "variance", "cosine")


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(p.grad) for name, p in model.named_parameters()}


def direction(model: nn.Module, method: Any, batches: list[Batch]) -> Any:
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), method)
    report = optimizer.meta_step(partial(loss_of, model), batches)
    found = vars(report) | {"agreement_with_rest": report.agreement_with_rest}
    return gradients_of(model), {name: value for name, value in found.items() if value is not None}


def networks(scheme: str) -> tuple[str, ...]:
    return NETWORKS if scheme == "fsdp" else NETWORKS[:1]


def by_smooth_fish(scheme: str) -> dict[Any, Any]:
    found = {}
    for name, (kind, (gamma, symmetric)) in itertools.product(networks(scheme), SETTINGS.items()):
        model = spread(scheme, build(name))
        method = SmoothFish(gamma, LR, symmetric=symmetric, track_alignment="pairs")
        found[name, kind] = direction(model, method, mine(domain_batches(3, 1)))
    return found


def by_idgm(scheme: str) -> dict[Any, Any]:
    found = {}
    for name, agreement, kept in [
        *itertools.product(networks(scheme), AGREEMENTS, [False]),
        ("batch_norm", "variance", True),
    ]:
        model = spread(scheme, build(name))
        method = IDGM(model, GAMMA, agreement, hvp="finite_difference", keep_graphs=kept, track_alignment=True)
        found[name, agreement, kept] = direction(model, method, mine(domain_batches(3, 1)))
    return found


@pytest.mark.parametrize(
    ("scheme", "size"), [("fsdp", 2), pytest.param("fsdp", 3, marks=pytest.mark.large), ("kept", 2), ("hsdp", 4)]
)
def test_smooth_fish_is_that_of_one_process(scheme: str, size: int):
    everywhere = on_ranks(size, by_smooth_fish, scheme)
    domains = domain_batches(3, 1)
    for (name, kind), (found, report) in everywhere[0].items():
        gamma, symmetric = SETTINGS[kind]
        model = build(name)
        expected = smooth_fish_gradient(model, partial(loss_over, size=size), domains, gamma, LR, symmetric=symmetric)
        for g, wanted in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(g, wanted, rtol=1e-9, atol=1e-12)
        if kind == "walk":  # along which it is measured
            continue
        here = [torch.autograd.grad(loss_over(model, b, size), list(model.parameters())) for b in domains]
        vectors = [torch.cat([g.reshape(-1) for g in gs]) for gs in here]
        torch.testing.assert_close(report["grad_norms"], torch.stack([v.norm() for v in vectors]))
        cosines = torch.stack([torch.stack([torch.cosine_similarity(a, b, dim=0) for a in vectors]) for b in vectors])
        torch.testing.assert_close(report["cosines"], cosines)
        torch.testing.assert_close(report["cosine"], (cosines.sum() - 3) / 6)
        with torch.no_grad():
            own = [torch.stack([loss_of(model, part(b, rank, size)) for b in domains]) for rank in range(size)]
        torch.testing.assert_close([one[name, kind][1]["losses"] for one in everywhere], own)


@pytest.mark.parametrize(
    ("scheme", "size"), [("fsdp", 2), pytest.param("fsdp", 3, marks=pytest.mark.large), ("hsdp", 4)]
)
def test_idgm_by_finite_differences_is_that_of_one_process(scheme: str, size: int):
    everywhere = on_ranks(size, by_idgm, scheme)
    for (name, agreement, _), (found, report) in everywhere[0].items():
        model = build(name)
        method = IDGM(model, GAMMA, agreement, hvp="finite_difference", track_alignment=True)
        optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), method)
        one = optimizer.meta_step(lambda batch: loss_over(model, batch, size), domain_batches(3, 1))  # noqa: B023
        for key, g in gradients_of(model).items():
            torch.testing.assert_close(found[key], g, rtol=1e-7, atol=1e-9)
        for measured in ("inner_product", "cosine", "grad_norms", "agreement_with_rest"):
            torch.testing.assert_close(report[measured], getattr(one, measured))


# ---------------------------------------------------------------------------------- walks, domains, samples over shards


def mesh_of_four() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))


def over_shards() -> dict[str, Any]:
    """A 2 by 2 mesh: ``fully_shard`` in each row, walks (or domains, or samples) across the rows."""
    mesh = mesh_of_four()
    row, column = mesh.get_local_rank("outer"), mesh.get_local_rank("inner")
    outer = {"process_group": mesh.get_group("outer")}
    finite = {"hvp": "finite_difference", "track_alignment": True}
    found = {}
    own = [part(batch, column, 2) for batch in domain_batches(3, row)]
    quarter = [part(part(batch, column, 2), row, 2) for batch in domain_batches(3, 0)]
    for name, batches, make in [
        ("walks", own, lambda model: SmoothFish(0.3, LR, model=model, symmetric=True, **outer)),
        ("domains", own[: 2 + row], lambda model: IDGM(model, GAMMA, "cosine", **finite, **outer)),
        ("variance", own[: 2 + row], lambda model: IDGM(model, GAMMA, "variance", **finite, **outer)),
        ("data", quarter, lambda model: IDGM(model, GAMMA, **finite, parallel="data", **outer)),
        ("one walk", quarter, lambda model: SmoothFish(1.0, LR, model=model, parallel="data", **outer)),
    ]:
        model = sharded(build("batch_norm"), mesh["inner"])
        found[name] = direction(model, make(model), batches)[0], [b.clone() for b in model.buffers()]
    model = sharded(build("batch_norm"), mesh["inner"])
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), SmoothFish(1.0, LR, **outer))
    last = dist.get_rank() == 3
    found["nan"] = fails(optimizer, lambda b: loss_of(model, b) * (float("nan") if last else 1.0), own)
    with torch.no_grad():
        next(model.parameters()).to_local().add_(float(last))
    optimizer.load_state_dict(optimizer.state_dict())
    found["other weights"] = fails(optimizer, partial(loss_of, model), own)
    return found


def test_walks_domains_and_samples_over_shards():
    everywhere = on_ranks(4, over_shards)
    domains = [domain_batches(3, row) for row in range(2)]
    found = everywhere[0]
    for name in ("walks", "domains", "variance", "data", "one walk"):
        assert same(found[name][0], everywhere[3][name][0])
        for column in range(2):  # buffers are those of the ranks with the same part of the shards
            assert same(everywhere[column][name][1], everywhere[2 + column][name][1])

    def halves(model: nn.Module, batch: Batch) -> Tensor:
        return loss_over(model, batch, 2)

    def quarters(model: nn.Module, batch: Batch) -> Tensor:
        parts = [part(part(batch, column, 2), row, 2) for column in range(2) for row in range(2)]
        return torch.stack([loss_of(model, one) for one in parts]).mean()

    walks = [smooth_fish_gradient(build("batch_norm"), halves, own, 0.3, LR, symmetric=True) for own in domains]
    model = build("batch_norm")
    for wanted_of, name in [
        (lambda: [sum(gs) / 2 for gs in zip(*walks, strict=True)], "walks"),
        (lambda: of_idgm(halves, domains[0][:2] + domains[1], "cosine"), "domains"),
        (lambda: of_idgm(halves, domains[0][:2] + domains[1], "variance"), "variance"),
        (lambda: of_idgm(quarters, domains[0], "inner_product"), "data"),
        (lambda: smooth_fish_gradient(model, quarters, domains[0], 1.0, LR), "one walk"),
    ]:
        for g, wanted in zip(found[name][0].values(), wanted_of(), strict=True):
            torch.testing.assert_close(g, wanted, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    for one in everywhere:
        assert "is nan" in one["nan"][1]
        assert "number 0 of the optimizer" in one["other weights"][1]


def of_idgm(loss: Any, batches: list[Batch], agreement: str) -> list[Tensor]:
    model = build("batch_norm")
    method = IDGM(model, GAMMA, agreement, hvp="finite_difference")
    GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), method).meta_step(partial(loss, model), batches)
    return [p.grad for p in model.parameters()]


# ----------------------------------------------------------------------------------------------- training, and refusals


def method_of(kind: str, model: nn.Module) -> Any:
    if kind == "IDGM":
        return IDGM(model, GAMMA, "variance", hvp="finite_difference")
    return SmoothFish(0.3, LR, symmetric=True)


def train(reshard: bool, kind: str) -> Any:
    model = sharded(build("smooth"), reshard=reshard)
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=1e-2), method_of(kind, model))
    last = dist.get_rank() == dist.get_world_size() - 1
    for seed in range(3):
        batches = mine(domain_batches(3, seed))
        error = fails(optimizer, lambda batch: loss_of(model, batch) * (float("nan") if last else 1.0), batches)
        assert error is not None
        assert "the loss of batch 0 is nan" in error[1]
        with torch.no_grad():
            loss_of(model, batches[0])  # leaves all of the root's parameters where its shards were
        optimizer.meta_step(partial(loss_of, model), batches)
    loss_of(model, batches[0]).backward()
    return weights(model)


@pytest.mark.parametrize("kind", ["IDGM", "SmoothFish"])
@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
def test_training_goes_on_as_in_one_process(kind: str, reshard: bool):
    """Also after a loss that was NaN on one rank, and after an evaluation."""
    found = on_ranks(2, train, reshard, kind)
    model = build("smooth")
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=1e-2), method_of(kind, model))
    for seed in range(3):
        optimizer.meta_step(partial(loss_over, model, size=2), domain_batches(3, seed))
    for name, p in weights(model).items():
        assert same(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], p, rtol=1e-6, atol=1e-8)


def refusals() -> dict[str, str]:
    found = {}

    def attempt(name: str, make: Any) -> None:
        try:
            make()
        except ValueError as error:
            found[name] = str(error)

    plain, model = build("smooth"), sharded(build("smooth"))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    attempt("reverse", lambda: GradMatch(sgd, IDGM(model, GAMMA)))
    attempt("forward", lambda: GradMatch(sgd, IDGM(model, GAMMA, hvp="forward")))
    method = IDGM(plain, GAMMA)
    fully_shard(plain)
    attempt("sharded later", lambda: GradMatch(torch.optim.SGD(plain.parameters(), lr=0.1), method))
    optimizer = GradMatch(sgd, IDGM(model, GAMMA, hvp="finite_difference"))
    attempt("set later", lambda: setattr(optimizer.method, "hvp", "reverse"))
    assert optimizer.method.hvp == "finite_difference"
    optimizer.method.agreement = lambda gradients: sum(g.square().sum() for g in gradients[0].values())
    attempt("function", lambda: optimizer.meta_step(partial(loss_of, model), mine(domain_batches(2, 0))))
    return found


def test_what_shards_cannot_do_is_refused():
    for found in on_ranks(2, refusals):
        for name in ("reverse", "forward", "sharded later", "set later"):
            for remedy in ("hvp='finite_difference'", "SmoothFish", "Fish"):
                assert remedy in found[name]
        assert "where parameters are sharded (got a function)" in found["function"]


def in_half_precision() -> dict[str, Tensor]:
    policy = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    model = sharded(build("smooth", torch.float32), **policy)
    batches = [(x.float(), y.float()) for x, y in mine(domain_batches(3, 1))]
    return direction(model, SmoothFish(1.0, LR), batches)[0]


def test_a_policy_of_mixed_precision_is_followed():
    found = on_ranks(2, in_half_precision)[0]
    expected = smooth_fish_gradient(build("smooth"), partial(loss_over, size=2), domain_batches(3, 1), 1.0, LR)
    flat, wanted = torch.cat([g.reshape(-1) for g in found.values()]), torch.cat([g.reshape(-1) for g in expected])
    assert flat.dtype is torch.float32
    assert float((flat - wanted).norm() / wanted.norm()) < 0.03
