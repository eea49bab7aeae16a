"""``gamma=None`` finds the gamma at which the matching part is ``strength`` times as long as the mean gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _ranks import on_ranks
from torch import Tensor

from torch_gradmatch import IDGM, GradMatch
from torch_gradmatch.gradients.functional import IDGMGradient, domain_gradients, idgm_grad

AGREEMENTS = ["inner_product", "variance", "cosine", "own"]


def own_agreement(gradients: Any) -> Tensor:
    return -torch.stack([(g["a"] - gradients[0]["a"]).square().sum() for g in gradients[1:]]).logsumexp(dim=0)


def regression(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (torch.tanh(x @ params["a"]) * params["b"] - y).square().mean()


def params_and_batches(domains: int = 3) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(6, 4, generator=generator).double(), torch.randn(6, generator=generator).double())
        for _ in range(domains)
    ]
    return {"a": torch.randn(4, generator=generator).double(), "b": torch.tensor(1.5, dtype=torch.float64)}, batches


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in gradient.values()])


def mean_gradient(params: dict[str, Tensor], batches: list[Any]) -> Tensor:
    return torch.stack([flat(g) for g in domain_gradients(regression, params, batches).gradients]).mean(dim=0)


def assert_of_strength(found: IDGMGradient, mean: Tensor, strength: float) -> None:
    assert float((flat(found.gradient) - mean).norm() / mean.norm()) == pytest.approx(strength, rel=1e-10)


@pytest.mark.parametrize("hvp", ["reverse", "kept", "forward", "finite_difference"])
@pytest.mark.parametrize("chosen", AGREEMENTS)
def test_the_matching_part_is_as_long_as_asked_for(chosen: str, hvp: str):
    params, batches = params_and_batches()
    phi = own_agreement if chosen == "own" else chosen
    settings = {"keep_graphs": True} if hvp == "kept" else {"hvp": hvp}
    for strength in (0.1, 2.0):
        found = idgm_grad(regression, params, batches, None, phi, strength=strength, **settings)
        assert_of_strength(found, mean_gradient(params, batches), strength)
        given = idgm_grad(regression, params, batches, found.gamma, phi, **settings)
        torch.testing.assert_close(flat(found.gradient), flat(given.gradient), rtol=1e-10, atol=1e-13)
        assert given.gamma == found.gamma
        torch.testing.assert_close(found.agreement, given.agreement)
        torch.testing.assert_close(found.losses, given.losses)


def test_strength_has_no_units():
    """Gamma has: 1/loss here."""
    params, batches = params_and_batches()
    found = idgm_grad(regression, params, batches, None, "variance")
    scaled = idgm_grad(lambda p, b: 8 * regression(p, b), params, batches, None, "variance")
    assert scaled.gamma == pytest.approx(found.gamma / 8, rel=1e-10)
    torch.testing.assert_close(flat(scaled.gradient), 8 * flat(found.gradient))


def test_where_there_is_nothing_to_measure_it_is_plain_training():
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    found = idgm_grad(lambda w, x: (w - 1).square().sum() * x.sum(), torch.ones(2), batches, None)
    assert found.gamma is None
    assert found.gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("factor", [1e30, float("nan")], ids=["overflow", "nan"])
def test_what_is_not_finite_is_not_finite_in_the_gradient(factor: float):
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    found = idgm_grad(lambda w, x: factor * (w * x).square().sum(), torch.ones(2), batches, None, check=False)
    assert found.gamma is None
    assert not found.gradient.isfinite().any()


class Regression(torch.nn.Module):
    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(p.clone()) for p in params.values())

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return regression({"a": self.a, "b": self.b}, batch)


def found_over_ranks(kind: str) -> tuple[Tensor, float | None]:
    params, batches = params_and_batches()
    rank, model = torch.distributed.get_rank(), Regression(params)
    if kind == "domains":
        own = batches[:1] if rank == 0 else batches[1:]
    else:
        own = [(x[3 * rank : 3 * rank + 3], y[3 * rank : 3 * rank + 3]) for x, y in batches]
    method = IDGM(model, process_group=torch.distributed.group.WORLD, parallel=kind)
    report = GradMatch(torch.optim.SGD(model.parameters(), lr=0.0), method).meta_step(model.loss, own)
    return flat({"a": model.a.grad, "b": model.b.grad}), report.gamma


@pytest.mark.parametrize("kind", ["domains", "data"])
def test_all_ranks_find_the_same(kind: str):
    params, batches = params_and_batches()
    expected = idgm_grad(regression, params, batches, None, "variance")
    (first, gamma), (second, other) = on_ranks(2, found_over_ranks, kind)
    assert gamma == other == pytest.approx(expected.gamma, rel=1e-9)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, flat(expected.gradient))
