"""SmoothFish against its definition, and against the exact objective to second order."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from _models import FeatureNet, assert_identical, loss_of, make_batches
from _reference import smooth_fish_direction
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fish import quartic_losses
from test_idgm import expected_idgm_direction
from torch import Tensor, nn

from torch_gradmatch import GradMatch, SmoothFish, fish_gamma


def direction(losses: Any, theta: Tensor, gamma: float, inner_lr: float, *, symmetric: bool = False) -> Tensor:
    """What the wrapped optimizer gets as the gradient, through the public API."""
    parameter = nn.Parameter(theta.clone())
    method = SmoothFish(gamma, inner_lr, symmetric=symmetric)
    optimizer = GradMatch(torch.optim.SGD([parameter], lr=1.0), method)
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
    generator = torch.Generator().manual_seed(seed)
    losses = quartic_losses(generator, domains=domains, size=4)
    theta = torch.randn(4, generator=generator, dtype=torch.float64)
    expected = smooth_fish_direction(losses, theta, gamma, inner_lr, symmetric=symmetric)
    found = direction(losses, theta, gamma, inner_lr, symmetric=symmetric)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("gamma", "domains"), [(0.5, 3), (1.0, 2), (1.0, 4), (3.0, 3)])
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


@pytest.mark.parametrize(("domains", "seed"), [(2, 0), (3, 1), (8, 2)])
def test_a_walk_and_its_reverse_match_exactly_in_any_order(domains: int, seed: int):
    """One meta-iteration against one of IDGM by the inner product: the error halves with inner_lr, to nothing.

    The test of the test: so it does neither for one walk of the same strength nor with another constant.
    """
    generator = torch.Generator().manual_seed(seed)
    losses = quartic_losses(generator, domains=domains, size=5, scale=0.4)
    theta = torch.randn(5, generator=generator, dtype=torch.float64)
    gamma = 0.7
    exact = expected_idgm_direction(losses, theta, gamma)
    size = float((exact - expected_idgm_direction(losses, theta, 0.0)).norm())
    symmetric, one_walk, wrong = [], [], []
    for halvings in range(4, 12):
        alpha = 0.5**halvings
        found = direction(losses, theta, gamma, alpha, symmetric=True)
        symmetric.append(float((found - exact).norm()) / size)
        found = direction(losses, theta, gamma / fish_gamma(alpha, domains), alpha)
        one_walk.append(float((found - exact).norm()) / size)
        found = direction(losses, theta, 1.1 * gamma, alpha, symmetric=True)
        wrong.append(float((found - exact).norm()) / size)
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(symmetric)]
    assert all(1.8 <= ratio <= 2.3 for ratio in ratios[3:]), ratios
    assert symmetric[-1] < 1e-3
    assert one_walk[-1] > 0.05
    assert one_walk[-2] / one_walk[-1] == pytest.approx(1.0, abs=0.1)
    assert wrong[-1] == pytest.approx(0.1, abs=1e-2)


@pytest.mark.parametrize("kind", ["one walk", "its gradient alone", "symmetric"])
def test_the_objective_is_what_the_direction_lowers(kind: str):
    """An optimizer that asks for both (a line search): slope along the direction, to second order in alpha."""
    gamma = {"one walk": 2.0, "its gradient alone": 1.0, "symmetric": 0.5}[kind]
    generator = torch.Generator().manual_seed(0)
    losses = quartic_losses(generator, domains=3, size=5, scale=0.4)
    theta = torch.randn(5, generator=generator, dtype=torch.float64)
    orders = list(itertools.permutations(losses))
    errors = []

    class Asking(torch.optim.LBFGS):
        def step(self, closure: Any) -> None:
            self.value = closure()

    def evaluate(point: Tensor, order: Any, alpha: float) -> tuple[Tensor, Tensor]:
        parameter = nn.Parameter(point.clone())
        method = SmoothFish(gamma, alpha, symmetric=kind == "symmetric")
        optimizer = GradMatch(Asking([parameter]), method)
        optimizer.meta_step(lambda loss: loss(parameter), order)
        return optimizer.optimizer.value, parameter.grad

    for alpha in (1 / 32, 1 / 64, 1 / 128):
        mean = torch.stack([evaluate(theta, order, alpha)[1] for order in orders]).mean(dim=0)
        ahead, behind = (
            torch.stack([evaluate(theta + sign * 1e-5 * mean, order, alpha)[0] for order in orders]).mean()
            for sign in (1, -1)
        )
        errors.append(abs(float((ahead - behind) / 2e-5 - mean.square().sum())))
    smallest = 1.8 if kind == "symmetric" else 3.6
    assert all(coarse / fine > smallest for coarse, fine in itertools.pairwise(errors)), errors


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

    optimizer = GradMatch(torch.optim.SGD([w], lr=0.1), SmoothFish(gamma, 0.1, symmetric=symmetric))
    for number in range(1, 10):
        optimizer.meta_step(loss_fn, [1, 2, 3])
        looked = number in (1, 2, 4, 8) and len(evaluated) > 3
        assert calls == (evaluated[:3] + [1] * looked + evaluated[3:])
        calls.clear()


@pytest.mark.parametrize(
    ("gamma", "symmetric", "fails_at"),
    [(1.0, False, n) for n in (0, 2)] + [(2.0, False, n) for n in (0, 3, 5)] + [(2.0, True, n) for n in (3, 5, 7)],
)
def test_an_error_on_the_way_changes_nothing(gamma: float, symmetric: bool, fails_at: int):
    model = FeatureNet(torch.Generator().manual_seed(0))
    method = SmoothFish(gamma, 0.1, model, symmetric=symmetric)
    optimizer = GradMatch(torch.optim.Adam(model.parameters()), method)
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


@pytest.mark.parametrize(("gamma", "symmetric"), [(1.0, False), (2.0, False), (2.0, True)])
def test_a_walk_that_diverges_is_an_error_that_names_the_step(gamma: float, symmetric: bool):
    w = nn.Parameter(torch.ones(()))
    optimizer = GradMatch(torch.optim.SGD([w], lr=0.1), SmoothFish(gamma, 1e30, symmetric=symmetric))
    with pytest.raises(RuntimeError, match=r"inner walk of SmoothFish diverged.*inner_lr=1e\+30"):
        optimizer.meta_step(lambda t: (w - t).pow(4), [0.0, 2.0, 3.0])
    assert w.item() == 1.0
    assert w.grad is None
    ignoring = GradMatch(torch.optim.SGD([w], lr=0.1), SmoothFish(gamma, 1e30, nonfinite="ignore", symmetric=symmetric))
    ignoring.meta_step(lambda t: (w - t).pow(4), [0.0, 2.0, 3.0])
    assert not bool(torch.isfinite(w))


def test_at_gamma_1_a_loss_that_is_infinite_by_itself_is_named():
    """Not the walk's fault: it is infinite before it, too."""
    w = nn.Parameter(torch.ones(()))
    optimizer = GradMatch(torch.optim.SGD([w], lr=0.1), SmoothFish(1.0, 0.1))
    with pytest.raises(ValueError, match="loss of batch 2 is inf: nothing was changed"):
        optimizer.meta_step(lambda t: (w - t).pow(4), [0.0, 2.0, float("inf")])
    assert w.item() == 1.0


