r"""Functions of the domains' losses: ordinary training, V-REx and GroupDRO.

Each hands :math:`\sum_i w_i\,\partial L_i/\partial\theta` to the wrapped optimizer.

============ =========================================== ======================================================
method       objective                                   source
============ =========================================== ======================================================
``ERM``      :math:`\bar L = \frac1S\sum_i L_i`          Vapnik, 1998
``VREx``     :math:`\bar L + \frac\beta S\sum_i          Krueger et al., *Out-of-Distribution Generalization via
             (L_i - \bar L)^2`                           Risk Extrapolation*, ICML 2021, arXiv 2003.00688
``GroupDRO`` :math:`\sum_i q_i L_i`, with                Sagawa et al., *Distributionally Robust Neural Networks
             :math:`q_i \propto q_i\,e^{\eta L_i}`       for Group Shifts*, ICLR 2020, arXiv 1911.08731,
             before each step                            Algorithm 1
============ =========================================== ======================================================
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from torch_gradmatch import _checks as checks
from torch_gradmatch.gradients.alignment import accumulate
from torch_gradmatch.gradients.backward import gradient_of
from torch_gradmatch.methods.base import COMMON_CHECKS
from torch_gradmatch.methods.direction import Direction, Evaluation
from torch_gradmatch.methods.once import OnceMethod, domain_keys

__all__ = ["ERM", "GroupDRO", "VREx"]


class _Risk(OnceMethod):
    """A function of the losses, whose weights are known when all of them are: S graphs are alive until then."""

    @abstractmethod
    def weights(self, given: Evaluation, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivative of the objective by each loss, and the objective.

        Args:
            given: Batches and all else.
            losses: Without the scale, shape (S,).
        """

    def direction(self, given: Evaluation) -> Direction:
        """Work out the gradient of the objective. See ``DirectionMethod.direction``."""
        self.expect(given)
        graphs: list[Tensor] = []
        losses = self.losses(given, lambda _, loss: graphs.append(loss))
        weights, objective = self.weights(given, losses / given.scale)
        total: list[Tensor | None] = []
        weighed = [weight * loss for weight, loss in zip(weights.to(graphs[0].device), graphs, strict=True)]
        accumulate(total, gradient_of(torch.stack(weighed).sum(), given.parameters))
        return self.close(given, losses, total, objective)


@dataclass(repr=False)
class ERM(OnceMethod):
    r"""Ordinary training: the mean :math:`\frac1S\sum_i G_i` of the domains' gradients, one graph at a time.

    The baseline to compare with. Every domain counts the same, however many samples it has.

    Attributes:
        model: Pass the model if it is in ``DistributedDataParallel``, or to have its buffers (BatchNorm's statistics)
            restored where a meta-iteration fails.
        nonfinite: ``"raise"`` refuses a loss or direction with NaN or infinity before anything is changed (synchronizes
            once in a meta-iteration). ``"ignore"`` skips this check.
        process_group: Ranks that each have their part of the batch of every domain: one all-reduce of the gradient.
            None for one process, for a model in ``DistributedDataParallel`` and for ``fully_shard``.

    Raises:
        ValueError: If a setting is out of range; the message names it and shows the value.

    Example:
        >>> import torch
        >>> from torch_gradmatch import ERM, GradMatch
        >>> w = torch.nn.Parameter(torch.tensor(0.0))
        >>> optimizer = GradMatch(torch.optim.SGD([w], lr=0.5), ERM())
        >>> optimizer.meta_step(lambda target: (w - target).square(), [1.0, 3.0]).losses
        tensor([1., 9.])
        >>> w.item()
        2.0
    """

    model: nn.Module | None = None
    nonfinite: Literal["raise", "ignore"] = "raise"
    process_group: ProcessGroup | None = None

    checks: ClassVar[Mapping[str, Callable[[Any], Any]]] = COMMON_CHECKS
    fewest: ClassVar[int] = 1

    def direction(self, given: Evaluation) -> Direction:
        """Work out the mean gradient. See ``DirectionMethod.direction``."""
        self.expect(given)
        total: list[Tensor | None] = []

        def take(index: int, loss: Tensor) -> None:
            gradient = gradient_of(loss, given.parameters)
            checks.check_reached(gradient, index)
            accumulate(total, gradient, 1 / len(given.batches))

        losses = self.losses(given, take)
        return self.close(given, losses, total, losses.mean() / given.scale)


