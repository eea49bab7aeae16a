"""Time of one Hessian-vector product of the loss of one batch, several ways, beside the plain gradient.

Networks are in evaluation mode, so that all ways are of the same function: no dropout, and no statistics that
``torch.func`` could not write. Where a second derivative of attention is needed, its kernel is the one that has one
(MATH), for every way; the gradient and finite differences use the default. ``torch.func`` is the ``jvp`` of ``grad`` as
PyTorch's documentation has it. ``curvlinops`` is a peer, timed where it is installed.

Before it is timed each way is compared with double backward: in float64 with GELUs in place of ReLUs, where even
differences have to agree, and in float32 as timed, where a difference steps across the kinks of ReLUs and is off by up
to several times the product itself. The latter distance, relative to the product's length, is ``error`` in
``extra_info``. What others compute wrongly is not timed: in torch 2.13 the ``jvp`` of ``jacrev``, which ``curvlinops``
3.0 is made of, gets the derivative by the weights of ``LayerNorm`` wrong, where the ``jvp`` of ``grad`` is right.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from benchmarks._models import NETWORKS, Batch
from torch_gradmatch.gradients.hvp import HVPS, differentiable_attention, hessian_vector_product

Tensors = dict[str, Tensor]
Product = Callable[[], Sequence[Tensor]]
ROUNDS = {"MLP": 50, "CdSprites CNN": 20, "ResNet-18/4": 7, "Transformer": 10}


class Problem:
    """The loss of one batch as a function of a network's parameters, and a vector."""

    def __init__(
        self, network: str, dtype: torch.dtype = torch.float32, activation: Callable[[], nn.Module] = nn.ReLU
    ) -> None:
        torch.manual_seed(0)
        self.model = NETWORKS[network].make(activation).eval().to(dtype)
        x, y = NETWORKS[network].batches(1)[0]
        self.batch: Batch = (x.to(dtype), y)
        self.parameters: Tensors = {n: p.detach() for n, p in self.model.named_parameters()}
        self.vector: Tensors = {n: torch.randn_like(p) for n, p in self.parameters.items()}

    def loss(self, parameters: Tensors) -> Tensor:
        return nn.functional.cross_entropy(functional_call(self.model, parameters, (self.batch[0],)), self.batch[1])


def gradient(problem: Problem) -> Product:
    parameters = list(problem.model.parameters())

    def run() -> Sequence[Tensor]:
        x, y = problem.batch
        return torch.autograd.grad(nn.functional.cross_entropy(problem.model(x), y), parameters)

    return run


def of_package(hvp: str) -> Callable[[Problem], Product]:
    def make(problem: Problem) -> Product:
        def run() -> Sequence[Tensor]:
            product: Tensors = hessian_vector_product(problem.loss, problem.parameters, problem.vector, hvp)
            return list(product.values())

        return run

    return make


def torch_func(problem: Problem) -> Product:
    def run() -> Sequence[Tensor]:
        with differentiable_attention("forward"):
            product: Tensors = jvp(grad(problem.loss), (problem.parameters,), (problem.vector,))[1]
        return list(product.values())

    return run


def curvlinops(problem: Problem) -> Product:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = pytest.importorskip("curvlinops")
    parameters = list(problem.model.parameters())
    with differentiable_attention("forward"):
        hessian = peer.HessianLinearOperator(
            problem.model, nn.CrossEntropyLoss(), parameters, [problem.batch], check_deterministic=False
        )
    vector = list(problem.vector.values())

    def run() -> Sequence[Tensor]:
        with differentiable_attention("forward"):
            product: Sequence[Tensor] = hessian @ vector
        return product

    return run


WAYS: dict[str, Callable[[Problem], Product]] = {
    **{hvp: of_package(hvp) for hvp in HVPS},
    "torch.func": torch_func,
    "curvlinops": curvlinops,
}


def error(way: str, problem: Problem) -> float:
    """The distance of a way's product from that of double backward, over the latter's length."""
    found, exact = WAYS[way](problem)(), of_package("reverse")(problem)()
    distance, length = (
        torch.stack([torch.linalg.vector_norm(t) for t in tensors]).norm()
        for tensors in ([f.detach() - e for f, e in zip(found, exact, strict=True)], exact)
    )
    assert length > 0
    return float(distance / length)


def time_it(benchmark: BenchmarkFixture, problem: Problem, run: Product, **info: Any) -> None:
    parameters = list(problem.parameters.values())
    benchmark.extra_info.update(info, parameters=sum(p.numel() for p in parameters), samples=len(problem.batch[1]))
    result = benchmark.pedantic(run, rounds=ROUNDS[info["network"]], warmup_rounds=2)
    assert [r.shape for r in result] == [p.shape for p in parameters]
    assert all(bool(r.isfinite().all()) for r in result)


@pytest.mark.parametrize("network", NETWORKS)
def test_gradient(benchmark: BenchmarkFixture, network: str) -> None:
    problem = Problem(network)
    time_it(benchmark, problem, gradient(problem), network=network, way="gradient")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_hvp(benchmark: BenchmarkFixture, network: str, way: str) -> None:
    off_if_smooth = error(way, Problem(network, torch.float64, nn.GELU))
    problem = Problem(network)
    off = error(way, problem)
    agrees = off_if_smooth < 1e-6 and (off < 1e-3 or way == "finite_difference")
    if way not in HVPS and not agrees:
        pytest.skip(f"{way} differs from double backward by {off_if_smooth:.1e} of the product's length in float64")
    assert agrees
    time_it(benchmark, problem, WAYS[way](problem), network=network, way=way, error=off)
