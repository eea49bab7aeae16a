"""The exact objective and its two-pass gradient against naive double backward, and the laws they obey."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import _networks as networks
import hypothesis.strategies as st
import pytest
import torch
from _networks import Case, make, mean_squared_error, two_layers
from _networks import regression as batches_of_regression
from _reference import agreement_of
from _second_order import flat, next_random_numbers, plain_autograd, seed_everything
from hypothesis import given, settings
from torch import Tensor, nn

from torch_gradmatch.gradients.functional import (
    domain_gradients,
    functional_loss,
    idgm_grad,
    idgm_loss,
)

GAMMA = 0.3


AGREEMENTS = ["inner_product", "variance", "cosine", "own"]


def own_agreement(gradients: Any) -> Tensor:
    """Of dictionaries in the library, of flat vectors in the reference: minus the largest distance from the first."""
    flat = [g if isinstance(g, Tensor) else torch.cat([t.reshape(-1) for t in g.values()]) for g in gradients]
    return -torch.stack([(g - flat[0]).square().sum() for g in flat[1:]]).logsumexp(dim=0)


def phi_of(chosen: str) -> Any:
    return own_agreement if chosen == "own" else chosen


def pure_of(case: Case) -> Any:
    return functional_loss(case.model, lambda batch: case.loss(case.model, batch))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


def name_of(build: Callable[[], Case]) -> str:
    return build.__name__


@pytest.mark.parametrize("hvp", ["reverse", "kept", "forward", "finite_difference"])
@pytest.mark.parametrize("chosen", AGREEMENTS)
@pytest.mark.parametrize("build", [networks.mixup, networks.features], ids=name_of)
def test_two_passes_are_naive_double_backward(build: Callable[[], Case], chosen: str, hvp: str):
    """Every agreement by every way; other networks are in ``test_real_models.py``."""
    case, oracle = make(build), make(build).model
    way = {"keep_graphs": True} if hvp == "kept" else {"hvp": hvp}
    params, buffers = trainable(case.model), buffers_of(case.model)
    seed_everything()
    found = idgm_grad(pure_of(case), params, case.batches, GAMMA, phi_of(chosen), **way, buffers=buffers)
    next_numbers = next_random_numbers()
    seed_everything()
    expected = plain_autograd(oracle, case.loss, case.batches, GAMMA, phi_of(chosen))
    assert next_numbers == next_random_numbers()
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if hvp == "finite_difference" else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(flat(found.gradient, case.model), flat(expected.direction, oracle), **tolerance)
    torch.testing.assert_close(
        found.losses.mean() - GAMMA * found.agreement, expected.objective, rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(found.buffers, buffers_of(oracle), rtol=1e-12, atol=1e-12)
    assert found.reached == {n: g is not None for n, g in expected.direction.items()}


@pytest.mark.parametrize("chosen", AGREEMENTS)
@pytest.mark.parametrize("build", [networks.batch_norm_eval, networks.batch_norm_1d], ids=name_of)
def test_gradient_is_that_of_the_scalar_by_finite_differences(build: Callable[[], Case], chosen: str):
    """No derivative of the library's in the oracle: central differences of ``idgm_loss`` along random directions."""
    case = make(build)
    params, buffers = trainable(case.model), buffers_of(case.model)
    gradient = idgm_grad(pure_of(case), params, case.batches, GAMMA, phi_of(chosen), buffers=buffers).gradient
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}

        def objective(step: float, direction: dict[str, Tensor] = direction) -> float:
            moved = {n: p.detach() + step * direction[n] for n, p in params.items()}
            return float(idgm_loss(pure_of(case), moved, case.batches, GAMMA, phi_of(chosen), buffers=buffers)[0])

        slope = (objective(1e-5) - objective(-1e-5)) / 2e-5
        expected = sum(float((gradient[n] * direction[n]).sum()) for n in params)
        assert slope == pytest.approx(expected, rel=1e-6, abs=1e-8)


# ------------------------------------------------------------------------------------------------- the scalar composes


def quartic(generator: torch.Generator, domains: int, size: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(6, size, generator=generator, dtype=torch.float64), torch.randn(6, generator=generator).double())
        for _ in range(domains)
    ]


