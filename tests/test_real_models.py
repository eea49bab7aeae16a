"""Methods with second derivatives, and those beside them, on the kinds of models and loops that people have.

The oracle is plain autograd on a copy of the model: one forward pass of each domain, every graph kept, and the whole
objective differentiated at once.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import _networks as networks
import numpy as np
import pytest
import torch
from _models import assert_identical, assert_same_model
from _networks import Case, cross_entropy, make, mean_squared_error, regression, two_layers
from _reference import mean_pairwise_cosine, mean_pairwise_inner_product
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, AdamW, lr_scheduler
from torch.utils.checkpoint import checkpoint

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

GAMMA = 0.3
Loss = Callable[[nn.Module, Any], Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small only lose by more threads, and much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------------- oracles


def seed_everything(seed: int = 3) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the global generator is the one that losses draw from
    random.seed(seed)


def next_random_numbers() -> list[float]:
    return [float(torch.rand(())), float(np.random.rand()), random.random()]  # noqa: NPY002


def flat(gradient: dict[str, Tensor | None], model: nn.Module) -> Tensor:
    """One real vector for a gradient by parameter name, zeros for None."""
    parts = [torch.zeros_like(p) if gradient.get(n) is None else gradient[n] for n, p in model.named_parameters()]
    reals = [
        torch.view_as_real(g) * 1.0 if g.is_complex() else g for g in parts
    ]  # view_as_real's derivative needs a copy
    return torch.cat([g.reshape(-1) for g in reals])


def plain_variance(gradients: list[Tensor]) -> Tensor:
    mean = sum(gradients) / len(gradients)
    return -sum((g - mean).square().sum() for g in gradients) / len(gradients)


AGREEMENTS = {
    "inner_product": mean_pairwise_inner_product,
    "cosine": mean_pairwise_cosine,
    "variance": plain_variance,
}


@dataclass
class Expected:
    """What plain autograd found."""

    direction: dict[str, Tensor | None]
    losses: Tensor
    gradients: list[Tensor]
    objective: Tensor


def plain_autograd(
    model: nn.Module,
    loss: Loss,
    batches: list[Any],
    gamma: float = GAMMA,
    agreement: str | Callable[[list[dict[str, Tensor]]], Tensor] = "inner_product",
    names: list[str] | None = None,
    chosen: list[int] | None = None,
) -> Expected:
    """Differentiate mean loss - gamma phi by the named parameters; only the chosen domains get a second derivative."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad and (names is None or n in names)}
    losses, gradients = [], []
    with sdpa_kernel(SDPBackend.MATH):
        for index, batch in enumerate(batches):
            losses.append(loss(model, batch))
            found = torch.autograd.grad(losses[-1], list(params.values()), create_graph=True, allow_unused=True)
            found = [g if g is None or not g.is_sparse else g.to_dense() for g in found]
            if chosen is not None and index not in chosen:
                found = [None if g is None else g.detach() for g in found]
            gradients.append(dict(zip(params, found, strict=True)))
        vectors = [flat(g, model) for g in gradients]
        if callable(agreement):
            filled = [{n: torch.zeros_like(params[n]) if g is None else g for n, g in gs.items()} for gs in gradients]
            phi = agreement(filled)
        else:
            phi = AGREEMENTS[agreement](vectors)
        mean = torch.stack(losses).mean()
        share = 1.0 if chosen is None else len(batches) / len(chosen)
        objective = mean - gamma * share * phi
        direction = torch.autograd.grad(objective, list(params.values()), allow_unused=True)
    dense = [g if g is None or not g.is_sparse else g.to_dense() for g in direction]
    return Expected(
        dict(zip(params, dense, strict=True)),
        torch.stack(losses).detach(),
        [v.detach() for v in vectors],
        (mean - gamma * phi).detach(),
    )


def plain_smooth_fish(
    model: nn.Module, walker: nn.Module, loss: Loss, batches: list[Any], gamma: float, inner_lr: float
) -> Tensor:
    """Gbar + gamma (Gtilde - Gbar), the walk on a second copy of the model; the first one's buffers move on."""
    params = [p for p in model.parameters() if p.requires_grad]
    walking = [p for p in walker.parameters() if p.requires_grad]

    def gradient(network: nn.Module, wanted: list[Tensor], batch: Any) -> list[Tensor]:
        found = torch.autograd.grad(loss(network, batch), wanted, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, wanted, strict=True)]

    at_start, along = [], []
    for batch in batches:
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        at_start.append(gradient(model, params, batch))
        after = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        for states in (before, after):
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            random.setstate(states[2])
            if states is before:
                along.append(gradient(walker, walking, batch))
        with torch.no_grad():
            for p, g in zip(walking, along[-1], strict=True):
                p -= inner_lr * g
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    means = [[sum(parts) / len(batches) for parts in zip(*gs, strict=True)] for gs in (at_start, along)]
    return flat({n: a + gamma * (b - a) for n, a, b in zip(names, *means, strict=True)}, model)


