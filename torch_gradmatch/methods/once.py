"""The base of methods that evaluate each domain once in a meta-iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.profiler import record_function

from torch_gradmatch import _checks as checks
from torch_gradmatch._checks import _DOMAINS as DOMAINS
from torch_gradmatch.gradients.engine import with_zeros
from torch_gradmatch.gradients.report import MetaStep
from torch_gradmatch.methods.direction import Direction, DirectionMethod, Evaluation
from torch_gradmatch.parallel.foreach import WIDE

__all__ = ["OnceMethod", "domain_keys"]


class OnceMethod(DirectionMethod):
    """A method that evaluates each domain's loss once in a meta-iteration, so that it need not be the same twice."""

    parallel: ClassVar[Literal["data"]] = "data"  # every rank has its part of the batch of each domain
    nonfinite: str
    model: nn.Module | None
    process_group: ProcessGroup | None

    def __post_init__(self) -> None:
        self.reduce_for_ddp()
        super().__post_init__()

    def losses(self, given: Evaluation, take: Callable[[int, Tensor], Any]) -> Tensor:
        """Evaluate each domain, in order.

        Args:
            given: Loss function, batches and all else.
            take: Called with the number of each domain and its loss.

        Returns:
            The losses, shape (S,), detached: the means over the ranks that share them.
        """
        found = []
        for index in range(len(given.batches)):
            with record_function("GradMatch.domain_loss"), checks.evaluating(index):
                loss = given.loss(index)
            found.append(loss.detach())
            take(index, loss)
            del loss  # before the next graph grows
        losses = torch.stack([loss.to(found[0].device, torch.float64) for loss in found])
        if given.sharing is not None:
            given.sharing.reduce_([losses], "data", "joined")
        return losses.to(found[0].dtype)

    def expect(self, given: Evaluation, *parts: list[tuple[Tensor, torch.dtype]]) -> None:
        """Say what is to be reduced where ranks share the batches.

        Args:
            given: As for :meth:`losses`.
            *parts: Tensors and dtypes of what is reduced between losses and direction, in order.
        """
        if given.sharing is not None:
            like = given.parameters[0]
            losses = [(like.new_zeros(len(given.batches)), torch.float64)]
            wide = [(p, WIDE.get(p.dtype, p.dtype)) for p in given.parameters]
            given.sharing.expect(losses, *parts, wide, numbers=len(wide))

    def close(
        self,
        given: Evaluation,
        losses: Tensor,
        total: list[Tensor | None],
        objective: Tensor,
        gamma: float | None = None,
        *,
        is_reduced: bool = False,
    ) -> Direction:
        """Check what was found and put it together.

        Args:
            given: As for :meth:`losses`.
            losses: Of the domains, as multiplied by the scale.
            total: The direction in wide dtypes, None where no loss depends on a parameter; this rank's.
            objective: What it lowers, without the scale.
            gamma: To report.
            is_reduced: Whether the direction is that of all ranks already.

        Returns:
            The direction.

        Raises:
            RuntimeError: If it is not finite.
        """
        checks.check_reached(total, 0)
        reached = [t is not None for t in total]
        if given.sharing is not None:
            if not is_reduced:
                given.sharing.reduce_direction_(with_zeros(total, given.parameters), given.parameters)
            reached = given.sharing.numbers(given.parameters[0], [], reached)[1]
        gradient = [
            t.to(p.dtype) if t is not None and is_reached else None
            for t, p, is_reached in zip(total, given.parameters, reached, strict=True)
        ]
        if given.checks and self.nonfinite == "raise":
            norm = given.read_finite(losses, [g for g in gradient if g is not None])[1][0]
            if not math.isfinite(norm) and given.scale == 1.0:  # else the scaler skips the step
                raise RuntimeError(
                    f"{type(self).__name__} diverged: the direction has norm {norm}. Nothing was changed: look at the "
                    "losses, or lower a learning rate"
                )
        report = MetaStep(losses / given.scale, gamma=gamma)
        return Direction(gradient, objective, report, None if given.places is None else given.places.save())


def domain_keys(given: Evaluation) -> list[str]:
    """Return a key for each domain: its name, or its position where domains have no names.

    Args:
        given: What a method is given.

    Returns:
        A text for each domain.

    Raises:
        ValueError: If there are no names and another number of domains than before.
    """
    names: Sequence[Any] | None = DOMAINS.get()
    if names is not None:
        return [repr(name) for name in names]
    number = float(len(given.batches))
    if given.memory.setdefault("number of domains", number) != number:
        raise ValueError(
            f"batches holds {len(given.batches)} domains without names, and earlier ones held "
            f"{given.memory['number of domains']:.0f}: this method remembers something of each domain, so pass a "
            "mapping by name, or batches by meta_batches() from a sampler"
        )
    return [f"number {index}" for index in range(len(given.batches))]
