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

from torch_gradmatch import _checks as checks
from torch_gradmatch.gradients.agreement import fish_gamma
from torch_gradmatch.gradients.alignment import GradientAlignment
from torch_gradmatch.gradients.evaluation import Evaluation
from torch_gradmatch.gradients.flat import Vector, WeightedSum
from torch_gradmatch.gradients.repeats import check_repeats, precision
from torch_gradmatch.gradients.report import report_of
from torch_gradmatch.gradients.walk import Walk
from torch_gradmatch.methods.base import COMMON_CHECKS
from torch_gradmatch.methods.direction import Direction, DirectionMethod
from torch_gradmatch.parallel.shards import sharded_like, total_norm

__all__ = ["SmoothFish"]


@dataclass(repr=False)
class SmoothFish(DirectionMethod):
    r"""Match gradients by :math:`\bar G + \gamma(\tilde G - \bar G)`: first derivatives, free choice of strength.

    Costs S gradients in a meta-iteration over S domains at gamma 1, which is what ordinary training on the same batches
    costs, and 2S - 1 at another; 3S - 2 if symmetric. Batches are walked through in the order given: shuffle the
    domains, as ``DomainBatchSampler`` does. All gradients of a domain see the same random numbers (dropout), so that
    their difference is the effect of the walk alone. For the same reason the loss has to be the same when it is
    evaluated again; in meta-iterations number 1, 2, 4, 8 and so on one is, to see whether it is.

    Attributes:
        gamma: :math:`\gamma \ge 0`, the strength of the matching; 0 is ordinary training, at its cost. The exact
            objective's gamma that this corresponds to is ``gamma * fish_gamma(inner_lr, S)``; if symmetric, gamma
            itself.
        inner_lr: :math:`\alpha > 0`, step of the inner walk by SGD, whatever the wrapped optimizer. If symmetric, the
            step of a difference of gradients: the direction is exact to :math:`O(\alpha)`, and where it is so small
            that the difference is lost in rounding a warning says so, in the first meta-iterations.
        model: The model, if it has buffers (BatchNorm's statistics): they then move once for each domain and
            meta-iteration; without it with every gradient. A model in ``DistributedDataParallel``, which averages the
            gradients by itself, is passed as such.
        nonfinite: ``"raise"`` refuses a loss or a direction with NaN or infinity, and a matching term that outgrows the
            loss, before anything is changed (synchronizes once in a meta-iteration); ``"ignore"`` does not look.
        track_alignment: Measure the mean cosine of the gradients, too, and of each with the sum of those before it;
            costs one more vector of the size of the parameters. ``"pairs"`` measures the cosine of each pair of
            domains, too, and copies every gradient for it: S times the parameters.
        symmetric: Walk to and fro, for the gradient of the exact objective by the inner product without second
            derivatives.
        process_group: The ranks that train together, ``torch.distributed.group.WORLD`` for all of them; None for one
            process, or for a model of ``torch.distributed.fsdp.fully_shard``, whose ranks find each other. Parameters
            are then the same bits on all of them after every ``meta_step``, and so are the model's buffers: means over
            the ranks, the largest of integers. What is raised on one rank is raised on all.
        parallel: ``"walks"``: every rank walks by itself, through batches of its own in an order of its own, and the
            mean of the directions goes to the wrapped optimizer: one all-reduce of the size of the parameters. Two
            ranks that walk in opposite orders have the exact objective's direction in the mean. The model is the plain
            module; losses and all else in the report are of this rank's walk. ``"data"``: every rank has its part of
            the batch of each domain, and each gradient is averaged, as in ``DistributedDataParallel``, which the model
            may be in.

    At gamma 1 (and not symmetric) no gradient is taken at :math:`\theta` but the first: what ``meta_step`` reports is
    then measured along the walk, as Fish does.

    Raises:
        TypeError: If ``model`` is no module or ``process_group`` no process group.
        ValueError: If a setting is out of range; the message names it and shows the value.

    Example:
        >>> import torch
        >>> from torch_gradmatch import GradMatch, SmoothFish
        >>> w = torch.nn.Parameter(torch.tensor(0.0))
        >>> optimizer = GradMatch(torch.optim.SGD([w], lr=1.0), SmoothFish(gamma=2.0, inner_lr=0.1))
        >>> report = optimizer.meta_step(lambda target: (w - target).square() / 2, [1.0, 3.0])
        >>> w.grad  # G = -1, -3; along the walk -1, -2.9: -2 + 2 (-1.95 + 2)
        tensor(-1.9000)
        >>> _ = w.data.zero_()
        >>> optimizer = GradMatch(torch.optim.SGD([w], lr=1.0), SmoothFish(gamma=0.1, inner_lr=0.1, symmetric=True))
        >>> report = optimizer.meta_step(lambda target: (w - target).square() / 2, [1.0, 3.0])
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
        domains, over = len(given.batches), given.over
        weight = self._weight(domains)
        sums = given.sums(cosines=bool(self.track_alignment), pairs=self.track_alignment == "pairs")
        step = self.inner_lr / given.scale
        walk = Walk(given.loss_fn, given.batches, given.parameters, over, self.model, step)
        if over.reduces or walk.sharded:
            sums.reserve(walk.parameters)
        again: dict[int, Tensor] = {}
        try:
            if self._is_one_walk:
                gradient = walk.first(0)
                walk.begin()  # a lazy parameter is made by now
                sums.add(gradient)
                for index in range(1, domains):
                    walk.move(gradient)
                    del gradient  # before the next graph grows
                    gradient = walk.first(index)
                    sums.add(gradient)
                del gradient
                walk.end()
                after = walk.finish()
                total = sums.mean()
            else:
                begins = self._gradients_here(walk, sums)
                after = walk.finish()
                if given.checks and weight > 0 and given.is_due:
                    again[0] = walk.loss(0)
                total = self._walks(walk, sums.mean(weight=1 - weight), begins)
            losses = torch.stack([loss.to(walk.losses[0].device, walk.losses[0].dtype) for loss in walk.losses])
            measured = sums.result()
            losses, again = over.losses(losses, again)
            if given.checks:  # before it is reduced, so that the rank that is to blame says so
                self._check(walk, given, sums, losses, total.tensors(like=walk.shards), again)
            over.finish_walks(total)
            direction = total.tensors(like=walk.shards)
            buffers = None if after is None else dict(over.buffers(after))
        finally:
            walk.close()
            sums.reset(release=True)
        report = report_of(losses, measured, given.scale)
        objective = losses.mean() / given.scale - self._strength(domains) * measured.inner_product / given.scale**2
        pairs = zip(walk.parameters, direction, strict=True)
        return Direction([None if d is None else sharded_like(d, p) for p, d in pairs], objective, report, buffers)

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
        fish = fish_gamma(self.inner_lr, domains)
        return -fish if self._is_one_walk else self._weight(domains) * fish

    def _gradients_here(self, walk: Walk, sums: GradientAlignment) -> dict[int, Vector]:
        """Take in every domain's gradient where the parameters are; return those with which a walk begins."""
        domains, begins = len(walk.batches), {}
        for index in range(domains):
            gradient = walk.first(index, keep_buffers=self.symmetric)
            sums.add(gradient)
            if self.gamma > 0 and (index == 0 or (self.symmetric and index == domains - 1)):
                begins[index] = gradient
            del gradient
        return begins

    def _walks(self, walk: Walk, total: WeightedSum, begins: dict[int, Vector]) -> WeightedSum:
        """Add the mean gradient along one walk, or along one and its reverse."""
        domains = len(walk.batches)
        share = self._weight(domains) / domains / max(1, len(begins))
        for first in sorted(begins, reverse=True):
            walk.begin()
            gradient = begins.pop(first)
            total.add(gradient, share)
            for index in range(1, domains) if first == 0 else range(domains - 2, -1, -1):
                walk.move(gradient)
                del gradient
                gradient = walk.again(index)
                total.add(gradient, share)
            del gradient
            walk.end()
        return total

    def _check(
        self,
        walk: Walk,
        given: Evaluation,
        sums: GradientAlignment,
        losses: Tensor,
        direction: Vector,
        again: Mapping[int, Tensor],
    ) -> None:
        """Raise if something is not finite or diverges, or if a loss evaluated again is another; synchronizes once."""
        domains, scale, second = len(losses), given.scale, list(again.values())
        weight = self._weight(domains)
        if self.nonfinite == "raise":
            found = [sharded_like(d, p) for d, p in zip(direction, walk.parameters, strict=True) if d is not None]
            try:
                first, (norm, product, *_) = given.read_finite(losses, found, [sums.result().inner_product])
            except ValueError as error:
                infinite = torch.isfinite(losses).logical_not().nonzero()
                index = int(infinite[0]) if len(infinite) else None  # or it is another rank's
                if index is None or not self._is_one_walk or not walk.is_finite_at_start(index):
                    raise
                if scale != 1.0 and not math.isfinite(float(total_norm(found))):
                    return  # gradients that overflowed led the walk there: the scaler skips the step, the scale falls
                name = checks.name_of(index)
                raise self._diverged(f"the loss of {name} is {losses[index].item()} along it") from error
            if not math.isfinite(norm) and scale == 1.0:  # else the scaler skips the step
                raise self._diverged("the direction holds NaN or infinity")
            if math.isfinite(product) and not self._is_one_walk:
                remedy = f"Lower gamma (it is {self.gamma:g}) or inner_lr (it is {self.inner_lr:g})"
                matching = self._strength(domains) * product / scale**2
                given.refuse_explosion(sum(first) / domains / scale, matching, remedy)
        if second:
            # An error of the gradients counts in the direction with this weight.
            tolerance = math.sqrt(precision([*walk.parameters, losses])) / max(1.0, weight)
            check_repeats((losses.double() / scale).tolist(), {0: float(second[0]) / scale}, tolerance)
            # Later the walk may be lost because there is nothing left to learn; and else it is gamma that is small.
            if given.number < 4 and weight > 1 / 32:
                self._check_resolution(walk, sums, direction, weight)

    def _check_resolution(self, walk: Walk, sums: GradientAlignment, direction: Vector, weight: float) -> None:
        """Warn if the walks' gradients differ from those at their start by no more than rounding does."""
        pairs = zip(direction, sums.mean().tensors(like=walk.shards), walk.parameters, strict=True)
        means, differences = [], []
        for d, mean, p in pairs:
            if d is not None and mean is not None:
                means.append(sharded_like(mean, p))
                differences.append(sharded_like(d - mean, p))
        length, difference = float(total_norm(means)), float(total_norm(differences)) / weight
        if difference < min(32 * precision(means), 0.02) * length:
            warnings.warn(
                f"SmoothFish matches nothing: along the walk the mean gradient changes by {difference / length:.1g} of "
                f"its length, which is rounding. Raise inner_lr (it is {self.inner_lr:g}) or train in a wider "
                "dtype; if every loss is linear in the parameters, there is nothing to be matched",
                stacklevel=7,
            )

    def _diverged(self, how: str) -> RuntimeError:
        return RuntimeError(
            f"the inner walk of SmoothFish diverged: {how}, with inner_lr={self.inner_lr} and gamma={self.gamma}. "
            "Nothing was changed: lower inner_lr or gamma and go on"
        )
