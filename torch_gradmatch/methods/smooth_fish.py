r"""SmoothFish: gradient matching of free strength by first derivatives.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, the smoothed variant of Fish
(``FishSmooth``). With :math:`\bar G` the mean of the domains' gradients at :math:`\theta` and :math:`\tilde G` the mean
of their gradients along an inner walk by SGD with step :math:`\alpha`, each taken where the ones before have led,

.. math:: \bar G + \gamma\,(\tilde G - \bar G)

goes to the wrapped optimizer as the gradient. Averaged over the order of the domains

.. math::

    \tilde G - \bar G = -\frac{\alpha (S-1)}{4}\,\frac{\partial\,\mathrm{GIP}}{\partial\theta} + O(\alpha^2),

so this is the gradient of the exact objective with :math:`\gamma\cdot` ``fish_gamma(inner_lr, S)``. At
:math:`\gamma = 1` it is the walk's mean gradient and nothing else: S gradients, Fish with SGD inside and the wrapped
optimizer outside.

**The walk and its reverse.** One walk follows
:math:`\bar G - \frac{\alpha}{S}\sum_{i\text{ before }j} H_j G_i + O(\alpha^2)`, which depends on the order of the
domains. With :math:`F` and :math:`R` the mean gradients along a walk and along its reverse, both from :math:`\theta`,
every ordered pair of domains is there once, whatever the order:

.. math::

    \tfrac12(F + R) - \bar G = -\frac{\alpha}{2S}\sum_{i\ne j} H_j G_i + O(\alpha^2)
        = -\frac{\alpha (S-1)}{4}\,\frac{\partial\,\mathrm{GIP}}{\partial\theta} + O(\alpha^2).

So ``symmetric=True`` follows the gradient of the exact objective,

.. math:: \bar G + \frac{\gamma}{\alpha(S-1)/4}\,\bigl(\tfrac12(F + R) - \bar G\bigr)
    = \bar G - \gamma\,\frac{\partial\,\mathrm{GIP}}{\partial\theta} + O(\alpha),

for any order and with first derivatives alone. That a pass over the data and its reverse cancel what depends on the
order is known for the epochs of SGD: Rajput et al., *Permutation-Based SGD: Is Random Optimal?*, ICLR 2022 (FlipFlop);
Nguyen et al., arXiv 2604.00260 (paired reversal).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.profiler import record_function

from torch_gradmatch import _checks as checks
from torch_gradmatch.gradients.agreement import fish_gamma
from torch_gradmatch.gradients.alignment import GradientAlignment, accumulate
from torch_gradmatch.gradients.backward import gradient_of
from torch_gradmatch.gradients.engine import with_zeros
from torch_gradmatch.gradients.replay import Replay, check_repeats
from torch_gradmatch.gradients.report import MetaStep
from torch_gradmatch.methods.base import COMMON_CHECKS
from torch_gradmatch.methods.direction import Direction, DirectionMethod, Evaluation
from torch_gradmatch.parallel.foreach import WIDE, Vector, add_all_, clone_all, copy_all_, precision, squared_norm

__all__ = ["SmoothFish"]


@dataclass(repr=False)
class SmoothFish(DirectionMethod):
    r"""Match gradients by :math:`\bar G + \gamma(\tilde G - \bar G)`: first derivatives, free choice of strength.

    A meta-iteration over S domains takes S gradients at gamma 1, as ordinary training does, 2S - 1 at another gamma,
    and 3S - 2 if symmetric. The walk goes through the batches in the order given: shuffle the domains, as
    ``DomainBatchSampler`` does. All gradients of a domain see the same random numbers (dropout), so that their
    difference is the effect of the walk alone. The loss has to be the same when it is evaluated again;
    meta-iterations number 1, 2, 4, 8 and so on check that.

    Attributes:
        gamma: :math:`\gamma \ge 0`, the strength of the matching; 0 is ordinary training, at its cost. In the exact
            objective's gamma it is ``gamma * fish_gamma(inner_lr, S)``; if symmetric, gamma itself.
        inner_lr: :math:`\alpha > 0`, step of the inner walk by SGD, whatever the wrapped optimizer. If symmetric, the
            step of a difference of gradients: the direction is exact to :math:`O(\alpha)`. If it is so small that
            rounding swallows the difference, the first meta-iterations warn.
        model: Pass the model if it has buffers (BatchNorm's statistics). They then move once for each domain and
            meta-iteration; without it with every gradient. A model in ``DistributedDataParallel`` is passed in its
            wrapper, which averages the gradients.
        nonfinite: ``"raise"`` refuses a loss or a direction with NaN or infinity, and a matching term that outgrows the
            loss, before anything is changed (synchronizes once in a meta-iteration). ``"ignore"`` skips these checks.
        track_alignment: Measure the mean cosine of the gradients, too; costs one more vector of the size of the
            parameters. ``"pairs"`` also measures the cosine of each pair of domains, and of each domain with the sum of
            the others. It copies every gradient: S times the parameters.
        symmetric: Walk through the domains and back. That gives the gradient of the exact objective with the inner
            product, without second derivatives.
        process_group: The ranks that train together, ``torch.distributed.group.WORLD`` for all of them; None for one
            process, or for a model of ``torch.distributed.fsdp.fully_shard``, whose ranks find each other. After every
            ``meta_step`` parameters are the same bits on all ranks, and so are the model's buffers: means over the
            ranks, the largest of integers. All ranks raise what one raises.
        parallel: ``"walks"``: every rank takes a walk of its own (other batches, another order), and the mean of the
            directions goes to the wrapped optimizer: one all-reduce of the size of the parameters. The mean of two
            ranks that walk in opposite orders is the exact objective's direction. The model is the plain module; the
            report is of this rank's walk. ``"data"``: every rank has its part of the batch of each domain, and each
            gradient is averaged. The model may be in ``DistributedDataParallel``.

    At gamma 1 (not symmetric) only the first gradient is taken at :math:`\theta`. The report of ``meta_step`` is then
    measured along the walk, as under Fish.

    Raises:
        TypeError: If ``model`` is no module or ``process_group`` no process group.
        ValueError: If a setting is out of range; the message names it and shows the value.

    Example:
        >>> import torch
        >>> from torch_gradmatch import GradMatch, SmoothFish
        >>> w = torch.nn.Parameter(torch.tensor(0.0))
        >>> sgd, loss = torch.optim.SGD([w], lr=1.0), lambda target: (w - target).square() / 2
        >>> optimizer = GradMatch(sgd, SmoothFish(gamma=2.0, inner_lr=0.1))
        >>> report = optimizer.meta_step(loss, [1.0, 3.0])
        >>> w.grad  # G = -1, -3; along the walk -1, -2.9: -2 + 2 (-1.95 + 2)
        tensor(-1.9000)
        >>> _ = w.data.zero_()
        >>> optimizer = GradMatch(sgd, SmoothFish(gamma=0.1, inner_lr=0.1, symmetric=True))
        >>> report = optimizer.meta_step(loss, [1.0, 3.0])
        >>> w.grad  # GIP = (w - 1)(w - 3), so -2 - 0.1 (2w - 4)
        tensor(-1.6000)
    """

    gamma: float
    inner_lr: float
    model: nn.Module | None = None
    nonfinite: Literal["raise", "ignore"] = "raise"
    track_alignment: bool | Literal["pairs"] = False
    symmetric: bool = False
    process_group: ProcessGroup | None = None
    parallel: Literal["walks", "data"] = "walks"

    checks: ClassVar[Mapping[str, Callable[[Any], Any]]] = COMMON_CHECKS | {
        "gamma": partial(checks.check_number, "gamma", at_least=0),
        "inner_lr": partial(checks.check_number, "inner_lr", above=0),
        "symmetric": partial(checks.check_bool, "symmetric"),
        "parallel": partial(checks.check_choice, "parallel", choices=("walks", "data")),
    }

    def direction(self, given: Evaluation) -> Direction:
        """Work out the direction. See ``DirectionMethod.direction``."""
        domains, sharing, weight = len(given.batches), given.sharing, self._weight(len(given.batches))
        walks = 1 + self.symmetric if self.gamma > 0 else 0
        if sharing is not None:
            gradients = domains + walks * (domains - 1) * (not self._is_one_walk)
            own = [(p, p.dtype) for p in given.parameters]
            wide = [(p, WIDE.get(p.dtype, p.dtype)) for p in given.parameters]
            data = sharing.kind == "data"
            sharing.expect(*([own] * gradients if data else [wide]), numbers=2 * domains * data + len(own))
        sums = GradientAlignment(bool(self.track_alignment), self.track_alignment == "pairs")
        walk = _Walk(given, sums, self.inner_lr / given.scale, symmetric=self.symmetric)
        total: list[Tensor | None] = []
        after = None
        try:
            if self._is_one_walk:
                walk.go(range(domains))
                after = walk.replay.save()
                accumulate(total, sums.total, 1 / domains)
            else:
                begins = {}
                for index in range(domains):
                    gradient = walk.gradient(index)
                    if self.gamma > 0 and (index == 0 or (self.symmetric and index == domains - 1)):
                        begins[index] = gradient
                    del gradient
                after = walk.replay.save()
                if given.checks and weight > 0 and given.is_due:
                    walk.replay.again[0] = walk.loss(0)
                accumulate(total, sums.total, (1 - weight) / domains)
                for first in sorted(begins, reverse=True):
                    order = range(domains) if first == 0 else range(domains - 1, -1, -1)
                    walk.go(order, begins.pop(first), partial(accumulate, total, factor=weight / domains / walks))
            reached = [t is not None for t in sums.total]
            found = walk.replay.stacked()
            if given.checks:  # before it is reduced, so that the rank that is to blame says so
                self._check(walk, given, found[0], total)
        finally:
            walk.close(after)
        if sharing is not None:
            sharing.reduce_(with_zeros(total, given.parameters), "walks")
            found, reached = sharing.numbers(given.parameters[0], found, reached)
        losses, again = (values.to(walk.replay.losses[0].dtype) for values in found)
        if given.checks and walk.replay.again:
            self._check_again(given, sums, losses, again, total)
        measured, losses = sums.result(given.scale), losses / given.scale
        objective = losses.mean() - self._strength(domains) * measured.inner_product
        direction = [
            d.to(p.dtype) if d is not None and is_reached else None
            for d, p, is_reached in zip(total, given.parameters, reached, strict=True)
        ]
        report = MetaStep(losses, measured.inner_product, measured.cosine, measured.grad_norms, measured.cosines)
        return Direction(direction, objective, report, after[1])

    @property
    def _is_one_walk(self) -> bool:
        return self.gamma == 1 and not self.symmetric

    def _weight(self, domains: int) -> float:
        r"""Return w of the direction :math:`\bar G + w(\tilde G - \bar G)`."""
        return self.gamma / fish_gamma(self.inner_lr, domains) if self.symmetric else self.gamma

    def _strength(self, domains: int) -> float:
        """Return the gamma of the exact objective that is lowered, to first order and in the mean over orders.

        The losses along a walk are themselves lower by twice as much.
        """
        fish = self.inner_lr * (domains - 1) / 4
        return -fish if self._is_one_walk else self._weight(domains) * fish

    def _check(self, walk: _Walk, given: Evaluation, losses: Tensor, direction: Vector) -> None:
        """Raise if something is not finite or diverges; synchronizes once."""
        if self.nonfinite != "raise":
            return
        domains, scale = len(losses), given.scale
        found = [d for d in direction if d is not None]
        try:
            first, (norm, product) = given.read_finite(losses, found, [walk.sums.result().inner_product])
        except ValueError as error:
            infinite = torch.isfinite(losses).logical_not().nonzero()
            index = int(infinite[0])
            if not self._is_one_walk or not walk.is_finite_at_start(index):
                raise
            if scale != 1.0 and not math.isfinite(float(squared_norm(found))):
                return  # gradients that overflowed led the walk there: the scaler skips the step, the scale falls
            name = checks.name_of(index)
            raise self._diverged(f"the loss of {name} is {losses[index].item()} along it") from error
        if not math.isfinite(norm) and scale == 1.0:  # else the scaler skips the step
            raise self._diverged("the direction holds NaN or infinity")
        if math.isfinite(product) and not self._is_one_walk:
            remedy = f"Lower gamma (it is {self.gamma:g}) or inner_lr (it is {self.inner_lr:g})"
            matching = self._strength(domains) * product / scale**2
            given.refuse_explosion(sum(first) / domains / scale, matching, remedy)

    def _check_again(
        self, given: Evaluation, sums: GradientAlignment, losses: Tensor, again: Tensor, direction: Vector
    ) -> None:
        """Raise if a loss evaluated again is another, warn if the walks' effect is rounding; synchronizes."""
        weight = self._weight(len(losses))
        # An error of the gradients counts in the direction with this weight.
        tolerance = math.sqrt(precision([*given.parameters, losses])) / max(1.0, weight)
        check_repeats((losses.double() / given.scale).tolist(), (again.double() / given.scale).tolist(), tolerance)
        # Later the walk may be lost because there is nothing left to learn; and else it is gamma that is small.
        if given.number >= 4 or weight <= 1 / 32:
            return
        mean: list[Tensor | None] = []
        accumulate(mean, sums.total, 1 / len(losses))
        length = _length(mean)
        coarsest = precision([p for p, m in zip(given.parameters, mean, strict=True) if m is not None])
        add_all_(mean, direction, -1.0)
        difference = _length(mean) / weight
        if difference < min(32 * coarsest, 0.02) * length:
            warnings.warn(
                f"SmoothFish matches nothing: along the walk the mean gradient changes by {difference / length:.1g} of "
                f"its length, which is rounding. Raise inner_lr (it is {self.inner_lr:g}) or train in a wider "
                "dtype; if every loss is linear in the parameters, there is nothing to be matched",
                stacklevel=6,
            )

    def _diverged(self, how: str) -> RuntimeError:
        return RuntimeError(
            f"the inner walk of SmoothFish diverged: {how}, with inner_lr={self.inner_lr} and gamma={self.gamma}. "
            "Nothing was changed: lower inner_lr or gamma and go on"
        )


def _length(vector: Vector) -> float:
    return float(squared_norm([part for part in vector if part is not None]) ** 0.5)


class _Walk:
    """The evaluations of one meta-iteration, each at whatever point the walk has led to.

    Args:
        given: Loss function, batches and all else.
        sums: Take in the gradients of each domain's first evaluation.
        step: Of the walk.
        symmetric: Whether there is one to and fro.
    """

    def __init__(self, given: Evaluation, sums: GradientAlignment, step: float, *, symmetric: bool) -> None:
        self.parameters = given.parameters
        self.sharing = given.sharing
        self.sums = sums
        self.step = step
        loss = given.loss
        point = lambda index, _: loss(index)  # noqa: E731
        self.replay = Replay(point, given.batches, given.parameters, given.places, chains=not symmetric)
        self._start: list[Tensor] | None = None

    def gradient(self, index: int) -> list[Tensor | None]:
        """Return the gradient of a domain at the present parameters, the mean over the ranks that share it."""
        is_first = index == len(self.replay.losses)
        with record_function("GradMatch.domain_gradient"):
            gradient = gradient_of(self.replay(index), self.parameters)
        if is_first:
            checks.check_reached(gradient, index)
        if self.sharing is not None and self.sharing.kind == "data":
            pairs = zip(gradient, self.parameters, strict=True)
            gradient = [torch.zeros_like(p) if g is None else g for g, p in pairs]
            self.sharing.reduce_([g for g in gradient if g is not None], "data")
        if is_first:
            self.sums.add(gradient)
        return gradient

    def go(
        self,
        order: range,
        first: list[Tensor | None] | None = None,
        take: Callable[[list[Tensor | None]], None] | None = None,
    ) -> None:
        """Walk through the domains by SGD, from the parameters and back to them; the first gradient may be known."""
        gradient = self.gradient(order[0]) if first is None else first
        self._start = clone_all(self.parameters)  # a lazy parameter is made by now
        for index in order:
            if index != order[0]:
                with torch.no_grad():
                    add_all_(self.parameters, gradient, -self.step)
                torch.clear_autocast_cache()  # around the whole meta_step it would hold the weights before the step
                del gradient  # before the next graph grows
                gradient = self.gradient(index)
            if take is not None:
                take(gradient)
        self._return()

    def _return(self) -> None:
        if self._start is not None:
            copy_all_(self.parameters, self._start)
            self._start = None
            torch.clear_autocast_cache()

    def loss(self, index: int) -> Tensor:
        """Evaluate a domain's loss at the present parameters as the first time."""
        loss = self.replay(index)
        if self.sharing is not None and self.sharing.in_step:
            gradient_of(loss, self.parameters)  # only a backward pass lets DDP and fully_shard go on
        return loss.detach()

    def is_finite_at_start(self, index: int) -> bool:
        """Return whether a loss that was not finite along the walk is so at its start; False if it may not look."""
        self._return()
        in_step = self.sharing is not None and self.sharing.in_step
        return not in_step and bool(torch.isfinite(self.replay(index)))

    def close(self, after: Any) -> None:
        """Leave parameters and buffers as they were before, random numbers as one evaluation of each domain does."""
        self._return()
        self.replay.close(after)
