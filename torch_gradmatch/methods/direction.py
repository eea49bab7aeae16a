"""What the methods have in common that work out one direction and hand it to the wrapped optimizer as the gradient."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_gradmatch._checks import name_of
from torch_gradmatch._random_state import RandomState, devices_of
from torch_gradmatch.gradients.alignment import GradientAlignment
from torch_gradmatch.gradients.over_ranks import Alone
from torch_gradmatch.methods.base import MetaLoop, MetaStep, add_note
from torch_gradmatch.methods.first_call import first_call
from torch_gradmatch.methods.scaling import LossScaling
from torch_gradmatch.methods.together import SharedSettings, Together, mean_over
from torch_gradmatch.parallel.shards import total_norm
from torch_gradmatch.slow.saved_buffers import BufferSlots, ForwardBuffers, SavedBuffers

__all__ = ["Direction", "DirectionStep"]


@dataclass(frozen=True)
class Direction:
    """What one evaluation found.

    Attributes:
        gradient: For each parameter of the optimizer, what its ``.grad`` is to be; None for no step.
        objective: What the direction lowers, shape ().
        report: What was measured.
        buffers: The model's buffers after one forward pass of each domain, by name; None to leave them be.
    """

    gradient: list[Tensor | None]
    objective: Tensor
    report: MetaStep
    buffers: dict[str, Tensor] | None


class DirectionStep(MetaLoop):
    """A method without inner steps: every meta-iteration is one step of the wrapped optimizer.

    ``step`` is then a plain step of the wrapped optimizer on whatever gradients it finds: ordinary training, for
    instance to warm up.

    Args:
        optimizer: The wrapped optimizer.
        method: The settings, with the model whose buffers to write, if any.
    """

    def __init__(self, optimizer: Optimizer, method: SharedSettings) -> None:
        super().__init__(optimizer)
        self.model: nn.Module | None = method.model
        self._together = Together(optimizer, method)
        self._in_meta_step = False
        self._knows_buffers = False  # whether it was seen that ranks move none that nobody averages
        self._other_buffers = ForwardBuffers()  # of models that nobody told us of
        self._knows_loss_fn = False  # whether meta_step has called one before
        self._looked = 0  # how often it was asked whether a look is due

    @abstractmethod
    def evaluate(
        self,
        loss_fn: Callable[[Any], Tensor],
        batches: Sequence[Any],
        over: Alone,
        *,
        check: bool = True,
        scale: float = 1.0,
    ) -> Direction:
        """Work out the direction at the present parameters.

        Parameters, buffers and ``.grad`` are afterwards as before, also if it raises.

        Args:
            loss_fn: ``loss_fn(batch)`` returns a scalar.
            batches: One batch of each domain, at least one.
            over: How ranks share the work. What one of them raises in here, the caller has raised on all.
            check: Whether to refuse what is not finite or diverges, if the method does so.
            scale: What ``loss_fn`` multiplies each loss by. The direction is to be multiplied by it, too, and the
                report is not.

        Returns:
            The direction and what was measured.
        """

    @staticmethod
    def running_sums(last: GradientAlignment, *, cosines: bool, pairs: bool) -> GradientAlignment:
        """Return empty running sums, those of the last meta-iteration if they will do: their layout is made once.

        Args:
            last: Those of the last meta-iteration.
            cosines: Whether to measure the mean cosine.
            pairs: Whether to measure the cosines of pairs.

        Returns:
            The sums.
        """
        if (last.cosines, last.pairs) != (cosines, pairs):
            return GradientAlignment(cosines=cosines, pairs=pairs)
        last.reset()
        return last

    def is_due(self) -> bool:
        """Return whether now to look whether losses are the same twice; to be asked once in a meta-iteration.

        Returns:
            True in those number 1, 2, 4, 8 and so on: early, and never again for long.
        """
        self._looked += 1
        return self._looked & (self._looked - 1) == 0

    def trainable(self) -> list[Tensor]:
        """Return the optimizer's parameters that require a gradient.

        Returns:
            The parameters, in order.

        Raises:
            ValueError: If there is none.
        """
        trainable = [p for p in self.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError(
                "no parameter of the optimizer requires a gradient, so nothing can be trained: call requires_grad_() "
                "on those that should be"
            )
        return trainable

    def read_finite(
        self, losses: Tensor, gradient: Sequence[Tensor], *others: Tensor, over: Alone
    ) -> tuple[list[float], list[float]]:
        """Read what tells whether an evaluation went well, waiting for an accelerator once.

        Args:
            losses: Of the domains, shape (S,).
            gradient: The direction found.
            others: Anything else that is wanted.
            over: How ranks share the evaluation.

        Returns:
            The losses; and the norm of the gradient and the other numbers, finite or not.

        Raises:
            ValueError: If a loss is not finite.
        """
        wanted = [total_norm(gradient), *others]
        parts = [losses.double(), *(w.detach().to(losses.device).double().reshape(-1) for w in wanted)]
        values = torch.cat(parts).tolist()
        for index, loss in enumerate(values[: len(losses)]):
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of {name_of(index)} is {loss}: nothing was changed; look at that batch, or lower a "
                    "learning rate"
                )
        if over.in_step:
            over.ranks.agree()  # whose loss it was that made the gradients of all not finite
        return values[: len(losses)], values[len(losses) :]

    def step(self, closure: Callable[[], Any] | None, scaling: LossScaling | None = None) -> Any:
        """Take a plain step of the wrapped optimizer. See ``GradMatch.step``."""
        if not self._in_meta_step:
            self._together.forget()
        return self.wrapped_step(closure, scaling)

    def interpolate(self) -> None:
        """Refuse: there is no inner loop. See ``GradMatch.interpolate``."""
        raise RuntimeError(
            f"{type(self).__name__.removesuffix('Step')} has no inner loop to close by interpolate(): "
            "call meta_step(loss_fn, batches)"
        )

    def rollback(self) -> None:
        """Do nothing: there is no inner loop. See ``GradMatch.rollback``."""

    def meta_step(
        self, loss_fn: Callable[[Any], Tensor], batches: Sequence[Any], step: Callable[..., Any], scaler: Any = None
    ) -> MetaStep:
        """Carry out one meta-iteration. See ``GradMatch.meta_step``."""
        parameters = self.parameters()
        gradients = [p.grad for p in parameters]
        slots = None if self.model is None else BufferSlots(self.model)
        saved = None if slots is None else SavedBuffers(slots)
        # An optimizer that evaluates again has moved the parameters when the loss raises.
        values = [p.detach().clone() for p in parameters] if self.needs_closure else []
        random_state = RandomState.capture(devices_of(parameters, batches)) if self.needs_closure else None
        scale = 1.0
        if scaler is not None:
            scale = float(scaler.scale(torch.ones((), device=parameters[0].device)))
        stepping = False
        self._in_meta_step = True
        with self._other_buffers if saved is None else nullcontext():
            try:
                buffers = [] if slots is None else [b for b in slots.tensors() if b is not None]
                over = self._together.begin(parameters, buffers, len(batches), scale)
                found = self._evaluate_together(self._scaled(loss_fn, scaler), batches, over, scale=scale)
                self._assign(found.gradient)
                if slots is not None and found.buffers is not None:
                    slots.assign(found.buffers)
                stepping = True
                if random_state is None:
                    step()
                else:
                    step(self._closure(found, loss_fn, batches, over, random_state))
                if scaler is not None:
                    scaler.update()
            except BaseException as error:
                with torch.no_grad():
                    for p, value in zip(parameters, values, strict=False):
                        p.copy_(value)
                self._assign(gradients)
                (saved or self._other_buffers).restore()
                if stepping and not values:
                    kept = "; parameters and state are what the wrapped optimizer's step left when it failed"
                    add_note(error, f"meta_step() failed: as before the call are .grad and the buffers{kept}")
                elif stepping:
                    kept = "; the wrapped optimizer's state is what its step left when it failed"
                    add_note(error, f"meta_step() failed: as before the call are parameters, .grad and buffers{kept}")
                else:
                    add_note(error, "meta_step() failed: everything is as before the call")
                raise
            finally:
                self._in_meta_step = False
        self.last = found.report if over.names is None else replace(found.report, domains=over.names)
        return self.last

    def _evaluate_together(
        self, loss_fn: Callable[[Any], Tensor], batches: Sequence[Any], over: Alone, **settings: Any
    ) -> Direction:
        """Work out the direction and raise on all ranks what one of them raises."""
        with over.ranks.together(), self._together.without_reduction():
            found = self.evaluate(loss_fn, batches, over, **settings)
            if over.reduces and self.model is None and not self._knows_buffers:
                self._refuse_moved_buffers()
                self._knows_buffers = True
            return found

    def _refuse_moved_buffers(self) -> None:
        for buffer, before in self._other_buffers._saved:
            if not torch.equal(buffer, before):
                raise ValueError(
                    f"the evaluations of the ranks have moved a buffer of shape {tuple(buffer.shape)}, as BatchNorm's "
                    "statistics, each in its own way: pass the model, SmoothFish(..., model=model), whose buffers are "
                    "averaged"
                )

    def refuse(self, error: Exception) -> None:
        """Let other ranks know. See ``MetaLoop.refuse``."""
        self._together.ranks(self.parameters()).agree(error)

    def _scaled(self, loss_fn: Callable[[Any], Tensor], scaler: Any) -> Callable[[Any], Tensor]:
        """Let a loss function scale its losses, and look at its first call."""

        def call(batch: Any) -> Tensor:
            if self._knows_loss_fn:
                return loss_fn(batch)
            loss = first_call(loss_fn, batch, self.optimizer, self.parameters(), scales=scaler is not None)
            self._knows_loss_fn = True
            return loss

        return call if scaler is None else lambda batch: scaler.scale(call(batch))

    def _closure(
        self,
        found: Direction,
        loss_fn: Callable[[Any], Tensor],
        batches: Sequence[Any],
        over: Alone,
        random_state: RandomState,
    ) -> Callable[[], Tensor]:
        """Return a closure for an optimizer that evaluates more than once, always with the same random numbers.

        The first time it knows the answer, if the optimizer asks before it moves (SAM does not). A line search may look
        at points where nothing is finite, so they are not refused.
        """
        first = [found] if self.traits.asks_first else []

        def closure() -> Tensor:
            if first:
                now = first.pop()
            else:
                after = RandomState.capture(devices_of(self.parameters(), batches))
                random_state.restore()
                now = self._evaluate_together(loss_fn, batches, over, check=False)
                after.restore()
            self._assign(now.gradient)
            return mean_over(now.objective, over.ranks)  # by which all have to go on alike

        return closure

    def _assign(self, gradient: list[Tensor | None]) -> None:
        for parameter, g in zip(self.parameters(), gradient, strict=True):
            parameter.grad = g

    def state_dict(self, *, whole: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """Return nothing: nothing outlives a meta-iteration. See ``MetaLoop.state_dict``."""
        return {}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Accept: there is nothing to load. See ``MetaLoop.check_state_dict``."""

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: ARG002
        """Forget what the last meta-iteration measured. See ``MetaLoop.load_state_dict``."""
        self.last = None
        self._together.forget()