def regression(theta: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (torch.tanh(x @ theta) - y).square().mean()


def drawn(seed: int, domains: int, size: int = 4) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    batches = quartic(generator, domains, size)
    return torch.randn(size, generator=generator, dtype=torch.float64), batches


def test_jvp_is_the_gradient_along_a_direction():
    theta, batches = drawn(0, 3)
    direction = torch.ones_like(theta)
    value, slope = torch.func.jvp(lambda t: idgm_loss(regression, t, batches, GAMMA), (theta,), (direction,))
    torch.testing.assert_close(value, idgm_loss(regression, theta, batches, GAMMA))
    torch.testing.assert_close(slope, idgm_grad(regression, theta, batches, GAMMA).gradient @ direction)


def test_vmap_over_an_ensemble():
    thetas = torch.stack([drawn(seed, 3)[0] for seed in range(5)])
    batches = drawn(0, 3)[1]
    together = torch.func.vmap(torch.func.grad(lambda t: idgm_loss(regression, t, batches, GAMMA, "cosine")))(thetas)
    for theta, gradient in zip(thetas, together, strict=True):
        torch.testing.assert_close(idgm_grad(regression, theta, batches, GAMMA, "cosine").gradient, gradient)


def test_plain_autograd_and_a_second_derivative():
    theta, batches = drawn(1, 3)
    leaf = theta.clone().requires_grad_()
    idgm_loss(regression, leaf, batches, GAMMA).backward()
    torch.testing.assert_close(leaf.grad, idgm_grad(regression, theta, batches, GAMMA).gradient)
    hessian = torch.func.hessian(lambda t: idgm_loss(regression, t, batches, GAMMA))(theta)
    torch.testing.assert_close(hessian, hessian.T)


def test_the_derivative_by_gamma_is_minus_the_agreement():
    theta, batches = drawn(2, 3)
    slope = torch.func.grad(lambda g: idgm_loss(regression, theta, batches, g))(torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(slope, -idgm_grad(regression, theta, batches, 0.5).agreement)


def test_domain_gradients():
    theta, batches = drawn(3, 3)
    found = domain_gradients(regression, theta, batches)
    assert found.losses.shape == (3,)
    assert found.buffers is None
    for batch, gradient, loss in zip(batches, found.gradients, found.losses, strict=True):
        leaf = theta.clone().requires_grad_()
        value = regression(leaf, batch)
        torch.testing.assert_close(gradient, torch.autograd.grad(value, leaf)[0])
        torch.testing.assert_close(loss, value.detach())
    with pytest.raises(ValueError, match="batches is empty"):
        domain_gradients(regression, theta, [])


# ---------------------------------------------------------------------------------------------------------- the laws

many = {"domains": st.integers(2, 5), "seed": st.integers(0, 2**32)}
law = settings(deadline=None, max_examples=20)


@pytest.mark.parametrize("chosen", ["inner_product", "variance", "cosine"])
@law
@given(**many, order=st.randoms(use_true_random=False))
def test_the_order_of_domains_does_not_matter(chosen: str, domains: int, seed: int, order: Any):
    theta, batches = drawn(seed, domains)
    shuffled = batches[:]
    order.shuffle(shuffled)
    first, second = (idgm_grad(regression, theta, b, GAMMA, chosen) for b in (batches, shuffled))
    torch.testing.assert_close(first.gradient, second.gradient)
    torch.testing.assert_close(first.agreement, second.agreement)


@law
@given(**many)
def test_identical_domains(domains: int, seed: int):
    """GIP = |G|^2 and its gradient 2 H G; variance and cosine have nothing left to do."""
    theta, batches = drawn(seed, 1)
    batches *= domains
    gradient, loss_hessian = (
        f(lambda t: regression(t, batches[0]))(theta) for f in (torch.func.grad, torch.func.hessian)
    )
    found = idgm_grad(regression, theta, batches, GAMMA)
    torch.testing.assert_close(found.agreement, gradient.square().sum())
    torch.testing.assert_close(found.gradient, gradient - GAMMA * 2 * loss_hessian @ gradient)
    for chosen in ("variance", "cosine"):
        torch.testing.assert_close(idgm_grad(regression, theta, batches, 1.0, chosen).gradient, gradient)


@pytest.mark.parametrize("chosen", ["inner_product", "variance", "cosine", "own"])
@law
@given(**many)
def test_gamma_zero_is_ordinary_training(chosen: str, domains: int, seed: int):
    theta, batches = drawn(seed, domains)
    phi = own_agreement if chosen == "own" else chosen
    calls = []

    def counted(t: Tensor, batch: Any) -> Tensor:
        calls.append(1)
        return regression(t, batch)

    found = idgm_grad(counted, theta, batches, 0.0, phi)
    leaf = theta.clone().requires_grad_()
    torch.stack([regression(leaf, b) for b in batches]).mean().backward()
    torch.testing.assert_close(found.gradient, leaf.grad, rtol=1e-14, atol=1e-15)
    assert len(calls) == domains  # and costs no second pass
    expected = domain_gradients(regression, theta, batches).gradients
    torch.testing.assert_close(
        found.agreement, own_agreement(expected) if chosen == "own" else agreement_of(chosen, expected)
    )


@law
@given(**many, scale=st.floats(0.1, 10.0))
def test_scaling_of_the_losses(domains: int, seed: int, scale: float):
    """phi has the losses' scale squared (cosine: none), so gamma counts in units of 1/loss (cosine: of loss)."""
    theta, batches = drawn(seed, domains)

    def scaled(t: Tensor, batch: Any) -> Tensor:
        return scale * regression(t, batch)

    for chosen, gamma in (("inner_product", GAMMA / scale), ("variance", GAMMA / scale), ("cosine", GAMMA * scale)):
        expected = scale * idgm_grad(regression, theta, batches, GAMMA, chosen).gradient
        torch.testing.assert_close(idgm_grad(scaled, theta, batches, gamma, chosen).gradient, expected)


@pytest.mark.parametrize("hvp", ["reverse", "forward"])
@pytest.mark.parametrize("chosen", ["inner_product", "variance", "cosine"])
@pytest.mark.parametrize("build", [networks.transformer_eval, networks.features], ids=name_of)
def test_one_pass_over_an_order_and_its_reverse_is_two_passes(build: Callable[[], Case], chosen: str, hvp: str):
    case = make(build)
    model, pure = case.model.eval(), pure_of(case)  # a domain's loss does not depend on its place
    params, buffers = trainable(model), buffers_of(model)
    two = idgm_grad(pure, params, case.batches, GAMMA, chosen, buffers=buffers)
    one, other = (
        idgm_grad(pure, params, order, GAMMA, chosen, hvp=hvp, one_pass=True, buffers=buffers)
        for order in (case.batches, case.batches[::-1])
    )
    of_both = {n: (g + other.gradient[n]) / 2 for n, g in one.gradient.items()}
    torch.testing.assert_close(of_both, two.gradient, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(one.agreement, two.agreement)
    assert torch.equal(one.losses, two.losses)
    assert float((flat(one.gradient, model) - flat(two.gradient, model)).abs().max()) > 1e-6  # one order is another


@law
@given(seed=st.integers(0, 2**32), chosen=st.sampled_from(["inner_product", "variance", "cosine"]))
def test_one_pass_is_unbiased_over_the_orders(seed: int, chosen: str):
    theta, batches = drawn(seed, 4)
    found = [
        idgm_grad(regression, theta, list(order), GAMMA, chosen, one_pass=True).gradient
        for order in itertools.permutations(batches)
    ]
    expected = idgm_grad(regression, theta, batches, GAMMA, chosen).gradient
    torch.testing.assert_close(torch.stack(found).mean(dim=0), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("hvp", ["reverse", "forward", "finite_difference"])
def test_one_pass_moves_buffers_and_random_numbers_once_for_each_domain(hvp: str):
    torch.manual_seed(0)
    model = two_layers(nn.BatchNorm1d(6), nn.Dropout(0.3))
    batches, params, buffers = batches_of_regression(7, 4), trainable(model), buffers_of(model)
    pure, calls = functional_loss(model, lambda batch: mean_squared_error(model, batch)), []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return pure(*arguments)

    found = []
    for settings_ in ({"one_pass": True, "hvp": hvp}, {"keep_graphs": True}):
        seed_everything()
        found.append((idgm_grad(counted, params, batches, GAMMA, buffers=buffers, **settings_), torch.rand(())))
        calls.append(0)
    (one, after), (kept, expected) = found
    assert torch.equal(after, expected)
    assert torch.equal(one.losses, kept.losses)
    for n, b in one.buffers.items():
        torch.testing.assert_close(b, kept.buffers[n])
    # Before the first domain there is none to match it with.
    assert calls.index(0) == {"reverse": 3, "forward": 1 + 2 * 2, "finite_difference": 1 + 2 * 3}[hvp]


def test_one_pass_by_strength():
    theta, batches = drawn(1, 4)
    found = idgm_grad(regression, theta, batches, None, "variance", strength=0.2, one_pass=True)
    mean = idgm_grad(regression, theta, batches, 0.0).gradient
    torch.testing.assert_close((found.gradient - mean).norm(), 0.2 * mean.norm())
    again = idgm_grad(regression, theta, batches, found.gamma, "variance", one_pass=True)
    torch.testing.assert_close(again.gradient, found.gradient)


# ------------------------------------------------------------------------------------------------- functional_loss


def test_functional_loss_leaves_the_model_alone():
    case = make(networks.batch_norm_1d)
    model = case.model
    before = copy.deepcopy(model.state_dict())
    params = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    given_buffers = copy.deepcopy(buffers)
    loss, moved = functional_loss(model, lambda x: model(x).sum())(params, buffers, case.batches[0][0])
    assert loss.item() == 0.0
    assert moved["1.num_batches_tracked"] == 1
    for n, b in buffers.items():
        assert torch.equal(b, given_buffers[n])
    for n, t in model.state_dict().items():
        assert torch.equal(t, before[n])


def test_buffers_under_transforms():
    """An ensemble by ``vmap`` with statistics of its own for each member."""
    case = make(networks.batch_norm_1d)
    batches = case.batches[:2]
    pure, params, buffers = pure_of(case), trainable(case.model), buffers_of(case.model)
    params = {n: p.detach() for n, p in params.items()}
    stacked = [{n: torch.stack([t, t]) for n, t in tensors.items()} for tensors in (params, buffers)]

    def gradient(p: Any, b: Any) -> Any:
        return torch.func.grad(lambda q: idgm_loss(pure, q, batches, GAMMA, buffers=b), has_aux=True)(p)

    expected, moved = gradient(params, buffers)
    found, found_moved = torch.func.vmap(gradient)(*stacked)
    for n, g in expected.items():
        torch.testing.assert_close(found[n], torch.stack([g, g]), rtol=1e-9, atol=1e-12)
    for n, b in moved.items():
        torch.testing.assert_close(found_moved[n], torch.stack([b, b]))


def test_functional_loss_restores_the_model_when_the_loss_raises():
    model = nn.Linear(2, 1)
    weight = model.weight

    def fails(x: Tensor) -> Tensor:
        model(x)
        raise KeyError("column")

    with pytest.raises(KeyError, match="column"):
        functional_loss(model, fails)({"weight": torch.zeros(1, 2)}, {}, torch.ones(1, 2))
    assert model.weight is weight


def test_a_buffer_put_in_anothers_place_is_followed():
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, x * self.weight])
            return self.seen.square().sum()

    model = Memory()
    pure = functional_loss(model, model)
    _, buffers = pure({"weight": torch.tensor(3.0)}, {"seen": torch.tensor([1.0])}, torch.tensor([2.0]))
    assert buffers["seen"].tolist() == [1.0, 6.0]
    assert not buffers["seen"].requires_grad
    assert model.seen.shape == (0,)


def test_a_loss_that_is_a_module_is_not_taken_for_a_part_of_the_model():
    model = nn.Linear(2, 1)
    criterion = nn.PReLU()  # has a parameter named weight, as the model has
    pure = functional_loss(model, nn.Sequential(model, criterion, nn.Flatten(0)))
    loss, _ = pure({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, {}, torch.tensor([[-1.0, -1.0]]))
    assert loss.item() == pytest.approx(-0.5)


# ------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": -0.1}, r"gamma should be a finite number of at least 0 \(got -0.1\)"),
        ({"gamma": float("nan")}, r"gamma .*got nan"),
        ({"gamma": True}, r"gamma .*got True"),
        ({"agreement": "covariance"}, "agreement should be one of"),
        ({"hvp": "exact"}, r"hvp should be one of 'reverse', 'forward', 'finite_difference' \(got 'exact'\)"),
        ({"gamma": None, "strength": 0.0}, "strength should be a finite number greater than 0"),
        ({"one_pass": 1}, r"one_pass should be True or False \(got 1\)"),
        ({"one_pass": True, "keep_graphs": True}, "one_pass=True keeps no graph"),
        ({"one_pass": True, "agreement": own_agreement}, "with one_pass=True .*needs every domain.s whole gradient"),
        ({"keep_graphs": True, "hvp": "forward"}, "keep_graphs=True needs hvp='reverse'"),
    ],
    ids=lambda v: "-".join(f"{k}={getattr(x, '__name__', x)}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_bad_settings(changes: dict[str, Any], message: str):
    theta, batches = drawn(0, 3)
    with pytest.raises(ValueError, match=message):
        idgm_grad(regression, theta, batches, **({"gamma": 0.1} | changes))


@pytest.mark.parametrize("count", [0, 1])
def test_matching_needs_two_domains(count: int):
    theta, batches = drawn(0, 3)
    for function in (idgm_grad, idgm_loss):
        with pytest.raises(ValueError, match=rf"at least 2 domains \(got {count}\)"):
            function(regression, theta, batches[:count], 0.1)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda t, b: t, ValueError, r"for batch 0 it has shape \(4,\)"),
        (lambda t, b: 1.0, TypeError, "for batch 0 it returned float"),
        (lambda t, b: t.detach().sum(), ValueError, "the loss of batch 0 does not depend on any parameter"),
    ],
    ids=["vector", "number", "detached"],
)
def test_bad_losses(loss: Any, error: type[Exception], message: str):
    theta, batches = drawn(0, 3)
    with pytest.raises(error, match=message):
        idgm_grad(loss, theta, batches, 0.1)


