"""TorchJD's aggregators through ``Aggregate``: what TorchJD itself would leave in ``.grad``."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from torch_gradmatch import Aggregate, GradMatch

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


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("name", AGGREGATORS)
def test_is_what_torchjd_leaves_in_grad(name: str):
    model, reference, aggregator = network(), network(), AGGREGATORS[name]()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), Aggregate(aggregator))
    plain = SGD(reference.parameters(), lr=0.1)
    for number in range(3):
        inputs = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        domains = [(x, (x[:, :3] * (index - 1)).sin()) for index, x in enumerate(inputs)]
        torch.manual_seed(number)  # PCGrad draws an order
        optimizer.meta_step(partial(loss_of, model), domains)
        torch.manual_seed(number)
        plain.zero_grad()
        autojac.backward([loss_of(reference, batch) for batch in domains])
        autojac.jac_to_grad(list(reference.parameters()), aggregator)
        plain.step()
        torch.testing.assert_close(list(model.parameters()), list(reference.parameters()), rtol=1e-7, atol=1e-9)
