r"""Fish: gradient matching with first derivatives only.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, Algorithm 1:

.. math::

    \tilde\theta &\leftarrow \theta \\
    \tilde\theta &\leftarrow \text{inner optimizer step on } L_i \quad \text{for each domain } i = 1, \ldots, S \\
    \theta &\leftarrow \theta + \epsilon\,(\tilde\theta - \theta)

Difference from the official code (github.com/YugeTen/fish): there the configured ``meta_lr`` is divided by the number
of inner steps before use; here ``meta_lr`` is :math:`\epsilon` itself, as in the paper's algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.profiler import record_function

from torch_gradmatch import _checks as checks
from torch_gradmatch.gradients.report import MetaStep
from torch_gradmatch.methods.base import COMMON_CHECKS, Method, evaluate, shown_settings
from torch_gradmatch.methods.inner_loop import InnerLoop
from torch_gradmatch.parallel.ranks import is_told

__all__ = ["Fish"]


@dataclass(repr=False)
class Fish(Method):
    r"""Walk through the domains with the inner optimizer, then move a fraction of the way (Algorithm 1).

    For plain SGD inner steps of size :math:`\alpha`, averaged over the order of the domains, the walk follows
    :math:`\bar G - \frac{\alpha(S-1)}{4}\,\partial\mathrm{GIP}/\partial\theta + O(\alpha^2)`: besides lowering the mean
    loss it raises the inner product of the domains' gradients.

    Attributes:
        meta_lr: :math:`\epsilon` in (0, 1], the fraction of the inner walk that is kept.
        inner_steps: S, the number of inner steps after which ``step`` interpolates by itself; None to call
            ``interpolate`` or ``meta_step`` instead.
        inner_state: ``"carry"`` keeps the inner optimizer's state (momenta, step counts) from one meta-iteration to
            the next. ``"reset"`` returns the state at the start of each to what it was when the optimizer was wrapped;
            hyperparameters stay as they are. A function is called with the wrapped optimizer at the start of every
            inner loop, to reset what it chooses.
        model: Pass the model to interpolate its buffers (BatchNorm's statistics), too. In a loop of your own call
            ``zero_grad()`` before the first forward pass: changes to buffers before it are not part of the inner loop.
            A model in ``DistributedDataParallel`` is passed in its wrapper.
        buffers: With ``model``: ``"interpolate"`` moves floating-point buffers by the same interpolation as the
            parameters, as the official code does. ``"latest"`` keeps the values at the end of the inner loop. Integer
            buffers always take the latest value.
        meta_dtype: Keep slow weights in this dtype where it is wider than the parameter's. Without it a small
            ``meta_lr`` does not move bf16 or fp16 parameters at all.
        track_alignment: Measure how well the inner gradients agree: ``GradMatch.last_meta_step`` and the result of
            ``meta_step`` then hold inner product, cosine and norms. It costs two vectors of the size of the parameters.
            ``"pairs"`` also measures the cosine of each pair of domains, and of each domain with the sum of the others.
            It copies every gradient: S times the parameters. Each gradient is taken at the fast weights of its step. An
            inner loop that is resumed in the middle reports nothing.
        nonfinite: ``"raise"`` refuses to interpolate towards parameters or buffers that hold NaN or infinity, so the
            slow weights survive a diverged inner loop (synchronizes once in a meta-iteration). In ``meta_step`` it also
            refuses a loss that is not finite before the step on it (synchronizes once more for each domain), and keeps
            a copy of the wrapped optimizer's state, to restore it if the meta-iteration fails. ``"ignore"`` skips
            these checks, never synchronizes and keeps no such copy. On several ranks all raise what one finds, and
            losses are checked at the end of the inner loop.
        process_group: Ranks that each take a walk of their own (other batches, another order) from the same
            parameters. The meta-update goes to the mean of the walks,
            :math:`\theta \leftarrow \theta + \epsilon(\frac1R\sum_r\tilde\theta_r - \theta)`. It takes one
            all-reduce of the parameters in a meta-iteration, and leaves the same bits on every rank. It needs
            ``inner_state="reset"`` and ``model``, whose buffers are averaged. The model must not be in
            ``DistributedDataParallel``. The report is of this rank's own walk. ``torch.distributed.group.WORLD`` for
            all ranks; None for one process, for ``DistributedDataParallel`` and for ``fully_shard``, which average
            gradients in every step.

    All settings but ``model`` and ``process_group`` may be changed; a change takes effect at the next meta-iteration.

    Raises:
        TypeError: If ``model`` is no module or ``process_group`` no process group.
        ValueError: If a setting is out of range; the message names it and shows the value.

    Example:
        >>> Fish(meta_lr=0.1, inner_steps=15, inner_state="reset").inner_steps
        15
        >>> Fish(meta_lr=2.0)
        Traceback (most recent call last):
            ...
        ValueError: meta_lr should be a number in (0, 1] (got 2.0)
    """

    meta_lr: float = 0.5
    inner_steps: int | None = None
    inner_state: Literal["carry", "reset"] | Callable[[Optimizer], object] = "carry"
    model: nn.Module | None = None
    buffers: Literal["interpolate", "latest"] = "interpolate"
    meta_dtype: torch.dtype | None = None
    track_alignment: bool | Literal["pairs"] = False
    nonfinite: Literal["raise", "ignore"] = "raise"
    process_group: ProcessGroup | None = None

    checks: ClassVar[Mapping[str, Callable[[Any], Any]]] = COMMON_CHECKS | {
        "meta_lr": partial(checks.check_fraction, "meta_lr"),
        "inner_steps": checks.optional(partial(checks.check_int, "inner_steps", at_least=1)),
        "inner_state": partial(
            checks.check_choice, "inner_state", choices=("carry", "reset"), or_else=", or a function"
        ),
        "buffers": partial(checks.check_choice, "buffers", choices=("interpolate", "latest")),
        "meta_dtype": checks.optional(partial(checks.check_floating_dtype, "meta_dtype")),
    }

    def __post_init__(self) -> None:
        if self.process_group is not None and self.inner_state != "reset":
            raise ValueError(
                'Fish(process_group=...) needs inner_state="reset": the state that one rank\'s walk leaves is not that '
                f"of the others (got {self.inner_state!r:.80})"
            )
        super().__post_init__()

    def make_loop(self, optimizer: Optimizer) -> FishLoop:
        """Make the loop that carries these settings out for one optimizer.

        Args:
            optimizer: The wrapped optimizer.

        Returns:
            The loop.
        """
        return FishLoop(self, optimizer)


class FishLoop(InnerLoop):
    """Fish at work on one optimizer."""

    def meta_step(
        self, loss_fn: Callable[[Any], Tensor], batches: Sequence[Any], step: Callable[..., Any], scaler: Any = None
    ) -> MetaStep:
        """Carry out one meta-iteration. See ``GradMatch.meta_step``."""
        parameters, method = self.parameters(), self.method
        gradients = [p.grad for p in parameters]
        losses: list[Tensor] = []
        self._begin_meta_step(len(batches), parameters)
        try:
            if method.nonfinite == "raise":
                self.inner_state.save(resets=method.inner_state == "reset")
            self._losses, self._warns = losses, False
            self.slow.take(parameters, method.meta_dtype)  # theta~ <- theta
            self._open(parameters)
            for index, batch in enumerate(batches):
                differentiate = partial(self._differentiate, loss_fn, batch, index, losses, scaler)
                differentiate()
                if self.needs_closure:
                    known = not self.evaluates_before
                    step(_known_first(differentiate, losses[-1], parameters) if known else differentiate)
                else:
                    step()  # theta~ <- inner optimizer step on L_i
                if scaler is not None:
                    scaler.update()
            if self.slow.is_open:
                self.interpolate()  # theta <- theta + eps (theta~ - theta)
            self.last = replace(self.last or MetaStep(), losses=torch.stack(losses))
        except BaseException as error:
            self._undo(error, parameters, gradients)
            raise
        finally:
            self._losses = self.inner_state.saved = None
        return self.last

    def _begin_meta_step(self, batches: int, parameters: list[Tensor]) -> None:
        """Raise on all ranks if a meta-iteration cannot begin."""
        together, inner_steps = self.together, self.method.inner_steps
        facts: dict[str, object] = {}
        if together is not None:
            facts = together.facts(self.optimizer, parameters, shown_settings(self.method))
        with nullcontext() if together is None else together.ranks.together({**facts, "number of batches": batches}):
            self._check_settings("meta_step()")
            if self.slow.is_open:
                raise RuntimeError(
                    f"meta_step() in the middle of a manual inner loop ({self.inner_step} steps taken): "
                    "call interpolate() or rollback() first"
                )
            if inner_steps is not None and batches != inner_steps:
                raise ValueError(
                    f"batches holds {batches} batches but Fish(inner_steps={inner_steps}): pass as many "
                    "batches as inner steps, or leave inner_steps out"
                )
        if together is not None:
            together.check_same(parameters)

    def _differentiate(
        self, loss_fn: Callable[[Any], Tensor], batch: Any, index: int, losses: list[Tensor], scaler: Any
    ) -> Tensor:
        """Leave the gradient of one domain's loss in ``.grad``; what LBFGS calls again and again."""
        parameters = self.parameters()
        for p in parameters:
            p.grad = None
        is_first = index == len(losses)
        with record_function("GradMatch.domain_gradient"):
            loss = evaluate(loss_fn, batch, index, parameters, again=not is_first)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if is_first:
            if all(p.grad is None for p in parameters):
                checks.check_reached([], index)
            losses.append(loss.detach())
            # On an accelerator this synchronizes: best while it is at work on the backward pass, not before. Where
            # passes are collectives, a rank that stopped here would leave the others in the next one.
            in_step = self.together is not None and self.together.in_step
            if self.settings.nonfinite == "raise" and not in_step and not math.isfinite(value := float(losses[-1])):
                checks.refuse_loss(index, value)
        return loss

    def _undo(self, error: BaseException, parameters: list[Tensor], gradients: list[Tensor | None]) -> None:
        """Return to what there was before a ``meta_step`` that failed, and let the error say what that is."""
        taken = self.inner_step
        if self.slow.is_open:
            self.slow.restore()
            self._close()
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        restored = ["parameters", ".grad", *(["the model's buffers"] if self.slow.places is not None else [])]
        kept = f"; the wrapped optimizer's state is that after {taken} inner steps"
        if self.inner_state.restore() or not taken:
            restored.append("the wrapped optimizer's state")
            kept = ""
        checks.add_note(error, f"meta_step() failed: as before the call are {', '.join(restored)}{kept}")
        together = self.together
        if together is not None and not together.in_step and isinstance(error, Exception) and not is_told(error):
            together.ranks.vote(error)  # where a pass is a collective the others wait in that, and hear of nothing


def _known_first(evaluate: Callable[[], Tensor], loss: Tensor, parameters: list[Tensor]) -> Callable[[], Tensor]:
    """Return a closure that knows the answer the first time, unless the optimizer has moved the parameters by then."""
    known = {sum(p._version for p in parameters): loss}

    def closure() -> Tensor:
        first = known.pop(sum(p._version for p in parameters), None)
        return evaluate() if first is None else first

    return closure
