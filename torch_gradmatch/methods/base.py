"""What a method of gradient matching is to ``GradMatch``: a small object with the policy of a meta-iteration.

A new method is one new file: a :class:`Method` with the settings, whose :meth:`Method.start` makes a
:class:`MetaLoop` that carries them out for one optimizer.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from torch_gradmatch.gradients.alignment import Alignment
from torch_gradmatch.gradients.rest import WithRest
from torch_gradmatch.methods.scaling import LossScaling
from torch_gradmatch.slow.finite import read
from torch_gradmatch.wrapped.traits import Traits, traits_of

__all__ = ["MetaLoop", "MetaStep", "Method", "add_note", "report_of"]


@dataclass(frozen=True)
class MetaStep(WithRest):
    """What one meta-iteration over S domains measured. Tensors: nothing waits for an accelerator until it is read.

    Attributes:
        losses: Loss of each domain's batch, shape (S,); None after a manual loop, which shows no losses.
        inner_product: Mean inner product of the domains' gradients over pairs, shape (), when tracked.
        cosine: Mean cosine of the domains' gradients over pairs, shape (), when tracked.
        grad_norms: Euclidean norm of each domain's gradient, shape (S,), when tracked.
        cosines: Cosine of the gradients of each pair of domains, shape (S, S), with ``track_alignment="pairs"``.
        domains: The domains' names in the order of all these, if they are known: ``meta_step`` was given a mapping, or
            a list by :func:`~torch_gradmatch.meta_batches` from a sampler, which knows its labels.
    """

    losses: Tensor | None = None
    inner_product: Tensor | None = None
    cosine: Tensor | None = None
    grad_norms: Tensor | None = None
    cosines: Tensor | None = None
    domains: tuple[Any, ...] | None = None
    _with_rest: tuple[Tensor, ...] | None = None

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Return what was measured as names and numbers, which any logger takes.

        Waits for an accelerator, once. The matrix :attr:`cosines` is not in it: that is a picture.

        Args:
            prefix: In front of every name, ``"train/"`` for instance.

        Returns:
            Means over the domains, ``loss`` and ``grad_norm``, and the mean over pairs ``inner_product`` and
            ``cosine``, as far as they were measured. If the domains' names are known also ``loss/NAME``,
            ``grad_norm/NAME`` and ``agreement_with_rest/NAME`` of each, the last where it is a number: without names a
            position stands for another domain each time.

        Example:
            >>> import torch
            >>> MetaStep(torch.tensor([1.0, 2.0]), domains=("north", "south")).scalars("train/")
            {'train/loss': 1.5, 'train/loss/north': 1.0, 'train/loss/south': 2.0}
        """
        found: dict[str, Tensor] = {}
        for name, values in (("loss", self.losses), ("grad_norm", self.grad_norms)):
            if values is not None:
                found[name] = values.mean()
                for domain, value in zip(self.domains or (), values, strict=False):
                    found[f"{name}/{domain}"] = value
        for name, mean in (("inner_product", self.inner_product), ("cosine", self.cosine)):
            if mean is not None:
                found[name] = mean
        if self.domains is not None and (with_rest := self.agreement_with_rest) is not None:
            for domain, value in zip(self.domains, with_rest, strict=False):
                found[f"agreement_with_rest/{domain}"] = value
        numbers = zip(found, read(list(found.values())), strict=True)
        return {
            f"{prefix}{name}": value
            for name, value in numbers
            if not (name.startswith("agreement_with_rest/") and math.isnan(value))
        }


def report_of(losses: Tensor | None, measured: Alignment, scale: float = 1.0) -> MetaStep:
    """Report what was measured, on losses that may have been multiplied by a number.

    Args:
        losses: Shape (S,), if they are known.
        measured: How well their gradients agree.
        scale: The number.

    Returns:
        The report of the losses themselves.
    """
    inner_product, grad_norms = measured.inner_product, measured.grad_norms
    if scale != 1.0:
        inner_product, grad_norms = inner_product / scale**2, grad_norms / scale
        losses = None if losses is None else losses / scale
    with_rest = measured._with_rest
    if scale != 1.0 and with_rest is not None:
        with_rest = tuple(numbers / scale**2 for numbers in with_rest)
    return MetaStep(losses, inner_product, measured.cosine, grad_norms, measured.cosines, _with_rest=with_rest)


