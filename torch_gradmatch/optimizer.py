"""``GradMatch``: gradient matching as a drop-in wrapper around any ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_gradmatch._checks import add_note, check_batches, naming
from torch_gradmatch.gradients.report import MetaStep
from torch_gradmatch.methods.base import Method
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.methods.scaling import LossScaling
from torch_gradmatch.several import SeveralOptimizers, check_optimizer
from torch_gradmatch.slow.average import Average, RunningAverage
from torch_gradmatch.slow.inner_state import shown_name
from torch_gradmatch.wrapper import Wrapper, is_initialization

__all__ = ["GradMatch", "MetaStep"]

MethodT = TypeVar("MethodT", bound=Method)
_NO_CLOSURE: Any = object()  # step() was called without one, and not by torch.distributed.checkpoint


class GradMatch(Wrapper, Generic[MethodT]):
    r"""Wraps an optimizer so that training prefers updates on which the domains' gradients agree.

    It is a ``torch.optim.Optimizer``: learning-rate schedulers, ``GradScaler``, hooks, closures, deepcopy and pickle
    work. Parameter groups, defaults and state *are* the wrapped optimizer's; nothing is added to them. Wrapping does
    not build, step or copy the optimizer. With :class:`~torch_gradmatch.Fish` the model holds the fast weights
    :math:`\tilde\theta` in an inner loop and the slow weights :math:`\theta` between two. The other methods hand the
    wrapped optimizer one gradient in each meta-iteration.

    Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937.

    The wrapped optimizer's own methods, such as schedule-free's ``train`` and ``eval``, can be called on this object.

    Args:
        optimizer: The optimizer to wrap: any class, freshly built or in the middle of training. A list of optimizers
            over disjoint parameters is wrapped as one: a step is one step of each. A learning-rate scheduler takes
            this object or any of them.
        method: How to match gradients; ``Fish()`` if left out.
        average: Keep the mean of the weights for :meth:`averaged_weights`; None to keep none.

    Attributes:
        optimizer: The wrapped optimizer; for a list, one object that holds it as ``optimizer.optimizers``.
        method: The method. Its settings may be changed between meta-iterations, ``optimizer.method.meta_lr = 0.1``.
            ``method`` and ``optimizer`` cannot be replaced.
        average: As given.

    Raises:
        TypeError: If ``optimizer`` is no ``torch.optim.Optimizer`` or is wrapped already, ``method`` is no method
            object or ``average`` no :class:`~torch_gradmatch.Average`.
        ValueError: If the method's model does not hold the optimizer's parameters, two optimizers hold the same
            parameter, or the method cannot serve an optimizer of this class; the message says what can.

    Example:
        >>> import torch
        >>> from torch_gradmatch import Fish, GradMatch
        >>> model = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = GradMatch(sgd, Fish(meta_lr=0.5, inner_steps=2))
        >>> for x in torch.eye(2):  # one batch of each of two domains
        ...     optimizer.zero_grad()
        ...     model(x).square().sum().backward()
        ...     optimizer.step()  # the second also interpolates
        >>> optimizer.inner_step
        0
    """

    # A GradScaler is to call step() also for gradients that overflowed, so that the domain counts as visited.
    _step_supports_amp_scaling = True

    @overload
    def __init__(
        self: GradMatch[Fish], optimizer: Optimizer | Sequence[Optimizer], *, average: Average | None = None
    ) -> None: ...

    @overload
    def __init__(
        self, optimizer: Optimizer | Sequence[Optimizer], method: MethodT, average: Average | None = None
    ) -> None: ...

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        method: Method | None = None,
        average: Average | None = None,
    ) -> None:
        listed: Sequence[Any] = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
        if any(isinstance(one, GradMatch) for one in listed):
            raise TypeError("optimizer is a GradMatch already: wrap plain optimizers once")
        method = Fish() if method is None else method
        if not isinstance(method, Method):
            kind = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
            raise TypeError(f"method should be a method object such as Fish() (got {kind})")
        if average is not None and not isinstance(average, Average):
            raise TypeError(f"average should be an Average() or None (got {average!r:.80})")
        optimizer = SeveralOptimizers(listed) if listed is optimizer else check_optimizer("optimizer", optimizer)
        super().__init__(optimizer)
        self.method = cast("MethodT", method)
        self._loop = method.make_loop(optimizer)
        self.average = average
        self._average = None if average is None else RunningAverage(average, getattr(method, "model", None))

    if not TYPE_CHECKING:  # which would accept any name for the sake of this

        def __setattr__(self, name: str, value: Any) -> None:
            if name in ("optimizer", "method", "average") and name in vars(self):
                raise AttributeError(
                    f"{name} cannot be replaced: change a setting, optimizer.method.meta_lr = 0.1, or wrap the "
                    "optimizer anew"
                )
            super().__setattr__(name, value)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters.

        Args:
            set_to_none: As in ``torch.optim.Optimizer.zero_grad``.
        """
        self.optimizer.zero_grad(set_to_none=set_to_none)
        if self._average is None or not self._average.is_shown:
            self._loop.before_forward()

    @property
    def inner_step(self) -> int:
        """Number of inner steps taken since the last meta-update."""
        return self._loop.inner_step

    @property
    def domain(self) -> str | int | None:
        """Label of the next step's batch, set by the loop if :attr:`last_meta_step` is to name the domains.

        :func:`~torch_gradmatch.domain_batches` knows it. A step forgets it. A string, an integer or None.
        """
        return self._loop.domain

    @domain.setter
    def domain(self, label: str | int | None) -> None:
        if label is not None and not isinstance(label, str | Integral):
            raise TypeError(f"domain should be a label, a string or an integer, or None (got {label!r:.80})")
        self._loop.domain = label

    @property
    def last_meta_step(self) -> MetaStep | None:
        """What the last meta-iteration measured, or None before the first."""
        return self._loop.last

    def step(self, closure: Callable[[], Any] | None = _NO_CLOSURE) -> Any:
        """Take one step of the wrapped optimizer; under ``Fish(inner_steps=S)`` every S-th also interpolates.

        Under the other methods this is ordinary training; :meth:`meta_step` takes their steps. A step that raises does
        not count. A step that a ``torch.amp.GradScaler`` skips, because gradients overflowed, counts: the domain had
        its turn.

        Args:
            closure: Re-evaluates the model and returns the loss; passed on to the wrapped optimizer.

        Returns:
            What the wrapped optimizer's ``step`` returns, the loss if there is a closure.

        Raises:
            RuntimeError: If the inner loop diverged (see ``Fish.nonfinite``): the slow weights are intact; or if a
                ``GradScaler`` passes a closure.
        """
        if closure is _NO_CLOSURE:
            closure = None
        elif closure is None and is_initialization(self.optimizer):
            if self._loop.needs_closure:
                raise RuntimeError(
                    f"{shown_name(self.optimizer)} needs a closure, so torch.distributed.checkpoint cannot make its "
                    "state by a step without gradients: take a step first, or save optimizer.state_dict() by torch.save"
                )
            return self.optimizer.step()
        if self._average is not None:
            self._average.check("step()")
        told = vars(self)  # which is where a GradScaler tells
        scaling = LossScaling(told.get("grad_scale"), told["found_inf"]) if "found_inf" in told else None
        try:
            loss = self._loop.step(closure, scaling)
        except BaseException:
            if scaling is not None:  # the GradScaler will not take them away
                told.pop("found_inf", None)
                told.pop("grad_scale", None)
            raise
        finally:
            torch.clear_autocast_cache()  # autocast around several steps would go on with the weights of the first
        if self._average is not None and not self._loop.inner_step:
            self._average.take(self._loop.theta())
        return loss

    def interpolate(self) -> None:
        r"""Close the inner loop: :math:`\theta \leftarrow \theta + \epsilon(\tilde\theta - \theta)`.

        Raises:
            RuntimeError: If no inner step was taken since the last interpolation, the inner loop diverged, or the
                method has none.
        """
        if self._average is not None:
            self._average.check("interpolate()")
        self._loop.interpolate()
        torch.clear_autocast_cache()
        if self._average is not None:
            self._average.take(self._loop.theta())

    def rollback(self) -> None:
        """Abandon the inner loop: parameters (and buffers, if followed) return to the slow weights, exactly.

        Between two inner loops there is nothing to undo and nothing happens. The wrapped optimizer keeps its state;
        if that holds NaN or infinity it is reset, with a warning, to what it was when it was wrapped, since no later
        step could recover.
        """
        if self._average is not None:
            self._average.check("rollback()")
        self._loop.rollback()
        torch.clear_autocast_cache()

    def slow_weights(self) -> AbstractContextManager[None]:
        r"""Let parameters and followed buffers hold the slow weights :math:`\theta` inside a ``with`` block.

        Use it to evaluate, export, average or save a model in the middle of an inner loop, where the model holds the
        fast weights. After the block it holds them again, bit for bit, also if the block raises. Changes to parameters
        inside the block are discarded. Between two inner loops, and under methods without one, the block changes
        nothing and discards nothing. It takes the memory of one more copy of the parameters. ``step``, ``meta_step``,
        ``interpolate``, ``rollback`` and ``state_dict`` raise ``RuntimeError`` inside the block.

        Returns:
            A context manager.

        Example:
            >>> import torch
            >>> from torch_gradmatch import Fish, GradMatch
            >>> w = torch.nn.Parameter(torch.ones(()))
            >>> optimizer = GradMatch(torch.optim.SGD([w], lr=0.5), Fish(inner_steps=2))
            >>> w.square().backward()
            >>> optimizer.step()
            >>> with optimizer.slow_weights():
            ...     inside = w.item()
            >>> inside, w.item()
            (1.0, 0.0)
        """
        return self._loop.slow_weights()

    def averaged_weights(self) -> AbstractContextManager[None]:
        r"""Let parameters and followed buffers hold their average :math:`\bar\theta` inside a ``with`` block.

        Use it to evaluate, export or save the averaged model, also in the middle of an inner loop. After the block
        parameters and buffers are what they were, bit for bit, also if the block raises. Changes to parameters inside
        the block are discarded. Changes to buffers are kept with the average: if the model has BatchNorm, call
        ``torch.optim.swa_utils.update_bn(loader, model)`` inside, then evaluate. Only the buffers of the method's
        ``model`` are followed. The block takes the memory of one more copy of the parameters. ``step``, ``meta_step``,
        ``interpolate``, ``rollback`` and ``state_dict`` raise ``RuntimeError`` inside.

        Returns:
            A context manager.

        Raises:
            RuntimeError: If the optimizer keeps no average, or (on entering the block) it has not begun.
        """
        if self._average is None:
            raise RuntimeError("this optimizer keeps no average: GradMatch(optimizer, method, average=Average())")
        return self._average.shown()

    def meta_step(
        self, loss_fn: Callable[[Any], Tensor], batches: Iterable[Any] | Mapping[Any, Any], scaler: Any = None
    ) -> MetaStep:
        """Carry out one whole meta-iteration by the chosen method.

        If anything raises, parameters, the buffers of the method's ``model``, ``.grad`` and the wrapped optimizer's
        state are restored to what they were before the call. A note on the error says what was restored. There are two
        exceptions. Methods other than ``Fish`` take the wrapped optimizer's step last; if that step raises, its state
        stays where the step left it, and so do the parameters unless it takes a closure. ``Fish`` with
        ``nonfinite="ignore"`` keeps no copy of that state.

        Args:
            loss_fn: ``loss_fn(batch)`` calls the model as usual and returns a scalar.
            batches: One batch of each of S domains, in the form that ``loss_fn`` takes. A mapping names the domains, in
                its order. Lists from :func:`~torch_gradmatch.meta_batches` know the names. Messages and the result then
                use them.
            scaler: A ``torch.amp.GradScaler`` for training in half precision. Losses are scaled, gradients unscaled,
                steps on gradients that overflowed are skipped, and the scale is updated. ``loss_fn`` returns the plain
                loss.

        Returns:
            What was measured.

        Raises:
            RuntimeError: In the middle of an inner loop; if training diverges; under ``IDGM`` if an operation lacks the
                derivative needed; if ``loss_fn`` calls ``backward()``; if ``scaler`` is given and the wrapped optimizer
                needs a closure. The message says what to do.
            TypeError: If ``loss_fn`` cannot be called, a loss is not a tensor, or ``scaler`` no ``GradScaler``.
            ValueError: If there are no batches (under ``IDGM`` and ``SmoothFish``: fewer than two), or not as many as
                ``Fish(inner_steps=S)`` says, or a loss is not a scalar, not finite or depends on no parameter.

        Example:
            >>> import torch
            >>> from torch_gradmatch import Fish, GradMatch
            >>> w = torch.nn.Parameter(torch.zeros(()))
            >>> method = Fish(meta_lr=1.0, track_alignment=True)
            >>> optimizer = GradMatch(torch.optim.SGD([w], lr=0.1), method)
            >>> report = optimizer.meta_step(lambda target: (w - target).square(), [1.0, 2.0])
            >>> report.losses, report.grad_norms
            (tensor([1.0000, 3.2400]), tensor([2.0000, 3.6000]))
        """
        try:
            if self._average is not None:
                self._average.check("meta_step()")
            domains, listed = check_batches(loss_fn, batches)
            step = self.step if scaler is None else self._scaled_step(scaler)
        except (TypeError, ValueError, RuntimeError) as error:
            self._loop.refuse(error)
            raise
        try:
            names = nullcontext() if domains is None else naming(domains)
            with names, nullcontext() if self._average is None else self._average.meta_step():
                report = self._loop.meta_step(loss_fn, listed, step, scaler)
        except Exception as error:
            if isinstance(batches, Mapping) and any("loss_fn was called" in n for n in getattr(error, "__notes__", ())):
                add_note(error, f"batches was a mapping, whose keys {list(batches)!r:.80} were taken for the domains")
            raise
        finally:
            torch.clear_autocast_cache()
        if domains is not None and report.domains is None:
            report = self._loop.last = replace(report, domains=domains)
        if self._average is not None:
            self._average.take(self._loop.theta())
        return report

    def _scaled_step(self, scaler: Any) -> Callable[..., Any]:
        """Return the step that a scaler takes, or raise if it cannot."""
        if not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler should be None or a torch.amp.GradScaler (got {type(scaler).__name__})")
        if self._loop.needs_closure:
            raise RuntimeError(
                f"{shown_name(self.optimizer)} needs a closure, which a GradScaler does not support: train it "
                "without a scaler"
            )
        return partial(scaler.step, self)

    def __repr__(self) -> str:
        average = "" if self.average is None else f",\n{self.average!r}"
        return f"GradMatch(\n{self.optimizer!r},\n{self.method!r}{average}\n)"
