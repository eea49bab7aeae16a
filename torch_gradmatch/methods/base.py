"""The interface between ``GradMatch`` and a method: settings, and the loop that carries them out.

A new method is one new file: a :class:`Method` with the settings, whose :meth:`Method.make_loop` makes a
:class:`MetaLoop` that carries them out for one optimizer.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from torch_gradmatch import _checks as checks
from torch_gradmatch.gradients.report import MetaStep
from torch_gradmatch.methods.scaling import LossScaling
from torch_gradmatch.parallel.ranks import check_process_group
from torch_gradmatch.parallel.together import Together, ranks_around
from torch_gradmatch.slow.inner_state import wants_closure

__all__ = ["COMMON_CHECKS", "MetaLoop", "Method", "evaluate", "shown_settings"]


class Method(ABC):
    """The settings of a method. It holds no state: one object may serve several optimizers.

    A setting may be changed between meta-iterations, ``optimizer.method.gamma = 0.5``. It is checked as at
    construction, by :attr:`checks`, and takes effect at the next meta-iteration. A refused value changes nothing.

    A method with a ``ProcessGroup`` cannot be pickled. A deepcopy has the same group.
    """

    checks: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    """For each setting a function that returns the value to keep, or raises."""

    if not TYPE_CHECKING:  # which would accept any name for the sake of this

        def __setattr__(self, name: str, value: object) -> None:
            settings = getattr(self, "__dataclass_fields__", {name: None})
            if name not in settings:
                raise AttributeError(
                    f"{type(self).__name__} has no setting {name!r}; its settings are {', '.join(settings)}"
                )
            check = self.checks.get(name)
            super().__setattr__(name, value if check is None else check(value))

    def __post_init__(self) -> None:
        group, model = getattr(self, "process_group", None), getattr(self, "model", None)
        if group is not None and model is None:
            raise ValueError(
                f"{type(self).__name__}(process_group=...) needs model=, whose buffers are averaged over the ranks"
            )

    def reduce_for_ddp(self) -> None:
        """Reduce gradients in one go, instead of ``DistributedDataParallel`` in each backward pass."""
        model: Any = getattr(self, "model", None)
        if getattr(self, "process_group", None) is None and isinstance(model, DistributedDataParallel):
            vars(self)["process_group"] = model.process_group

    def __repr__(self) -> str:
        shown = [f"{k}={v if k == 'model' else repr(v)}" for k, v in shown_settings(self).items()]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        memo.update((id(value), value) for value in vars(self).values() if isinstance(value, ProcessGroup))
        duplicate = memo[id(self)] = object.__new__(type(self))
        vars(duplicate).update(copy.deepcopy(vars(self), memo))
        return duplicate

    def __copy__(self) -> Method:
        duplicate = object.__new__(type(self))
        vars(duplicate).update(vars(self))
        return duplicate

    def __getstate__(self) -> dict[str, Any]:
        groups = [name for name, value in vars(self).items() if isinstance(value, ProcessGroup)]
        if groups:
            raise TypeError(
                f"a {type(self).__name__} with a {groups[0]} cannot be pickled, nor can an optimizer around it: save "
                "optimizer.state_dict(), which holds no settings, and build both anew"
            )
        return vars(self)

    @abstractmethod
    def make_loop(self, optimizer: Optimizer) -> MetaLoop:
        """Make the object that carries the method out for one optimizer.

        Args:
            optimizer: The wrapped optimizer.

        Returns:
            The loop.
        """


COMMON_CHECKS: dict[str, Callable[[Any], Any]] = {
    "model": checks.optional(partial(checks.check_model, "model")),
    "track_alignment": checks.check_tracking,
    "nonfinite": partial(checks.check_choice, "nonfinite", choices=("raise", "ignore")),
    "process_group": check_process_group,
}


def shown_settings(method: Any) -> dict[str, object]:
    """Return a method's settings by name, as a message or ``repr`` shows them: the same text on every rank.

    Args:
        method: A dataclass of settings.

    Returns:
        A model by its class, a function by its name, a group by how many ranks it has; without a group nothing of it.
    """
    shown = {field.name: getattr(method, field.name) for field in fields(method)}
    for name, value in shown.items():
        if isinstance(value, ProcessGroup):
            shown[name] = f"{value.size()} ranks"
        elif isinstance(value, tuple):
            shown[name] = f"{len(value)} parameters"
        elif callable(value):
            shown[name] = getattr(value, "__qualname__", type(value).__name__)
    if shown.get("process_group", "") is None:
        shown = {name: value for name, value in shown.items() if name not in ("process_group", "parallel")}
    return shown


class MetaLoop(ABC):
    """A method at work on one optimizer. Must survive deepcopy and pickle.

    Args:
        method: The settings.
        optimizer: The wrapped optimizer.

    Attributes:
        method: As given.
        optimizer: As given.
        inner_step: Number of inner steps since the last meta-update.
        domain: The label of the batch that the next step is on, if the training loop says it.
        last: What the last meta-iteration measured.
        needs_closure: Whether the wrapped optimizer's ``step`` needs a closure.
    """

    def __init__(self, method: Any, optimizer: Optimizer) -> None:
        self.method = method
        self.optimizer = optimizer
        self.inner_step = 0
        self.domain: str | int | None = None
        self.last: MetaStep | None = None
        self.needs_closure = wants_closure(optimizer)

    @cached_property
    def together(self) -> Together | None:
        """The ranks that train together, None on one process."""
        return ranks_around(self.parameters(), self.method)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "together"}  # it has process groups

    @property
    def evaluates_before(self) -> bool:
        """Whether the gradient is evaluated before ``step(closure)``, which moves the parameters first: SAM's kind."""
        return hasattr(self.optimizer, "first_step")

    def parameters(self) -> list[Tensor]:
        """Return all parameters of the wrapped optimizer in the order of its groups, each once."""
        return list(dict.fromkeys(p for group in self.optimizer.param_groups for p in group["params"]))

    def named_parameters(self) -> dict[Any, Tensor]:
        """Return all parameters by their names, if the groups have them, else by position: for checkpoints."""
        names = [name for group in self.optimizer.param_groups for name in group.get("param_names", ())]
        parameters = self.parameters()
        return dict(zip(names if len(names) == len(parameters) else range(len(parameters)), parameters, strict=True))

    def theta(self) -> dict[Tensor, Tensor]:
        """Return the slow weights by parameter after a meta-update: the parameters themselves without an inner loop."""
        return {p: p for p in self.parameters()}

    def wrapped_step(self, closure: Callable[[], Any] | None, scaling: LossScaling | None) -> Any:
        """Take one step of the wrapped optimizer.

        Args:
            closure: As for any optimizer.
            scaling: What a ``GradScaler`` says of the gradients, if one called.

        Returns:
            What the wrapped optimizer returned.

        Raises:
            RuntimeError: If a ``GradScaler`` passes a closure.
        """
        if scaling is not None:
            if closure is not None:
                raise RuntimeError("a GradScaler does not support closures: call scaler.step(optimizer) without one")
            return scaling.step(self.optimizer)
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def step(self, closure: Callable[[], Any] | None, scaling: LossScaling | None = None) -> Any:
        """Carry out ``GradMatch.step``: for a method without an inner loop, a plain step.

        Args:
            closure: As for any optimizer.
            scaling: As for :meth:`wrapped_step`.

        Returns:
            What the wrapped optimizer returned.
        """
        return self.wrapped_step(closure, scaling)

    def interpolate(self) -> None:
        """Carry out ``GradMatch.interpolate``.

        Raises:
            RuntimeError: If the method has no inner loop.
        """
        raise RuntimeError(
            f"{type(self.method).__name__} has no inner loop to interpolate: call meta_step(loss_fn, batches)"
        )

    def rollback(self) -> None:  # noqa: B027  most have no inner loop
        """Carry out ``GradMatch.rollback``."""

    def before_forward(self) -> None:  # noqa: B027
        """Take note that a forward pass comes next: gradients have been reset."""

    def slow_weights(self) -> AbstractContextManager[None]:
        """Carry out ``GradMatch.slow_weights``: nothing, for a method without an inner loop."""
        return nullcontext()

    @abstractmethod
    def meta_step(
        self, loss_fn: Callable[[Any], Tensor], batches: Sequence[Any], step: Callable[..., Any], scaler: Any = None
    ) -> MetaStep:
        """Carry out ``GradMatch.meta_step``.

        Args:
            loss_fn: ``loss_fn(batch)`` returns a scalar.
            batches: One batch of each domain, at least one.
            step: ``GradMatch.step``, so that hooks and schedulers see every step; or the scaler's step of it.
            scaler: A ``torch.amp.GradScaler``, or None.

        Returns:
            What was measured.
        """

    def refuse(self, error: Exception) -> None:
        """Let the other ranks know that this one cannot begin a meta-iteration, before the error is raised here.

        Args:
            error: The reason.
        """
        if self.together is not None:
            self.together.ranks.vote(error)

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs, as plain tensors and numbers, parameters by position."""
        return {}

    def check_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Raise ``ValueError`` if a state cannot be loaded; change nothing.

        Args:
            state: What :meth:`state_dict` once returned; empty if a checkpoint has nothing of ours.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: ARG002
        """Continue from a state that :meth:`check_state_dict` found good.

        Args:
            state: What :meth:`state_dict` once returned.
        """
        self.last = None


def evaluate(
    loss_fn: Callable[[Any], Tensor], batch: Any, index: int, parameters: Sequence[Tensor], *, again: bool | None = None
) -> Tensor:
    """Call a loss function and check what it returned; the parameters have no ``.grad`` before.

    Args:
        loss_fn: ``loss_fn(batch)`` returns a scalar.
        batch: The batch.
        index: Its position, for messages.
        parameters: Those that are trained.
        again: Whether the batch was evaluated before, for a note on an error; None if the caller notes it.

    Returns:
        The loss, shape ().

    Raises:
        RuntimeError: If ``loss_fn`` called ``backward()`` by itself.
    """
    try:
        returned = loss_fn(batch)
    except Exception as error:
        if again is not None:
            checks.note_batch(error, index, again=again)
        raise
    if any(p.grad is not None for p in parameters):
        raise RuntimeError(
            "loss_fn called backward(): meta_step() takes the gradient of what loss_fn(batch) returns by itself. "
            "Return the loss and leave out backward(), zero_grad() and step()"
        )
    return checks.check_loss(returned, index)
