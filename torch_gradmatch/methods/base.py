"""What a method of gradient matching is to ``GradMatch``: a small object with the policy of a meta-iteration.

A new method is one new file: a :class:`Method` with the settings, whose :meth:`Method.start` makes a
:class:`MetaLoop` that carries them out for one optimizer.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["MetaLoop", "MetaStep", "Method", "needs_closure"]


@dataclass(frozen=True)
class MetaStep:
    """What one meta-iteration over S domains measured. Tensors: nothing waits for an accelerator until it is read.

    Attributes:
        losses: Loss of each domain's batch, shape (S,); None after a manual loop, which shows no losses.
        inner_product: Mean inner product of the domains' gradients over pairs, shape (), when tracked.
        cosine: Mean cosine of the domains' gradients over pairs, shape (), when tracked.
        grad_norms: Euclidean norm of each domain's gradient, shape (S,), when tracked.
    """

    losses: Tensor | None = None
    inner_product: Tensor | None = None
    cosine: Tensor | None = None
    grad_norms: Tensor | None = None


class Method(ABC):
    """The settings of a method. Holds no state: one object may serve several optimizers."""

    @abstractmethod
    def start(self, optimizer: Optimizer, state: MutableMapping[Tensor, Any]) -> MetaLoop:
        """Make the object that carries the method out for one optimizer.

        Args:
            optimizer: The wrapped optimizer.
            state: ``GradMatch.state``: the place for tensors that belong to a parameter.

        Returns:
            The loop.
        """


class MetaLoop(ABC):
    """A method at work on one optimizer. Must survive deepcopy and pickle.

    Attributes:
        optimizer: The wrapped optimizer.
        inner_step: Number of inner steps since the last meta-update.
        last: What the last meta-iteration measured.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.inner_step = 0
        self.last: MetaStep | None = None

    def parameters(self) -> list[Tensor]:
        """Return all parameters of the wrapped optimizer in the order of its groups, each once.

        Returns:
            The parameters.
        """
        return list(dict.fromkeys(p for group in self.optimizer.param_groups for p in group["params"]))

    @abstractmethod
    def step(self, closure: Callable[[], Any] | None) -> Any:
        """Carry out ``GradMatch.step``.

        Args:
            closure: As for any optimizer.

        Returns:
            What the wrapped optimizer returned.
        """

    @abstractmethod
    def interpolate(self) -> None:
        """Carry out ``GradMatch.interpolate``."""

    @abstractmethod
    def rollback(self) -> None:
        """Carry out ``GradMatch.rollback``."""

    @abstractmethod
    def meta_step(self, loss_fn: Callable[[Any], Tensor], batches: Sequence[Any], step: Callable[..., Any]) -> MetaStep:
        """Carry out ``GradMatch.meta_step``.

        Args:
            loss_fn: ``loss_fn(batch)`` returns a scalar.
            batches: One batch of each domain, at least one.
            step: ``GradMatch.step``, so that hooks and schedulers see every step.

        Returns:
            What was measured.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs, as plain tensors and numbers, parameters by position.

        Returns:
            The state.
        """

    @abstractmethod
    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise if a state cannot be loaded; change nothing.

        Args:
            state: What :meth:`state_dict` once returned.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`check_state_dict` found good.

        Args:
            state: What :meth:`state_dict` once returned.
        """


def needs_closure(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's ``step`` cannot do without a closure, as LBFGS's.

    Args:
        optimizer: The wrapped optimizer.

    Returns:
        Whether.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
