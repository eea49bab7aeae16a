"""Time of one Hessian-vector product of the loss of one batch, several ways, beside the plain gradient.

Networks are in evaluation mode, so that all ways are of the same function: no dropout, and no statistics that
``torch.func`` could not write. Where a second derivative of attention is needed, its kernel is the one that has one
(MATH), for every way; the gradient and finite differences use the default. ``curvlinops`` is a peer, timed where it is
installed.

Each way is compared with double backward in float64 with GELUs in place of ReLUs, where even differences have to agree.
What others compute wrongly is not timed: in torch 2.13 the ``jvp`` of ``jacrev``, which ``curvlinops`` 3.0 is made of,
gets the derivative by the weights of ``LayerNorm`` wrong, where the ``jvp`` of ``grad`` is right. ``error`` in
``extra_info`` is the distance in float32 as timed, relative to the product's length: a difference that steps across the
kinks of ReLUs is off by up to several times the product itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from benchmarks._models import NETWORKS
from benchmarks.ways import CURVLINOPS, HessianLinearOperator, hessian_product
from torch_gradmatch.gradients.hvp import HVPS, hessian_vector_product

ROUNDS = {"MLP": 50, "CdSprites CNN": 20, "ResNet-18/4": 7, "Transformer": 10}


class Problem:
    """The loss of one batch as a function of a network's parameters, and a vector."""

    def __init__(self, network: str, dtype: torch.dtype, activation: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        self.model = NETWORKS[network].make(activation=activation).eval().to(dtype)
        x, y = NETWORKS[network].batches(1)[0]
        self.batch = (x.to(dtype), y)
        self.parameters = {n: p.detach() for n, p in self.model.named_parameters()}
        self.vector = {n: torch.randn_like(p) for n, p in self.parameters.items()}

    def loss(self, parameters: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(self.model, parameters, (self.batch[0],)), self.batch[1])


def gradient(problem: Problem) -> Sequence[Tensor]:
    loss = nn.functional.cross_entropy(problem.model(problem.batch[0]), problem.batch[1])
    return torch.autograd.grad(loss, list(problem.model.parameters()))


def of_package(hvp: str, problem: Problem) -> Sequence[Tensor]:
    return list(hessian_vector_product(problem.loss, problem.parameters, problem.vector, hvp).values())


def curvlinops(problem: Problem) -> Sequence[Tensor]:
    vector = list(problem.vector.values())
    return hessian_product(problem.model, list(problem.model.parameters()), problem.batch, vector)


PRODUCTS: dict[str, Callable[[Problem], Sequence[Tensor]]] = {
    **{hvp: partial(of_package, hvp) for hvp in HVPS},
    CURVLINOPS: curvlinops,
}


def error(way: str, problem: Problem) -> float:
    """The distance of a way's product from that of double backward, over the latter's length."""
    found, exact = (parameters_to_vector(product(problem)).detach() for product in (PRODUCTS[way], PRODUCTS["reverse"]))
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("way", ["gradient", *PRODUCTS])
@pytest.mark.parametrize("network", NETWORKS)
def test_hvp(benchmark: BenchmarkFixture, network: str, way: str) -> None:
    if way == CURVLINOPS and HessianLinearOperator is None:
        pytest.skip("curvlinops is not installed")
    problem = Problem(network, torch.float32, nn.ReLU)
    if way in PRODUCTS:
        off = error(way, Problem(network, torch.float64, nn.GELU))
        if way not in HVPS and off >= 1e-6:
            pytest.skip(f"{way} differs from double backward by {off:.1e} of the product's length in float64")
        assert off < 1e-6
        benchmark.extra_info["error"] = error(way, problem)
    parameters = list(problem.parameters.values())
    benchmark.extra_info.update(
        network=network, way=way, parameters=sum(p.numel() for p in parameters), samples=len(problem.batch[1])
    )
    run = partial(PRODUCTS.get(way, gradient), problem)
    result = benchmark.pedantic(run, rounds=ROUNDS[network], warmup_rounds=2)
    assert [r.shape for r in result] == [p.shape for p in parameters]
    assert all(bool(r.isfinite().all()) for r in result)