@dataclass(repr=False)
class VREx(_Risk):
    r"""Equal losses: the mean plus ``beta`` times the mean squared deviation over domains (V-REx).

    In DomainBed the first steps have another ``beta``, and the optimizer is made anew after them. Here
    ``optimizer.method.beta`` may be changed at any time. The domains are evaluated one by one, with S graphs alive.

    Attributes:
        beta: :math:`\beta \ge 0`, in units of 1/loss; 0 is ordinary training.
        model: As for :class:`~torch_gradmatch.ERM`.
        nonfinite: As for :class:`~torch_gradmatch.ERM`.
        process_group: As for :class:`~torch_gradmatch.ERM`.

    Raises:
        ValueError: If a setting is out of range; the message names it and shows the value.
    """

    beta: float = 1.0
    model: nn.Module | None = None
    nonfinite: Literal["raise", "ignore"] = "raise"
    process_group: ProcessGroup | None = None

    checks: ClassVar[Mapping[str, Callable[[Any], Any]]] = COMMON_CHECKS | {
        "beta": partial(checks.check_number, "beta", at_least=0),
    }

    def weights(self, given: Evaluation, losses: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        r"""Return :math:`(1 + 2\beta (L_i - \bar L)) / S`, and the objective. See ``_Risk.weights``."""
        deviations = losses - losses.mean()
        objective = losses.mean() + self.beta * deviations.square().mean()
        return (1 + 2 * self.beta * deviations) / len(losses), objective


@dataclass(repr=False)
class GroupDRO(_Risk):
    r"""The worst domain: weights :math:`q_i` that grow with the losses, :math:`q_i \propto q_i\,e^{\eta L_i}`.

    Every domain seen so far has a weight, by name where the batches have names (a mapping, or
    :func:`~torch_gradmatch.meta_batches` from a sampler), else by position. In a meta-iteration the weights of its
    domains are divided by their sum. They are in the optimizer's state dict, as logarithms. The domains are evaluated
    one by one, with S graphs alive.

    Attributes:
        eta: :math:`\eta \ge 0`, in units of 1/loss; 0 is ordinary training.
        model: As for :class:`~torch_gradmatch.ERM`.
        nonfinite: As for :class:`~torch_gradmatch.ERM`.
        process_group: As for :class:`~torch_gradmatch.ERM`.

    Raises:
        ValueError: If a setting is out of range; the message names it and shows the value.
    """

    eta: float = 0.01
    model: nn.Module | None = None
    nonfinite: Literal["raise", "ignore"] = "raise"
    process_group: ProcessGroup | None = None

    checks: ClassVar[Mapping[str, Callable[[Any], Any]]] = COMMON_CHECKS | {
        "eta": partial(checks.check_number, "eta", at_least=0),
    }
    keeps: ClassVar[str] = "the weights of the domains begin anew"

    def weights(self, given: Evaluation, losses: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`q`, updated by the losses, and :math:`q \cdot L`. See ``_Risk.weights``."""
        keys = [f"log weight of {key}" for key in domain_keys(given)]
        logs: dict[str, float] = {k: v for k, v in given.memory.items() if k.startswith("log weight of ")}
        mean = math.log(sum(map(math.exp, logs.values())) / len(logs)) if logs else 0.0
        now = [logs.get(key, mean) for key in keys]  # a domain that is new is of the mean weight
        if given.checks:  # not where a line search evaluates again
            now = [log + self.eta * loss for log, loss in zip(now, losses.tolist(), strict=True)]
            logs |= dict(zip(keys, now, strict=True))
            highest = max(logs.values())
            total = highest + math.log(sum(math.exp(log - highest) for log in logs.values()))
            if math.isfinite(total):  # else the losses are refused
                given.memory.update({key: log - total for key, log in logs.items()})
        q = torch.tensor(now, dtype=torch.float64).softmax(0).to(losses)
        return q, (q * losses).sum()