def gradient_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: p.grad for n, p in model.named_parameters()}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Close as vectors: norm of the difference over norm."""
    assert bool(torch.isfinite(actual).all())
    error = float((actual - expected).norm() / expected.norm())
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_same_buffers(actual: nn.Module, expected: nn.Module) -> None:
    ours, theirs = dict(actual.named_buffers()), dict(expected.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, buffer in theirs.items():
        torch.testing.assert_close(ours[name], buffer, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@contextmanager
def nothing_changes(model: nn.Module, optimizer: GradMatch) -> Iterator[None]:
    """Parameters, buffers, gradients and the optimizer's state are bit for bit as before."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 0.125)
    flags = [p.requires_grad for p in model.parameters()]
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), gradient_of(model)))
    identities = [id(t) for t in itertools.chain(model.parameters(), model.buffers())]
    yield
    assert_identical(model.state_dict(), before[0], "model")
    assert_identical(optimizer.state_dict(), before[1], "optimizer")
    assert_identical(gradient_of(model), before[2], "gradient")
    assert [id(t) for t in itertools.chain(model.parameters(), model.buffers())] == identities
    assert [p.requires_grad for p in model.parameters()] == flags


# ------------------------------------------------------------------------------------------- the zoo of models

VARIANTS: dict[str, tuple[dict[str, Any], str, float]] = {
    "reverse": ({}, "inner_product", 1e-11),
    "reverse-cosine": ({}, "cosine", 1e-11),
    "reverse-kept": ({"keep_graphs": True}, "variance", 1e-11),
    "reverse-2-of-3": ({"hvp_domains": 2}, "variance", 1e-11),
    "reverse-kept-2-of-3": ({"hvp_domains": 2, "keep_graphs": True}, "inner_product", 1e-11),
    "forward": ({"hvp": "forward"}, "cosine", 1e-11),
    "forward-kept": ({"hvp": "forward", "keep_graphs": True}, "inner_product", 1e-11),
    "finite_difference": ({"hvp": "finite_difference"}, "variance", 5e-4),
    "finite_difference-kept": ({"hvp": "finite_difference", "keep_graphs": True}, "inner_product", 5e-4),
}


def check_against_plain_autograd(build: Callable[[], Case], variant: str) -> None:
    settings, agreement, tolerance = VARIANTS[variant]
    case, oracle, unmatched = make(build), make(build).model, make(build).model
    before = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    names = list(before)
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.1), IDGM(case.model, GAMMA, agreement, **settings))
    seed_everything()
    chosen = torch.randperm(3)[: settings["hvp_domains"]].tolist() if "hvp_domains" in settings else None
    expected = plain_autograd(oracle, case.loss, case.batches, GAMMA, agreement, names, chosen)
    expected_random = next_random_numbers()
    wanted = flat(expected.direction, oracle)
    seed_everything()
    without_matching = flat(plain_autograd(unmatched, case.loss, case.batches, 0.0).direction, oracle)
    assert float((wanted - without_matching).norm() / wanted.norm()) > 1e-3  # else this could not fail

    seed_everything()
    report = optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)

    assert next_random_numbers() == expected_random
    found = gradient_of(case.model)
    assert {n for n, g in found.items() if g is None} == {n for n in names if expected.direction.get(n) is None}
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


def name_of(build: Callable[[], Case]) -> str:
    return build.__name__


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("build", networks.PLAIN, ids=name_of)
def test_idgm_is_plain_autograd(build: Callable[[], Case], variant: str):
    """Direction, buffers (moved once by each domain), random numbers, losses and step, for every way of an HVP."""
    if "forward" not in variant or build not in networks.WITHOUT_FORWARD:
        check_against_plain_autograd(build, variant)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "finite_difference" not in v])
@pytest.mark.parametrize("build", networks.WITHOUT_DIFFERENCES, ids=name_of)
def test_idgm_is_plain_autograd_where_the_loss_detaches_something(build: Callable[[], Case], variant: str):
    if "forward" not in variant or build not in networks.WITHOUT_FORWARD:
        check_against_plain_autograd(build, variant)


@pytest.mark.parametrize("keep_graphs", [False, True], ids=["streaming", "kept"])
@pytest.mark.parametrize("build", networks.WITHOUT_FORWARD, ids=name_of)
def test_forward_names_reverse_where_it_cannot_work(build: Callable[[], Case], keep_graphs: bool):
    case = make(build)
    method = IDGM(case.model, GAMMA, hvp="forward", keep_graphs=keep_graphs)
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.1), method)
    with nothing_changes(case.model, optimizer), pytest.raises(RuntimeError, match='use hvp="reverse"'):
        optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)


