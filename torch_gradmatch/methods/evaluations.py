"""The evaluations of one meta-iteration of SmoothFish, each at whatever point the walk has led to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from torch_gradmatch._checks import check_loss, check_reached
from torch_gradmatch._foreach import by_kind, is_sharded, local_of
from torch_gradmatch._random_state import RandomState, devices_of
from torch_gradmatch.gradients.flat import Vector
from torch_gradmatch.gradients.hvp import first_order
from torch_gradmatch.gradients.over_ranks import Alone
from torch_gradmatch.slow.saved_buffers import BufferSlots, SavedBuffers

__all__ = ["Evaluations"]


class Evaluations:
    """The evaluations of one meta-iteration, of which all of a domain see the same buffers and random numbers.

    Args:
        loss_fn: ``loss_fn(batch)`` returns a scalar.
        batches: One of each domain.
        parameters: Those to differentiate by and to move.
        model: Whose buffers to keep, if any.
        step: Of the walk.
        over: How ranks share them.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any], Tensor],
        batches: Sequence[Any],
        parameters: list[Tensor],
        model: nn.Module | None,
        step: float,
        over: Alone,
    ) -> None:
        self.parameters = parameters
        self.shards = [local_of(p) for p in parameters]
        self.sharded = any(map(is_sharded, parameters))
        self.over = over
        self.losses: list[Tensor] = []
        self._loss_fn = loss_fn
        self._batches = batches
        self._step = step
        self._slots = None if model is None else BufferSlots(model)
        self._randoms: list[RandomState] = []
        self._buffers: dict[int, SavedBuffers] = {}  # before a domain's first evaluation
        self._random_after: RandomState | None = None

    def first(self, index: int, *, keep_buffers: bool = False) -> Vector:
        """Evaluate a domain for the first time; the domains before it have been.

        Args:
            index: Which.
            keep_buffers: Whether it may be evaluated again in another order than that of the first time. Without this
                only the buffers of the first two domains are kept: the others find what those before them leave.

        Returns:
            Its gradient, one tensor for each parameter, None where the loss does not depend on it.
        """
        self._randoms.append(RandomState.capture(devices_of(self.parameters, self._batches[index])))
        if self._slots is not None and (index <= 1 or keep_buffers):
            self._buffers[index] = SavedBuffers(self._slots)
        loss, gradient = self._differentiate(index)
        check_reached(gradient, index)
        self.losses.append(loss)
        return self.over.gradient(gradient, self.parameters)

    def finish(self) -> SavedBuffers | None:
        """Note how one evaluation of each domain leaves random numbers and buffers.

        Returns:
            The buffers, if they are kept.
        """
        self._random_after = RandomState.capture(devices_of(self.parameters, list(self._batches)))
        return None if self._slots is None else SavedBuffers(self._slots)

    def again(self, index: int) -> Vector:
        """Evaluate a domain at the present parameters as the first time.

        Args:
            index: Which.

        Returns:
            Its gradient.
        """
        self._set_back(index)
        return self.over.gradient(self._differentiate(index)[1], self.parameters)

    def loss(self, index: int) -> Tensor:
        """Evaluate a domain's loss at the present parameters as the first time, without its gradient.

        Args:
            index: Which.

        Returns:
            The loss, detached.
        """
        self._set_back(index)
        if self.sharded:  # only a backward pass lets fully_shard go on to other parameters
            return self._differentiate(index)[0]
        return check_loss(self._loss_fn(self._batches[index]), index).detach()

    def is_finite_at_start(self, index: int) -> bool:
        """Return whether a loss that was not finite along the walk is so at its start.

        Args:
            index: Which.

        Returns:
            False also where this rank may not evaluate it by itself.
        """
        return not self.over.in_step and bool(torch.isfinite(self.loss(index)))

    @torch.no_grad()
    def move(self, gradient: Vector) -> None:
        """Take a step of SGD.

        Args:
            gradient: The last domain's.
        """
        for _, (parameters, gradients) in by_kind(self.parameters, gradient):
            torch._foreach_add_(parameters, gradients, alpha=-self._step)
        torch.clear_autocast_cache()  # around the whole meta_step it would hold the weights before the step

    def close(self) -> None:
        """Leave buffers as they were before and random numbers as one evaluation of each domain does."""
        if self._buffers:
            self._buffers[0].restore()
        if self._random_after is not None:
            self._random_after.restore()

    def _set_back(self, index: int) -> None:
        self._randoms[index].restore()
        if index in self._buffers:
            self._buffers[index].restore()

    def _differentiate(self, index: int) -> tuple[Tensor, list[Tensor | None]]:
        with record_function("GradMatch.domain_gradient"):
            return first_order(lambda _: check_loss(self._loss_fn(self._batches[index]), index), self.parameters)
