"""Directions beyond ERM: the theorem, what the figures mean, and when there are none."""

from __future__ import annotations

import itertools
import re
from typing import Any

import _networks as networks
import pytest
import torch
from _models import assert_identical
from _networks import Case, make
from _study import OnceDifferentiable, short_timings, state_of_everything
from torch import Tensor, nn
from torch.optim import LBFGS, SGD

from torch_gradmatch import IDGM, Comparison, Fish, SmoothFish, compare, fish_gamma
from torch_gradmatch.gradients.agreement import variance

SMOOTH = [networks.batch_norm_1d, networks.resnet, networks.dropout, networks.transformer, networks.gru]


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    short_timings(monkeypatch)


def compared(case: Case, methods: dict[str, Any], lr: float, orders: int = 2, **others: Any) -> Comparison:
    optimizer = SGD(case.model.parameters(), lr=lr)
    own: dict[str, Any] = {"loss_fn": case.loss, "batches": case.batches, "optimizer": optimizer} | others
    return compare(case.model, methods=methods, rounds=1, orders=orders, show=False, **own)


@pytest.mark.parametrize("build", SMOOTH)
def test_fish_by_sgd_tends_to_exact_with_fish_gamma(build: Any):
    """The error falls in proportion to the learning rate: exact is what it tends to."""
    errors = []
    for lr in (1e-4, 5e-5):
        case = make(build)
        found = compared(case, {"Fish": Fish(model=case.model)}, lr)["Fish"].fidelity
        assert found.gamma == pytest.approx(fish_gamma(lr, 3), rel=0.05)
        assert found.resolved
        errors.append(found.relative_error)
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)


def test_an_order_and_its_reverse_stand_for_all_orders():
    found = compared(make(networks.dropout), {"Fish": Fish()}, 1e-6, orders=4)["Fish"].fidelity
    assert found.relative_error < 1e-4
    assert found.gamma == pytest.approx(fish_gamma(1e-6, 3), rel=1e-4)
    assert len(found.cosines) == 4
    assert max(found.cosines) < 0.999 < found.cosine  # one order is not symmetric


def gip(gradients: Any) -> Tensor:
    totals = [sum(g[name] for g in gradients) for name in gradients[0]]
    whole = sum((t * t).sum() for t in totals)
    each = sum((v * v).sum() for g in gradients for v in g.values())
    return (whole - each) / (len(gradients) * (len(gradients) - 1))


AGREEMENTS = {
    "inner_product": "inner_product",
    "variance": "variance",
    "cosine": "cosine",
    "function variance": variance,
    "a function": lambda g: -gip(g),
    "gip": gip,
}


@pytest.mark.parametrize("build", [networks.batch_norm_1d, networks.transformer])
def test_idgm_is_exact_by_its_own_agreement(build: Any):
    """With cosine 1 and its own gamma in its own units."""
    case = make(build)
    methods = {name: IDGM(case.model, 0.3, agreement=agreement) for name, agreement in AGREEMENTS.items()}
    found = compared(case, methods, 0.1)
    for name in methods:
        fidelity = found[name].fidelity
        assert fidelity.agreement == name.removeprefix("function ")
        assert fidelity.cosine == pytest.approx(1.0, abs=1e-9)
        assert fidelity.gamma == pytest.approx(0.3, rel=1e-7)
        assert fidelity.relative_error < 1e-6
        assert len(fidelity.cosines) == 1


def test_walks_and_one_pass_match_the_inner_product_in_the_mean_over_orders():
    case = make(networks.batch_norm_1d)
    one_pass = IDGM(case.model, 0.5, "inner_product", one_pass=True)
    found = compared(case, {"smooth": SmoothFish(5.0, 1e-5, case.model), "one": one_pass, "Fish": Fish()}, 1e-5, 4)
    smooth, one = found["smooth"].fidelity, found["one"].fidelity
    assert smooth.agreement == one.agreement == found["Fish"].fidelity.agreement == "inner_product"
    assert smooth.gamma == pytest.approx(5 * fish_gamma(1e-5, 3), rel=1e-3)
    assert min(one.cosines) < max(one.cosines) - 0.01  # another in each order
    assert one.gamma == pytest.approx(0.5, rel=1e-9)
    assert one.cosine == pytest.approx(1.0, abs=1e-12)


def test_a_direction_that_is_lost_says_so_in_its_own_words():
    case = make(networks.batch_norm_1d)
    assert "lost in rounding" in str(compared(case, {"Fish": Fish(model=case.model)}, 1e-17))
    diverged = compared(case, {"Fish": Fish(model=case.model)}, 1e200)
    assert re.search(r"diverged|the loss of batch \d is", diverged["Fish"].error)
    assert diverged["Fish"].fidelity is None
    last = case.batches[-1]  # whose step is so long that the walk goes on from it nowhere

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return (1e6 if batch is last else 1.0) * model(batch[0]).square().mean().exp()

    reordered = compared(case, {"Fish": Fish(model=case.model)}, 0.1, loss_fn=loss_fn)
    assert reordered["Fish"].error == "the walk through the domains diverged: lower the learning rate"


def test_a_loss_with_a_memory_has_no_fidelity_and_is_named_once():
    case = make(networks.batch_norm_1d)
    calls = itertools.count(1)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return case.loss(case.model, batch) * (1 + 0.1 * next(calls))

    found = compared(case, None, 1e-4, loss_fn=loss_fn)
    assert found["Fish"].cost is not None
    assert "not the same twice" in found["SmoothFish, symmetric"].error
    printed = str(found).replace("\n", " ")
    assert printed.count("is not the same twice") <= 3
    assert "No fidelity for the inner_product: " in printed


def test_without_second_derivatives_the_reference_is_by_finite_differences():
    case = make(networks.batch_norm_1d)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return (OnceDifferentiable.apply(model(batch[0])) - batch[1]).square().mean()

    found = compared(case, None, 1e-4, loss_fn=loss_fn)
    assert "By finite differences for the inner_product: " in found.reference
    assert "finite_difference" in found["IDGM"].error
    assert "IDGM; IDGM, keep_graphs; IDGM, one_pass failed: " in str(found).replace("\n", " ")
    assert found["IDGM, finite_difference"].fidelity.cosine == pytest.approx(1.0, abs=1e-4)
    assert found["Fish"].fidelity.cosine > 0.99


def test_a_gradient_penalty_in_the_loss_is_no_hindrance():
    case = make(networks.batch_norm_1d)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return case.loss(model, batch) + slope.square().mean()

    found = compared(case, {"IDGM": IDGM(case.model, 0.1)}, 1e-5, loss_fn=loss_fn)
    assert found["IDGM"].fidelity.cosine == pytest.approx(1.0, abs=1e-6)


def test_lbfgs_has_costs_and_no_fidelity():
    case = make(networks.batch_norm_1d)
    optimizer = LBFGS(case.model.parameters(), lr=0.1, max_iter=3)
    before = state_of_everything(case.model, optimizer)
    found = compared(case, {"Fish": Fish(), "exact": IDGM(case.model, 0.1)}, 0.1, optimizer=optimizer)
    assert_identical(state_of_everything(case.model, optimizer), before)
    assert not any(row.error for row in found.rows)
    assert found["Fish"].fidelity is None
    assert found["Fish"].cost.evaluations > 3