def test_differences_move_what_the_loss_detaches():
    """They are the exact product for the gradient as a function of all parameters, not for the objective."""
    case = make(networks.stop_gradient)
    params = list(case.model.parameters())
    gradients = [torch.autograd.grad(case.loss(case.model, batch), params) for batch in case.batches]
    expected = sum(torch.cat([g.reshape(-1) for g in gs]) for gs in gradients) / 3
    total = [sum(parts) for parts in zip(*gradients, strict=True)]
    for batch, gs in zip(case.batches, gradients, strict=True):
        displaced = []
        for step in (1e-5, -1e-5):
            twin = copy.deepcopy(case.model)
            with torch.no_grad():
                for p, t, g in zip(twin.parameters(), total, gs, strict=True):
                    p += step * (t - g) / 3
            found = torch.autograd.grad(case.loss(twin, batch), list(twin.parameters()))
            displaced.append(torch.cat([g.reshape(-1) for g in found]))
        expected -= GAMMA * (displaced[0] - displaced[1]) / 2e-5
    exact = flat(plain_autograd(make(networks.stop_gradient).model, case.loss, case.batches).direction, case.model)
    assert float((expected - exact).norm() / exact.norm()) > 1e-2
    method = IDGM(case.model, GAMMA, hvp="finite_difference")
    GradMatch(SGD(case.model.parameters(), lr=0.0), method).meta_step(lambda b: case.loss(case.model, b), case.batches)
    assert_close(flat(gradient_of(case.model), case.model), expected, 1e-6)


def test_differences_agree_with_own_weight_norm_where_torchs_has_a_wrong_second_derivative():
    """``torch._weight_norm`` fails ``gradgradcheck`` (2.13, CPU), so its first derivative alone is of use."""
    own, case = make(networks.weight_normalized), make(networks.weight_normalized_by_torch)
    expected = plain_autograd(own.model, own.loss, own.batches)
    method = IDGM(case.model, GAMMA, hvp="finite_difference")
    GradMatch(SGD(case.model.parameters(), lr=0.0), method).meta_step(lambda b: case.loss(case.model, b), case.batches)
    assert_close(flat(gradient_of(case.model), case.model), flat(expected.direction, own.model), 1e-6)


@pytest.mark.parametrize("build", [*networks.PLAIN, *networks.WITHOUT_DIFFERENCES], ids=name_of)
def test_smooth_fish_is_the_walk_of_a_copy(build: Callable[[], Case]):
    case, oracle, walker = make(build), make(build).model, make(build).model
    gamma, inner_lr = 2.0, 0.2
    seed_everything()
    expected = plain_smooth_fish(oracle, walker, case.loss, case.batches, gamma, inner_lr)
    expected_random = next_random_numbers()
    seed_everything()
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.1), SmoothFish(gamma, inner_lr, case.model))
    optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)
    assert next_random_numbers() == expected_random
    assert_close(flat(gradient_of(case.model), case.model), expected, 1e-11)
    assert_same_buffers(case.model, oracle)


def test_smooth_fish_without_the_model_moves_buffers_on_the_walk_too():
    case, oracle = make(networks.batch_norm_1d), make(networks.batch_norm_1d)
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.1), SmoothFish(1.0, 0.2))
    optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)
    assert int(case.model[1].num_batches_tracked) == 2 * 3 - 1
    optimizer = GradMatch(SGD(oracle.model.parameters(), lr=0.1), SmoothFish(1.0, 0.2, oracle.model))
    optimizer.meta_step(lambda batch: oracle.loss(oracle.model, batch), oracle.batches)
    assert int(oracle.model[1].num_batches_tracked) == 3
    assert_identical(gradient_of(case.model), gradient_of(oracle.model))


# --------------------------------------------------------------------------------- models that ask for more

METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "IDGM": lambda model: IDGM(model, GAMMA),
    "IDGM-kept": lambda model: IDGM(model, GAMMA, "variance", keep_graphs=True),
    "IDGM-forward": lambda model: IDGM(model, GAMMA, hvp="forward"),
    "IDGM-finite_difference": lambda model: IDGM(model, GAMMA, hvp="finite_difference"),
    "SmoothFish": lambda model: SmoothFish(1.0, 0.1, model),
    "Fish": lambda model: Fish(0.5, model=model),
}
DIRECTIONS = {name: method for name, method in METHODS.items() if name != "Fish"}


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
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("keep_graphs", [False, True], ids=["streaming", "kept"])
@pytest.mark.parametrize("kind", ["flash attention", "once_differentiable"])
def test_a_model_without_second_derivative_is_told_to_use_differences(kind: str, keep_graphs: bool):
    torch.manual_seed(0)
    if kind == "flash attention":
        model, twin = Attention(SDPBackend.FLASH_ATTENTION).double(), Attention(SDPBackend.MATH).double()
        batches = regression(4, 5, 8, targets=3)
    else:
        model, twin = (two_layers(nn.BatchNorm1d(6), Sine(f)) for f in (OnceDifferentiable.apply, torch.sin))
        batches = regression(7, 4)
    twin.load_state_dict(model.state_dict())
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), IDGM(model, GAMMA, keep_graphs=keep_graphs))
    with nothing_changes(model, optimizer), pytest.raises(RuntimeError, match='use hvp="finite_difference"'):
        optimizer.meta_step(lambda batch: mean_squared_error(model, batch), batches)
    optimizer.method.hvp = "finite_difference"
    optimizer.meta_step(lambda batch: mean_squared_error(model, batch), batches)
    expected = plain_autograd(twin, mean_squared_error, batches)
    assert_close(flat(gradient_of(model), model), flat(expected.direction, twin), 1e-6)
    assert_same_buffers(model, twin)


