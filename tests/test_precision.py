"""Every method in single precision, under autocast and with parameters in bfloat16."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import _networks as networks
import pytest
import torch
from _networks import mean_squared_error, regression, two_layers
from _second_order import GAMMA, METHODS, assert_close, flat, gradient_of, plain_autograd
from torch import Tensor, nn
from torch.optim import SGD

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

LOW_PRECISION = {**METHODS, "SmoothFish": lambda model: SmoothFish(5.0, 0.5, model), "Fish": lambda model: Fish(1.0)}


@pytest.mark.parametrize(("kind", "hvp"), [(nn.LSTM, "reverse"), (nn.GRU, "finite_difference")])
def test_recurrent_layers_in_single_precision(kind: type[nn.RNNBase], hvp: str):
    """On the CPU another kernel than in double precision; a copy afterwards is whole."""
    torch.manual_seed(0)
    model = networks.Recurrent(kind).float()
    model.layers.dropout = 0.0
    twin = copy.deepcopy(model).double()
    batches = [(x.float(), y.float()) for x, y in regression(5, 3, 4)]
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), IDGM(model, GAMMA, "inner_product", hvp=hvp))
    optimizer.meta_step(lambda batch: mean_squared_error(model, batch), batches)
    expected = plain_autograd(twin, mean_squared_error, [(x.double(), y.double()) for x, y in batches])
    assert_close(flat(gradient_of(model), model).double(), flat(expected.direction, twin), 2e-3)
    assert torch.equal(copy.deepcopy(model)(batches[0][0]), model(batches[0][0]))


@pytest.mark.parametrize(
    ("method", "where"),
    [
        *((name, "around meta_step") for name in LOW_PRECISION if name != "IDGM-finite_difference"),
        *((name, "inside the loss") for name in ("IDGM", "IDGM-forward", "SmoothFish", "Fish")),
    ],
)
def test_autocast_to_bfloat16(method: str, where: str):
    """The step is that of single precision up to rounding; parameters and gradients stay in single precision.

    Autocast keeps copies of the weights until its end: around a whole meta-iteration they outlive a walk's steps.
    """
    moved = []
    for mixed in (False, True):
        around, inside = (
            torch.autocast("cpu", dtype=torch.bfloat16) if mixed and where == here else nullcontext()
            for here in ("around meta_step", "inside the loss")
        )
        torch.manual_seed(0)
        model = two_layers(nn.BatchNorm1d(16), width=16).float()
        batches = [(x.float(), y.float()) for x, y in regression(32, 4)]
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        optimizer = GradMatch(SGD(model.parameters(), lr=0.5), LOW_PRECISION[method](model))

        def loss(
            batch: tuple[Tensor, Tensor], model: nn.Module = model, mixed: bool = mixed, inside: Any = inside
        ) -> Tensor:
            with inside:
                output = model(batch[0])
            assert output.dtype == (torch.bfloat16 if mixed else torch.float32)
            return (output.float() - batch[1]).square().mean()

        with around:
            optimizer.meta_step(loss, batches)
        assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
        moved.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    assert_close(moved[1], moved[0], 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_parameters(method: str):
    torch.manual_seed(0)
    reference = two_layers(nn.LayerNorm(16), width=16)
    model = copy.deepcopy(reference).bfloat16()
    reference.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in regression(32, 4)]
    found = []
    for network, dtype in ((reference, torch.float64), (model, torch.bfloat16)):
        optimizer = GradMatch(SGD(network.parameters(), lr=0.1), METHODS[method](network))
        optimizer.meta_step(
            lambda b, n=network, t=dtype: mean_squared_error(n, (b[0].to(t), b[1].to(t))).to(t), batches
        )
        assert {p.dtype for p in network.parameters()} == {p.grad.dtype for p in network.parameters()} == {dtype}
        found.append(flat(gradient_of(network), network).double())
    least = 0.97 if "finite_difference" in method else 0.99  # the step is long where the dtype is coarse
    assert float(torch.cosine_similarity(found[0], found[1], dim=0)) > least