def test_generators_of_batches_and_parameters_of_any_structure():
    theta, batches = drawn(0, 3)
    expected = idgm_grad(regression, theta, batches, GAMMA).gradient
    found = idgm_grad(
        lambda p, b: regression(torch.cat([p[0], *p[1]["rest"]]), b),
        (theta[:1], {"rest": [theta[1:3], theta[3:]]}),
        (b for b in batches),
        GAMMA,
    )
    torch.testing.assert_close(torch.cat([found.gradient[0], *found.gradient[1]["rest"]]), expected)
    assert found.reached == (True, {"rest": [True, True]})


def test_parameters_are_not_touched():
    theta, batches = drawn(0, 3)
    leaf = theta.clone().requires_grad_()
    found = idgm_grad(regression, leaf, batches, GAMMA)
    assert leaf.grad is None
    assert torch.equal(leaf.detach(), theta)
    assert not any(t.requires_grad for t in (found.gradient, found.losses, found.agreement))


@pytest.mark.parametrize("chosen", AGREEMENTS)
def test_the_cosine_is_measured_where_it_is_asked_for(chosen: str):
    theta, batches = drawn(0, 3)
    phi = own_agreement if chosen == "own" else chosen
    plain, asked = (idgm_grad(regression, theta, batches, GAMMA, phi, cosines=c) for c in (False, True))
    assert (plain.alignment.cosine is None) == (chosen != "cosine")
    expected = agreement_of("cosine", domain_gradients(regression, theta, batches).gradients)
    torch.testing.assert_close(asked.alignment.cosine, expected)
    assert torch.equal(plain.gradient, asked.gradient)


