"""Training that diverges is an error in words; what only looks like it is not, and the advice is what helps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from _feature_training import snapshot
from _models import assert_identical, domain_loss, small_network
from _second_order import nothing_changes
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from torch_gradmatch import IDGM, GradMatch, SmoothFish

DOMAINS = range(3)


def sgd(model: nn.Module, method: Any, lr: float = 0.01) -> GradMatch[Any]:
    return GradMatch(SGD(model.parameters(), lr=lr), method)


def check_refused(model: nn.Module, optimizer: GradMatch[Any], loss_fn: Any, batches: Any, message: str) -> None:
    """Check that one of the meta-iterations to come is refused in these words, and that it changes nothing."""
    before: Any = None

    def train() -> None:
        nonlocal before
        for _ in range(300):
            before = snapshot(model, optimizer), copy.deepcopy([p.grad for p in model.parameters()])
            optimizer.meta_step(loss_fn, batches)

    with pytest.raises(RuntimeError, match=message):
        train()
    assert_identical((snapshot(model, optimizer), [p.grad for p in model.parameters()]), before)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


HEALTHY: dict[str, Callable[[nn.Module], Any]] = {
    "inner_product": lambda m: IDGM(m, 0.1, "inner_product"),
    "inner_product, found gamma": lambda m: IDGM(m, agreement="inner_product"),
    "SmoothFish": lambda m: SmoothFish(2.0, 0.05, m),
}


@pytest.mark.parametrize("zero", [0.0, 1e-9])
@pytest.mark.parametrize("name", HEALTHY)
def test_a_loss_about_zero_is_healthy(name: str, zero: float):
    """A loss has no origin: less a constant it has the same gradients."""

    def trained(origins: list[Any]) -> dict[str, Tensor]:
        model = small_network()
        optimizer = sgd(model, HEALTHY[name](model))
        for _ in range(3):
            optimizer.meta_step(lambda d: domain_loss(model, d) - origins[d], DOMAINS)
        return dict(model.state_dict())

    at_start = [domain_loss(small_network(), d).detach() - zero for d in DOMAINS]
    torch.testing.assert_close(trained(at_start), trained([0.0, 0.0, 0.0]))


def bowl(gamma: float, lr: float = 0.1, **settings: Any) -> tuple[nn.Module, GradMatch[Any], Any, list[float]]:
    """L_i = (w - t_i)^2 / 2 for t = 1, 3: unbounded below if gamma > 1/2, since GIP = (w - 1)(w - 3)."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = sgd(model, IDGM(model, gamma, **{"agreement": "inner_product"} | settings), lr)
    return model, optimizer, lambda t: (model.weight.squeeze() - t).square() / 2, [1.0, 3.0]


@pytest.mark.parametrize(("gamma", "start"), [(20.0, 0.0), (8.0, 2.1)], ids=["at once", "from a harmless start"])
def test_an_exploding_inner_product_is_an_error_before_anything_changes(gamma: float, start: float):
    """At w = 2 the domains' gradients are opposed, and their inner product grows from there without end."""
    model, optimizer, loss_fn, targets = bowl(gamma)
    nn.init.constant_(model.weight, start)
    message = (
        r"training diverges: the matching term is .* and the mean loss .*earlier ones may have led here, so go back to "
        rf"a checkpoint\. Lower gamma \(it is {gamma:g}\), or use agreement='variance', which is bounded"
    )
    check_refused(model, optimizer, loss_fn, targets, message)
    optimizer.method.gamma = 0.0
    optimizer.meta_step(loss_fn, targets)


@pytest.mark.parametrize("gamma", [90.0, 300.0])
def test_smooth_fish_that_diverges_says_so_as_idgm_does_and_nothing_changes(gamma: float):
    model = small_network()
    optimizer = GradMatch(AdamW(model.parameters(), lr=0.01), SmoothFish(gamma, 0.3, model))
    message = r"training diverges: the matching term is .*go back to a checkpoint.*Lower gamma "
    message += rf"\(it is {gamma:g}\) or inner_lr \(it is 0.3\)"
    check_refused(model, optimizer, partial(domain_loss, model), DOMAINS, message)


def test_a_stable_gamma_is_not_suspected():
    """gamma = 0.4: bounded below, minimum of the mean loss kept. At first the loss is 0 and the matching term 1.2."""
    model, optimizer, loss_fn, targets = bowl(gamma=0.4, lr=0.5)
    for _ in range(120):
        report = optimizer.meta_step(lambda t: loss_fn(t) - 2.5, targets)
    assert model.weight.item() == pytest.approx(2.0, abs=1e-4)
    assert float(report.losses.mean()) == pytest.approx(-2.0)


@pytest.mark.parametrize("agreement", ["variance", "cosine"])
def test_the_bounded_agreements_are_not_suspected(agreement: str):
    model, optimizer, loss_fn, targets = bowl(gamma=1e6, lr=1e-9, agreement=agreement)
    optimizer.meta_step(loss_fn, targets)
    assert bool(torch.isfinite(model.weight).all())


def test_the_check_can_be_turned_off():
    model, optimizer, loss_fn, targets = bowl(gamma=20.0, nonfinite="ignore")
    for _ in range(80):
        optimizer.meta_step(loss_fn, targets)
    assert not bool(torch.isfinite(model.weight).all())


@pytest.mark.parametrize("agreement", ["variance", "cosine", "inner_product"])
def test_a_second_derivative_that_is_not_finite_is_blamed_on_the_agreement_only_if_it_is_unbounded(agreement: str):
    """The norm of a bias of zeros has a gradient and no second derivative."""
    remedy = r"no finite second derivative here \(norm\(\) or sqrt\(\) of zero\)"
    if agreement == "inner_product":
        remedy = "lower gamma, or use agreement='variance'"
    model = small_network()
    nn.init.zeros_(model[2].bias)
    optimizer = sgd(model, IDGM(model, 0.1, agreement))
    message = rf"IDGM diverged.*gamma=0.1\. Nothing was changed.*{remedy}"
    with nothing_changes(model, optimizer), pytest.raises(RuntimeError, match=message) as caught:
        optimizer.meta_step(lambda d: domain_loss(model, d) + model[2].bias.norm(), DOMAINS)
    assert ("variance" in str(caught.value)) is (agreement == "inner_product")
