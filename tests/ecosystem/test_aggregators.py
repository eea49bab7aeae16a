"""TorchJD's aggregators through ``Aggregate``: what TorchJD itself would leave in ``.grad``."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from torch_gradmatch import Aggregate, Average, GradMatch

aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
autojac = pytest.importorskip("torchjd.autojac")
AGGREGATORS = {
    "UPGrad": aggregation.UPGrad,
    "PCGrad": aggregation.PCGrad,
    "CAGrad": partial(aggregation.CAGrad, c=0.5),
    "MGDA": aggregation.MGDA,
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def domains(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made: list[Any] = [torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [(x, (x[:, :3] * (index - 1)).sin()) for index, x in enumerate(made)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("name", AGGREGATORS)
def test_is_what_torchjd_leaves_in_grad(name: str):
    model, reference = network(), network()
    aggregator = AGGREGATORS[name]()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Aggregate(aggregator))
    plain = SGD(reference.parameters(), lr=0.1)
    for number in range(3):
        torch.manual_seed(number)  # PCGrad draws an order
        optimizer.meta_step(partial(loss_of, model), domains(number))
        torch.manual_seed(number)
        plain.zero_grad()
        losses = [loss_of(reference, batch) for batch in domains(number)]
        autojac.backward(losses)
        autojac.jac_to_grad(list(reference.parameters()), aggregator)
        plain.step()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_trains_with_an_average():
    model = network()
    optimizer = GradMatch(Adam(model.parameters(), lr=0.01), Aggregate(aggregation.UPGrad()), Average())
    losses = [optimizer.meta_step(partial(loss_of, model), domains(number)).losses.mean() for number in range(100)]
    assert losses[-1] < losses[0]
    with optimizer.averaged_weights():
        assert loss_of(model, domains(0)[0]).isfinite()