def test_a_parameter_under_two_names_is_refused():
    theta, batches = drawn(0, 3)
    with pytest.raises(ValueError, match="params holds a tensor twice"):
        idgm_grad(lambda p, b: regression(p[0] + p[1], b), [theta, theta], batches, GAMMA)


def test_a_mapping_of_batches_is_its_batches():
    theta, batches = drawn(0, 3)
    found = idgm_grad(regression, theta, dict(zip("abc", batches, strict=True)), GAMMA)
    assert torch.equal(found.gradient, idgm_grad(regression, theta, batches, GAMMA).gradient)


def test_a_functional_loss_without_buffers_says_what_it_needs():
    case = make(networks.batch_norm_1d)
    with pytest.raises(ValueError, match=r"pass buffers=dict\(model.named_buffers\(\)\)"):
        idgm_grad(pure_of(case), trainable(case.model), case.batches, GAMMA)
    with pytest.raises(TypeError, match=r"should return the loss and the new buffers.*got Tensor"):
        idgm_grad(lambda p, b, x: regression(p, x), drawn(0, 3)[0], drawn(0, 3)[1], GAMMA, buffers={})


def test_functional_loss_follows_the_models_tensors_and_refuses_unknown_names():
    model = nn.Linear(2, 1, bias=False)
    pure = functional_loss(model, lambda x: model(x).sum())
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.load_state_dict({"weight": torch.zeros(1, 2)}, assign=True)
    assert pure({}, {}, torch.ones(1, 2))[0].item() == 0.0
    assert pure(params, {}, torch.ones(1, 2))[0].item() == pytest.approx(float(params["weight"].sum()))
    with pytest.raises(ValueError, match="Linear has no parameter or buffer 'wieght'"):
        pure({"wieght": params["weight"]}, {}, torch.ones(1, 2))