@pytest.mark.parametrize("hvp", ["reverse", "finite_difference"])
@pytest.mark.parametrize("keep_graphs", [False, True], ids=["streaming", "kept"])
def test_checkpointing_changes_nothing(hvp: str, keep_graphs: bool):
    """What is evaluated again in the backward pass must see the same parameters: the displaced ones in a difference."""
    found = []
    for plain in (False, True):
        torch.manual_seed(0)
        model = networks.Checkpointed(plain=plain).double()
        method = IDGM(model, GAMMA, hvp=hvp, keep_graphs=keep_graphs)
        optimizer = GradMatch(SGD(model.parameters(), lr=0.1), method)
        optimizer.meta_step(lambda batch, m=model: mean_squared_error(m, batch), regression(7, 4))
        found.append(flat(gradient_of(model), model))
    assert_close(found[0], found[1], 1e-9)


# Forward derivatives belong to tensors that take the place of the parameters, so those must come from the model.
IN_PLACE = [name for name in DIRECTIONS if name != "IDGM-forward"]


@pytest.mark.parametrize("method", IN_PLACE)
def test_a_failing_loss_leaves_buffers_inside_a_checkpoint(method: str):
    torch.manual_seed(0)
    model = two_layers(nn.BatchNorm1d(6))
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), DIRECTIONS[method](model))
    batches = regression(7, 4)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        value = (checkpoint(model, batch[0], use_reentrant=False) - batch[1]).square().mean()
        return value * float("nan") if batch is batches[2] else value

    with nothing_changes(model, optimizer), pytest.raises(ValueError, match="batch 2 is nan"):
        optimizer.meta_step(loss, batches)


@pytest.mark.parametrize("method", IN_PLACE)
def test_a_penalty_on_parameters_gathered_before_the_loss(method: str):
    """``params = list(model.parameters())`` outside the loss function, as weight penalties are often written."""
    torch.manual_seed(0)
    model = two_layers()
    twin = copy.deepcopy(model)
    gathered = {id(m): list(m.parameters()) for m in (model, twin)}

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mean_squared_error(network, batch) + 0.3 * sum(p.square().sum() for p in gathered[id(network)])

    batches = regression(7, 4)
    if method == "SmoothFish":
        walker = copy.deepcopy(twin)
        gathered[id(walker)] = list(walker.parameters())
        expected = plain_smooth_fish(twin, walker, loss, batches, 1.0, 0.1)
    else:
        agreement = "variance" if method == "IDGM-kept" else "inner_product"
        expected = flat(plain_autograd(twin, loss, batches, GAMMA, agreement).direction, twin)
    optimizer = GradMatch(SGD(model.parameters(), lr=0.0), DIRECTIONS[method](model))
    optimizer.meta_step(lambda batch: loss(model, batch), batches)
    assert_close(flat(gradient_of(model), model), expected, 1e-6)


def test_forward_refuses_parameters_gathered_before_the_loss():
    model = two_layers()
    gathered = list(model.parameters())
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), IDGM(model, GAMMA, hvp="forward"))
    with nothing_changes(model, optimizer), pytest.raises(RuntimeError, match='use hvp="reverse"'):
        optimizer.meta_step(
            lambda batch: mean_squared_error(model, batch) + sum(p.square().sum() for p in gathered), regression(7, 4)
        )


@pytest.mark.parametrize("method", IN_PLACE)
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


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("hvp", ["reverse", "finite_difference"])
def test_recurrent_layers_in_single_precision(kind: type[nn.RNNBase], hvp: str):
    """On the CPU another kernel than in double precision; a copy and a checkpoint afterwards are whole."""
    torch.manual_seed(0)
    model = networks.Recurrent(kind).float()
    twin = copy.deepcopy(model).double()
    batches = [(x.float(), y.float()) for x, y in regression(5, 3, 4)]
    model.layers.dropout = twin.layers.dropout = 0.0
    optimizer = GradMatch(SGD(model.parameters(), lr=0.1), IDGM(model, GAMMA, hvp=hvp))
    optimizer.meta_step(lambda batch: mean_squared_error(model, batch), batches)
    expected = plain_autograd(twin, mean_squared_error, [(x.double(), y.double()) for x, y in batches])
    assert_close(flat(gradient_of(model), model).double(), flat(expected.direction, twin), 2e-3)
    other = copy.deepcopy(model)
    assert torch.equal(other(batches[0][0]), model(batches[0][0]))
    assert pickle.loads(pickle.dumps(model.state_dict())).keys() == model.state_dict().keys()


# --------------------------------------------------------------------------------- which parameters are trained


