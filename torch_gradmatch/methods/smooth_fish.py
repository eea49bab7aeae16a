r"""SmoothFish: a first-order direction with a free strength of matching.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, the smoothed variant of Fish
(``FishSmooth``). With :math:`\bar G` the mean of the domains' gradients at :math:`\theta` and :math:`\tilde G` the mean
of their gradients along an inner walk by SGD with step :math:`\alpha`, each taken where the ones before have led,

.. math:: \bar G + \gamma\,(\tilde G - \bar G)

goes to the wrapped optimizer as the gradient. Averaged over the order of the domains

.. math::

    \tilde G - \bar G = -\frac{\alpha (S-1)}{4}\,\frac{\partial\,\mathrm{GIP}}{\partial\theta} + O(\alpha^2),

so this is the gradient of the exact objective with :math:`\gamma\cdot` ``fish_gamma(inner_lr, S)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from torch_gradmatch._checks import (
    check_bool,
    check_choice,
    check_loss,
    check_model,
    check_num_domains,
    check_number,
    check_reached,
    optional,
)
from torch_gradmatch.gradients.alignment import GradientAlignment
from torch_gradmatch.gradients.hvp import first_order
from torch_gradmatch.gradients.random_state import RandomState, devices_of
from torch_gradmatch.methods.base import Method
from torch_gradmatch.methods.direction import Direction, DirectionStep, unscaled_report
from torch_gradmatch.slow.saved_buffers import BufferSlots, SavedBuffers
from torch_gradmatch.slow.weights import SlowWeights

__all__ = ["SmoothFish"]


@dataclass
class SmoothFish(Method):
    r"""Match gradients by :math:`\bar G + \gamma(\tilde G - \bar G)`: first derivatives, free choice of strength.

    Costs 2S - 1 gradients in a meta-iteration over S domains. Batches are walked through in the order given: shuffle
    the domains, as ``DomainBatchSampler`` does. Both gradients of a domain see the same random numbers (dropout), so
    that their difference is the effect of the walk alone.

    Attributes:
        gamma: :math:`\gamma \ge 0`, the strength of the matching; 0 is ordinary training, at its cost. The exact
            objective's gamma that this corresponds to is ``gamma * fish_gamma(inner_lr, S)``.
        inner_lr: :math:`\alpha > 0`, step of the inner walk by SGD, whatever the wrapped optimizer.
        model: The model, if it has buffers (BatchNorm's statistics): they then move once for each domain and
            meta-iteration; without it twice.
        nonfinite: ``"raise"`` refuses a loss or a direction with NaN or infinity before anything is changed (waits for
            an accelerator once in a meta-iteration); ``"ignore"`` does not look.
        track_alignment: Measure the mean cosine of the gradients, too; costs one more vector of the size of the
            parameters.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If a setting is out of range; the message names it and shows the value.

    Example:
        >>> import torch
        >>> from torch_gradmatch import GradMatch, SmoothFish
        >>> w = torch.nn.Parameter(torch.tensor(0.0))
        >>> optimizer = GradMatch(torch.optim.SGD([w], lr=1.0), SmoothFish(gamma=2.0, inner_lr=0.1))
        >>> report = optimizer.meta_step(lambda target: (w - target).square() / 2, [1.0, 3.0])
        >>> w.grad  # G = -1, -3; along the walk -1, -2.9: -2 + 2 (-1.95 + 2)
        tensor(-1.9000)
    """

    gamma: float
    inner_lr: float
    model: nn.Module | None = None
    nonfinite: Literal["raise", "ignore"] = "raise"
    track_alignment: bool = False

    checks: ClassVar[Mapping[str, Callable[[Any], object]]] = {
        "gamma": partial(check_number, "gamma", at_least=0),
        "inner_lr": partial(check_number, "inner_lr", above=0),
        "model": optional(partial(check_model, "model")),
        "track_alignment": partial(check_bool, "track_alignment"),
        "nonfinite": partial(check_choice, "nonfinite", choices=("raise", "ignore")),
    }

    def __repr__(self) -> str:
        model = None if self.model is None else type(self.model).__name__
        return (
            f"SmoothFish(gamma={self.gamma!r}, inner_lr={self.inner_lr!r}, model={model!r}, "
            f"nonfinite={self.nonfinite!r}, track_alignment={self.track_alignment!r})"
        )

    def start(self, optimizer: Optimizer, state: MutableMapping[Tensor, Any]) -> SmoothFishStep:
        """Make the loop that carries these settings out for one optimizer.

        Args:
            optimizer: The wrapped optimizer.
            state: Where to keep the slow weights.

        Returns:
            The loop.
        """
        return SmoothFishStep(self, optimizer, state)


class SmoothFishStep(DirectionStep):
    """SmoothFish at work on one optimizer.

    Args:
        method: The settings.
        optimizer: The wrapped optimizer.
        state: Where to keep the slow weights.
    """

    def __init__(self, method: SmoothFish, optimizer: Optimizer, state: MutableMapping[Tensor, Any]) -> None:
        super().__init__(optimizer, method.model)
        self.method = method
        self.weights = SlowWeights(state)
        self._sums = GradientAlignment(cosines=method.track_alignment)

    def evaluate(
        self, loss_fn: Callable[[Any], Tensor], batches: Sequence[Any], *, check: bool = True, scale: float = 1.0
    ) -> Direction:
        """Work out the direction. See ``DirectionStep.evaluate``."""
        domains = check_num_domains(len(batches))
        gamma, step = self.method.gamma, self.method.inner_lr
        parameters = self.trainable()
        sums = self._sums = self.running_sums(self._sums, cosines=self.method.track_alignment)
        losses, randoms = [], []
        walked: list[Tensor | None] = []
        slots = None if self.model is None else BufferSlots(self.model)
        before = after_first = None if slots is None else SavedBuffers(slots)

        def differentiate(index: int) -> tuple[Tensor, list[Tensor | None]]:
            with record_function("GradMatch.domain_gradient"):
                return first_order(lambda _: check_loss(loss_fn(batches[index]), index), parameters)

        try:
            for index, batch in enumerate(batches):
                randoms.append(RandomState.capture(devices_of(parameters, batch)))
                loss, gradient = differentiate(index)
                check_reached(gradient, index)
                losses.append(loss)
                sums.add(gradient)
                if index == 0:
                    walked, after_first = gradient, None if slots is None else SavedBuffers(slots)
            after, random = None if slots is None else SavedBuffers(slots), RandomState.capture(devices_of(parameters))
            total = sums.mean(weight=1 - gamma if gamma > 0 else 1.0)
            if gamma > 0:
                total.add(walked, weight=gamma / domains)
                self.weights.snapshot(parameters, None)
                if after_first is not None:
                    after_first.restore()
                for index in range(1, domains):
                    _sgd_step(parameters, walked, step / scale)
                    randoms[index].restore()
                    walked = differentiate(index)[1]
                    total.add(walked, weight=gamma / domains)
                random.restore()
        finally:
            self.weights.rollback()
            torch.clear_autocast_cache()
            if before is not None:
                before.restore()
        direction = dict(zip(parameters, total.tensors(like=parameters), strict=True))
        measured = sums.result()
        sums.reset(release=True)
        stacked = torch.stack([loss.to(losses[0].device, losses[0].dtype) for loss in losses])
        if check and self.method.nonfinite == "raise":
            norm = self.read_finite(stacked, [g for g in direction.values() if g is not None])[0]
            if scale == 1.0 and not math.isfinite(norm):  # else the scaler skips the step
                raise RuntimeError(
                    f"the inner walk of SmoothFish diverged: the direction holds NaN or infinity, with inner_lr={step} "
                    f"and gamma={gamma}. Nothing was changed: lower inner_lr or gamma and go on"
                )
        return Direction(
            gradient=[direction.get(p) for p in self.parameters()],
            objective=stacked.mean(),
            report=unscaled_report(stacked, measured, scale),
            buffers=None if after is None else after.values(),
        )


@torch.no_grad()
def _sgd_step(parameters: Sequence[Tensor], gradient: Sequence[Tensor | None], step: float) -> None:
    pairs = [(p, g) for p, g in zip(parameters, gradient, strict=True) if g is not None]
    if pairs:
        torch._foreach_add_([p for p, _ in pairs], [g for _, g in pairs], alpha=-step)
        torch.clear_autocast_cache()  # around the whole meta_step it would hold the weights before the walk
