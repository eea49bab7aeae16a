"""Directions beyond ERM: the theorem, oracles by double backward, and what the figures mean."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import _networks as networks
import pytest
import torch
from _networks import Case, make
from torch.optim import LBFGS, SGD, Adam

from torch_gradmatch import IDGM, Fish, SmoothFish, fish_gamma
from torch_gradmatch.evaluation.fidelity import ExactTerm, agreement_of, fidelity, random_orders
from torch_gradmatch.evaluation.trial import Trial
from torch_gradmatch.gradients.agreement import inner_product, variance

SMOOTH = [networks.batch_norm_1d, networks.resnet, networks.dropout, networks.transformer, networks.gru]


@contextmanager
def trying(case: Case, optimizer: torch.optim.Optimizer) -> Iterator[Trial]:
    with Trial(case.model, lambda batch: case.loss(case.model, batch), case.batches, optimizer) as trial:
        trial.fix_random_numbers()
        yield trial


def all_orders(domains: int) -> list[list[int]]:
    return [list(order) for order in itertools.permutations(range(domains))]


@pytest.mark.parametrize("build", SMOOTH)
def test_the_exact_term_is_the_double_backward_of_the_inner_product(build):
    case = make(build)
    parameters = list(case.model.parameters())
    with trying(case, SGD(parameters, lr=0.1)) as trial:
        exact = ExactTerm(trial)
        trial.reset()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            gradients = [
                torch.autograd.grad(trial.loss_fn(b), parameters, create_graph=True, materialize_grads=True)
                for b in trial.batches
            ]
            pairs = list(itertools.permutations(gradients, 2))
            gip = sum((a * b).sum() for one, other in pairs for a, b in zip(one, other, strict=True)) / len(pairs)
            expected = torch.autograd.grad(-gip, parameters, materialize_grads=True)
    sizes = [p.numel() for p in parameters]
    terms, means = (
        [v.view(p.shape) for v, p in zip(x.split(sizes), parameters, strict=True)] for x in (exact.term, exact.mean)
    )
    for p, term, mean, e, *g in zip(parameters, terms, means, expected, *gradients, strict=True):
        torch.testing.assert_close(mean, torch.stack(g).mean(0).detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(term, e, rtol=1e-7, atol=1e-9 * float(e.abs().max() + 1), msg=str(p.shape))
    assert 0 < exact.noise < 1e-12


@pytest.mark.parametrize("build", SMOOTH)
def test_fish_by_sgd_tends_to_exact_with_fish_gamma(build):
    """Over all orders; the error falls in proportion to the learning rate."""
    errors = []
    for lr in (1e-4, 5e-5):
        case = make(build)
        with trying(case, SGD(case.model.parameters(), lr=lr)) as trial:
            exact = ExactTerm(trial)
            found = fidelity(trial, Fish(model=case.model), exact, all_orders(3))
        assert found.gamma == pytest.approx(fish_gamma(lr, 3), rel=0.05)
        assert found.resolved
        errors.append(found.relative_error)
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)


def test_an_order_and_its_reverse_stand_for_all_orders():
    case = make(networks.dropout)
    lr = 1e-6
    with trying(case, SGD(case.model.parameters(), lr=lr)) as trial:
        exact = ExactTerm(trial)
        pair = fidelity(trial, Fish(), exact, [[2, 0, 1], [1, 0, 2]])
        single = fidelity(trial, Fish(), exact, [[2, 0, 1]])
    assert pair.relative_error < 1e-4
    assert pair.gamma == pytest.approx(fish_gamma(lr, 3), rel=1e-4)
    assert single.relative_error > 0.05  # one order is not symmetric
    assert single.cosine == single.cosines[0] == pytest.approx(pair.cosines[0])


def test_methods_are_told_apart_by_their_gamma():
    case = make(networks.batch_norm_1d)
    lr, domains = 1e-5, 3
    with trying(case, Adam(case.model.parameters(), lr=1e-3)) as trial:
        exact = ExactTerm(trial)
        smooth = fidelity(trial, SmoothFish(5.0, lr, case.model), exact, all_orders(domains))
        half = fidelity(trial, IDGM(case.model, 0.5, "inner_product"), exact, all_orders(domains))
        away = fidelity(trial, IDGM(case.model, 0.5, agreement=lambda g: -_gip(g)), exact, all_orders(domains))
        one = fidelity(trial, IDGM(case.model, 0.5, "inner_product", one_pass=True), exact, all_orders(domains))
    assert smooth.gamma == pytest.approx(5 * fish_gamma(lr, domains), rel=1e-3)
    assert half.gamma == pytest.approx(0.5, rel=1e-9)
    assert half.cosine == pytest.approx(1.0, abs=1e-12)
    assert len(half.cosines) == 1
    assert away.gamma == pytest.approx(-0.5, rel=1e-9)
    assert away.cosine == pytest.approx(-1.0, abs=1e-9)
    assert min(one.cosines) < max(one.cosines) - 0.01  # another in each order
    assert one.gamma == pytest.approx(0.5, rel=1e-9)  # exact in the mean
    assert one.cosine == pytest.approx(1.0, abs=1e-12)


def _gip(gradients):
    totals = [sum(g[name] for g in gradients) for name in gradients[0]]
    whole = sum((t * t).sum() for t in totals)
    each = sum((v * v).sum() for g in gradients for v in g.values())
    return (whole - each) / (len(gradients) * (len(gradients) - 1))


def test_a_difference_lost_in_rounding_says_so():
    case = make(networks.batch_norm_1d)
    with trying(case, SGD(case.model.parameters(), lr=1e-17)) as trial:
        found = fidelity(trial, Fish(), ExactTerm(trial), all_orders(3))
    assert not found.resolved
    assert math.isfinite(found.gamma)


def test_an_optimizer_that_evaluates_gradients_itself_has_no_direction_of_a_walk():
    case = make(networks.batch_norm_1d)
    with trying(case, LBFGS(case.model.parameters())) as trial:
        assert fidelity(trial, Fish(), ExactTerm(trial), all_orders(3)) is None


def test_parameters_beyond_the_loss_and_frozen_ones_are_zero():
    case = make(networks.features)
    with trying(case, SGD(case.model.parameters(), lr=1e-3)) as trial:
        exact = ExactTerm(trial)
        found = fidelity(trial, Fish(model=case.model), exact, all_orders(3))
    terms = exact.term.split([p.numel() for p in trial.parameters])
    zero = {p for p, t in zip(trial.parameters, terms, strict=True) if not t.any()}
    assert case.model.unused in zero
    assert all(p in zero for p in case.model.frozen.parameters())
    assert found.cosine > 0.9


@pytest.mark.parametrize("domains", [2, 5])
def test_orders_come_with_their_reverse(domains: int):
    orders = random_orders(domains, 6, torch.Generator().manual_seed(1))
    assert len(orders) == 6
    for first, second in zip(orders[::2], orders[1::2], strict=True):
        assert sorted(first) == list(range(domains))
        assert first == second[::-1]


@pytest.mark.parametrize(
    ("agreement", "name"),
    [
        ("inner_product", "inner_product"),
        ("variance", "variance"),
        ("cosine", "cosine"),
        (variance, "variance"),
        (lambda g: -_gip(g), "a function"),
        (_gip, "_gip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "function",
)
@pytest.mark.parametrize("build", [networks.batch_norm_1d, networks.transformer])
def test_idgm_is_exact_by_its_own_agreement(build, agreement, name: str):
    """With cosine 1 and its own gamma in its own units."""
    case = make(build)
    with trying(case, SGD(case.model.parameters(), lr=0.1)) as trial:
        method = IDGM(case.model, 0.3, agreement=agreement)
        found = fidelity(trial, method, ExactTerm(trial, agreement=agreement_of(method)), all_orders(3))
    assert found.agreement == name
    assert found.cosine == pytest.approx(1.0, abs=1e-9)
    assert found.gamma == pytest.approx(0.3, rel=1e-7)
    assert found.relative_error < 1e-6


def test_what_follows_a_walk_matches_the_inner_product():
    assert agreement_of(Fish()) is agreement_of(SmoothFish(1.0, 0.1)) is inner_product


def test_a_diverging_walk_says_so_in_its_own_words():
    case = make(networks.batch_norm_1d)
    with trying(case, SGD(case.model.parameters(), lr=1e200)) as trial:
        exact = ExactTerm(trial)
        with pytest.raises((RuntimeError, ValueError), match=r"diverged|the loss of batch \d is"):
            fidelity(trial, Fish(model=case.model), exact, all_orders(3))


def test_a_loss_that_is_not_the_same_twice_has_no_exact_term():
    case = make(networks.batch_norm_1d)
    calls = itertools.count(1)

    def loss_fn(batch):
        return case.loss(case.model, batch) * (1 + 0.1 * next(calls))

    with (
        Trial(case.model, loss_fn, case.batches, SGD(case.model.parameters(), lr=0.1)) as trial,
        pytest.raises(ValueError, match="not the same twice"),
    ):
        ExactTerm(trial)
