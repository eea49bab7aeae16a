"""The exact objective and its two-pass gradient against naive double backward, and what it composes with."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import Mock

import _networks as networks
import pytest
import torch
from _models import assert_identical
from _networks import Case, make, mean_squared_error, two_layers
from _networks import regression as batches_of_regression
from _reference import agreement_of
from _regression import AGREEMENTS, GAMMA, drawn, phi_of, regression
from _second_order import flat, next_random_numbers, plain_autograd, seed_everything
from torch import Tensor, nn

from torch_gradmatch.gradients.functional import domain_gradients, functional_loss, idgm_grad, idgm_loss

NAMED = AGREEMENTS[:-1]


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
def test_gradient_is_that_of_the_scalar_by_finite_differences(chosen: str):
    """No derivative of the library's in the oracle: central differences of ``idgm_loss`` along random directions."""
    case = make(networks.batch_norm_1d)
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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # the first time, in torch itself
def test_jvp_plain_autograd_a_second_derivative_and_the_derivative_by_gamma():
    theta, batches = drawn(1, 3)
    expected, direction = idgm_grad(regression, theta, batches, GAMMA), torch.ones_like(theta)

    def objective(t: Tensor, gamma: Any = GAMMA) -> Tensor:
        return idgm_loss(regression, t, batches, gamma)

    value, slope = torch.func.jvp(objective, (theta,), (direction,))
    leaf = theta.clone().requires_grad_()
    objective(leaf).backward()
    torch.testing.assert_close([value, slope], [objective(theta), expected.gradient @ direction])
    torch.testing.assert_close(leaf.grad, expected.gradient)
    hessian = torch.func.hessian(objective)(theta)
    torch.testing.assert_close(hessian, hessian.T)
    by_gamma = torch.func.grad(objective, argnums=1)(theta, torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(by_gamma, -expected.agreement)


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


# ------------------------------------------------------------------------------------------------------- the gradient


def test_of_five_identical_domains_the_product_is_a_square_and_nothing_else_is_left_to_match():
    theta, batches = drawn(4, 1)
    gradient, hessian = (f(lambda t: regression(t, batches[0]))(theta) for f in (torch.func.grad, torch.func.hessian))
    found = idgm_grad(regression, theta, batches * 5, GAMMA)
    torch.testing.assert_close(found.agreement, gradient.square().sum())
    torch.testing.assert_close(found.gradient, gradient - GAMMA * 2 * hessian @ gradient)
    for chosen in ("variance", "cosine"):
        torch.testing.assert_close(idgm_grad(regression, theta, batches * 5, 1.0, chosen).gradient, gradient)


@pytest.mark.parametrize("chosen", AGREEMENTS)
def test_gamma_zero_is_ordinary_training(chosen: str):
    theta, batches = drawn(5, 4)
    calls = []

    def counted(t: Tensor, batch: Any) -> Tensor:
        calls.append(1)
        return regression(t, batch)

    found = idgm_grad(counted, theta, batches, 0.0, phi_of(chosen))
    leaf = theta.clone().requires_grad_()
    torch.stack([regression(leaf, b) for b in batches]).mean().backward()
    torch.testing.assert_close(found.gradient, leaf.grad, rtol=1e-14, atol=1e-15)
    assert len(calls) == 4  # and costs no second pass
    gradients = domain_gradients(regression, theta, batches).gradients
    expected = phi_of(chosen)(gradients) if chosen == "own" else agreement_of(chosen, gradients)
    torch.testing.assert_close(found.agreement, expected)


@pytest.mark.parametrize("hvp", ["reverse", "forward"])
@pytest.mark.parametrize("chosen", NAMED)
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


# ------------------------------------------------------------------------------------------------- functional_loss


def test_functional_loss_leaves_the_model_alone():
    case = make(networks.batch_norm_1d)
    model = case.model
    before, buffers = copy.deepcopy(model.state_dict()), copy.deepcopy(dict(model.named_buffers()))
    given_buffers = copy.deepcopy(buffers)
    params = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    loss, moved = functional_loss(model, lambda x: model(x).sum())(params, buffers, case.batches[0][0])
    assert loss.item() == 0.0
    assert moved["1.num_batches_tracked"] == 1
    assert_identical(buffers, given_buffers)
    assert_identical(model.state_dict(), before)


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
    weight, pure = model.weight, functional_loss(model, Mock(side_effect=KeyError("column")))
    with pytest.raises(KeyError, match="column"):
        pure({"weight": torch.zeros(1, 2)}, {}, torch.ones(1, 2))
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
        ({"one_pass": True, "agreement": phi_of("own")}, "with one_pass=True .*needs every domain.s whole gradient"),
        ({"keep_graphs": True, "hvp": "forward"}, "keep_graphs=True needs hvp='reverse'"),
    ],
    ids=lambda v: "-".join(f"{k}={getattr(x, '__name__', x)}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_bad_settings(changes: dict[str, Any], message: str):
    theta, batches = drawn(0, 3)
    with pytest.raises(ValueError, match=message):
        idgm_grad(regression, theta, batches, **({"gamma": 0.1} | changes))


@pytest.mark.parametrize(
    ("loss", "count", "error", "message"),
    [
        (regression, 0, ValueError, r"at least 2 domains \(got 0\)"),
        (regression, 1, ValueError, r"at least 2 domains \(got 1\)"),
        (lambda t, b: t, 3, ValueError, r"for batch 0 it has shape \(4,\)"),
        (lambda t, b: 1.0, 3, TypeError, "for batch 0 it returned float"),
        (lambda t, b: t.detach().sum(), 3, ValueError, "the loss of batch 0 does not depend on any parameter"),
    ],
    ids=["no domain", "one domain", "vector", "number", "detached"],
)
def test_bad_losses_and_numbers_of_domains(loss: Any, count: int, error: type[Exception], message: str):
    theta, batches = drawn(0, 3)
    for function in (idgm_grad, idgm_loss) if count < 2 else (idgm_grad,):
        with pytest.raises(error, match=message):
            function(loss, theta, batches[:count], 0.1)


def test_generators_or_mappings_of_batches_and_parameters_of_any_structure_which_are_not_touched():
    theta, batches = drawn(0, 3)
    expected, leaf = idgm_grad(regression, theta, batches, GAMMA).gradient, theta.clone().requires_grad_()
    found = idgm_grad(
        lambda p, b: regression(torch.cat([p[0], *p[1]["rest"]]), b),
        (leaf[:1], {"rest": [leaf[1:3], leaf[3:]]}),
        (b for b in batches),
        GAMMA,
    )
    torch.testing.assert_close(torch.cat([found.gradient[0], *found.gradient[1]["rest"]]), expected)
    assert found.reached == (True, {"rest": [True, True]})
    found = idgm_grad(regression, leaf, dict(zip("abc", batches, strict=True)), GAMMA)
    assert torch.equal(found.gradient, expected)
    assert not any(t.requires_grad for t in (found.gradient, found.losses, found.agreement))
    assert leaf.grad is None
    assert torch.equal(leaf.detach(), theta)


@pytest.mark.parametrize("chosen", AGREEMENTS)
def test_the_cosine_is_measured_where_it_is_asked_for(chosen: str):
    theta, batches = drawn(0, 3)
    plain, asked = (idgm_grad(regression, theta, batches, GAMMA, phi_of(chosen), cosines=c) for c in (False, True))
    assert (plain.alignment.cosine is None) == (chosen != "cosine")
    expected = agreement_of("cosine", domain_gradients(regression, theta, batches).gradients)
    torch.testing.assert_close(asked.alignment.cosine, expected)
    assert torch.equal(plain.gradient, asked.gradient)


def test_a_parameter_under_two_names_is_refused_and_a_functional_loss_says_that_it_needs_buffers():
    theta, batches = drawn(0, 3)
    with pytest.raises(ValueError, match="params holds a tensor twice"):
        idgm_grad(lambda p, b: regression(p[0] + p[1], b), [theta, theta], batches, GAMMA)
    case = make(networks.batch_norm_1d)
    with pytest.raises(ValueError, match=r"pass buffers=dict\(model.named_buffers\(\)\)"):
        idgm_grad(pure_of(case), trainable(case.model), case.batches, GAMMA)
    with pytest.raises(TypeError, match=r"should return the loss and the new buffers.*got Tensor"):
        idgm_grad(lambda p, b, x: regression(p, x), theta, batches, GAMMA, buffers={})


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


def peak(agreement, domains, keep_graphs, rows=2000):
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
