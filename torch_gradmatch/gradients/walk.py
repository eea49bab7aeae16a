"""The evaluations of one meta-iteration of SmoothFish, each at whatever point the walk has led to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from torch_gradmatch._checks import check_reached, evaluating
from torch_gradmatch.gradients.flat import Vector
from torch_gradmatch.gradients.hvp import first_order
from torch_gradmatch.gradients.over_ranks import Alone
from torch_gradmatch.gradients.random_state import RandomState, devices_of
from torch_gradmatch.parallel.foreach import by_kind, clone_all, copy_all_, is_sharded, local_of
from torch_gradmatch.slow.buffers import Buffers

__all__ = ["Walk"]


class Walk:
    """The evaluations of one meta-iteration, of which all of a domain see the same buffers and random numbers.

    Args:
        loss_fn: Returns the loss of a batch.
        batches: One of each domain.
        parameters: Those to differentiate by and to move.
        over: How ranks share the evaluations.
        model: Whose buffers to keep, if any.
        step: Of the walk.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any], Tensor],
        batches: Sequence[Any],
        parameters: list[Tensor],
        over: Alone,
        model: nn.Module | None,
        step: float,
    ) -> None:
        self.parameters = parameters
        self.shards = [local_of(p) for p in self.parameters]
        self.sharded = any(map(is_sharded, self.parameters))
        self.batches = batches
        self.over = over
        self.losses: list[Tensor] = []
        self._loss_fn = loss_fn
        self._step = step
        self._places = None if model is None else Buffers(model)
        self._randoms: list[RandomState] = []
        self._buffers: dict[int, list[Any]] = {}  # before a domain's first evaluation
        self._random_after: RandomState | None = None
        self._start: list[Tensor] | None = None

    def first(self, index: int, *, keep_buffers: bool = False) -> Vector:
        """Evaluate a domain for the first time; the domains before it have been.

        Args:
            index: Which.
            keep_buffers: Whether it may be evaluated again in another order than that of the first time. Without this
                only the buffers of the first two domains are kept: the others find what those before them leave.

        Returns:
            Its gradient, one tensor for each parameter, None where the loss does not depend on it.
        """
        self._randoms.append(RandomState.capture(devices_of(self.parameters, self.batches[index])))
        if self._places is not None and (index <= 1 or keep_buffers):
            self._buffers[index] = self._places.save()
        loss, gradient = self._differentiate(index)
        check_reached(gradient, index)
        self.losses.append(loss)
        return self.over.gradient(gradient, self.parameters)

    def finish(self) -> dict[str, Tensor] | None:
        """Note how one evaluation of each domain leaves random numbers and buffers.

        Returns:
            Copies of the buffers by name, if they are kept.
        """
        self._random_after = RandomState.capture(devices_of(self.parameters, list(self.batches)))
        if self._places is None:
            return None
        now = self._places.named()
        return dict(zip(now, clone_all(list(now.values())), strict=True))

    def again(self, index: int) -> Vector:
        """Evaluate a domain at the present parameters as the first time.

        Args:
            index: Which.

        Returns:
            Its gradient.
        """
        return self.over.gradient(self._once_more(index)[1], self.parameters)

    def loss(self, index: int) -> Tensor:
        """Evaluate a domain's loss at the present parameters as the first time.

        Args:
            index: Which.

        Returns:
            The loss, detached.
        """
        if self.over.in_step:  # only a backward pass lets DistributedDataParallel and fully_shard go on
            return self._once_more(index)[0]
        return self._once_more(index, gradients=False)[0]

    def _once_more(self, index: int, *, gradients: bool = True) -> tuple[Tensor, Sequence[Tensor | None]]:
        self._randoms[index].restore()
        if self._places is not None and index in self._buffers:
            self._places.restore(self._buffers[index])
        if gradients:
            return self._differentiate(index, again=True)
        with evaluating(index, again=True):
            return self._loss_fn(self.batches[index]).detach(), ()

    def is_finite_at_start(self, index: int) -> bool:
        """Return whether a loss that was not finite along the walk is so at its start.

        Args:
            index: Which.

        Returns:
            False also where this rank may not evaluate it by itself.
        """
        return not self.over.in_step and bool(torch.isfinite(self.loss(index)))

    def begin(self) -> None:
        """Begin a walk here."""
        self._start = clone_all(self.parameters)

    @torch.no_grad()
    def move(self, gradient: Vector) -> None:
        """Take a step of SGD.

        Args:
            gradient: The last domain's.
        """
        for _, (parameters, gradients) in by_kind(self.parameters, gradient):
            torch._foreach_add_(parameters, gradients, alpha=-self._step)
        torch.clear_autocast_cache()  # around the whole meta_step it would hold the weights before the step

    def end(self) -> None:
        """Return to where the walk began, if there is one."""
        if self._start is not None:
            copy_all_(self.parameters, self._start)
            self._start = None
            torch.clear_autocast_cache()

    def close(self) -> None:
        """Leave buffers as they were before and random numbers as one evaluation of each domain does."""
        self.end()
        if self._places is not None and self._buffers:
            self._places.restore(self._buffers[0])
        if self._random_after is not None:
            self._random_after.restore()

    def _differentiate(self, index: int, *, again: bool = False) -> tuple[Tensor, Sequence[Tensor | None]]:
        with record_function("GradMatch.domain_gradient"), evaluating(index, again=again):
            return first_order(lambda _: self._loss_fn(self.batches[index]), self.parameters)
