"""Second-order methods on a GPU; needs no native kernel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _reference import naive_idgm
from torch import Tensor, nn
from torch.optim import SGD

from torch_gradmatch import IDGM, GradMatch, SmoothFish

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
HVPS = ["reverse", "forward", "finite_difference"]


def network() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.4), nn.Linear(32, 3))
    batches = [torch.randn(8, 6, dtype=torch.float64) + i for i in range(4)]
    return model.double().cuda(), [b.cuda() for b in batches]


@pytest.mark.parametrize("keep_graphs", [False, True], ids=["streaming", "keep_graphs"])
@pytest.mark.parametrize("hvp", HVPS)
def test_dropout_of_the_gpu_is_the_same_in_both_passes(hvp: Any, keep_graphs: bool):
    model, batches = network()
    oracle = copy.deepcopy(model)
    method = IDGM(model, 0.3, "variance", hvp=hvp, keep_graphs=keep_graphs)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), method)
    torch.manual_seed(1)
    optimizer.meta_step(lambda x: model(x).square().mean(), batches)
    next_number = torch.rand((), device="cuda")
    torch.manual_seed(1)
    parameters = list(oracle.parameters())
    _, gradient = naive_idgm(parameters, [lambda x=x: oracle(x).square().mean() for x in batches], 0.3, "variance")
    assert torch.equal(torch.rand((), device="cuda"), next_number)
    tolerance = 1e-6 if hvp == "finite_difference" else 1e-9
    for p, g in zip(model.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(model.buffers(), oracle.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("method", [*HVPS, 1.0, 2.0, "symmetric"])
def test_waits_for_the_gpu_only_to_look_for_divergence(method: Any):
    model, batches = network()
    settings: dict[str, Any] = {"model": model, "nonfinite": "ignore"}
    if method in HVPS:
        optimizer = GradMatch(SGD(model.parameters(), lr=0.1), IDGM(gamma=0.3, hvp=method, **settings))
    else:
        gamma = {"gamma": 0.3, "symmetric": True} if method == "symmetric" else {"gamma": method}
        optimizer = GradMatch(SGD(model.parameters(), lr=0.1), SmoothFish(inner_lr=0.01, **gamma, **settings))
    for _ in range(2):  # in these it looks whether a loss is the same twice
        optimizer.meta_step(lambda x: model(x).square().mean(), batches)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.meta_step(lambda x: model(x).square().mean(), batches)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