@pytest.mark.parametrize("method", METHODS)
def test_only_parameters_of_the_optimizer_that_a_loss_uses_move(method: str):
    """AdamW decays every parameter that has a gradient, so those without must have None."""
    torch.manual_seed(0)
    model = nn.ModuleDict({n: nn.Linear(4, 4) for n in ("trained", "frozen", "unused", "elsewhere")}).double()
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3).double()))
    model.register_parameter("of_one_domain", nn.Parameter(torch.ones(4).double()))
    model["frozen"].requires_grad_(False)
    twin = copy.deepcopy(model)
    groups = [
        {"params": [*model["trained"].parameters(), *model["frozen"].parameters()], "lr": 0.05},
        {"params": [*model["unused"].parameters(), model.empty, model.of_one_domain], "lr": 0.5},
    ]
    optimizer = GradMatch(AdamW(groups, weight_decay=0.5), METHODS[method](model))

    def loss(batch: tuple[int, Tensor]) -> Tensor:
        domain, x = batch
        hidden = torch.tanh(model["elsewhere"](torch.tanh(model["frozen"](model["trained"](x)))))
        return (hidden * model.of_one_domain if domain == 1 else hidden).square().mean()

    optimizer.meta_step(loss, [(d, x) for d, (x, _) in enumerate(regression(5, 4))])
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, twin.get_parameter(n))}
    assert moved == {"trained.weight", "trained.bias", "of_one_domain"}
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    if method != "Fish":  # whose backward() leaves gradients wherever they are required
        assert with_gradient == moved
    assert not model["frozen"].weight.requires_grad
    step = (model["trained"].weight - twin["trained"].weight).detach().abs().max()
    larger = (model.of_one_domain - twin.of_one_domain).detach().abs().min()
    assert float(larger) > 2 * float(step)  # by the groups' learning rates


def test_part_of_the_model_is_differentiated_alone():
    """A head trained by IDGM on a body that another optimizer trains: the direction is that of the head."""
    case = make(networks.batch_norm_1d)
    twin = copy.deepcopy(case.model)
    optimizer = GradMatch(SGD(case.model[3].parameters(), lr=0.1), IDGM(case.model, GAMMA))
    optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)
    expected = plain_autograd(twin, case.loss, case.batches, names=["3.weight", "3.bias"])
    assert_close(flat(gradient_of(case.model), case.model), flat(expected.direction, twin), 1e-11)
    assert case.model[0].weight.grad is None
    assert_same_buffers(case.model, twin)


def test_a_loss_that_uses_no_trained_parameter_is_named():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 1), "other": nn.Linear(4, 1)})
    for method in (IDGM(model, GAMMA), SmoothFish(1.0, 0.1, model)):
        optimizer = GradMatch(SGD(model["head"].parameters(), lr=0.1), method)
        with nothing_changes(model, optimizer), pytest.raises(ValueError, match=r"batch 1 .*depend"):
            optimizer.meta_step(lambda name: model[name](torch.ones(2, 4)).sum(), ["head", "other", "head"])


def test_a_parameter_outside_the_model_is_refused():
    model, other = nn.Linear(3, 2), nn.Linear(5, 4)
    with pytest.raises(ValueError, match=r"parameter number 2 .*\(4, 5\).*not in the model Linear"):
        GradMatch(SGD([*model.parameters(), *other.parameters()], lr=0.1), IDGM(model, GAMMA))


# --------------------------------------------------------------------------------------------- precision

LOW_PRECISION = {**METHODS, "SmoothFish": lambda model: SmoothFish(5.0, 0.5, model), "Fish": lambda model: Fish(1.0)}


@pytest.mark.parametrize("where", ["inside the loss", "around meta_step"])
@pytest.mark.parametrize("method", [name for name in LOW_PRECISION if name != "IDGM-finite_difference"])
def test_autocast_to_bfloat16(method: str, where: str):
    """The step is that of single precision up to rounding; parameters and gradients stay in single precision.

    Autocast keeps copies of the weights until its end: around a whole meta-iteration they outlive a walk's steps.
    """

    def autocast(on: bool) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16) if on else nullcontext()

    moved = []
    for mixed in (False, True):
        torch.manual_seed(0)
        model = two_layers(nn.BatchNorm1d(16), width=16).float()
        batches = [(x.float(), y.float()) for x, y in regression(32, 4)]
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        optimizer = GradMatch(SGD(model.parameters(), lr=0.5), LOW_PRECISION[method](model))

        def loss(batch: tuple[Tensor, Tensor], model: nn.Module = model, mixed: bool = mixed) -> Tensor:
            with autocast(mixed and where == "inside the loss"):
                output = model(batch[0])
            assert output.dtype == (torch.bfloat16 if mixed else torch.float32)
            return (output.float() - batch[1]).square().mean()

        with autocast(mixed and where == "around meta_step"):
            optimizer.meta_step(loss, batches)
        assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
        moved.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    assert_close(moved[1], moved[0], 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_parameters(method: str):
    torch.manual_seed(0)
    reference = two_layers(nn.LayerNorm(16), width=16)
    model = copy.deepcopy(reference).bfloat16()
    reference.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in regression(32, 4)]
    found = []
    for network, dtype in ((reference, torch.float64), (model, torch.bfloat16)):
        optimizer = GradMatch(SGD(network.parameters(), lr=0.1), METHODS[method](network))
        optimizer.meta_step(
            lambda b, n=network, t=dtype: mean_squared_error(n, (b[0].to(t), b[1].to(t))).to(t), batches
        )
        assert {p.dtype for p in network.parameters()} == {p.grad.dtype for p in network.parameters()} == {dtype}
        found.append(flat(gradient_of(network), network).double())
    least = 0.95 if "finite_difference" in method else 0.99  # the step is long where the dtype is coarse
    assert float(torch.cosine_similarity(found[0], found[1], dim=0)) > least


