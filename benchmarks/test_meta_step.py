"""Time of one meta-iteration over five domains in every way of ``ways.py``.

The wrapped optimizer is SGD with step 0: the weights stay where they are, so every round is the same.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import ways
from benchmarks._models import NETWORKS
from torch_gradmatch import Fish

DOMAINS = 5
GAMMA = 1e-3
ROUNDS = {"MLP": 15, "CdSprites CNN": 9, "ResNet-18/4": 3, "Transformer": 5}
RESET = "Fish, reset"


@pytest.mark.parametrize("way", [RESET, *ways.names()])
@pytest.mark.parametrize("network", NETWORKS)
def test_meta_step(benchmark: BenchmarkFixture, network: str, way: str) -> None:
    if (network, way) == ("Transformer", ways.CURVLINOPS):
        pytest.skip("draws dropout anew")
    problem = ways.Problem(network, DOMAINS)
    before = [p.detach().clone() for p in problem.parameters]
    reset = Fish(model=problem.model, inner_state="reset")
    run = problem.meta_step(reset) if way == RESET else problem.way(way, GAMMA)
    benchmark.extra_info.update(network=network, way=way, domains=DOMAINS, parameters=sum(p.numel() for p in before))
    benchmark.pedantic(run, rounds=ROUNDS[network], warmup_rounds=1)
    for p, value in zip(problem.parameters, before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is not None
        assert bool(p.grad.isfinite().all())
