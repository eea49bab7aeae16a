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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_gradmatch.evaluation.trial import Trial
from torch_gradmatch.gradients.agreement import AGREEMENTS, Agreement, check_agreement, inner_product
from torch_gradmatch.gradients.functional import functional_loss, idgm_grad
from torch_gradmatch.gradients.replay import check_repeats
from torch_gradmatch.methods.base import Method
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.methods.idgm import IDGM
from torch_gradmatch.methods.smooth_fish import SmoothFish
from torch_gradmatch.optimizer import GradMatch
from torch_gradmatch.parallel.foreach import precision
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
        The name of a named one, else that of the function, or of its class.
    """
    for name, function in AGREEMENTS.items():
        if function is agreement:
            return name
    name = getattr(agreement, "__name__", type(agreement).__name__)
    return "a function" if name == "<lambda>" else str(name)


class ExactTerm:
    r"""The gradient of the mean loss and :math:`-\partial\phi/\partial\theta` at one point.

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
        self._phi = check_agreement(agreement)
        losses = trial.losses()
        check_repeats(losses, trial.losses(), math.sqrt(precision(trial.parameters)))
        self.agreement = name_of(self._phi)
        self.mean = _mean_gradient(trial)
        change = float(_mean_gradient(trial, nudge=True).sub_(self.mean).norm())
        self.noise = SAFETY * change / max(float(self.mean.norm()), _tiny(self.mean))
        # Taken as a difference of directions, with both of about one length; for that its length has to be known.
        self.term = self._term(trial, hvp, 1.0)
        length = float(self.term.norm())
        if not (math.isfinite(length) and math.isfinite(float(self.mean.norm()))):
            raise RuntimeError(
                "the gradients are not finite at these parameters: look at the batches, or take a model that has not "
                "diverged"
            )
        if length > 0:
            del self.term  # before the next
            self.term = self._term(trial, hvp, float(self.mean.norm()) / length)

    def _term(self, trial: Trial, hvp: str, gamma: float) -> Tensor:
        trial.reset()
        names = {p: name for name, p in trial.model.named_parameters()}
        params = {names[p]: p for p in trial.parameters if p.requires_grad}
        loss_fn = functional_loss(trial.model, trial.loss_fn)
        buffers = dict(trial.model.named_buffers())
        found = idgm_grad(loss_fn, params, trial.batches, gamma, self._phi, hvp=hvp, buffers=buffers).gradient
        return (
            _added(torch.zeros_like(self.mean), (found.pop(names[p], None) for p in trial.parameters), trial)
            .sub_(self.mean)
            .div_(gamma)
        )


def direction_beyond_erm(trial: Trial, method: Method, exact: ExactTerm, order: Sequence[int]) -> Tensor:
    """Carry out one meta-iteration and return what its gradients have beyond the mean gradient.

    Args:
        trial: Where, with its random numbers fixed.
        method: The method.
        exact: Holds the mean gradient.
        order: In which to go through the domains.

    Returns:
        One vector for all parameters.
    """
    if type(method) is Fish and method.nonfinite == "raise":  # keeps a copy of the optimizer's state, to no use here
        beyond = direction_beyond_erm(trial, replace(method, nonfinite="ignore"), exact, order)
        if beyond.isfinite().all():
            return beyond
        del beyond  # and let the method itself say what is wrong
    trial.reset()
    if isinstance(method, IDGM | SmoothFish):  # one gradient, whatever the optimizer: one without a state
        wrapper: GradMatch[Any] = GradMatch(torch.optim.SGD(trial.parameters, lr=0.0), method)
    else:
        wrapper = trial.wrap(method)
    total, steps = exact.mean.new_zeros(0), 0  # of the parameters' size from the first step on

    def note(*_: Any) -> None:
        nonlocal total, steps
        total = _added(total if steps else torch.zeros_like(exact.mean), (p.grad for p in trial.parameters), trial)
        steps += 1

    wrapper.optimizer.register_step_pre_hook(note)
    wrapper.meta_step(trial.loss_fn, [trial.batches[i] for i in order])
    trial.reset()
    return total.div_(steps).sub_(exact.mean)


def fidelity(trial: Trial, method: Method, exact: ExactTerm, orders: Sequence[Sequence[int]]) -> Fidelity | None:
    """Measure a method's direction beyond ERM against the exact objective's.

    Args:
        trial: Where, with its random numbers fixed.
        method: The method.
        exact: What to compare with; that of :func:`agreement_of` the method, if it is to be its own.
        orders: Orders of the domains, one meta-iteration for each. Methods without a walk take one.

    Returns:
        What was found, or None for an optimizer that evaluates gradients itself (LBFGS).
    """
    if wants_closure(trial.optimizer):
        return None
    if isinstance(method, IDGM) and not method.one_pass:
        orders = [range(len(trial.batches))]  # no walk: the order changes nothing
    cosines: list[float] = []
    mean: Tensor | None = None
    for number, order in enumerate(orders):
        torch.default_generator.manual_seed(number)
        beyond = direction_beyond_erm(trial, method, exact, order)
        cosines.append(_cosine(beyond, exact.term))
        mean = beyond if mean is None else mean.add_(beyond)
        del beyond
    assert mean is not None
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
    first = trial.parameters[0]
    dtypes = {p.dtype.to_real() for p in trial.parameters} | {torch.float32}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    length = sum(p.numel() * (2 if p.is_complex() else 1) for p in trial.parameters)
    return _added(torch.zeros(length, dtype=wide, device=first.device), (p.grad for p in trial.parameters), trial)


def _added(vector: Tensor, gradient: Iterable[Tensor | None], trial: Trial) -> Tensor:
    """Add a gradient to a vector of all parameters, in at least fp32; nothing where a parameter has none."""
    start = 0
    for p, g in zip(trial.parameters, gradient, strict=True):
        end = start + p.numel() * (2 if p.is_complex() else 1)
        if g is not None:
            dense = g.detach().to_dense() if g.layout is not torch.strided else g.detach()
            dense = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
            vector[start:end] += dense.reshape(-1).to(vector.device)
        start = end
    return vector


def _tiny(vector: Tensor) -> float:
    return float(torch.finfo(vector.dtype).tiny)


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = float(a.norm()) * float(b.norm())
    return float(a @ b) / norms if norms > 0 else math.nan