# --------------------------------------------------------------------------------------------- errors


WRONG_LOSSES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "vector": (lambda value: value.expand(3), ValueError, r"batch 2 it has shape \(3,\)"),
    "float": (lambda value: float(value.detach()), TypeError, r"batch 2 it returned float"),
    "none": (lambda value: None, TypeError, r"batch 2 it returned NoneType"),
    "nan": (lambda value: value * float("nan"), ValueError, r"batch 2 is nan"),
    "infinite": (lambda value: value / 0.0, ValueError, r"batch 2 is inf"),
    "detached": (lambda value: value.detach(), ValueError, r"batch 2 does not depend"),
}


@pytest.mark.parametrize("wrong", WRONG_LOSSES)
@pytest.mark.parametrize("method", DIRECTIONS)
def test_a_wrong_loss_is_named_and_nothing_changes(method: str, wrong: str):
    spoil, error, message = WRONG_LOSSES[wrong]
    case = make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters()), DIRECTIONS[method](case.model))

    def healthy(batch: Any) -> Tensor:
        return case.loss(case.model, batch)

    optimizer.meta_step(healthy, case.batches)
    with nothing_changes(case.model, optimizer), pytest.raises(error, match=message):
        optimizer.meta_step(lambda b: spoil(healthy(b)) if b is case.batches[2] else healthy(b), case.batches)
    with nothing_changes(case.model, optimizer), pytest.raises(ValueError, match=r"at least 2 domains \(got 1\)"):
        optimizer.meta_step(healthy, case.batches[:1])
    with nothing_changes(case.model, optimizer), pytest.raises(ValueError, match="batches is empty"):
        optimizer.meta_step(healthy, [])
    with nothing_changes(case.model, optimizer), pytest.raises(ZeroDivisionError):
        optimizer.meta_step(lambda b: 1 / 0 if b is case.batches[2] else healthy(b), case.batches)
    oracle = copy.deepcopy(case)
    plain = GradMatch(AdamW(oracle.model.parameters()), DIRECTIONS[method](oracle.model))
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for network, opt in ((case, optimizer), (oracle, plain)):
        opt.meta_step(lambda b, n=network: n.loss(n.model, b), case.batches)
    assert_identical(case.model.state_dict(), oracle.model.state_dict())


@pytest.mark.parametrize("method", DIRECTIONS)
def test_a_failing_step_leaves_parameters_and_buffers(method: str):
    """The last thing that can go wrong: a hook or the wrapped optimizer itself raises."""
    case = make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters()), DIRECTIONS[method](case.model))

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = optimizer.register_step_pre_hook(fail)
    with nothing_changes(case.model, optimizer), pytest.raises(MemoryError):
        optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)
    handle.remove()
    optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)
    assert int(case.model[1].num_batches_tracked) == 3


@pytest.mark.parametrize("method", DIRECTIONS)
def test_a_loss_that_fails_while_lbfgs_has_moved_the_parameters(method: str):
    case = make(networks.batch_norm_eval)
    optimizer = GradMatch(
        torch.optim.LBFGS(case.model.parameters(), lr=0.1, max_iter=4), DIRECTIONS[method](case.model)
    )
    before = copy.deepcopy(case.model.state_dict())
    calls = []

    def loss(batch: Any) -> Tensor:
        calls.append(batch)
        if len(calls) > 11:  # beyond the first evaluation by any method
            raise MemoryError
        return case.loss(case.model, batch)

    with pytest.raises(MemoryError):
        optimizer.meta_step(loss, case.batches)
    assert_identical(case.model.state_dict(), before)


# ----------------------------------------------------------------------------------------- GradMatch around them


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def train(case: Case, optimizer: GradMatch, iterations: int = 2) -> None:
    for _ in range(iterations):
        optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)


@pytest.mark.parametrize("method", DIRECTIONS)
def test_there_is_no_inner_loop(method: str):
    case, twin = make(networks.batch_norm_1d), make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters()), DIRECTIONS[method](case.model))
    plain = AdamW(twin.model.parameters())
    train(case, optimizer)
    twin.model.load_state_dict(case.model.state_dict())
    plain.load_state_dict(copy.deepcopy(optimizer.optimizer.state_dict()))
    with nothing_changes(case.model, optimizer):
        optimizer.rollback()
        with pytest.raises(RuntimeError, match=r"no inner loop .*meta_step"):
            optimizer.interpolate()
    for network, opt in ((case, optimizer), (twin, plain)):
        opt.zero_grad()
        network.loss(network.model, network.batches[0]).backward()
        opt.step()
    assert_identical(case.model.state_dict(), twin.model.state_dict())
    assert optimizer.inner_step == 0


