"""SmoothFish against its definition, and against the exact objective to second order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from _reference import smooth_fish_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from test_idgm import exact_direction, quartic, ratios
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import LBFGS, SGD, AdamW

from torch_gradmatch import GradMatch, SmoothFish, fish_gamma


def direction(losses: Any, theta: Tensor, gamma: float, inner_lr: float, *, symmetric: bool = False) -> Tensor:
    """What the wrapped optimizer gets as the gradient, through the public API."""
    parameter = nn.Parameter(theta.clone())
    optimizer = GradMatch(SGD([parameter], lr=1.0), SmoothFish(gamma, inner_lr, symmetric=symmetric))
    optimizer.meta_step(lambda loss: loss(parameter), losses)
    torch.testing.assert_close(theta - parameter.detach(), parameter.grad)
    return parameter.grad


@settings(deadline=None, max_examples=20)
@given(
    domains=st.integers(2, 5),
    seed=st.integers(0, 2**32),
    gamma=st.floats(0, 5) | st.just(1.0),
    inner_lr=st.floats(1e-3, 1.0),
    symmetric=st.booleans(),
)
def test_against_the_definition(domains: int, seed: int, gamma: float, inner_lr: float, symmetric: bool):
    losses, theta = quartic(seed, domains, size=4, scale=1.0)
    model = nn.ParameterDict({"theta": theta.clone()})
    (expected,) = smooth_fish_gradient(
        model, lambda m, loss: loss(m["theta"]), losses, gamma, inner_lr, symmetric=symmetric
    )
    found = direction(losses, theta, gamma, inner_lr, symmetric=symmetric)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("gamma", "domains"), [(0.5, 3), (1.0, 2), (1.0, 4), (3.0, 3)])
def test_is_idgm_to_second_order(domains: int, gamma: float):
    """Mean over all orders against the exact objective with gamma * fish_gamma: halve alpha, quarter the error."""
    losses, theta = quartic(1, domains)
    errors = []
    for alpha in (1 / 8, 1 / 16, 1 / 32, 1 / 64):
        exact = exact_direction(losses, theta, gamma * fish_gamma(alpha, domains))
        found = [direction(order, theta, gamma, alpha) for order in itertools.permutations(losses)]
        errors.append(float((torch.stack(found).mean(dim=0) - exact).norm()))
    assert all(3.7 <= ratio <= 4.3 for ratio in ratios(errors)), errors


@pytest.mark.parametrize(("domains", "seed"), [(2, 0), (3, 1), (8, 2)])
def test_a_walk_and_its_reverse_match_exactly_in_any_order(domains: int, seed: int):
    """One meta-iteration against one of IDGM by the inner product: the error halves with inner_lr, to nothing.

    The test of the test: so it does neither for one walk of the same strength nor with another constant.
    """
    losses, theta = quartic(seed, domains)
    gamma = 0.7
    exact = exact_direction(losses, theta, gamma)
    size = float((exact - exact_direction(losses, theta, 0.0)).norm())
    symmetric, one_walk, wrong = [], [], []
    for halvings in range(4, 12):
        alpha = 0.5**halvings
        for errors, found in (
            (symmetric, direction(losses, theta, gamma, alpha, symmetric=True)),
            (one_walk, direction(losses, theta, gamma / fish_gamma(alpha, domains), alpha)),
            (wrong, direction(losses, theta, 1.1 * gamma, alpha, symmetric=True)),
        ):
            errors.append(float((found - exact).norm()) / size)
    assert all(1.8 <= ratio <= 2.3 for ratio in ratios(symmetric)[3:]), symmetric
    assert symmetric[-1] < 1e-3
    assert one_walk[-1] > 0.05
    assert one_walk[-2] / one_walk[-1] == pytest.approx(1.0, abs=0.1)
    assert wrong[-1] == pytest.approx(0.1, abs=1e-2)


class Asking(LBFGS):
    """Asks for the objective, as a line search does, and moves nothing."""

    def step(self, closure: Any) -> None:
        self.value = closure()


@pytest.mark.parametrize(
    ("gamma", "symmetric"),
    [(2.0, False), (1.0, False), (0.5, True)],
    ids=["one walk", "its gradient alone", "symmetric"],
)
def test_the_objective_is_what_the_direction_lowers(gamma: float, symmetric: bool):
    """Slope along the direction, to second order in alpha."""
    losses, theta = quartic(0, domains=3)
    orders = list(itertools.permutations(losses))
    errors = []

    def evaluate(point: Tensor, order: Any, alpha: float) -> tuple[Tensor, Tensor]:
        parameter = nn.Parameter(point.clone())
        optimizer = GradMatch(Asking([parameter]), SmoothFish(gamma, alpha, symmetric=symmetric))
        optimizer.meta_step(lambda loss: loss(parameter), order)
        return optimizer.optimizer.value, parameter.grad

    for alpha in (1 / 32, 1 / 64, 1 / 128):
        mean = torch.stack([evaluate(theta, order, alpha)[1] for order in orders]).mean(dim=0)
        ahead, behind = (
            torch.stack([evaluate(theta + sign * 1e-5 * mean, order, alpha)[0] for order in orders]).mean()
            for sign in (1, -1)
        )
        errors.append(abs(float((ahead - behind) / 2e-5 - mean.square().sum())))
    assert all(ratio > (1.8 if symmetric else 3.6) for ratio in ratios(errors)), errors


@pytest.mark.parametrize(
    ("gamma", "symmetric", "evaluated"),
    [
        (0.0, False, [1, 2, 3]),
        (0.0, True, [1, 2, 3]),
        (1.0, False, [1, 2, 3]),
        (2.0, False, [1, 2, 3, 2, 3]),
        (0.1, True, [1, 2, 3, 2, 1, 2, 3]),
    ],
)
def test_evaluates_each_domain_as_often_as_it_says(gamma: float, symmetric: bool, evaluated: list[float]):
    """And once more, to see whether a loss is the same twice, in meta-iterations number 1, 2, 4 and 8."""
    calls: list[float] = []
    w = nn.Parameter(torch.zeros(()))

    def loss_fn(target: float) -> Tensor:
        calls.append(target)
        return (w - target).square()

    optimizer = GradMatch(SGD([w], lr=0.1), SmoothFish(gamma, 0.1, symmetric=symmetric))
    for number in range(1, 10):
        optimizer.meta_step(loss_fn, [1, 2, 3])
        looked = number in (1, 2, 4, 8) and len(evaluated) > 3
        assert calls == (evaluated[:3] + [1] * looked + evaluated[3:])
        calls.clear()


@pytest.mark.parametrize(("gamma", "symmetric"), [(1.0, False), (2.0, False), (2.0, True)])
def test_a_walk_that_diverges_is_an_error_that_names_the_step(gamma: float, symmetric: bool):
    w = nn.Parameter(torch.ones(()))
    optimizer = GradMatch(SGD([w], lr=0.1), SmoothFish(gamma, 1e30, symmetric=symmetric))
    with pytest.raises(RuntimeError, match=r"inner walk of SmoothFish diverged.*inner_lr=1e\+30"):
        optimizer.meta_step(lambda t: (w - t).pow(4), [0.0, 2.0, 3.0])
    assert w.item() == 1.0
    assert w.grad is None
    optimizer.method.nonfinite = "ignore"
    optimizer.meta_step(lambda t: (w - t).pow(4), [0.0, 2.0, 3.0])
    assert not bool(torch.isfinite(w))


def noisy_labels(domains: int = 3, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Domains of unequal scale and direction, three labels in ten wrong."""
    generator = torch.Generator().manual_seed(0)
    directions, batches = torch.randn(domains + 1, 8, generator=generator), []
    for scale, direction in enumerate(directions[1:], 1):
        x = scale * torch.randn(size, 8, generator=generator)
        wrong = torch.rand(size, generator=generator) < 0.3
        batches.append((x, ((x @ (directions[0] + 0.7 * direction) > 0) ^ wrong).long()))
    return batches


