"""The oracle for methods with second derivatives, and what their tests share.

The oracle is plain autograd on a copy of the model: one forward pass of each domain, every graph kept, and the whole
objective differentiated at once.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _models import assert_identical, assert_same_state
from _networks import Case
from _reference import agreement_of, smooth_fish_gradient
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_gradmatch import ERM, IDGM, Aggregate, Fish, Fishr, GradMatch, GroupDRO, SmoothFish, VREx

GAMMA = 0.3
Loss = Callable[[nn.Module, Any], Tensor]

METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "IDGM": lambda model: IDGM(model, GAMMA, "inner_product"),
    "IDGM-kept": lambda model: IDGM(model, GAMMA, "variance", keep_graphs=True),
    "IDGM-forward": lambda model: IDGM(model, GAMMA, "inner_product", hvp="forward"),
    "IDGM-finite_difference": lambda model: IDGM(model, GAMMA, "inner_product", hvp="finite_difference"),
    "SmoothFish": lambda model: SmoothFish(2.0, 0.1, model),
    "SmoothFish-walk": lambda model: SmoothFish(1.0, 0.1, model),
    "SmoothFish-symmetric": lambda model: SmoothFish(GAMMA, 0.1, model, symmetric=True),
    "Fish": lambda model: Fish(0.5, model=model),
}


def head_of(model: nn.Module) -> Any:
    return model.out if hasattr(model, "out") else model[-1]  # type: ignore[index]


MORE_METHODS: dict[str, Callable[[nn.Module], Any]] = {  # that take first derivatives, or second ones of a head
    "ERM": lambda m: ERM(model=m),
    "VREx": lambda m: VREx(0.7, model=m),
    "GroupDRO": lambda m: GroupDRO(0.5, model=m),
    "Aggregate": lambda m: Aggregate(lambda matrix: matrix.amax(0), model=m),
    "Fishr": lambda m: Fishr(m, head_of(m)),
    "Fishr later": lambda m: Fishr(m, head_of(m), start=3),
    "matched": lambda m: IDGM(m, matched=head_of(m)),
    "IDGM by strength": lambda m: IDGM(m),
}
EVERY = METHODS | MORE_METHODS
DIRECTIONS = {name: method for name, method in METHODS.items() if name != "Fish"}


def seed_everything(seed: int = 3) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also prints the stack, for devices not yet in use
    np.random.seed(seed)  # noqa: NPY002  the global generator is the one that losses draw from
    random.seed(seed)


def next_random_numbers() -> list[float]:
    return [float(torch.rand(())), float(np.random.rand()), random.random()]  # noqa: NPY002


def flat(gradient: dict[str, Tensor | None], model: nn.Module) -> Tensor:
    """One real vector for a gradient by parameter name, zeros for None."""
    parts = [torch.zeros_like(p) if gradient.get(n) is None else gradient[n] for n, p in model.named_parameters()]
    # view_as_real's derivative needs a copy
    reals = [torch.view_as_real(g) * 1.0 if g.is_complex() else g for g in parts]
    return torch.cat([g.reshape(-1) for g in reals])


# -------------------------------------------------------------------------------------------------------------- oracles


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
) -> Expected:
    """Differentiate mean loss - gamma phi by the named parameters."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad and (names is None or n in names)}
    losses, gradients = [], []
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            losses.append(loss(model, batch))
            found = torch.autograd.grad(losses[-1], list(params.values()), create_graph=True, allow_unused=True)
            found = [g if g is None or not g.is_sparse else g.to_dense() for g in found]
            gradients.append(dict(zip(params, found, strict=True)))
        vectors = [flat(g, model) for g in gradients]
        if callable(agreement):
            filled = [{n: torch.zeros_like(params[n]) if g is None else g for n, g in gs.items()} for gs in gradients]
            phi = agreement(filled)
        else:
            phi = agreement_of(agreement, vectors)
        mean = torch.stack(losses).mean()
        objective = mean - gamma * phi
        direction = torch.autograd.grad(objective, list(params.values()), allow_unused=True)
    dense = [g if g is None or not g.is_sparse else g.to_dense() for g in direction]
    return Expected(
        dict(zip(params, dense, strict=True)),
        torch.stack(losses).detach(),
        [v.detach() for v in vectors],
        objective.detach(),
    )


def plain_smooth_fish(
    model: nn.Module,
    walker: nn.Module,
    loss: Loss,
    batches: list[Any],
    gamma: float,
    inner_lr: float,
    *,
    symmetric: bool = False,
) -> Tensor:
    """The direction as one vector; the walk is on a second model, built alike, as some cannot be copied."""
    found = smooth_fish_gradient(model, loss, batches, gamma, inner_lr, symmetric=symmetric, walker=walker)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return flat(dict(zip(names, found, strict=True)), model)


# ------------------------------------------------------------------------------------------------ comparisons and loops


def gradient_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: p.grad for n, p in model.named_parameters()}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Close as vectors: norm of the difference over norm."""
    assert bool(torch.isfinite(actual).all())
    error = float((actual - expected).norm() / expected.norm())
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_same_buffers(actual: nn.Module, expected: nn.Module) -> None:
    assert_same_state(dict(actual.named_buffers()), dict(expected.named_buffers()), rtol=1e-12)


@contextmanager
def nothing_changes(model: nn.Module, optimizer: GradMatch) -> Iterator[None]:
    """Parameters, gradients, the optimizer's state and the buffers that it follows are the same, bit for bit."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 0.125)

    def everything() -> Any:
        values = dict(model.named_parameters()) if optimizer.method.model is None else dict(model.state_dict())
        return values, optimizer.state_dict(), gradient_of(model)

    def objects() -> list[Any]:
        parameters = list(model.parameters())
        return [
            *map(id, itertools.chain(parameters, model.buffers())),
            *((id(p.grad), p.requires_grad) for p in parameters),
        ]

    before, identities = copy.deepcopy(everything()), objects()
    yield
    assert_identical(everything(), before)
    assert objects() == identities


def train(case: Case, optimizer: GradMatch, iterations: int = 2) -> None:
    for _ in range(iterations):
        optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)