@pytest.mark.parametrize("method", DIRECTIONS)
def test_resumes_bit_for_bit_from_a_file(method: str):
    case, resumed = make(networks.batch_norm_1d), make(networks.batch_norm_1d, seed=1)
    optimizer = GradMatch(AdamW(case.model.parameters(), lr=0.05), DIRECTIONS[method](case.model))
    train(case, optimizer)
    saved = through_file({"model": case.model.state_dict(), "optimizer": optimizer.state_dict()})
    other = GradMatch(AdamW(resumed.model.parameters(), lr=7.0), DIRECTIONS[method](resumed.model))
    resumed.model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(case, optimizer)
    train(Case(resumed.model, resumed.loss, case.batches), other)
    assert_identical(resumed.model.state_dict(), case.model.state_dict())
    assert_identical(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_model_and_optimizer_goes_on_alike(method: str, how: Callable[[Any], Any]):
    case = make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters(), lr=0.05), METHODS[method](case.model))
    train(case, optimizer)
    model, twin = how((case.model, optimizer))
    assert twin.method.model is model is not case.model
    train(case, optimizer)
    assert not torch.equal(model[0].weight, case.model[0].weight)
    train(Case(model, case.loss, case.batches), twin)
    assert_identical(model.state_dict(), case.model.state_dict())
    assert_identical(twin.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.permutations(["IDGM", "SmoothFish", "Fish"], 2)))
def test_a_state_of_another_method_is_refused(saved: str, loaded: str):
    case, other = make(networks.batch_norm_1d), make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters()), METHODS[saved](case.model))
    target = GradMatch(AdamW(other.model.parameters()), METHODS[loaded](other.model))
    train(case, optimizer)
    train(other, target)
    with nothing_changes(other.model, target), pytest.raises(ValueError, match=f"'{saved}'.*{loaded}"):
        target.load_state_dict(optimizer.state_dict())


OPTIMIZERS = sorted(
    name
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
)


@pytest.mark.parametrize("method", ["IDGM", "SmoothFish"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "SparseAdam"])
def test_every_optimizer_takes_the_direction(name: str, method: str):
    """Three meta-iterations; the oracle puts the direction into ``.grad`` of a twin and steps the plain optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6, bias=name != "Muon"), nn.Tanh(), nn.Linear(6, 2, bias=name != "Muon")
    ).double()
    twin = copy.deepcopy(model)
    settings = {"lr": 0.05, "line_search_fn": "strong_wolfe"} if name == "LBFGS" else {"lr": 0.05}
    wrapped, plain = (getattr(torch.optim, name)(m.parameters(), **settings) for m in (model, twin))
    optimizer = GradMatch(wrapped, IDGM(model, 0.1, "variance") if method == "IDGM" else SmoothFish(1.0, 0.1, model))

    def closure(batches: list[Any]) -> Tensor:
        if method == "IDGM":
            found = plain_autograd(twin, mean_squared_error, batches, 0.1, "variance")
            direction, value = flat(found.direction, twin), found.objective
        else:
            direction = plain_smooth_fish(twin, copy.deepcopy(twin), mean_squared_error, batches, 1.0, 0.1)
            value = torch.stack([mean_squared_error(twin, batch) for batch in batches]).mean().detach()
        start = 0
        for p in twin.parameters():
            p.grad = direction[start : start + p.numel()].view_as(p).clone()
            start += p.numel()
        return value

    for _ in range(3):
        batches = regression(7, 4)
        optimizer.meta_step(lambda batch: mean_squared_error(model, batch), batches)
        if name == "LBFGS":
            plain.step(lambda batches=batches: closure(batches))
        else:
            closure(batches)
            plain.step()
        assert_same_model(model, twin, rtol=1e-7)


def test_sparse_adam_refuses_the_dense_direction_and_nothing_changes():
    case = make(networks.sparse_embedding)
    optimizer = GradMatch(torch.optim.SparseAdam(case.model.parameters()), IDGM(case.model, GAMMA))
    with nothing_changes(case.model, optimizer), pytest.raises(RuntimeError, match="does not support dense gradients"):
        train(case, optimizer, 1)


@pytest.mark.parametrize("method", METHODS)
def test_schedulers_count_meta_iterations(method: str):
    case = make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters(), lr=0.01), METHODS[method](case.model))
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=8)
    expected = lr_scheduler.OneCycleLR(AdamW([nn.Parameter(torch.zeros(1))], lr=0.01), max_lr=0.01, total_steps=8)
    for _ in range(5):
        train(case, optimizer, 1)
        scheduler.step()
        expected.optimizer.step()
        expected.step()
        assert optimizer.optimizer.param_groups[0]["lr"] == expected.get_last_lr()[0]


@pytest.mark.parametrize("method", DIRECTIONS)
def test_a_hook_clips_the_direction(method: str):
    case, twin = make(networks.batch_norm_1d), make(networks.batch_norm_1d)
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.5), DIRECTIONS[method](case.model))
    unclipped = GradMatch(SGD(twin.model.parameters(), lr=0.0), DIRECTIONS[method](twin.model))
    norms = []

    def clip(opt: GradMatch, *_: Any) -> None:
        norms.append(nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 0.01))

    optimizer.register_step_pre_hook(clip)
    train(case, optimizer, 1)
    train(twin, unclipped, 1)
    direction = flat(gradient_of(twin.model), twin.model)
    torch.testing.assert_close(torch.stack(norms), direction.norm()[None])
    before = nn.utils.parameters_to_vector(twin.model.parameters()).detach()
    after = nn.utils.parameters_to_vector(case.model.parameters()).detach()
    assert_close(before - after, 0.5 * 0.01 * direction / direction.norm(), 1e-5)


def layerwise_cosine(gradients: list[dict[str, Tensor]]) -> Tensor:
    """A user's own agreement: mean cosine over pairs of domains, tensor by tensor."""
    cosines = []
    for name in gradients[0]:
        units = nn.functional.normalize(torch.stack([g[name].flatten() for g in gradients]), dim=1)
        gram = units @ units.T
        cosines.append((gram.sum() - gram.trace()) / (len(gradients) * (len(gradients) - 1)))
    return torch.stack(cosines).mean()