@pytest.mark.parametrize(("gamma", "nonfinite"), [(0.5, "raise"), (1.0, "raise"), (3.0, "ignore")])
def test_training_that_matches_a_little_is_not_suspected_nor_what_is_not_looked_at(gamma: float, nonfinite: Any):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), noisy_labels()
    optimizer = GradMatch(AdamW(model.parameters(), lr=3e-3), SmoothFish(gamma, 1.0, model, nonfinite=nonfinite))

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    losses = [float(optimizer.meta_step(loss_fn, data).losses.mean()) for _ in range(200)]
    assert losses[-1] > 50 * losses[0] if gamma > 1 else losses[-1] < losses[0]


@pytest.mark.parametrize("scaler", [None, GradScaler("cpu", init_scale=4.0)], ids=["plain", "scaler"])
@pytest.mark.parametrize(("gamma", "symmetric"), [(2.0, False), (1.0, True)])
def test_warns_where_the_walk_is_lost_in_rounding(gamma: float, symmetric: bool, scaler: GradScaler | None):
    """And points to the line of the user."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    batches = [torch.randn(5, 4) for _ in range(3)]

    def train(inner_lr: float) -> None:
        optimizer = GradMatch(SGD(model.parameters(), lr=0.0), SmoothFish(gamma, inner_lr, symmetric=symmetric))
        optimizer.meta_step(lambda x: model(x).square().mean(), batches, scaler=scaler)

    train(0.1)
    message = r"SmoothFish matches nothing.*changes by .* of its length, which is rounding. Raise inner_lr"
    with pytest.warns(UserWarning, match=message) as told:
        train(1e-9)
    assert told[0].filename == __file__


def test_does_not_warn_of_a_walk_that_is_short_because_all_is_learnt():
    w = nn.Parameter(torch.zeros(()))
    optimizer = GradMatch(SGD([w], lr=0.1), SmoothFish(2.0, 0.1))
    for number in range(1, 9):
        if number == 5:
            optimizer.param_groups[0]["lr"] = 30.0
        optimizer.meta_step(lambda scale: nn.functional.softplus(-scale * w), [1.0, 2.0])
    assert 0 < float(w.grad.abs()) < 1e-6
