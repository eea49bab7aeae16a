"""The first call of a loss function, at which it is seen whether it leaves to ``meta_step`` what is ``meta_step``'s.

``loss_fn(batch)`` runs the model and returns the loss. One that was a training step before, and still calls
``backward()``, ``step()`` or ``GradScaler.scale``, would have every gradient counted twice or the parameters moved
behind the method's back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer

from torch_gradmatch.methods.scaling import refuse_scaled
from torch_gradmatch.wrapped.members import members

__all__ = ["first_call"]


def first_call(
    loss_fn: Callable[[Any], Tensor], batch: Any, optimizer: Optimizer, parameters: Sequence[Tensor], *, scales: bool
) -> Tensor:
    """Call a loss function and refuse one that takes gradients or steps, or scales its loss, by itself.

    Args:
        loss_fn: ``loss_fn(batch)`` returns a scalar.
        batch: The first one.
        optimizer: The wrapped optimizer.
        parameters: Its parameters. Their ``.grad`` is afterwards what it was.
        scales: Whether ``meta_step`` was given the scaler; if not, the loss should not be scaled.

    Returns:
        What it returned.

    Raises:
        RuntimeError: If it called ``backward()`` or a ``step()``.
        ValueError: If it scaled the loss.
    """
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    hooks = []
    for member in members(optimizer).values():
        with suppress(AttributeError):  # a class that does without Optimizer.__init__ has no hooks
            hooks.append(member.register_step_pre_hook(_refuse_step))
    try:
        loss = loss_fn(batch)
        if any(p.grad is not None for p in parameters):
            raise RuntimeError(
                "loss_fn called backward(): meta_step() takes the gradient of what loss_fn(batch) returns by itself. "
                "Return the loss and leave out backward(), zero_grad() and step()"
            )
    finally:
        for hook in hooks:
            hook.remove()
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
    if not scales and isinstance(loss, Tensor):
        refuse_scaled(loss)
    return loss


def _refuse_step(*_: Any) -> NoReturn:
    raise RuntimeError(
        "loss_fn called step() of the optimizer: meta_step() takes every step by itself. Return the loss and leave out "
        "backward(), zero_grad() and step()"
    )
