"""What the methods have in common that work out one direction and hand it to the wrapped optimizer as the gradient."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torch_gradmatch._checks import add_note, check_num_domains
from torch_gradmatch.gradients.evaluation import Evaluation
from torch_gradmatch.gradients.random_state import RandomState, devices_of
from torch_gradmatch.gradients.report import MetaStep
from torch_gradmatch.gradients.sharing import check_ddp, over_ranks, without_reduction
from torch_gradmatch.methods.base import MetaLoop, Method, evaluate, shown_settings
from torch_gradmatch.parallel.foreach import clone_all, copy_all_
from torch_gradmatch.parallel.reduction import sums_of_numbers
from torch_gradmatch.slow.buffers import Buffers

__all__ = ["Direction", "DirectionLoop", "DirectionMethod"]


@dataclass(frozen=True)
class Direction:
    """What one evaluation found.

    Attributes:
        gradient: For each trained parameter, what its ``.grad`` is to be; None for no step.
        objective: What the direction lowers, shape ().
        report: What was measured.
        buffers: The model's buffers after one forward pass of each domain, by name; None to leave them be.
    """

    gradient: Sequence[Tensor | None]
    objective: Tensor
    report: MetaStep
    buffers: dict[str, Tensor] | None = None


class DirectionMethod(Method):
    """A method without inner steps: every meta-iteration is one step of the wrapped optimizer."""

    def start(self, optimizer: Optimizer) -> DirectionLoop:
        """Make the loop that carries these settings out for one optimizer.

        Args:
            optimizer: The wrapped optimizer.

        Returns:
            The loop.
        """
        return DirectionLoop(self, optimizer)

    def check(self, loop: DirectionLoop) -> None:
        """Raise if the settings do not fit the optimizer. Called at each meta-iteration and when it is wrapped.

        Args:
            loop: The method at work on it.
        """

    @abstractmethod
    def direction(self, given: Evaluation) -> Direction:
        """Work out the direction at the present parameters.

        Parameters and buffers are afterwards as before, also if it raises; ``.grad`` is None before.

        Args:
            given: Loss function, batches and all else.

        Returns:
            The direction and what was measured.
        """


class DirectionLoop(MetaLoop):
    """A method without inner steps at work on one optimizer.

    ``step`` is then a plain step of the wrapped optimizer on whatever gradients it finds: ordinary training, for
    instance to warm up.

    Args:
        method: The settings.
        optimizer: The wrapped optimizer.
    """

    def __init__(self, method: DirectionMethod, optimizer: Optimizer) -> None:
        super().__init__(method, optimizer)
        self.memory: dict[str, float] = {}
        self._number = 0
        self._kept: dict[str, Any] = {}
        self._writes = self.needs_closure  # whether a meta-iteration writes to parameters before the step
        self._check()

    def _check(self) -> None:
        name = type(self.method).__name__
        if any(group.get("maximize") for group in self.optimizer.param_groups):
            raise ValueError(
                f"maximize=True with {name}, which minimizes: build the optimizer with maximize=False and let loss_fn "
                "return the negative of what is to be maximized"
            )
        if self.method.process_group is not (self.together and self.together.given):
            raise RuntimeError(f"{name}.process_group was changed after the optimizer was wrapped: wrap it anew")
        if self.together is not None and self.together.averages_gradients:
            check_ddp(self.method, self.together)
        self.method.check(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": {}}

    def step(self, closure: Callable[[], Any] | None, scaling: Any = None) -> Any:
        """Take a plain step of the wrapped optimizer. See ``GradMatch.step``."""
        if self.together is not None:
            self.together.has_same(())  # ranks may go separate ways by it
        return self.wrapped_step(closure, scaling)

    def meta_step(
        self, loss_fn: Callable[[Any], Tensor], batches: Sequence[Any], step: Callable[..., Any], scaler: Any = None
    ) -> MetaStep:
        """Carry out one meta-iteration. See ``GradMatch.meta_step``."""
        parameters, model = self.parameters(), self.method.model
        every = list(dict.fromkeys([*parameters, *(() if model is None else model.parameters())]))
        gradients, places = [p.grad for p in every], None if model is None else Buffers(model)
        saved = None if places is None else places.save()
        made = [p for p in parameters if not is_lazy(p)]
        # A forward pass may write to parameters (max_norm), and so may a backward pass and an optimizer's line search.
        looks = (self._number + 1) & self._number == 0  # in meta-iterations number 1, 2, 4, 8 and so on
        values = clone_all(made) if looks or self._writes else []
        memory = dict(self.memory)
        buffers = "" if places is None else ", the model's buffers"
        restored = f"parameters, .grad{buffers} and the wrapped optimizer's state"
        for p in every:
            p.grad = None
        try:
            given = self._begin(loss_fn, batches, parameters, scaler, {} if places is None else places.named())
            again = self._again(given) if self.needs_closure else None
            found = self._find(given)
            self._writes |= looks and not all(map(torch.equal, made, values))
            self._assign(given, found)
            if places is not None and found.buffers is not None:
                places.assign(found.buffers)
            kept = "state is what its step left" if values else "state and the parameters are what its step left"
            restored = f"{'parameters, ' * bool(values)}.grad{buffers}; the wrapped optimizer's {kept}"
            step() if again is None else step(partial(again, [] if self.evaluates_before else [found]))
            if scaler is not None:
                scaler.update()
        except BaseException as error:
            if values:
                copy_all_(made, values)
            for p, gradient in zip(every, gradients, strict=True):
                p.grad = gradient
            if places is not None and saved is not None:
                places.restore(saved)
            self.memory = memory
            add_note(error, f"meta_step() failed: as before the call are {restored}")
            raise
        for p, gradient in zip(every[len(parameters) :], gradients[len(parameters) :], strict=True):
            p.grad = gradient  # of parameters that the optimizer does not train
        if self.together is not None:
            self.together.has_same(parameters)
        self._number += 1
        self.last = found.report if given.over.names is None else replace(found.report, domains=given.over.names)
        return self.last

    def _begin(
        self,
        loss_fn: Callable[[Any], Tensor],
        batches: Sequence[Any],
        parameters: list[Tensor],
        scaler: Any,
        buffers: Mapping[str, Tensor],
    ) -> Evaluation:
        """Agree with the other ranks to begin a meta-iteration."""
        trained, error = [p for p in parameters if p.requires_grad], None
        try:
            self._check()
        except (ValueError, RuntimeError) as raised:
            if self.together is None:
                raise
            error = raised  # for the other ranks
        scale = 1.0 if scaler is None else float(scaler.scale(torch.ones((), device=parameters[0].device)))
        facts = {**shown_settings(self.method), "scale of the losses": scale}
        given = (self.optimizer, parameters, buffers.values(), len(batches))
        over = over_ranks(self.together, self.method, facts, *given, error)
        if not trained:
            raise ValueError("no parameter of the optimizer requires a gradient: call requires_grad_() on some")
        check_num_domains(over.domains(len(batches)))
        positions = {id(batch): index for index, batch in reversed(list(enumerate(batches)))}

        def loss(batch: Any) -> Tensor:
            found = evaluate(loss_fn, batch, positions.get(id(batch), 0), trained)
            return found if scaler is None else scaler.scale(found)

        return Evaluation(loss, batches, trained, over, scale, True, self._number, self.memory, self._kept)

    def _find(self, given: Evaluation) -> Direction:
        """Work out the direction and raise on all ranks what one of them raises."""
        for p in self.parameters():
            p.grad = None
        with given.over.ranks.together(), without_reduction(self.method):
            found: Direction = self.method.direction(given)
            return found

    def _again(self, given: Evaluation) -> Callable[[list[Direction]], Tensor]:
        """Return a closure for an optimizer that evaluates more than once, always with the same random numbers.

        The first time it knows the answer, if the optimizer asks before it moves (SAM does not). A line search may look
        at points where nothing is finite, so they are not refused.
        """
        before = RandomState.capture(devices_of(given.parameters, given.batches))

        def closure(known: list[Direction]) -> Tensor:
            if known:
                now = known.pop()
            else:
                after = RandomState.capture(devices_of(given.parameters, given.batches))
                before.restore()
                now = self._find(replace(given, checks=False))
                after.restore()
            self._assign(given, now)
            objective = now.objective.detach()  # by which all ranks have to go on alike
            for group in given.over.ranks.groups:
                objective = (sums_of_numbers([objective], group)[0] / group.size()).to(objective.dtype)
            return objective

        return closure

    def _assign(self, given: Evaluation, found: Direction) -> None:
        for p in self.parameters():
            p.grad = None
        for p, gradient in zip(given.parameters, found.gradient, strict=True):
            p.grad = gradient

    def state_dict(self) -> dict[str, Any]:
        """Return what the method keeps from one meta-iteration to the next. See ``MetaLoop.state_dict``."""
        return {"memory": dict(self.memory), "number": self._number}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` if the state is malformed. See ``MetaLoop.check_state_dict``."""
        memory = state.get("memory", {})
        if not isinstance(memory, dict) or not all(isinstance(v, float | int) for v in memory.values()):
            raise ValueError(f"the state dict's 'memory' is malformed (got {memory!r:.80})")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was saved. See ``MetaLoop.load_state_dict``."""
        super().load_state_dict(state)
        if not state and getattr(self.method, "gamma", 0.0) is None:
            warnings.warn("the state dict has nothing of GradMatch: gamma is found anew", stacklevel=4)
        self.memory, self._number = dict(state.get("memory", {})), int(state.get("number", 0))
        if self.together is not None:
            self.together.has_same(())
