r"""How near a method's direction beyond ordinary training comes to that of the exact objective.

Over one meta-iteration a method hands gradients to the wrapped optimizer: IDGM and SmoothFish one, Fish one for each
domain of its walk. Their mean less the gradient :math:`\bar G` of the mean loss is its *direction beyond ERM*. The
exact objective's is :math:`-\gamma\,\partial\phi/\partial\theta`, with the agreement :math:`\phi` of IDGM. What Fish
and SmoothFish match is the inner product, :math:`\phi = \mathrm{GIP}`: for Fish with SGD of step :math:`\alpha`

.. math:: \frac{\theta-\tilde\theta}{\alpha S} - \bar G
          = -\gamma_\mathrm{Fish}\,\frac{\partial\,\mathrm{GIP}}{\partial\theta} + O(\alpha^2)

averaged over the order of the domains; an order and its reverse are enough for the first term.

That holds where the gradients are smooth. Across the kinks of ReLUs they jump, at random places: on a walk of length
:math:`\delta` the sum of the jumps grows as :math:`\sqrt\delta`, so that a *shorter* walk is farther from the exact
direction, which knows of no kinks.

Vectors of the size of the parameters that are held while a method is at work: the mean gradient, the exact term, and
with more than one order of the domains the sum of the directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_gradmatch.evaluation.trial import Trial
from torch_gradmatch.gradients.agreement import Agreement, check_agreement, inner_product
from torch_gradmatch.gradients.report import MetaStep
from torch_gradmatch.methods.base import Method
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.methods.idgm import IDGM
from torch_gradmatch.methods.smooth_fish import SmoothFish
from torch_gradmatch.optimizer import GradMatch
from torch_gradmatch.slow.inner_state import wants_closure

__all__ = ["ExactTerm", "Fidelity", "agreement_of", "direction_beyond_erm", "fidelity", "name_of", "random_orders"]

SAFETY = 10.0  # a difference of gradients is more than noise if it is so many times as long


@dataclass(frozen=True)
class Fidelity:
    r"""A method's direction beyond ERM, d, against :math:`e = -\partial\phi/\partial\theta`, the exact one's.

    Attributes:
        cosines: Cosine of d and e in single meta-iterations, each with another order of the domains.
        cosine: Cosine of the mean of d over these and e.
        gamma: :math:`\langle d, e\rangle / |e|^2` for the mean d: the exact objective's :math:`\gamma` that the method
            comes nearest to.
        relative_error: :math:`|d - \gamma e| / |\gamma e|` with that :math:`\gamma`.
        strength: :math:`|d| / |\bar G|` for the mean d: how much gradient matching there is beside ordinary training.
        resolved: Whether d is longer than the rounding errors of the gradients whose difference it is. If not, the
            other figures mean nothing.
        agreement: Name of :math:`\phi`, which is what the method matches.
    """

    cosines: list[float]
    cosine: float
    gamma: float
    relative_error: float
    strength: float
    resolved: bool
    agreement: str


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


def agreement_of(method: Method) -> Agreement | None:
    """Return what a method matches: IDGM its own agreement, Fish and SmoothFish the inner product.

    Args:
        method: The method.

    Returns:
        The agreement as a function; None of a method that matches nothing, or the gradients of some parameters only.

    Example:
        >>> import torch
        >>> from torch_gradmatch import IDGM, Fish
        >>> agreement_of(Fish()).__name__, agreement_of(IDGM(torch.nn.Linear(1, 1), 0.1, "variance")).__name__
        ('inner_product', 'variance')
    """
    if isinstance(method, IDGM) and getattr(method, "matched", None) is None:
        return check_agreement(method.agreement)
    return inner_product if isinstance(method, Fish | SmoothFish) else None


def name_of(agreement: Agreement) -> str:
    """Return what an agreement is called in a table.

    Args:
        agreement: The function.

    Returns:
        The name of the function, or of its class.
    """
    name = getattr(agreement, "__name__", type(agreement).__name__)
    return "a function" if name == "<lambda>" else str(name)


class ExactTerm:
    r"""The gradient of the mean loss and :math:`-\partial\phi/\partial\theta` at one point, by ``IDGM``.

    Args:
        trial: Where, with its random numbers fixed.
        hvp: How to take the Hessian-vector products.
        agreement: :math:`\phi`, as for ``IDGM``.

    Attributes:
        agreement: Its name.
        mean: :math:`\bar G`.
        term: :math:`-\partial\phi/\partial\theta`.
        noise: Above this strength a direction is more than rounding: some times the relative change of the mean
            gradient when each parameter goes up or down by its precision.

    Raises:
        RuntimeError: If the model has no second derivatives, or the gradients are not finite.
        ValueError: If a loss is not the same twice.
    """

    def __init__(self, trial: Trial, hvp: str = "reverse", agreement: str | Agreement = "inner_product") -> None:
        phi = check_agreement(agreement)
        self.agreement = name_of(phi)
        self.mean = _mean_gradient(trial)
        change = float(_mean_gradient(trial, nudge=True).sub_(self.mean).norm())
        self.noise = SAFETY * change / max(float(self.mean.norm()), _tiny(self.mean))
        # Strength 1: the term is a difference of directions, with both of one length.
        method: Any = IDGM(trial.model, agreement=phi, strength=1.0, hvp=hvp, nonfinite="ignore")  # type: ignore[arg-type]
        self.term, report = direction_beyond_erm(trial, method, self.mean, range(len(trial.batches)))
        if not (self.term.isfinite().all() and self.mean.isfinite().all()):
            raise RuntimeError(
                "the gradients are not finite at these parameters: look at the batches, or take a model that has not "
                "diverged"
            )
        self.term = self.term.div_(report.gamma) if report.gamma else self.term.zero_()


def direction_beyond_erm(
    trial: Trial, method: Method, mean_gradient: Tensor, order: Sequence[int]
) -> tuple[Tensor, MetaStep]:
    """Carry out one meta-iteration and take what its gradients have beyond the mean gradient.

    Args:
        trial: Where, with its random numbers fixed.
        method: The method.
        mean_gradient: Of the domains.
        order: In which to go through the domains.

    Returns:
        One vector for all parameters, and the report.
    """
    trial.reset()
    if isinstance(method, IDGM | SmoothFish):  # one gradient, whatever the optimizer: one without a state
        wrapper: GradMatch[Any] = GradMatch(torch.optim.SGD(trial.parameters, lr=0.0), method)
    else:
        wrapper = trial.wrap(method)
    total, steps = mean_gradient.new_zeros(0), 0  # of the parameters' size from the first step on

    def note(*_: Any) -> None:
        nonlocal total, steps
        total = _add_gradients(total if steps else torch.zeros_like(mean_gradient), trial)
        steps += 1

    wrapper.optimizer.register_step_pre_hook(note)
    report = wrapper.meta_step(trial.loss_fn, [trial.batches[i] for i in order])
    trial.reset()
    return total.div_(steps).sub_(mean_gradient), report


def fidelity(trial: Trial, method: Method, exact: ExactTerm, orders: Sequence[Sequence[int]]) -> Fidelity | None:
    """Measure a method's direction beyond ERM against the exact objective's.

    Args:
        trial: Where, with its random numbers fixed.
        method: The method.
        exact: What to compare with; that of :func:`agreement_of` the method, if it is to be its own.
        orders: Orders of the domains, one meta-iteration for each. Methods without a walk take one.

    Returns:
        What was found, or None for an optimizer that evaluates gradients itself (LBFGS).

    Raises:
        RuntimeError: If a walk diverges.
    """
    if wants_closure(trial.optimizer):
        return None
    if isinstance(method, IDGM) and not method.one_pass:
        orders = [range(len(trial.batches))]  # no walk: the order changes nothing
    looks = type(method) is Fish and method.nonfinite == "raise"
    if looks:  # here: the method keeps a copy of the optimizer's state for it
        method = replace(method, nonfinite="ignore")  # type: ignore[type-var]
    cosines: list[float] = []
    mean = torch.zeros(())
    for number, order in enumerate(orders):
        torch.default_generator.manual_seed(number)
        beyond, _ = direction_beyond_erm(trial, method, exact.mean, order)
        if looks and not beyond.isfinite().all():
            raise RuntimeError("the walk through the domains diverged: lower the learning rate")
        cosines.append(_cosine(beyond, exact.term))
        mean = mean.add_(beyond) if number else beyond
        del beyond
    mean = mean.div_(len(orders))
    gamma = float(mean @ exact.term) / max(float(exact.term @ exact.term), _tiny(mean))
    strength = float(mean.norm()) / max(float(exact.mean.norm()), _tiny(mean))
    cosine = _cosine(mean, exact.term)
    error = float(mean.sub_(exact.term, alpha=gamma).norm()) / max(abs(gamma) * float(exact.term.norm()), _tiny(mean))
    return Fidelity(cosines, cosine, gamma, error, strength, strength > exact.noise, exact.agreement)


def _mean_gradient(trial: Trial, *, nudge: bool = False) -> Tensor:
    trial.reset()
    with torch.no_grad():
        for p in trial.parameters if nudge else ():
            p.add_(p * (2 * torch.randint(2, p.shape, device=p.device) - 1), alpha=torch.finfo(p.dtype).eps)
    trial.differentiate_mean_loss()
    wide = torch.float64 if any(p.dtype.to_real() == torch.float64 for p in trial.parameters) else torch.float32
    return _add_gradients(torch.zeros(sum(_sizes(trial)), dtype=wide, device=trial.parameters[0].device), trial)


def _add_gradients(vector: Tensor, trial: Trial) -> Tensor:
    """Add ``.grad`` to a vector of all parameters, in at least fp32; nothing where a parameter has none."""
    for p, part in zip(trial.parameters, vector.split(_sizes(trial)), strict=True):
        if p.grad is not None:
            dense = p.grad.to_dense() if p.grad.layout is not torch.strided else p.grad
            dense = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
            part.add_(dense.detach().reshape(-1).to(vector.device))
    return vector


def _sizes(trial: Trial) -> list[int]:
    return [p.numel() * (2 if p.is_complex() else 1) for p in trial.parameters]


def _tiny(vector: Tensor) -> float:
    return float(torch.finfo(vector.dtype).tiny)


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = float(a.norm()) * float(b.norm())
    return float(a @ b) / norms if norms > 0 else math.nan
