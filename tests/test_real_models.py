"""Methods with second derivatives on the kinds of models that people have, against plain autograd on a copy."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import _networks as networks
import pytest
import torch
from _models import assert_identical
from _networks import Case, make, mean_squared_error, regression, two_layers
from _reference import mean_pairwise_cosine, mean_pairwise_inner_product
from _second_order import (
    DIRECTIONS,
    GAMMA,
    assert_close,
    assert_same_buffers,
    flat,
    gradient_of,
    next_random_numbers,
    nothing_changes,
    plain_autograd,
    plain_smooth_fish,
    seed_everything,
    train,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD

from torch_gradmatch import IDGM, GradMatch, SmoothFish

# ------------------------------------------------------------------------------------------- the zoo of models

VARIANTS: dict[str, tuple[dict[str, Any], str, float]] = {
    "reverse": ({}, "inner_product", 1e-11),
    "reverse-cosine": ({}, "cosine", 1e-11),
    "reverse-kept": ({"keep_graphs": True}, "variance", 1e-11),
    "forward": ({"hvp": "forward"}, "cosine", 1e-11),
    "finite_difference": ({"hvp": "finite_difference"}, "variance", 1e-4),
}


# Buffers, random numbers, attention with dropout, parameters that a domain does not reach: here all ways can go wrong.
THOROUGH = [networks.batch_norm_1d, networks.mixup, networks.transformer, networks.features]
FIRST = ["reverse", "forward", "finite_difference"]  # of the other networks


def pairs(builds: list[Callable[[], Case]], variants: Iterable[str]) -> list[Any]:
    """Every network with every kind of derivative that it can take, and some with every variant."""
    return [
        pytest.param(build, variant, id=f"{build.__name__}-{variant}")
        for build, variant in itertools.product(builds, variants)
        if (variant in FIRST or build in THOROUGH)
        and ("forward" not in variant or build not in networks.WITHOUT_FORWARD)
    ]


@pytest.mark.parametrize(
    ("build", "variant"),
    [*pairs(networks.PLAIN, VARIANTS), *pairs(networks.WITHOUT_DIFFERENCES, ["reverse", "forward"])],
)
def test_idgm_is_plain_autograd(build: Callable[[], Case], variant: str):
    """Direction, buffers (moved once by each domain), random numbers, losses and step, for every way of an HVP."""
    settings, agreement, tolerance = VARIANTS[variant]
    case, oracle = make(build), make(build).model
    before = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    method = IDGM(case.model, GAMMA, agreement, track_alignment=True, **settings)
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.1), method)
    seed_everything()
    expected = plain_autograd(oracle, case.loss, case.batches, GAMMA, agreement, list(before))
    expected_random = next_random_numbers()
    wanted = flat(expected.direction, oracle)
    without_matching = torch.stack(expected.gradients).mean(dim=0)
    assert float((wanted - without_matching).norm() / wanted.norm()) > 1e-3  # else this could not fail

    seed_everything()
    report = optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)

    assert next_random_numbers() == expected_random
    found = gradient_of(case.model)
    assert {n for n, g in found.items() if g is None} == {n for n in before if expected.direction.get(n) is None}
    assert_close(flat(found, case.model), wanted, tolerance)
    assert_same_buffers(case.model, oracle)
    torch.testing.assert_close(report.losses, expected.losses)
    torch.testing.assert_close(report.inner_product, mean_pairwise_inner_product(expected.gradients))
    torch.testing.assert_close(report.cosine, mean_pairwise_cosine(expected.gradients))
    torch.testing.assert_close(report.grad_norms, torch.stack([g.norm() for g in expected.gradients]))
    for name, p in case.model.named_parameters():
        moved = before[name] if found[name] is None else before[name] - 0.1 * found[name]
        torch.testing.assert_close(p.detach(), moved, rtol=1e-12, atol=1e-14)
        assert found[name] is None or found[name].dtype == p.dtype


def penalty_on_gathered_parameters() -> Case:
    model = two_layers()
    gathered = list(model.parameters())
    return Case(
        model, lambda m, batch: mean_squared_error(m, batch) + sum(p.square().sum() for p in gathered), regression(7, 4)
    )


@pytest.mark.parametrize("build", [*networks.WITHOUT_FORWARD, penalty_on_gathered_parameters])
def test_forward_names_reverse_where_it_cannot_work(build: Callable[[], Case]):
    case = make(build)
    method = IDGM(case.model, GAMMA, hvp="forward")
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.1), method)
    with nothing_changes(case.model, optimizer), pytest.raises(RuntimeError, match='use hvp="reverse"'):
        optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)


def direction_by_differences(case: Case) -> Tensor:
    method = IDGM(case.model, GAMMA, "inner_product", hvp="finite_difference")
    train(case, GradMatch(SGD(case.model.parameters(), lr=0.0), method), 1)
    return flat(gradient_of(case.model), case.model)


def test_differences_move_what_the_loss_detaches():
    """They are the exact product for the gradient as a function of all parameters, not for the objective."""
    case = make(networks.stop_gradient)

    def gradient(batch: Any, step: float = 0.0, direction: Tensor | float = 0.0) -> Tensor:
        twin = copy.deepcopy(case.model)
        parameters = list(twin.parameters())
        moved = nn.utils.parameters_to_vector(parameters).detach() + step * direction
        nn.utils.vector_to_parameters(moved, parameters)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(case.loss(twin, batch), parameters)])

    gradients = [gradient(batch) for batch in case.batches]
    total = sum(gradients)
    expected = total / 3
    for batch, own in zip(case.batches, gradients, strict=True):
        there, back = (gradient(batch, step, (total - own) / 3) for step in (1e-5, -1e-5))
        expected = expected - GAMMA * (there - back) / 2e-5
    exact = flat(plain_autograd(make(networks.stop_gradient).model, case.loss, case.batches).direction, case.model)
    assert float((expected - exact).norm() / exact.norm()) > 1e-2
    assert_close(direction_by_differences(case), expected, 1e-6)


@pytest.mark.parametrize("keep_graphs", [False, True])
def test_torchs_wrong_weight_norm_is_refused(keep_graphs: bool):
    """``torch._weight_norm`` fails ``gradgradcheck`` (2.13, CPU), unlike one that writes it out."""
    own, case = make(networks.weight_normalized), make(networks.weight_normalized_by_torch)
    expected = plain_autograd(own.model, own.loss, own.batches)
    for one in (own, case):
        optimizer = GradMatch(SGD(one.model.parameters(), lr=0.0), IDGM(one.model, GAMMA, keep_graphs=keep_graphs))
        refused = pytest.raises(RuntimeError, match=r"hvp=\"finite_difference\".*weight_norm, whose double backward")
        with refused if one is case else nullcontext():
            train(one, optimizer, 1)
    assert_close(direction_by_differences(case), flat(expected.direction, own.model), 1e-6)


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        pytest.param(build, kind, id=f"{build.__name__}-{kind}")
        for build in [*networks.PLAIN, *networks.WITHOUT_DIFFERENCES]
        for kind in ("symmetric", "gamma 2", "gamma 1")
        if kind == "symmetric" or build in (*THOROUGH, networks.spectral_normalized)
    ],
)
def test_smooth_fish_is_the_walk_of_a_copy(build: Callable[[], Case], kind: str):
    case, oracle, walker = make(build), make(build).model, make(build).model
    gamma, inner_lr, symmetric = {"gamma 2": 2.0, "gamma 1": 1.0, "symmetric": 0.3}[kind], 0.2, kind == "symmetric"
    seed_everything()
    expected = plain_smooth_fish(oracle, walker, case.loss, case.batches, gamma, inner_lr, symmetric=symmetric)
    expected_random = next_random_numbers()
    seed_everything()
    method = SmoothFish(gamma, inner_lr, case.model, symmetric=symmetric)
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.1), method)
    optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)
    assert next_random_numbers() == expected_random
    assert_close(flat(gradient_of(case.model), case.model), expected, 1e-11)
    assert_same_buffers(case.model, oracle)


@pytest.mark.parametrize(("gamma", "symmetric", "evaluations"), [(1.0, False, 3), (2.0, False, 5), (0.3, True, 7)])
def test_smooth_fish_without_the_model_moves_buffers_with_every_evaluation(
    gamma: float, symmetric: bool, evaluations: int
):
    """S, 2S - 1 or 3S - 2, and in meta-iterations number 1, 2, 4, ... the look whether a loss is the same twice."""
    case, oracle = make(networks.batch_norm_1d), make(networks.batch_norm_1d)
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.1), SmoothFish(gamma, 0.2, symmetric=symmetric))
    for number in (1, 2, 3):
        train(case, optimizer, 1)
        looks = 0 if evaluations == 3 else min(number, 2)
        assert int(case.model[1].num_batches_tracked) == number * evaluations + looks
    method = SmoothFish(gamma, 0.2, oracle.model, symmetric=symmetric)
    train(oracle, GradMatch(SGD(oracle.model.parameters(), lr=0.1), method), 3)
    assert int(oracle.model[1].num_batches_tracked) == 9
    assert_identical(gradient_of(case.model), gradient_of(oracle.model))


# --------------------------------------------------------------------------------------------- models that ask for more


class Attention(nn.Module):
    """Insists on one kernel; FLASH_ATTENTION has no second derivative."""

    def __init__(self, kernel: SDPBackend) -> None:
        super().__init__()
        self.kernel = kernel
        self.norm = nn.BatchNorm1d(8)
        self.project = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        query, key, value = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in self.project(x).chunk(3, -1))
        with sdpa_kernel(self.kernel):
            attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.head(torch.tanh(attended.transpose(1, 2).flatten(2)).mean(dim=1))


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * ctx.saved_tensors[0].cos()


class Sine(nn.Module):
    def __init__(self, *, once: bool) -> None:
        super().__init__()
        self.function = OnceDifferentiable.apply if once else torch.sin

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("kind", "keep_graphs"), [("flash attention", False), ("once_differentiable", False), ("once_differentiable", True)]
)
def test_a_model_without_second_derivative_is_told_to_use_differences(kind: str, keep_graphs: bool):
    torch.manual_seed(0)
    if kind == "flash attention":
        model, twin = Attention(SDPBackend.FLASH_ATTENTION).double(), Attention(SDPBackend.MATH).double()
        batches = regression(4, 5, 8, targets=3)
    else:
        model, twin = (two_layers(nn.BatchNorm1d(6), Sine(once=once)) for once in (True, False))
        batches = regression(7, 4)
    twin.load_state_dict(model.state_dict())
    method = IDGM(model, GAMMA, "inner_product", keep_graphs=keep_graphs)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), method)
    with nothing_changes(model, optimizer), pytest.raises(RuntimeError, match='use hvp="finite_difference"'):
        optimizer.meta_step(lambda batch: mean_squared_error(model, batch), batches)
    optimizer.method.keep_graphs, optimizer.method.hvp = False, "finite_difference"
    optimizer.meta_step(lambda batch: mean_squared_error(model, batch), batches)
    expected = plain_autograd(twin, mean_squared_error, batches)
    assert_close(flat(gradient_of(model), model), flat(expected.direction, twin), 1e-6)
    assert_same_buffers(model, twin)


# Forward derivatives belong to tensors that take the place of the parameters, so those must come from the model.
@pytest.mark.parametrize("method", [name for name in DIRECTIONS if name != "IDGM-forward"])
def test_a_penalty_on_parameters_gathered_before_the_loss(method: str):
    """``params = list(model.parameters())`` outside the loss function, as weight penalties are often written."""
    torch.manual_seed(0)
    model = two_layers()
    twin = copy.deepcopy(model)
    gathered = {id(m): list(m.parameters()) for m in (model, twin)}

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mean_squared_error(network, batch) + 0.3 * sum(p.square().sum() for p in gathered[id(network)])

    batches = regression(7, 4)
    settings = DIRECTIONS[method](model)
    if isinstance(settings, SmoothFish):
        walker = copy.deepcopy(twin)
        gathered[id(walker)] = list(walker.parameters())
        gamma, inner_lr = settings.gamma, settings.inner_lr
        expected = plain_smooth_fish(twin, walker, loss, batches, gamma, inner_lr, symmetric=settings.symmetric)
    else:
        agreement = "variance" if method == "IDGM-kept" else "inner_product"
        expected = flat(plain_autograd(twin, loss, batches, GAMMA, agreement).direction, twin)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.0), settings)
    optimizer.meta_step(lambda batch: loss(model, batch), batches)
    assert_close(flat(gradient_of(model), model), expected, 1e-6)


@pytest.mark.parametrize("method", ["IDGM", "IDGM-kept"])  # of the others see test_backward_passes.py
def test_hooks_on_parameters_see_every_gradient(method: str):
    """``parameter.register_hook``, with which people mask the gradients of some weights."""
    torch.manual_seed(0)
    model = two_layers()
    mask = (torch.rand_like(model[0].weight) > 0.5).double()
    model[0].weight.register_hook(lambda g: g * mask)
    before = model[0].weight.detach().clone()
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), DIRECTIONS[method](model))
    optimizer.meta_step(lambda batch: mean_squared_error(model, batch), regression(7, 4))
    assert torch.equal(model[0].weight[mask == 0], before[mask == 0])


# -------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    ("method", "wrapped"),
    [
        ("IDGM-finite_difference", "the compiled model"),
        ("SmoothFish", "the model inside"),
        ("SmoothFish-symmetric", "the compiled model"),
    ],
)
def test_a_compiled_model_has_first_derivatives(method: str, wrapped: str):
    torch._dynamo.reset()
    case, twin = make(networks.batch_norm_1d), make(networks.batch_norm_1d)
    compiled = torch.compile(case.model, backend="aot_eager")
    model = compiled if wrapped == "the compiled model" else case.model
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), DIRECTIONS[method](model))
    optimizer.meta_step(lambda batch: case.loss(compiled, batch), case.batches)
    train(twin, GradMatch(SGD(twin.model.parameters(), lr=0.1), DIRECTIONS[method](twin.model)), 1)
    assert_close(flat(gradient_of(case.model), case.model), flat(gradient_of(twin.model), twin.model), 1e-9)
    assert_same_buffers(case.model, twin.model)


@pytest.mark.parametrize("keep_graphs", [False, True], ids=["streaming", "kept"])
def test_a_compiled_model_has_no_second_derivative(keep_graphs: bool):
    torch._dynamo.reset()
    case = make(networks.batch_norm_1d)
    compiled = torch.compile(case.model, backend="aot_eager")
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.1), IDGM(case.model, GAMMA, keep_graphs=keep_graphs))
    with nothing_changes(case.model, optimizer), pytest.raises(RuntimeError, match='use hvp="finite_difference"'):
        optimizer.meta_step(lambda batch: case.loss(compiled, batch), case.batches)