class Method(ABC):
    """The settings of a method. Holds no state: one object may serve several optimizers.

    A setting may be changed between meta-iterations, ``optimizer.method.gamma = 0.5``. It is checked like at
    construction, by :attr:`checks`, and takes effect at the next meta-iteration; a refused value changes nothing.

    A ``ProcessGroup`` among the settings can be neither copied nor pickled. A deepcopy has the same one: it trains
    among the same processes. To pickle such a method is an error, because without its group it would be another method.
    """

    checks: ClassVar[Mapping[str, Callable[[Any], object]]] = {}
    """For each setting a function that raises if it is given a value that cannot be used."""

    if not TYPE_CHECKING:  # which would accept any name for the sake of this

        def __setattr__(self, name: str, value: object) -> None:
            check = self.checks.get(name)
            if check is not None:
                check(value)
            super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        duplicate = memo[id(self)] = copy.copy(self)
        for name, value in vars(self).items():
            vars(duplicate)[name] = value if isinstance(value, ProcessGroup) else copy.deepcopy(value, memo)
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
        has_stepped: Whether it is known that the wrapped optimizer has taken a step: then it has all state that it
            will have.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.inner_step = 0
        self.last: MetaStep | None = None
        self.has_stepped = False
        self._lists: list[tuple[list[Tensor], int]] = []  # the groups' own, and how long they were
        self._listed: list[Tensor] = []
        self._parameters: list[Tensor] = []

    @cached_property
    def traits(self) -> Traits:
        """What the wrapped optimizer is like; found out once."""
        return traits_of(self.optimizer)

    @property
    def needs_closure(self) -> bool:
        """Whether the wrapped optimizer's ``step`` cannot do without a closure."""
        return self.traits.needs_closure

    def parameters(self) -> list[Tensor]:
        """Return all parameters of the wrapped optimizer in the order of its groups, each once.

        Returns:
            The parameters; the same list as long as the groups hold the same ones.
        """
        listed = [p for group in self.optimizer.param_groups for p in group["params"]]
        if len(listed) != len(self._listed) or not all(map(is_, listed, self._listed)):
            self._listed, self._parameters = listed, list(dict.fromkeys(listed))
        self._lists = [(group["params"], len(group["params"])) for group in self.optimizer.param_groups]
        return self._parameters

    def parameters_in_loop(self) -> list[Tensor]:
        """Return the same in the middle of an inner loop, without a look at each parameter.

        That would take longer than all else that is done in an inner step. A group may have got another list or a
        longer one since; parameters that were exchanged in the same list are noticed with the next inner loop.

        Returns:
            The parameters.
        """
        groups, lists = self.optimizer.param_groups, self._lists
        if len(groups) == len(lists) and all(
            group["params"] is known and len(known) == length
            for group, (known, length) in zip(groups, lists, strict=True)
        ):
            return self._parameters
        return self.parameters()

    @abstractmethod
    def step(self, closure: Callable[[], Any] | None, scaling: LossScaling | None = None) -> Any:
        """Carry out ``GradMatch.step``.

        Args:
            closure: As for any optimizer.
            scaling: What a ``GradScaler`` says of the gradients, if it was one that called.

        Returns:
            What the wrapped optimizer returned.
        """

    def wrapped_step(self, closure: Callable[[], Any] | None, scaling: LossScaling | None) -> Any:
        """Take one step of the wrapped optimizer.

        Args:
            closure: As for any optimizer.
            scaling: As for :meth:`step`.

        Returns:
            What the wrapped optimizer returned.
        """
        if scaling is not None:
            return scaling.step(self.optimizer)
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def first_step(self, take: Callable[[], Any]) -> Any:
        """Carry out the first half of a step in two, as SAM's: to where the gradient is to be evaluated again.

        Args:
            take: Does so.

        Returns:
            What it returns.
        """
        return take()

    def second_step(self, take: Callable[[], Any]) -> Any:
        """Carry out the second half of a step in two, with which it counts.

        Args:
            take: Does so.

        Returns:
            What it returns.
        """
        return take()

    @abstractmethod
    def interpolate(self) -> None:
        """Carry out ``GradMatch.interpolate``."""

    @abstractmethod
    def rollback(self) -> None:
        """Carry out ``GradMatch.rollback``."""

    def before_forward(self) -> None:  # noqa: B027  most have nothing to do
        """Take note that a forward pass comes next: gradients have been reset."""

    def slow_weights(self) -> AbstractContextManager[None]:
        """Carry out ``GradMatch.slow_weights``: nothing, for a method without an inner loop.

        Returns:
            A context manager.
        """
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

    def refuse(self, error: Exception) -> None:  # noqa: B027  with one process there is nobody to tell
        """Let other ranks know that this one cannot begin a meta-iteration, before the error is raised here.

        Args:
            error: The reason.
        """

    @abstractmethod
    def state_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs, as plain tensors and numbers, parameters by position.

        Args:
            whole: Whether the state should have a tensor for all that it may have one for at other times.

        Returns:
            The state.
        """

    def entry(self, parameter: Tensor) -> dict[str, Tensor]:  # noqa: ARG002  most have nothing
        """Return what stands beside the wrapped optimizer's entries in ``GradMatch.state[parameter]``.

        Args:
            parameter: One of the optimizer's.

        Returns:
            Tensors by name, the same names as in a state dict.
        """
        return {}

    def is_own(self, key: str) -> bool:  # noqa: ARG002
        """Return whether an entry of ``GradMatch.state[parameter]`` is the method's by its name.

        Args:
            key: The name.

        Returns:
            False for those of the wrapped optimizer.
        """
        return False

    def is_kept(self, key: str) -> bool:  # noqa: ARG002
        """Return whether such an entry is kept in the state that :meth:`Method.start` was given.

        Args:
            key: The name.

        Returns:
            False for one that is made of what is kept elsewhere.
        """
        return False

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


def add_note(error: BaseException, text: str) -> None:
    """Let an error say something more, below its own message.

    Args:
        error: Any error; it stays the same object.
        text: What to say.
    """
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(text)
    else:
        vars(error)["__notes__"] = [*getattr(error, "__notes__", ()), text]
