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
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from torch_gradmatch._checks import (
    check_bool,
    check_choice,
    check_model,
    check_num_domains,
    check_number,
    check_tracking,
    name_of,
    optional,
)
from torch_gradmatch.gradients.agreement import fish_gamma
from torch_gradmatch.gradients.alignment import GradientAlignment
from torch_gradmatch.gradients.flat import Vector
from torch_gradmatch.gradients.over_ranks import Alone
from torch_gradmatch.gradients.repeats import check_repeats, precision
from torch_gradmatch.methods.base import Method, report_of
from torch_gradmatch.methods.direction import Direction, DirectionStep
from torch_gradmatch.methods.evaluations import Evaluations
from torch_gradmatch.methods.together import shown_settings
from torch_gradmatch.parallel.ranks import check_process_group
from torch_gradmatch.parallel.shards import sharded_like, total_norm
from torch_gradmatch.slow.saved_buffers import ForwardBuffers
from torch_gradmatch.slow.weights import SlowWeights

__all__ = ["SmoothFish"]


@dataclass
class SmoothFish(Method):
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
            meta-iteration; without it with every gradient.
        nonfinite: ``"raise"`` refuses a loss or a direction with NaN or infinity before anything is changed (waits for
            an accelerator once in a meta-iteration); ``"ignore"`` does not look.
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

    checks: ClassVar[Mapping[str, Callable[[Any], object]]] = {
        "gamma": partial(check_number, "gamma", at_least=0),
        "inner_lr": partial(check_number, "inner_lr", above=0),
        "model": optional(partial(check_model, "model")),
        "track_alignment": check_tracking,
        "nonfinite": partial(check_choice, "nonfinite", choices=("raise", "ignore")),
        "symmetric": partial(check_bool, "symmetric"),
        "process_group": check_process_group,
        "parallel": partial(check_choice, "parallel", choices=("walks", "data")),
    }

    def __repr__(self) -> str:
        return f"SmoothFish({', '.join(f'{name}={value!r}' for name, value in shown_settings(self).items())})"

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
        super().__init__(optimizer, method)
        self.method = method
        self.weights = SlowWeights(state)
        self._sums = GradientAlignment(cosines=bool(method.track_alignment))

    def evaluate(
        self,
        loss_fn: Callable[[Any], Tensor],
        batches: Sequence[Any],
        over: Alone,
        *,
        check: bool = True,
        scale: float = 1.0,
    ) -> Direction:
        """Work out the direction. See ``DirectionStep.evaluate``."""
        domains, method = check_num_domains(len(batches)), self.method
        fish = fish_gamma(method.inner_lr, domains)
        walks_only = method.gamma == 1 and not method.symmetric
        # The direction is G_bar + weight (mean gradient of the walks - G_bar).
        weight = method.gamma / fish if method.symmetric else method.gamma
        tracked = method.track_alignment
        sums = self._sums = self.running_sums(self._sums, cosines=bool(tracked), pairs=tracked == "pairs")
        run = Evaluations(loss_fn, batches, self.trainable(), self.model, method.inner_lr / scale, over)
        if over.reduces or run.sharded:
            sums.reserve(run.parameters)
        again: Tensor | None = None
        try:
            if walks_only:
                self.weights.snapshot(run.parameters, None)
                gradient = run.first(0)
                sums.add(gradient)
                for index in range(1, domains):
                    run.move(gradient)
                    del gradient  # before the next graph grows
                    gradient = run.first(index)
                    sums.add(gradient)
                del gradient
                after = run.finish()
                self.weights.rollback()
                total = sums.mean()
            else:
                walks = [range(domains), range(domains - 1, -1, -1)] if method.symmetric else [range(domains)]
                begins = {}  # the first gradient of each walk, which is that at theta
                for index in range(domains):
                    gradient = run.first(index, keep_buffers=method.symmetric)
                    sums.add(gradient)
                    if weight > 0 and any(walk[0] == index for walk in walks):
                        begins[index] = gradient
                    del gradient
                after = run.finish()
                if check and weight > 0 and self.is_due():
                    with ForwardBuffers() if self.model is None else nullcontext() as others:
                        again = run.loss(0)
                        if others is not None:
                            others.restore()
                total = sums.mean(weight=1 - weight)
                for walk in reversed(walks) if weight > 0 else ():
                    self.weights.snapshot(run.parameters, None)
                    gradient = begins.pop(walk[0])
                    total.add(gradient, weight / (len(walks) * domains))
                    for index in walk[1:]:
                        run.move(gradient)
                        del gradient
                        gradient = run.again(index)
                        total.add(gradient, weight / (len(walks) * domains))
                    del gradient
                    self.weights.rollback()
            # Later the walk may be lost because there is nothing left to learn; and else it is gamma that is small.
            if again is not None and self._looked <= 4 and weight > 1 / 32:
                self._check_resolution(total.tensors(like=run.shards), run.parameters, weight)
            measured = sums.result()
            losses = torch.stack([loss.to(run.losses[0].device, run.losses[0].dtype) for loss in run.losses])
            losses, losses_again = over.losses(losses, {} if again is None else {0: again})
            direction = total.tensors(like=run.shards)
            if check:  # before it is reduced, so that the rank that is to blame says so
                self._check(run, losses, direction, losses_again, weight, scale)
            if over.finish_walks(total):
                direction = total.tensors(like=run.shards)
            sums.reset(release=True)
            buffers = None if after is None else dict(over.buffers(after.values()))
        finally:
            self.weights.rollback()
            torch.clear_autocast_cache()
            run.close()
        report = report_of(losses, measured, scale)
        assert report.losses is not None
        assert report.inner_product is not None
        # What the direction lowers, to first order and in the mean over orders: the mean loss less gamma GIP. Those
        # along a walk are themselves lower by twice as much.
        strength = -fish if walks_only else weight * fish
        pairs = zip(run.parameters, direction, strict=True)
        found = {p: None if d is None else sharded_like(d, p) for p, d in pairs}
        return Direction(
            gradient=[found.get(p) for p in self.parameters()],
            objective=report.losses.mean() - strength * report.inner_product.to(losses.device),
            report=report,
            buffers=buffers,
        )

    def _check_resolution(self, direction: Vector, parameters: Sequence[Tensor], weight: float) -> None:
        """Warn if the walks' gradients differ from those at their start by no more than rounding does.

        Args:
            direction: What this rank found.
            parameters: Of which it holds all or a shard.
            weight: Of the difference in it.
        """
        domains, found, lengths, differences, like = len(self._sums), [], [], [], []
        for index, d in enumerate(direction):  # one at a time: a whole vector would be the most memory of all
            if d is not None:
                mean = self._sums.total(index, like=d) / domains
                found.append(d)
                like.append(parameters[index])
                lengths.append(torch.linalg.vector_norm(mean))
                differences.append(torch.linalg.vector_norm(d - mean))
        length, difference = float(total_norm(lengths, like)), float(total_norm(differences, like)) / weight
        if difference < min(32 * precision(found), 0.02) * length:
            warnings.warn(
                f"SmoothFish matches nothing: along the walk the mean gradient changes by {difference / length:.1g} of "
                f"its length, which is rounding. Raise inner_lr (it is {self.method.inner_lr:g}) or train in a wider "
                "dtype; if every loss is linear in the parameters, there is nothing to be matched",
                stacklevel=2,
            )

    def _check(
        self,
        run: Evaluations,
        losses: Tensor,
        direction: Vector,
        again: Mapping[int, Tensor],
        weight: float,
        scale: float,
    ) -> None:
        """Raise if something is not finite, or if a loss evaluated again is another. Waits once for an accelerator."""
        method = self.method
        if method.nonfinite == "raise":
            try:
                found = [sharded_like(d, p) for d, p in zip(direction, run.parameters, strict=True) if d is not None]
                norm, *second = self.read_finite(losses, found, *again.values(), over=run.over)[1]
            except ValueError as error:
                infinite = torch.isfinite(losses).logical_not().nonzero()
                index = int(infinite[0]) if len(infinite) else None  # or it is another rank's
                if index is not None and method.gamma == 1 and not method.symmetric and run.is_finite_at_start(index):
                    raise self._diverged(f"the loss of {name_of(index)} is {losses[index].item()} along it") from error
                raise
            if not math.isfinite(norm) and scale == 1.0:  # else the scaler skips the step
                raise self._diverged("the direction holds NaN or infinity")
        else:
            second = [float(loss) for loss in again.values()]
        if second:
            # An error of the gradients counts in the direction with this weight.
            tolerance = math.sqrt(precision([*run.parameters, losses])) / max(1.0, weight)
            check_repeats((losses.double() / scale).tolist(), {0: second[0] / scale}, tolerance)

    def _diverged(self, how: str) -> RuntimeError:
        return RuntimeError(
            f"the inner walk of SmoothFish diverged: {how}, with inner_lr={self.method.inner_lr} and "
            f"gamma={self.method.gamma}. Nothing was changed: lower inner_lr or gamma and go on"
        )
