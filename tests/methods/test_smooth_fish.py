"""SmoothFish against its definition, and against the exact objective to second order."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from _models import FeatureNet, assert_identical, assert_same_model, loss_of, make_batches
from _reference import smooth_fish_direction, smooth_fish_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fish import quartic_losses
from test_idgm import expected_idgm_direction
from torch import Tensor, nn

from torch_gradmatch import GradMatch, SmoothFish, fish_gamma


def direction(losses: Any, theta: Tensor, gamma: float, inner_lr: float) -> Tensor:
    """What the wrapped optimizer gets as the gradient, through the public API."""
    parameter = nn.Parameter(theta.clone())
    optimizer = GradMatch(torch.optim.SGD([parameter], lr=1.0), SmoothFish(gamma, inner_lr))
    optimizer.meta_step(lambda loss: loss(parameter), losses)
    torch.testing.assert_close(theta - parameter.detach(), parameter.grad)
    return parameter.grad


@settings(deadline=None, max_examples=20)
@given(domains=st.integers(2, 5), seed=st.integers(0, 2**32), gamma=st.floats(0, 5), inner_lr=st.floats(1e-3, 1.0))
def test_against_the_definition(domains: int, seed: int, gamma: float, inner_lr: float):
    generator = torch.Generator().manual_seed(seed)
    losses = quartic_losses(generator, domains=domains, size=4)
    theta = torch.randn(4, generator=generator, dtype=torch.float64)
    expected = smooth_fish_direction(losses, theta, gamma, inner_lr)
    torch.testing.assert_close(direction(losses, theta, gamma, inner_lr), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("domains", [2, 3, 4])
def test_is_idgm_to_second_order(domains: int, gamma: float):
    """Mean over all orders against the exact objective with gamma * fish_gamma: halve alpha, quarter the error."""
    generator = torch.Generator().manual_seed(1)
    losses = quartic_losses(generator, domains=domains, size=5, scale=0.4)
    theta = torch.randn(5, generator=generator, dtype=torch.float64)
    errors = []
    for halvings in range(3, 7):  # down to 1/64
        alpha = 0.5**halvings
        exact = expected_idgm_direction(losses, theta, gamma * fish_gamma(alpha, domains))
        found = [direction(order, theta, gamma, alpha) for order in itertools.permutations(losses)]
        errors.append(float((torch.stack(found).mean(dim=0) - exact).norm()))
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(errors)]
    assert all(3.7 <= ratio <= 4.3 for ratio in ratios), ratios


def test_adam_on_the_network_with_every_feature():
    model = FeatureNet(torch.Generator().manual_seed(0))
    oracle = copy.deepcopy(model)
    optimizer = GradMatch(
        torch.optim.AdamW(model.parameters(), lr=0.05), SmoothFish(2.0, 0.1, model, track_alignment=True)
    )
    plain = torch.optim.AdamW(oracle.parameters(), lr=0.05)
    batches = make_batches(torch.Generator().manual_seed(1), 12)
    for start in range(0, 12, 3):
        group = batches[start : start + 3]
        report = optimizer.meta_step(lambda b: loss_of(model, b), group)
        found = smooth_fish_gradient(oracle, loss_of, group, 2.0, 0.1)
        for p, g in zip([p for p in oracle.parameters() if p.requires_grad], found, strict=True):
            p.grad = g
        plain.step()
        assert_same_model(model, oracle, rtol=1e-9)
        assert report.losses.shape == report.grad_norms.shape == (3,)
        assert report.inner_product.shape == report.cosine.shape == ()
    assert model.unused.grad is None


def test_costs_two_gradients_for_each_domain_but_one():
    calls = []
    w = nn.Parameter(torch.zeros(()))

    def loss_fn(target: float) -> Tensor:
        calls.append(target)
        return (w - target).square()

    optimizer = GradMatch(torch.optim.SGD([w], lr=0.1), SmoothFish(1.0, 0.1))
    optimizer.meta_step(loss_fn, [1.0, 2.0, 3.0])
    assert calls == [1.0, 2.0, 3.0, 2.0, 3.0]


def test_dropout_is_the_same_in_both_gradients_of_a_domain():
    """With a vanishing walk both are the same, so even a large gamma changes nothing; and the generator moves once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1)).double()
    batches = [torch.randn(5, 4, dtype=torch.float64) for _ in range(3)]
    found = []
    for gamma in (0.0, 100.0):
        torch.manual_seed(1)
        copied = copy.deepcopy(model)
        optimizer = GradMatch(torch.optim.SGD(copied.parameters(), lr=0.1), SmoothFish(gamma, 1e-12))
        optimizer.meta_step(lambda x, m=copied: m(x).square().mean(), batches)
        found.append((torch.cat([p.grad.reshape(-1) for p in copied.parameters()]), torch.rand(())))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-9)
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("fails_at", range(5))
def test_an_error_on_the_way_changes_nothing(fails_at: int):
    model = FeatureNet(torch.Generator().manual_seed(0))
    optimizer = GradMatch(torch.optim.Adam(model.parameters()), SmoothFish(1.0, 0.1, model))
    before = copy.deepcopy(model.state_dict())
    count = itertools.count()

    def loss_fn(batch: Any) -> Tensor:
        loss = loss_of(model, batch)
        if next(count) == fails_at:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.meta_step(loss_fn, make_batches(torch.Generator().manual_seed(1), 3))
    assert_identical(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.optimizer.state
    optimizer.meta_step(lambda b: loss_of(model, b), make_batches(torch.Generator().manual_seed(1), 3))


def test_a_walk_that_diverges_is_an_error_that_names_the_step():
    w = nn.Parameter(torch.ones(()))
    optimizer = GradMatch(torch.optim.SGD([w], lr=0.1), SmoothFish(1.0, 1e30))
    with pytest.raises(RuntimeError, match=r"inner walk of SmoothFish diverged.*inner_lr=1e\+30"):
        optimizer.meta_step(lambda t: (w - t).pow(4), [1.0, 2.0, 3.0])
    assert w.item() == 1.0
    assert w.grad is None
    ignoring = GradMatch(torch.optim.SGD([w], lr=0.1), SmoothFish(1.0, 1e30, nonfinite="ignore"))
    ignoring.meta_step(lambda t: (w - t).pow(4), [1.0, 2.0, 3.0])
    assert not bool(torch.isfinite(w))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1.0, 0.1), ValueError, r"gamma should be a finite number of at least 0 \(got -1.0\)"),
        ((1.0, 0.0), ValueError, r"inner_lr should be a finite number greater than 0 \(got 0.0\)"),
        ((1.0, float("nan")), ValueError, "inner_lr .*got nan"),
        ((1.0, 0.1, "model"), TypeError, "model should be a torch.nn.Module .got str."),
        ((1.0, 0.1, None, "warn"), ValueError, "nonfinite should be one of .*got 'warn'"),
    ],
    ids=["gamma", "zero step", "nan step", "model", "nonfinite"],
)
def test_bad_settings(arguments: tuple[Any, ...], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        SmoothFish(*arguments)


def test_representation():
    assert repr(SmoothFish(1.0, 0.1)) == (
        "SmoothFish(gamma=1.0, inner_lr=0.1, model=None, nonfinite='raise', track_alignment=False)"
    )