def log_volume(gradients: list[dict[str, Tensor]]) -> Tensor:
    """Another: minus the log-determinant of the matrix of inner products, which is small where they are parallel."""
    vectors = torch.stack([torch.cat([t.flatten() for t in g.values()]) for g in gradients])
    return -torch.logdet(vectors @ vectors.T + 0.1 * torch.eye(len(gradients), dtype=vectors.dtype))


@pytest.mark.parametrize("keep_graphs", [False, True], ids=["streaming", "kept"])
@pytest.mark.parametrize("hvp", ["reverse", "forward", "finite_difference"])
@pytest.mark.parametrize("agreement", [layerwise_cosine, log_volume])
def test_an_agreement_of_the_users_own(agreement: Callable[[Any], Tensor], hvp: str, keep_graphs: bool):
    case, oracle = make(networks.batch_norm_1d), make(networks.batch_norm_1d)
    oracle.model[0].bias.requires_grad_(False)  # before BatchNorm it has no effect: the cosine of two zeros
    case.model[0].bias.requires_grad_(False)
    method = IDGM(case.model, GAMMA, agreement, hvp=hvp, keep_graphs=keep_graphs)
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.0), method)
    train(case, optimizer, 1)
    expected = plain_autograd(oracle.model, case.loss, case.batches, GAMMA, agreement)
    assert_close(flat(gradient_of(case.model), case.model), flat(expected.direction, oracle.model), 1e-6)
    assert_same_buffers(case.model, oracle.model)


# -------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("network", ["ResNet", "Transformer"])
@pytest.mark.parametrize(
    "method",
    [
        lambda model: IDGM(model, 0.1, "variance"),
        lambda model: SmoothFish(1.0, 0.05, model),
        lambda model: Fish(0.5, model=model),
    ],
    ids=["IDGM", "SmoothFish", "Fish"],
)
def test_one_loop_trains_by_every_method(network: str, method: Callable[[nn.Module], Any]):
    torch.manual_seed(0)
    if network == "ResNet":
        model: nn.Module = networks.ResNet(width=4)
        labels = torch.randint(0, 3, (12,))
        patterns = torch.randn(3, 3, 8, 8)
        batches = [(patterns[labels] + 0.3 * torch.randn(12, 3, 8, 8) + 0.2 * d, labels) for d in range(3)]
    else:
        model = networks.SequenceClassifier(dropout=0.1)
        batches = []
        for _ in range(3):
            tokens = torch.randint(0, 11, (16, 6))
            batches.append((tokens, tokens[:, 0] % 3))
    optimizer = GradMatch(AdamW(model.parameters(), lr=0.01), method(model))
    losses = []
    for _ in range(15 if network == "ResNet" else 40):
        report = optimizer.meta_step(lambda batch: cross_entropy(model, batch), batches)
        losses.append(float(report.losses.mean()))
    assert losses[-1] < 0.5 * losses[0], losses
    model.eval()
    with torch.no_grad():
        accuracy = torch.cat([model(x).argmax(dim=1) == y for x, y in batches]).double().mean()
    assert accuracy > 0.6


# ----------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("wrapped", ["the compiled model", "the model inside"])
@pytest.mark.parametrize("method", ["IDGM-finite_difference", "SmoothFish"])
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
@pytest.mark.parametrize("build", [networks.batch_norm_1d, networks.nested_batches], ids=name_of)
def test_a_compiled_model_has_no_second_derivative(build: Callable[[], Case], keep_graphs: bool):
    torch._dynamo.reset()
    case = make(build)
    compiled = torch.compile(case.model, backend="aot_eager")
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.1), IDGM(case.model, GAMMA, keep_graphs=keep_graphs))
    with nothing_changes(case.model, optimizer), pytest.raises(RuntimeError, match='use hvp="finite_difference"'):
        optimizer.meta_step(lambda batch: case.loss(compiled, batch), case.batches)
