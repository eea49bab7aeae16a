"""Time of one ``meta_step`` over five domains, by every method, beside the gradient of the mean loss (ERM).

The wrapped optimizer is SGD with step 0: it does its work and the weights stay where they are, so every round is the
same. ``IDGM`` is timed in all the ways it has to take its Hessian-vector products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks._models import NETWORKS, Batch
from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish
from torch_gradmatch.methods.base import Method

DOMAINS = 5
GAMMA = 1e-3
ROUNDS = {"MLP": 15, "CdSprites CNN": 9, "ResNet-18/4": 3, "Transformer": 5}

METHODS: dict[str, Callable[[nn.Module], Method]] = {
    "Fish": lambda model: Fish(model=model),
    "Fish, reset": lambda model: Fish(model=model, inner_state="reset"),
    "SmoothFish": lambda model: SmoothFish(1.0, inner_lr=1e-3, model=model),
    "SmoothFish, gamma=2": lambda model: SmoothFish(2.0, inner_lr=1e-3, model=model),
    "SmoothFish, symmetric": lambda model: SmoothFish(GAMMA, inner_lr=1e-3, model=model, symmetric=True),
    "IDGM, reverse": lambda model: IDGM(model, GAMMA, "inner_product", hvp="reverse"),
    "IDGM, forward": lambda model: IDGM(model, GAMMA, "inner_product", hvp="forward"),
    "IDGM, finite_difference": lambda model: IDGM(model, GAMMA, "inner_product", hvp="finite_difference"),
    "IDGM, keep_graphs": lambda model: IDGM(model, GAMMA, "inner_product", keep_graphs=True),
    "IDGM, one_pass": lambda model: IDGM(model, GAMMA, "inner_product", one_pass=True),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    name: str = request.param
    return name


def cross_entropy(model: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1])


def time_it(benchmark: BenchmarkFixture, run: Callable[[], None], model: nn.Module, **info: Any) -> None:
    """Time a meta-iteration, after which the weights must be what they were."""
    before = [p.detach().clone() for p in model.parameters()]
    benchmark.extra_info.update(info, domains=DOMAINS, parameters=sum(p.numel() for p in before))
    benchmark.pedantic(run, rounds=ROUNDS[info["network"]], warmup_rounds=1)
    for p, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is not None
        assert bool(p.grad.isfinite().all())


def test_erm(benchmark: BenchmarkFixture, network: str) -> None:
    model, batches = NETWORKS[network].make(), NETWORKS[network].batches(DOMAINS)
    optimizer, loss_fn = SGD(model.parameters(), lr=0.0), cross_entropy(model)

    def run() -> None:
        optimizer.zero_grad()
        for batch in batches:
            (loss_fn(batch) / DOMAINS).backward()
        optimizer.step()

    time_it(benchmark, run, model, network=network, method="ERM")


@pytest.mark.parametrize("method", METHODS)
def test_meta_step(benchmark: BenchmarkFixture, network: str, method: str) -> None:
    model, batches = NETWORKS[network].make(), NETWORKS[network].batches(DOMAINS)
    optimizer, loss_fn = GradMatch(SGD(model.parameters(), lr=0.0), METHODS[method](model)), cross_entropy(model)

    def run() -> None:
        optimizer.meta_step(loss_fn, batches)

    time_it(benchmark, run, model, network=network, method=method)
    report = optimizer.last_meta_step
    assert report is not None
    assert report.losses is not None
    assert report.losses.shape == (DOMAINS,)
    assert bool(report.losses.isfinite().all())