def noisy_labels(domains: int = 3, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Domains of unequal scale and direction, three labels in ten wrong."""
    generator = torch.Generator().manual_seed(0)
    directions, batches = torch.randn(domains + 1, 8, generator=generator), []
    for scale, direction in enumerate(directions[1:], 1):
        x = scale * torch.randn(size, 8, generator=generator)
        wrong = torch.rand(size, generator=generator) < 0.3
        batches.append((x, ((x @ (directions[0] + 0.7 * direction) > 0) ^ wrong).long()))
    return batches


def small_classifier(gamma: float, **settings: Any) -> tuple[nn.Module, GradMatch[SmoothFish], Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = GradMatch(torch.optim.AdamW(model.parameters(), lr=3e-3), SmoothFish(gamma, 1.0, model, **settings))
    return model, optimizer, lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(("gamma", "nonfinite"), [(0.5, "raise"), (1.0, "raise"), (3.0, "ignore")])
def test_training_that_matches_a_little_is_not_suspected_nor_what_is_not_looked_at(gamma: float, nonfinite: str):
    optimizer, loss_fn = small_classifier(gamma, nonfinite=nonfinite)[1:]
    losses = [float(optimizer.meta_step(loss_fn, noisy_labels()).losses.mean()) for _ in range(200)]
    assert losses[-1] > 50 * losses[0] if gamma > 1 else losses[-1] < losses[0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_warns_where_the_walk_is_lost_in_rounding(symmetric: bool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    batches = [torch.randn(5, 4) for _ in range(3)]
    gamma = 1.0 if symmetric else 2.0

    def train(inner_lr: float) -> None:
        optimizer = GradMatch(
            torch.optim.SGD(model.parameters(), lr=0.0), SmoothFish(gamma, inner_lr, symmetric=symmetric)
        )
        optimizer.meta_step(lambda x: model(x).square().mean(), batches)

    train(0.1)
    with pytest.warns(UserWarning, match=r"changes by .* of its length, which is rounding. Raise inner_lr"):
        train(1e-9)


def test_does_not_warn_of_a_walk_that_is_short_because_all_is_learnt():
    w = nn.Parameter(torch.zeros(()))
    optimizer = GradMatch(torch.optim.SGD([w], lr=0.1), SmoothFish(2.0, 0.1))
    for number in range(1, 9):
        if number == 5:
            optimizer.param_groups[0]["lr"] = 30.0
        optimizer.meta_step(lambda scale: nn.functional.softplus(-scale * w), [1.0, 2.0])
    assert 0 < float(w.grad.abs()) < 1e-6