class WithoutGraph(torch.autograd.Function):
    """A backward pass that leaves no graph."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(w, x)
        return (x @ w).square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        w, x = ctx.saved_tensors
        with torch.no_grad():
            return (2 * grad * x.T @ (x @ w)).detach(), None


@pytest.mark.parametrize("settings_", [{}, {"keep_graphs": True}, {"one_pass": True}], ids=str)
def test_gradients_without_graph_are_refused_and_not_taken_for_a_zero_hessian(settings_: dict[str, Any]):
    theta, batches = drawn(0, 3)
    with pytest.raises(RuntimeError, match="no gradient depends on any parameter, so that there is nothing to match"):
        idgm_grad(lambda w, b: WithoutGraph.apply(w, b[0]), theta, batches, GAMMA, **settings_)
    found = idgm_grad(lambda w, b: WithoutGraph.apply(w, b[0]), theta, batches, GAMMA, hvp="finite_difference")
    expected = idgm_grad(lambda w, b: (b[0] @ w).square().sum(), theta, batches, GAMMA)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------- memory

PEAKS = r"""
import json, pathlib, re
import torch
from torch import nn
from torch_gradmatch.gradients.functional import functional_loss, idgm_grad

torch.set_num_threads(1)
model = nn.Sequential(*[part for _ in range(6) for part in (nn.Linear(64, 64), nn.Tanh())])
pure = functional_loss(model, lambda batch: model(batch[0].expand(batch[1], 64)).mean())
params = dict(model.named_parameters())


