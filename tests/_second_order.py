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
from _models import assert_identical
from _networks import Case
from _reference import agreement_of
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
    reals = [
        torch.view_as_real(g) * 1.0 if g.is_complex() else g for g in parts
    ]  # view_as_real's derivative needs a copy
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
            phi = agreement_of(agreement, vectors)
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
    model: nn.Module,
    walker: nn.Module,
    loss: Loss,
    batches: list[Any],
    gamma: float,
    inner_lr: float,
    *,
    symmetric: bool = False,
) -> Tensor:
    """Gbar + gamma (Gtilde - Gbar), the walk on a second copy of the model; the first one's buffers move on.

    Symmetric: the mean of two walks, of which the second goes back through the domains; each domain then begins with
    the buffers that it began with at first. At gamma 1 the walk is all there is, so the buffers are its.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    walking = [p for p in walker.parameters() if p.requires_grad]
    start = copy.deepcopy(walker.state_dict())

    def gradient(network: nn.Module, wanted: list[Tensor], batch: Any) -> list[Tensor]:
        found = torch.autograd.grad(loss(network, batch), wanted, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, wanted, strict=True)]

    def random_states() -> Any:
        return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002

    def set_random(states: Any) -> None:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])

    at_start, along, randoms, buffers = [], [], [], []
    for batch in batches:
        randoms.append(random_states())
        buffers.append(copy.deepcopy(list(model.buffers())))
        at_start.append(gradient(model, params, batch))
    after = random_states()
    orders = [range(len(batches)), range(len(batches) - 1, -1, -1)] if symmetric else [range(len(batches))]
    for order in orders:
        walker.load_state_dict(start)
        for index in order:
            set_random(randoms[index])
            if symmetric:
                for buffer, value in zip(walker.buffers(), buffers[index], strict=True):
                    buffer.copy_(value)
            along.append(gradient(walker, walking, batches[index]))
            with torch.no_grad():
                for p, g in zip(walking, along[-1], strict=True):
                    p -= inner_lr * g
    set_random(after)
    if symmetric:
        gamma = gamma / (inner_lr * (len(batches) - 1) / 4)
    elif gamma == 1:
        for buffer, walked in zip(model.buffers(), walker.buffers(), strict=True):
            buffer.copy_(walked)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    means = [[sum(parts) / len(gs) for parts in zip(*gs, strict=True)] for gs in (at_start, along)]
    return flat({n: a + gamma * (b - a) for n, a, b in zip(names, *means, strict=True)}, model)


# ------------------------------------------------------------------------------------------------ comparisons and loops


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
