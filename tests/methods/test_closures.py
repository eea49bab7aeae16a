"""Optimizers that evaluate the loss themselves: LBFGS, and SAM by closure. Fish: ``test_every_optimizer.py``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import pytorch_optimizer
import torch
from _models import assert_same_state, domain_loss, small_network
from _reference import mean_pairwise_cosine
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

DOMAINS = range(3)


BUILDS: dict[str, Callable[[Any], Optimizer]] = {  # known to need a closure
    "SAM": lambda p: pytorch_optimizer.SAM(p, SGD, lr=0.1, momentum=0.9, rho=0.2),
    "SAM-Adam": lambda p: pytorch_optimizer.SAM(p, Adam, lr=0.05, rho=0.2, adaptive=True),
    "LookSAM": lambda p: pytorch_optimizer.LookSAM(p, SGD, lr=0.1, rho=0.2, k=2),
    "LBFGS": lambda p: LBFGS(p, lr=0.1, max_iter=3),
    "LBFGS-Wolfe": lambda p: LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
}


def closure_of(optimizer: Optimizer, loss: Callable[[], Any]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def plain_step(optimizer: Optimizer, loss: Callable[[], Any]) -> None:
    closure = closure_of(optimizer, loss)
    closure()
    optimizer.step(closure)


def test_what_is_reported_is_at_the_point_before_the_step():
    model, plain = small_network(), small_network()
    optimizer = GradMatch(BUILDS["SAM"](model.parameters()), Fish(1.0, track_alignment=True))
    inner, losses, gradients = BUILDS["SAM"](plain.parameters()), [], []
    for d in DOMAINS:
        losses.append(domain_loss(plain, d))
        found = torch.autograd.grad(losses[-1], list(plain.parameters()))
        gradients.append(torch.cat([g.reshape(-1) for g in found]))
        plain_step(inner, partial(domain_loss, plain, d))
    report = optimizer.meta_step(partial(domain_loss, model), DOMAINS)
    torch.testing.assert_close(report.losses, torch.stack(losses).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(report.cosine, mean_pairwise_cosine(gradients), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("method", ["SmoothFish", "IDGM"])
def test_a_direction_is_worked_out_again_where_they_ask_for_it(method: str, name: str):
    """With gamma 0 the direction is the gradient of the mean loss: a plain step of the optimizer on that."""
    model, plain = small_network(), small_network()
    settings = {"SmoothFish": SmoothFish(0.0, 0.1), "IDGM": IDGM(model, 0.0)}[method]
    optimizer, inner = GradMatch(BUILDS[name](model.parameters()), settings), BUILDS[name](plain.parameters())
    for _ in range(3):
        plain_step(inner, lambda: sum(domain_loss(plain, d) for d in DOMAINS) / 3)
        optimizer.meta_step(partial(domain_loss, model), DOMAINS)
        assert_same_state(model.state_dict(), plain.state_dict(), rtol=1e-10)


@pytest.mark.parametrize("method", [Fish(0.4), SmoothFish(1.0, 0.1)], ids=["Fish", "SmoothFish"])
def test_sam_in_two_calls_is_refused_in_words(method: Any):
    """They would move the parameters outside of ``step``."""
    optimizer = GradMatch(BUILDS["SAM"](small_network().parameters()), method)
    for name in ("first_step", "second_step"):
        assert not hasattr(optimizer, name)
        with pytest.raises(AttributeError, match=rf"{name}\(\) would move the parameters.*call step\(closure\)"):
            getattr(optimizer, name)(zero_grad=True)


@pytest.mark.parametrize("name", ["SAM", "LBFGS"])
def test_a_scaler_is_refused(name: str):
    model = small_network()
    optimizer = GradMatch(BUILDS[name](model.parameters()), Fish(0.5))
    with pytest.raises(RuntimeError, match=f"{name} needs a closure, which a GradScaler does not support"):
        optimizer.meta_step(partial(domain_loss, model), DOMAINS, torch.amp.GradScaler("cpu"))


def test_buffers_moved_before_the_first_closure_are_the_users():
    """The forward pass that begins the inner loop is in the closure: none was seen when the step is called."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    optimizer = GradMatch(BUILDS["LBFGS"](model.parameters()), Fish(0.5, inner_steps=2, model=model))
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    closure = closure_of(optimizer, lambda: model(x).square().mean())
    for _ in range(2):
        optimizer.step(closure)
    optimizer.zero_grad()
    with torch.no_grad():
        model(x + 3)
    mean = model[0].running_mean.clone()
    optimizer.step(closure)
    assert not torch.equal(model[0].running_mean, mean)
    optimizer.rollback()
    torch.testing.assert_close(model[0].running_mean, mean, rtol=0, atol=0)
