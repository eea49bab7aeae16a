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
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from torch_gradmatch._checks import (
    check_choice,
    check_floating_dtype,
    check_fraction,
    check_int,
    check_loss,
)
from torch_gradmatch.gradients.alignment import GradientAlignment
from torch_gradmatch.methods.base import MetaLoop, MetaStep, Method, needs_closure
from torch_gradmatch.slow.buffers import SlowBuffers
from torch_gradmatch.slow.inner_state import NewlyBuilt
from torch_gradmatch.slow.weights import SlowWeights

__all__ = ["Fish"]


@dataclass
class Fish(Method):
    r"""Walk through the domains with the inner optimizer, then move a fraction of the way (Algorithm 1).

    For plain SGD inner steps of size :math:`\alpha`, averaged over the order of the domains, the walk follows
    :math:`\bar G - \frac{\alpha(S-1)}{4}\,\partial\mathrm{GIP}/\partial\theta + O(\alpha^2)`: besides lowering the mean
    loss it raises the inner product of the domains' gradients.

    Attributes:
        meta_lr: :math:`\epsilon` in (0, 1], the fraction of the inner walk that is kept. May be changed between
            meta-iterations.
        inner_steps: S, the number of inner steps after which ``step`` interpolates by itself; None to call
            ``interpolate`` or ``meta_step`` instead.
        inner_state: ``"carry"`` keeps the inner optimizer's state (momenta, step counts) from one meta-iteration to
            the next; ``"reset"`` starts every meta-iteration as if the optimizer were newly built, with the
            hyperparameters it has by then.
        model: The model, if its buffers (BatchNorm statistics) are to be followed, too.
        buffers: With ``model``: ``"interpolate"`` moves floating-point buffers by the same interpolation as the
            parameters, as the official code does; ``"latest"`` keeps what the inner loop left. Integer buffers
            always take the latest value.
        meta_dtype: Keep slow weights in this dtype where it is wider than the parameter's: with bf16 or fp16
            parameters a small ``meta_lr`` moves nothing otherwise.
        track_alignment: Measure how well the inner gradients agree: ``GradMatch.last_meta_step`` and the result of
            ``meta_step`` then hold inner product, cosine and norms. Costs two vectors of the size of the parameters.
        nonfinite: ``"raise"`` refuses to interpolate towards parameters that hold NaN or infinity, so the slow
            weights survive a diverged inner loop (waits for an accelerator once in a meta-iteration);
            ``"ignore"`` does not look.

    Raises:
        TypeError: If ``model`` is no module.
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
    inner_state: Literal["carry", "reset"] = "carry"
    model: nn.Module | None = None
    buffers: Literal["interpolate", "latest"] = "interpolate"
    meta_dtype: torch.dtype | None = None
    track_alignment: bool = False
    nonfinite: Literal["raise", "ignore"] = "raise"

    def __post_init__(self) -> None:
        check_fraction("meta_lr", self.meta_lr)
        if self.inner_steps is not None:
            check_int("inner_steps", self.inner_steps, at_least=1)
        check_choice("inner_state", self.inner_state, ("carry", "reset"))
        if self.model is not None and not isinstance(self.model, nn.Module):
            raise TypeError(f"model should be None or a torch.nn.Module (got {type(self.model).__name__})")
        check_choice("buffers", self.buffers, ("interpolate", "latest"))
        if self.meta_dtype is not None:
            check_floating_dtype("meta_dtype", self.meta_dtype)
        if not isinstance(self.track_alignment, bool):
            raise ValueError(f"track_alignment should be True or False (got {self.track_alignment!r})")
        check_choice("nonfinite", self.nonfinite, ("raise", "ignore"))

    def __repr__(self) -> str:
        model = None if self.model is None else type(self.model).__name__
        settings = {name: getattr(self, name) for name in self.__dataclass_fields__} | {"model": model}
        return f"Fish({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def start(self, optimizer: Optimizer, state: MutableMapping[Tensor, Any]) -> FishLoop:
        """Make the loop that carries these settings out for one optimizer.

        Args:
            optimizer: The wrapped optimizer.
            state: Where to keep the slow weights.

        Returns:
            The loop.
        """
        return FishLoop(self, optimizer, state)


class FishLoop(MetaLoop):
    """Fish at work on one optimizer.

    An inner loop is open from its first ``step`` until ``interpolate`` or ``rollback``.

    Args:
        method: The settings.
        optimizer: The wrapped optimizer.
        state: Where to keep the slow weights.
    """

    def __init__(self, method: Fish, optimizer: Optimizer, state: MutableMapping[Tensor, Any]) -> None:
        super().__init__(optimizer)
        self.method = method
        self.is_open = False
        self.slow_weights = SlowWeights(state, method.meta_dtype)
        self.slow_buffers = (
            None
            if method.model is None
            else SlowBuffers(method.model, interpolate=method.buffers == "interpolate", meta_dtype=method.meta_dtype)
        )
        self.newly_built = NewlyBuilt(optimizer) if method.inner_state == "reset" else None
        self.alignment = GradientAlignment() if method.track_alignment else None
        self._losses: list[Tensor] = []  # of the meta_step in progress

    # ------------------------------------------------------------------------------------------------ inner loop

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """Take one inner step; the S-th also interpolates. See ``GradMatch.step``."""
        inner_steps = self.method.inner_steps
        if inner_steps is not None and self.inner_step >= inner_steps:
            raise RuntimeError(
                f"all {inner_steps} inner steps were taken but the interpolation failed: "
                "call rollback() to return to the slow weights, or interpolate() to try again"
            )
        if not self.is_open:
            if self.newly_built is not None:
                self.newly_built.reset()
            self.is_open = True
        self.slow_weights.snapshot(self.parameters())
        closure = self._measuring(closure)
        before = None if self.newly_built is None else self.newly_built.before_step()
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        if self.newly_built is not None and before is not None:
            self.newly_built.after_step(before)
        self.inner_step += 1
        if self.inner_step == inner_steps:
            self.interpolate()
        return loss

    def _measuring(self, closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        """Take this inner step's gradients into the alignment: now, or after the first call of the closure.

        If the step then fails, the count of gradients no longer matches that of inner steps, and the alignment of
        this meta-iteration is not reported.

        Args:
            closure: The user's, or None.

        Returns:
            The closure to pass on, or None.
        """
        alignment = self.alignment
        if alignment is None:
            return closure
        expected = len(alignment) + 1

        def measure() -> None:
            gradients = [p.grad for p in self.parameters()]
            if len(alignment) < expected and any(g is not None for g in gradients):
                alignment.add(gradients)

        if closure is None:
            measure()
            return None
        user_closure = closure

        def measuring_closure() -> Any:
            loss = user_closure()
            measure()
            return loss

        return measuring_closure

    def interpolate(self) -> None:
        """Close the inner loop with the meta-update. See ``GradMatch.interpolate``."""
        if self.inner_step == 0:
            raise RuntimeError(
                "interpolate() needs at least one inner step since the last interpolation: call step() first"
            )
        weight = check_fraction("meta_lr", self.method.meta_lr)
        if self.method.nonfinite == "raise":
            self._refuse_nonfinite()
        with record_function("GradMatch.interpolate"):
            self.slow_weights.interpolate(weight)
            if self.slow_buffers is not None:
                self.slow_buffers.interpolate(weight)
        self._close()

    def _refuse_nonfinite(self) -> None:
        self._refuse_nonfinite_losses()
        diverged = self.slow_weights.nonfinite_parameters()
        if diverged:
            position = next(i for i, p in enumerate(self.parameters()) if p is diverged[0])
            raise RuntimeError(
                f"the inner loop diverged: after {self.inner_step} inner steps {len(diverged)} parameters hold NaN or "
                f"infinity, the first is {self._describe(position)}. The slow weights are intact: call rollback() to "
                'return to them; Fish(nonfinite="ignore") turns this check off'
            )

    def _refuse_nonfinite_losses(self, first: int = 0) -> None:
        """Raise if a loss of the meta_step in progress, from the ``first`` on, is not finite."""
        if self._losses[first:]:
            for index, loss in enumerate(torch.stack(self._losses[first:]).tolist(), start=first):
                if not math.isfinite(loss):
                    raise ValueError(
                        f"the loss of batch {index} is {loss}: parameters and buffers were set back to what they were "
                        "before this meta_step()"
                    )

    def _describe(self, position: int) -> str:
        names = [name for group in self.optimizer.param_groups for name in group.get("param_names", ())]
        shape = tuple(self.parameters()[position].shape)
        return f"{names[position]!r} of shape {shape}" if names else f"number {position} of shape {shape}"

    def rollback(self) -> None:
        """Abandon the inner loop. See ``GradMatch.rollback``."""
        self.slow_weights.rollback()
        if self.slow_buffers is not None:
            self.slow_buffers.rollback(loop_is_open=self.is_open)
        if self.alignment is not None:
            self.alignment.reset()
        was_open, self.is_open, self.inner_step = self.is_open, False, 0
        if was_open and self.newly_built is None and self._inner_state_is_nonfinite():
            NewlyBuilt(self.optimizer, keep_state=False).reset()
            warnings.warn(
                "the inner optimizer's state held NaN or infinity, from which no later step could have recovered: "
                "it was reset as if the optimizer were newly built",
                RuntimeWarning,
                stacklevel=3,
            )

    def _inner_state_is_nonfinite(self) -> bool:
        entries = [entry for entry in self.optimizer.state.values() if isinstance(entry, dict)]
        tensors = [v for entry in entries for v in entry.values() if isinstance(v, Tensor) and v.numel()]
        return any(not bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point() or t.is_complex())

    def _close(self) -> None:
        self.last = MetaStep()
        if self.alignment is not None:
            if len(self.alignment) == self.inner_step:
                measured = self.alignment.result()
                self.last = MetaStep(None, measured.inner_product, measured.cosine, measured.grad_norms)
            self.alignment.reset()
        self.inner_step = 0
        self.is_open = False

    # -------------------------------------------------------------------------------------------- meta-iteration

    def meta_step(self, loss_fn: Callable[[Any], Tensor], batches: Sequence[Any], step: Callable[..., Any]) -> MetaStep:
        """Carry out one meta-iteration. See ``GradMatch.meta_step``."""
        inner_steps = self.method.inner_steps
        if self.is_open:
            raise RuntimeError(
                f"meta_step() in the middle of a manual inner loop ({self.inner_step} steps taken): "
                "call interpolate() or rollback() first"
            )
        if inner_steps is not None and len(batches) != inner_steps:
            raise ValueError(
                f"batches holds {len(batches)} batches but Fish(inner_steps={inner_steps}): pass as many batches as "
                "inner steps, or leave inner_steps out"
            )
        if self.slow_buffers is not None:
            self.slow_buffers.capture_all()
        self._losses = []
        try:
            for index, batch in enumerate(batches):
                closure = partial(self._differentiate, loss_fn, batch, index)
                if needs_closure(self.optimizer):
                    step(closure)
                else:
                    closure()
                    step()
            if self.is_open:
                self.interpolate()
            self.last = replace(self.last or MetaStep(), losses=torch.stack(self._losses))
        except BaseException:
            self.rollback()
            raise
        finally:
            self._losses = []
        return self.last

    def _differentiate(self, loss_fn: Callable[[Any], Tensor], batch: Any, index: int) -> Tensor:
        """Leave the gradient of one domain's loss in ``.grad``; what LBFGS calls again and again."""
        self.optimizer.zero_grad()
        with record_function("GradMatch.domain_gradient"):
            loss = check_loss(loss_fn(batch), index)
            if index == len(self._losses):  # not again
                self._losses.append(loss.detach())
                if loss.device.type == "cpu" and self.method.nonfinite == "raise":
                    self._refuse_nonfinite_losses(index)  # elsewhere that waits: once, before interpolating
            loss.backward()
        return loss

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return counter, slow weights, slow buffers and running sums. See ``MetaLoop.state_dict``."""
        needed = self.is_open or self.method.meta_dtype is not None
        copies = {i: self.slow_weights.copy_of(p) for i, p in enumerate(self.parameters())} if needed else {}
        held = set(self.slow_weights.parameters)
        buffers = {} if self.slow_buffers is None else self.slow_buffers.held(loop_is_open=self.is_open)
        return {
            "inner_step": self.inner_step,
            "is_open": self.is_open,
            "slow_weights": {i: c for i, c in copies.items() if c is not None},
            "held": [i for i, p in enumerate(self.parameters()) if p in held],
            "slow_buffers": buffers,
            "alignment": None if self.alignment is None else self.alignment.state_dict(),
            "counters": [] if self.newly_built is None else sorted(self.newly_built.counters),
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` naming the first entry that cannot be loaded. See ``MetaLoop.check_state_dict``."""
        for key, kind in _LAYOUT.items():
            if not isinstance(state.get(key), kind):
                raise ValueError(f"the state dict's {key!r} is missing or malformed (got {state.get(key)!r:.80})")
        inner_step, inner_steps = (
            check_int("the state dict's inner_step", state["inner_step"], at_least=0),
            self.method.inner_steps,
        )
        if inner_steps is not None and inner_step > inner_steps:
            raise ValueError(f"the state dict was saved after {inner_step} inner steps but inner_steps={inner_steps}")
        if inner_step > 0 and not state["is_open"]:
            raise ValueError(f"the state dict has inner_step={inner_step} in an inner loop that is not open")
        parameters = self.parameters()
        _check_copies("slow weights of parameter", state["slow_weights"], dict(enumerate(parameters)))
        for position in state["held"]:
            if position not in state["slow_weights"]:
                raise ValueError(f"the state dict lacks the slow weights of parameter {position!r}")
        if self.alignment is not None and state["alignment"] is not None:
            sizes = [p.numel() * (2 if p.is_complex() else 1) for p in parameters]
            self.alignment.check_state_dict(state["alignment"], sizes)
        buffers = {} if self.slow_buffers is None else self.slow_buffers.copies
        _check_copies("slow copy of buffer", state["slow_buffers"], buffers)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was saved. See ``MetaLoop.load_state_dict``."""
        parameters = self.parameters()
        copies = {parameters[i]: copy for i, copy in state["slow_weights"].items()}
        self.slow_weights.hold(copies, [parameters[i] for i in state["held"]])
        if self.slow_buffers is not None:
            self.slow_buffers.hold(state["slow_buffers"])
        if self.alignment is not None:
            self.alignment.reset()
            if state["alignment"] is not None:
                self.alignment.load_state_dict(state["alignment"])
        if self.newly_built is not None:
            self.newly_built.counters.update(state["counters"])
        self.inner_step, self.is_open, self.last = state["inner_step"], state["is_open"], None


_LAYOUT: dict[str, type | tuple[type, ...]] = {
    "inner_step": int,
    "is_open": bool,
    "slow_weights": dict,
    "held": list,
    "slow_buffers": dict,
    "alignment": (dict, type(None)),
    "counters": list,
}


def _check_copies(what: str, copies: dict[Any, Any], originals: dict[Any, Tensor]) -> None:
    for key, copy in copies.items():
        if key not in originals:
            raise ValueError(f"the state dict holds the {what} {key!r}, which does not exist here")
        if not isinstance(copy, Tensor):
            raise ValueError(f"the {what} {key!r} in the state dict should be a tensor (got {type(copy).__name__})")
        if copy.shape != originals[key].shape:
            raise ValueError(
                f"the {what} {key!r} has shape {tuple(copy.shape)} in the state dict and "
                f"{tuple(originals[key].shape)} here"
            )
