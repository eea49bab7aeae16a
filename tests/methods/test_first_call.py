"""Mistakes in what meta_step is given get messages of ours, and lose nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _models import assert_identical
from _second_order import METHODS
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam

from torch_gradmatch import Fish, GradMatch, SmoothFish

INPUTS = [torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([[3.0, -1.0]], dtype=torch.float64)]


def built(method: str) -> tuple[nn.Module, GradMatch[Any]]:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    return model, GradMatch(Adam(model.parameters(), lr=0.1), METHODS[method](model))


@pytest.mark.parametrize("gradients", ["none", "old"])
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_fn_that_calls_backward_is_refused(method: str, retain: bool, gradients: str):
    model, optimizer = built(method)
    if gradients == "old":
        model(INPUTS[0]).sum().backward()
    before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def training_step(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward(retain_graph=retain)
        return loss

    with pytest.raises(RuntimeError, match=r"loss_fn called backward\(\)"):
        optimizer.meta_step(training_step, INPUTS)
    for name, p in model.named_parameters():
        assert (p.grad is None) if before[name] is None else torch.equal(p.grad, before[name])
    assert_identical(weights, dict(model.named_parameters()))
    optimizer.meta_step(lambda x: model(x).square().mean(), INPUTS)


@pytest.mark.parametrize("which", ["wrapper", "wrapped"])
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_fn_that_steps_is_refused(method: str, which: str):
    model, optimizer = built(method)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def training_step(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        (optimizer if which == "wrapper" else optimizer.optimizer).step()
        return loss

    with pytest.raises(RuntimeError, match=r"loss_fn called step\(\)"):
        optimizer.meta_step(training_step, INPUTS)
    assert_identical(weights, dict(model.named_parameters()))
    assert not optimizer.optimizer.state
    assert optimizer.inner_step == 0
    optimizer.meta_step(lambda x: model(x).square().mean(), INPUTS)


def test_a_loss_fn_that_differentiates_for_itself_is_fine():
    """A gradient penalty by autograd.grad leaves .grad alone."""
    model, optimizer = built("Fish")

    def penalized(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        out = model(x).sum()
        return out + torch.autograd.grad(out, x, create_graph=True)[0].square().sum()

    assert optimizer.meta_step(penalized, INPUTS).losses.shape == (2,)


def test_with_a_scaler_too():
    model, optimizer = built("SmoothFish")
    scaler = GradScaler("cpu", init_scale=8.0)
    with pytest.raises(RuntimeError, match=r"loss_fn called backward\(\)"):
        optimizer.meta_step(lambda x: model(x).sum().backward(), INPUTS, scaler)
    optimizer.meta_step(lambda x: model(x).square().mean(), INPUTS, scaler)


@pytest.mark.parametrize("method", [Fish(), SmoothFish(1.0, 0.1)], ids=["Fish", "SmoothFish"])
def test_swapped_and_missing_arguments(method: Any):
    w = nn.Parameter(torch.zeros(()))
    optimizer = GradMatch(SGD([w], lr=0.1), method)
    loss_fn = lambda x: (w - x).square()  # noqa: E731
    with pytest.raises(TypeError, match=r"loss_fn should be a function of a batch \(got list, the batches.*swapped"):
        optimizer.meta_step([1.0, 2.0], loss_fn)
    with pytest.raises(TypeError, match=r"loss_fn should be a function of a batch \(got Tensor\)"):
        optimizer.meta_step(loss_fn(1.0), [1.0, 2.0])
    for empty in ([], {}):
        with pytest.raises(ValueError, match="batches is empty"):
            optimizer.meta_step(loss_fn, empty)
