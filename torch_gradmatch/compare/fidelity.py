r"""How near a method's direction beyond ordinary training comes to that of the exact objective.

Over one meta-iteration a method hands gradients to the wrapped optimizer: IDGM and SmoothFish one, Fish one for each
domain of its walk. Their mean less the gradient :math:`\bar G` of the mean loss is its *direction beyond ERM*. The
exact objective's is :math:`-\gamma\,\partial\mathrm{GIP}/\partial\theta`, and for Fish with SGD of step :math:`\alpha`

.. math:: \frac{\theta-\tilde\theta}{\alpha S} - \bar G
          = -\gamma_\mathrm{Fish}\,\frac{\partial\,\mathrm{GIP}}{\partial\theta} + O(\alpha^2)

averaged over the order of the domains; an order and its reverse are enough for the first term.

That holds where the gradients are smooth. Across the kinks of ReLUs they jump, at random places: on a walk of length
:math:`\delta` the sum of the jumps grows as :math:`\sqrt\delta`, so that a *shorter* walk is farther from the exact
direction, which knows of no kinks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_gradmatch.compare.trial import Trial
from torch_gradmatch.gradients.functional import functional_loss, idgm_grad
from torch_gradmatch.methods.base import Method, needs_closure
from torch_gradmatch.methods.idgm import IDGM

__all__ = ["ExactTerm", "Fidelity", "fidelity", "random_orders"]

Vector = list[Tensor]
SAFETY = 10.0  # a difference of gradients is more than noise if it is so many times as long


@dataclass(frozen=True)
class Fidelity:
    r"""A method's direction beyond ERM, d, against :math:`e = -\partial\mathrm{GIP}/\partial\theta`, the exact one's.

    Attributes:
        cosines: Cosine of d and e in single meta-iterations, each with another order of the domains.
        cosine: Cosine of the mean of d over these and e.
        gamma: :math:`\langle d, e\rangle / |e|^2` for the mean d: the exact objective's :math:`\gamma` that the method
            comes nearest to.
        relative_error: :math:`|d - \gamma e| / |\gamma e|` with that :math:`\gamma`.
        strength: :math:`|d| / |\bar G|` for the mean d: how much gradient matching there is beside ordinary training.
        resolved: Whether d is longer than the rounding errors of the gradients whose difference it is. If not, the
            other figures mean nothing.
    """

    cosines: list[float]
    cosine: float
    gamma: float
    relative_error: float
    strength: float
    resolved: bool


def random_orders(domains: int, number: int, generator: torch.Generator) -> list[list[int]]:
    """Draw orders of the domains in pairs: one and its reverse.

    Args:
        domains: S.
        number: How many orders, even.
        generator: Draws them.

    Returns:
        The orders.

    Example:
        >>> random_orders(3, 2, torch.Generator().manual_seed(0))
        [[2, 0, 1], [1, 0, 2]]
    """
    drawn = [torch.randperm(domains, generator=generator).tolist() for _ in range(number // 2)]
    return [order for first in drawn for order in (first, first[::-1])]


class ExactTerm:
    r"""The gradient of the mean loss and :math:`-\partial\mathrm{GIP}/\partial\theta` at one point.

    Args:
        trial: Where, with its random numbers fixed.
        hvp: How to take the Hessian-vector products.

    Attributes:
        mean: :math:`\bar G`.
        term: :math:`-\partial\mathrm{GIP}/\partial\theta`.
        noise: Above this strength a direction is more than rounding: some times the relative change of the mean
            gradient when each parameter goes up or down by its precision.

    Raises:
        RuntimeError: If the model has no second derivatives, or the gradients are not finite.
    """

    def __init__(self, trial: Trial, hvp: str = "reverse") -> None:
        self.mean, nudged = _mean_gradient(trial), _mean_gradient(trial, nudge=True)
        self.noise = SAFETY * _norm(_minus(nudged, self.mean)) / max(_norm(self.mean), _tiny(self.mean))
        # Taken as a difference of directions, with both of about one length; for that its length has to be known.
        guess = self._term(trial, hvp, 1.0)
        length = _norm(guess)
        if not (math.isfinite(length) and math.isfinite(_norm(self.mean))):
            raise RuntimeError("the gradients are not finite at these parameters")
        self.term = self._term(trial, hvp, _norm(self.mean) / length) if length > 0 else guess

    def _term(self, trial: Trial, hvp: str, gamma: float) -> Vector:
        trial.reset()
        names = {p: name for name, p in trial.model.named_parameters()}
        params = {names[p]: p for p in trial.parameters if p.requires_grad}
        loss_fn = functional_loss(trial.model, trial.loss_fn)
        buffers = dict(trial.model.named_buffers())
        found = idgm_grad(loss_fn, params, trial.batches, gamma, hvp=hvp, buffers=buffers).gradient
        gradient = _filled(trial, [found.get(names[p]) for p in trial.parameters])
        return [(g - m) / gamma for g, m in zip(gradient, self.mean, strict=True)]


def direction_beyond_erm(
    trial: Trial, method: Method, exact: ExactTerm, order: Sequence[int], lr_factor: float = 1.0
) -> Vector:
    """Carry out one meta-iteration and return what its gradients have beyond the mean gradient.

    Args:
        trial: Where, with its random numbers fixed.
        method: The method.
        exact: Holds the mean gradient.
        order: In which to go through the domains.
        lr_factor: Multiplies the optimizer's learning rates.

    Returns:
        For each parameter.
    """
    trial.reset()
    optimizer = trial.wrap(method, lr_factor)
    total: Vector = []
    steps = 0

    def note(*_: Any) -> None:
        nonlocal total, steps
        gradient = _filled(trial, [p.grad for p in trial.parameters])
        total = gradient if not total else [t + g for t, g in zip(total, gradient, strict=True)]
        steps += 1

    optimizer.optimizer.register_step_pre_hook(note)
    optimizer.meta_step(trial.loss_fn, [trial.batches[i] for i in order])
    return [t / steps - m for t, m in zip(total, exact.mean, strict=True)]


def fidelity(
    trial: Trial, method: Method, exact: ExactTerm, orders: Sequence[Sequence[int]], lr_factor: float = 1.0
) -> Fidelity | None:
    """Measure a method's direction beyond ERM against the exact objective's.

    Args:
        trial: Where, with its random numbers fixed.
        method: The method.
        exact: What to compare with.
        orders: Orders of the domains, one meta-iteration for each. Methods without a walk take one.
        lr_factor: Multiplies the optimizer's learning rates, for the effect of the inner one on Fish.

    Returns:
        What was found, or None for an optimizer that evaluates gradients itself (LBFGS).
    """
    if needs_closure(trial.optimizer):
        return None
    if isinstance(method, IDGM) and method.hvp_domains is None:
        orders = [range(len(trial.batches))]  # no walk: the order changes nothing
    cosines = []
    mean: Vector = []
    for number, order in enumerate(orders):
        torch.default_generator.manual_seed(number)  # what a method draws for itself, as hvp_domains
        beyond = direction_beyond_erm(trial, method, exact, order, lr_factor)
        cosines.append(_cosine(beyond, exact.term))
        mean = beyond if not mean else [m + b for m, b in zip(mean, beyond, strict=True)]
    mean = [m / len(orders) for m in mean]
    gamma = _dot(mean, exact.term) / max(_dot(exact.term, exact.term), _tiny(mean))
    fitted = [gamma * e for e in exact.term]
    strength = _norm(mean) / max(_norm(exact.mean), _tiny(mean))
    return Fidelity(
        cosines=cosines,
        cosine=_cosine(mean, exact.term),
        gamma=gamma,
        relative_error=_norm(_minus(mean, fitted)) / max(_norm(fitted), _tiny(mean)),
        strength=strength,
        resolved=strength > exact.noise,
    )


def _mean_gradient(trial: Trial, *, nudge: bool = False) -> Vector:
    trial.reset()
    with torch.no_grad():
        for p in trial.parameters if nudge else ():
            p.add_(p * (2 * torch.randint(2, p.shape, device=p.device) - 1), alpha=torch.finfo(p.dtype).eps)
    trial.differentiate_mean_loss()
    return _filled(trial, [p.grad for p in trial.parameters])


def _filled(trial: Trial, gradient: Sequence[Tensor | None]) -> Vector:
    """Return a gradient of one's own in at least fp32, zero where a parameter has none."""
    wide = [torch.promote_types(p.dtype, torch.float32) for p in trial.parameters]
    return [
        torch.zeros_like(p, dtype=dtype) if g is None else _dense(g).detach().to(dtype, copy=True)
        for p, g, dtype in zip(trial.parameters, gradient, wide, strict=True)
    ]


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.layout is not torch.strided else gradient


def _minus(a: Vector, b: Vector) -> Vector:
    return [x - y for x, y in zip(a, b, strict=True)]


def _tiny(vector: Vector) -> float:
    return float(torch.finfo(vector[0].dtype).tiny)


def _dot(a: Vector, b: Vector) -> float:
    return sum(float(torch.vdot(x.flatten(), y.flatten()).real) for x, y in zip(a, b, strict=True))


def _norm(a: Vector) -> float:
    return math.sqrt(_dot(a, a))


def _cosine(a: Vector, b: Vector) -> float:
    norms = _norm(a) * _norm(b)
    return _dot(a, b) / norms if norms > 0 else math.nan