def peak(agreement, domains, keep_graphs, rows=4000):
    batches = [(torch.randn(1, 64), rows) for _ in range(domains)]
    idgm_grad(pure, params, batches, 0.1, agreement, keep_graphs=keep_graphs, buffers={})
    return int(re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1)) / 1024


before = peak("cosine", 2, False, rows=1)  # what is imported on first use
named = "inner_product", "variance", "cosine"
cases = [*((name, 2, False) for name in named), *((name, 12, False) for name in named)]
cases += [("variance", 2, True), ("variance", 6, True)]
print(json.dumps([[*case, peak(*case) - before] for case in cases]))
"""


@cache
def peak_megabytes() -> dict[tuple[str, int, bool], float]:
    """By agreement, number of domains and ``keep_graphs``; never less than before, since it is the peak of a process.

    So the few domains go before the many, and the kept graphs come last.
    """
    # A fixed threshold: glibc's moving one leaves holes in the heap, which would count, too.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    arguments = [sys.executable, "-c", PEAKS]
    run = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=120, env=environment)
    return {tuple(case): megabytes for *case, megabytes in json.loads(run.stdout)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("chosen", ["inner_product", "variance", "cosine"])
def test_memory_does_not_grow_with_the_number_of_domains(chosen: str):
    assert peak_megabytes()[chosen, 12, False] < 1.05 * peak_megabytes()[chosen, 2, False]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_test_of_memory_sees_kept_graphs():
    assert peak_megabytes()["variance", 6, True] > 2 * peak_megabytes()["variance", 2, True]
