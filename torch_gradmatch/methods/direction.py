"""The base of methods that work out one direction and hand it to the wrapped optimizer as the gradient."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torch_gradmatch._checks import add_note, check_num_domains, refuse_loss
from torch_gradmatch.gradients.replay import RandomState, devices_of
from torch_gradmatch.gradients.report import MetaStep
from torch_gradmatch.methods.base import MetaLoop, Method, evaluate, shown_settings
from torch_gradmatch.parallel.foreach import clone_all, copy_all_, squared_norm
from torch_gradmatch.parallel.ranks import average_, is_told
from torch_gradmatch.parallel.sharing import Sharing, check_ddp, share, without_reduction
from torch_gradmatch.slow.buffers import Buffers

__all__ = ["Direction", "DirectionLoop", "DirectionMethod", "Evaluation"]

# Training diverges where the matching term is larger than the loss and has grown so many times beyond the larger of
# both at the first meta-iteration. Where it works it stays below a third of that: tests/methods/test_smooth_fish.py.
EXPLODED = 10.0


@dataclass
class Evaluation:
    """What a method is given to work out a direction.

    Attributes:
        loss: Returns the loss of a domain by its number, times ``scale``.
        of_batch: Returns the loss of any batch, times ``scale``.
        batches: One batch of each domain.
        parameters: The optimizer's parameters that require a gradient.
        sharing: How ranks share the evaluations; None on one process.
        places: The model's buffers, if they are followed.
        scale: The scale of a ``GradScaler``. The direction is multiplied by it, the report is not.
        checks: Whether to refuse what is not finite or diverges, if the method does so.
        number: Number of meta-iterations before.
        memory: Numbers and tensors that the method keeps from one meta-iteration to the next. They are in the state
            dict: replace tensors instead of writing to them.
        kept: What the method keeps in this process only.
    """

    loss: Callable[[int], Tensor]
    of_batch: Callable[[Any], Tensor]
    batches: Sequence[Any]
    parameters: list[Tensor]
    sharing: Sharing | None = None
    places: Buffers | None = None
    scale: float = 1.0
    checks: bool = True
    number: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def is_due(self) -> bool:
        """Whether this meta-iteration checks that losses are the same twice: number 1, 2, 4, 8 and so on."""
        return (self.number + 1) & self.number == 0

    def read_finite(
        self, losses: Tensor, gradient: Sequence[Tensor], others: Sequence[Tensor] = ()
    ) -> tuple[list[float], list[float]]:
        """Read losses, the norm of a gradient and other numbers; synchronizes once.

        Args:
            losses: Losses of the domains, shape (S,).
            gradient: The direction found.
            others: Other tensors to read.

        Returns:
            The losses; and the norm of the gradient and the other numbers, finite or not.

        Raises:
            ValueError: If a loss is not finite.
        """
        wanted = [squared_norm(gradient).sqrt(), *others]
        parts = [losses.double(), *(w.detach().to(losses.device).double().reshape(-1) for w in wanted)]
        values = torch.cat(parts).tolist()
        for index, loss in enumerate(values[: len(losses)]):
            if not math.isfinite(loss):
                refuse_loss(index, loss)
        return values[: len(losses)], values[len(losses) :]

    def refuse_explosion(self, loss: float, matching: float, remedy: str) -> None:
        """Raise if the matching term outgrows the mean loss: then training raises the gradients without bound."""
        first = self.memory.setdefault("first", max(abs(loss), abs(matching)))
        if matching > max(abs(loss), EXPLODED * first):
            raise RuntimeError(
                f"training diverges: the matching term is {matching:.3g} and the mean loss {loss:.3g} (the larger of "
                f"both was {first:.3g} in the first meta-iteration). Nothing was changed by this meta_step(), but "
                f"earlier ones may have led here, so go back to a checkpoint. {remedy}"
            )


@dataclass(frozen=True)
class Direction:
    """What one evaluation found.

    Attributes:
        gradient: The new ``.grad`` of each trained parameter; None for no step.
        objective: What the direction lowers, shape ().
        report: What was measured.
        buffers: The model's buffers after one forward pass of each domain; None to leave them as they are.
    """

    gradient: Sequence[Tensor | None]
    objective: Tensor
    report: MetaStep
    buffers: Any = None


class DirectionMethod(Method):
    """A method without inner steps: every meta-iteration is one step of the wrapped optimizer."""

    fewest: ClassVar[int] = 2
    """The least number of domains in a meta-iteration."""
    keeps: ClassVar[str] = ""
    """What is lost with the method's state, for a warning."""

    def make_loop(self, optimizer: Optimizer) -> DirectionLoop:
        """Make the loop that carries these settings out for one optimizer. See ``Method.make_loop``."""
        return DirectionLoop(self, optimizer)

    def check(self, loop: DirectionLoop) -> None:
        """Raise if the settings do not fit the optimizer of a loop; called when it is wrapped and where they change."""

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
    """

    def __init__(self, method: DirectionMethod, optimizer: Optimizer) -> None:
        super().__init__(method, optimizer)
        self.memory: dict[str, Any] = {}
        self._number = 0
        self._kept: dict[str, Any] = {}
        self._writes = self.needs_closure  # whether a meta-iteration writes to parameters before the step
        self._check()

    def _check(self) -> None:
        """Raise if the settings do not fit the optimizer."""
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
        self._checked = {**vars(self.method)}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": {}, "_checked": {}}

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
            given = self._begin(loss_fn, batches, parameters, scaler, places)
            again = self._again(given) if self.needs_closure else None
            found = self._find(given)
            self._writes |= looks and not all(map(torch.equal, made, values))
            self._assign(given, found)
            if places is not None and saved is not None and found.buffers is not None:
                if given.sharing is not None:
                    given.sharing.average_moved_(places.values(saved), places.values(found.buffers))
                places.restore(found.buffers)
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
        names = None if given.sharing is None else given.sharing.names
        self.last = found.report if names is None else replace(found.report, domains=names)
        return self.last

    def _begin(
        self,
        loss_fn: Callable[[Any], Tensor],
        batches: Sequence[Any],
        parameters: list[Tensor],
        scaler: Any,
        places: Buffers | None,
    ) -> Evaluation:
        """Begin a meta-iteration, if all ranks can."""
        trained, error = [p for p in parameters if p.requires_grad], None
        try:
            if self._checked != vars(self.method) or any(g.get("maximize") for g in self.optimizer.param_groups):
                self._check()
        except (ValueError, RuntimeError) as raised:
            if self.together is None:
                raise
            error = raised  # for the other ranks
        scale = 1.0 if scaler is None else float(scaler.scale(torch.ones((), device=parameters[0].device)))
        sharing, domains = None, len(batches)
        if self.together is not None:
            buffers = [] if places is None else places.named().values()
            facts = {
                **shown_settings(self.method),
                "scale of the losses": scale,
                "gamma found": self.memory.get("gamma"),
            }
            given = (self.optimizer, parameters, buffers, domains)
            sharing = share(self.together, self.method, facts, *given, error)
            domains = sharing.domains(domains)
        if not trained:
            raise ValueError("no parameter of the optimizer requires a gradient: call requires_grad_() on some")
        if domains < self.method.fewest:
            check_num_domains(domains, self.method.fewest)
        apply: Callable[[Tensor], Tensor] = (lambda loss: loss) if scaler is None else scaler.scale
        return Evaluation(
            lambda index: apply(evaluate(loss_fn, batches[index], index, trained)),
            lambda batch: apply(evaluate(loss_fn, batch, 0, trained)),
            batches, trained, sharing, places, scale, True, self._number, self.memory, self._kept,
        )  # fmt: skip

    def _find(self, given: Evaluation) -> Direction:
        """Work out the direction and raise on all ranks what one of them raises."""
        for p in self.parameters():
            p.grad = None
        found: Direction
        if given.sharing is None:
            found = self.method.direction(given)
            return found
        with given.sharing.ranks.together(), without_reduction(self.method):
            try:
                found = self.method.direction(given)
            except Exception as error:
                if not is_told(error):
                    given.sharing.drain()
                raise
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
            objective = now.objective.detach().clone()  # by which all ranks have to go on alike
            for group in () if given.sharing is None else given.sharing.ranks.groups:
                average_([objective], group)
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
        memory, number = (state.get("memory"), state.get("number")) if state else ({}, 0)
        if not isinstance(memory, dict) or not all(isinstance(v, float | int | Tensor) for v in memory.values()):
            raise ValueError(f"the state dict's 'memory' is missing or malformed (got {memory!r:.80})")
        if type(number) is not int or number < 0:
            raise ValueError(f"the state dict's 'number' is missing or malformed (got {number!r:.80})")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was saved. See ``MetaLoop.load_state_dict``."""
        super().load_state_dict(state)
        if not state and self.method.keeps:
            warnings.warn(f"the state dict has nothing of GradMatch: {self.method.keeps}", stacklevel=4)
        memory = state.get("memory", {}).items()
        self.memory = {key: value.clone() if isinstance(value, Tensor) else value for key, value in memory}
        self._number = state.get("number", 0)
        if self.together is not None:
            self.together.has_same(())
