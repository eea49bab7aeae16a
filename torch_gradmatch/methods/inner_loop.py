r"""The inner loop of Fish: steps of the wrapped optimizer, and the interpolation that closes them.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, Algorithm 1, last two lines. A
training loop may call both; :class:`~torch_gradmatch.methods.fish.FishLoop` is the whole meta-iteration.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from torch_gradmatch._checks import check_entry, check_int, refuse_loss
from torch_gradmatch.gradients.alignment import GradientAlignment
from torch_gradmatch.gradients.report import MetaStep
from torch_gradmatch.methods.base import MetaLoop, shown_settings
from torch_gradmatch.parallel.foreach import copy_all_, find_nonfinite, read
from torch_gradmatch.slow import ops
from torch_gradmatch.slow.inner_state import InnerState, check_points
from torch_gradmatch.slow.weights import Slow

if TYPE_CHECKING:
    from torch_gradmatch.methods.scaling import LossScaling

__all__ = ["InnerLoop"]

MANY_STEPS = 100  # in one inner loop: nobody has as many domains and closes it by hand


class InnerLoop(MetaLoop):
    """An inner loop of one optimizer: open from its first step until it is interpolated or rolled back.

    Args:
        method: The settings.
        optimizer: The wrapped optimizer.

    Attributes:
        settings: Those of the inner loop in progress.
        slow: The slow weights, which know whether an inner loop is open.
        inner_state: The wrapped optimizer's state.
    """

    def __init__(self, method: Any, optimizer: Optimizer) -> None:
        super().__init__(method, optimizer)
        if method.process_group is not None and self.together is not None and self.together.averages_gradients:
            raise ValueError(
                "process_group is for ranks that walk by themselves, but DistributedDataParallel averages their "
                "gradients in every step: leave one of the two out. With process_group pass and call the plain module"
            )
        parameters, model = self.parameters(), method.model
        if model is not None and parameters and set(parameters).isdisjoint(model.parameters()):
            raise ValueError(
                f"model should hold the parameters that the optimizer trains: {type(model).__name__} has none of them. "
                "Is it another one, or a copy?"
            )
        self.settings = copy.copy(method)
        self.slow = Slow(model)
        self.inner_state = InnerState(optimizer, resets=method.inner_state == "reset")
        self._carries: object = None  # the inner_state that was checked
        self._alignment: GradientAlignment | None = None
        self._losses: list[Tensor] | None = None  # of a meta_step in progress
        self._domains: list[str | int] = []  # of the inner steps, as far as they were named
        self._warns = True  # of many steps in an inner loop of the user's
        self._check_settings()
        self.slow.rest(parameters, method.meta_dtype)

    def _check_settings(self, call: str = "") -> None:
        """Raise if a setting was changed that cannot be, or to one that cannot serve the optimizer."""
        method = self.method
        if method.model is not self.slow.model or method.process_group is not self.settings.process_group:
            raise RuntimeError(
                "Fish.model or Fish.process_group was changed after the optimizer was wrapped: wrap the optimizer "
                "anew, GradMatch(optimizer, Fish(model=model))"
            )
        if method.inner_state != self._carries:
            method.__post_init__()
            if method.inner_state == "carry" or (method.inner_state == "reset" and not self.inner_state.was_new):
                check_points(self.optimizer, can_reset=self.inner_state.was_new)
            if method.inner_state == "reset" and not self.inner_state.can_reset:
                raise RuntimeError('inner_state="reset" was chosen late, and the state when wrapped is lost: wrap anew')
            self._carries = method.inner_state
        if self.slow.is_shown:
            raise RuntimeError(
                f"{call} inside slow_weights(): parameters hold the slow weights there, for evaluating or saving a "
                "model. Leave the block first"
            )

    # ------------------------------------------------------------------------------------------------ inner loop

    def before_forward(self) -> None:
        """Copy what the first forward pass of an inner loop may move. See ``MetaLoop.before_forward``."""
        if not self.slow.is_open:
            self.slow.take(self.parameters(), self.method.meta_dtype, by_zero_grad=True)

    def _open(self, parameters: list[Tensor]) -> None:
        """Begin an inner loop with the step about to be taken, at the copies made before its first forward pass."""
        self.settings = settings = copy.copy(self.method)
        self.slow.open(parameters, settings.meta_dtype)
        tracks = settings.track_alignment
        self._alignment = GradientAlignment(pairs=tracks == "pairs") if tracks else None
        if settings.inner_state == "reset":
            self.inner_state.reset()
        elif callable(settings.inner_state):
            settings.inner_state(self.optimizer)

    def step(self, closure: Callable[[], Any] | None, scaling: LossScaling | None = None) -> Any:
        """Take one inner step; the S-th also interpolates. See ``GradMatch.step``."""
        self._check_settings("step()")
        parameters = self.parameters()
        if self.slow.is_open:
            self.slow.join(parameters, self.settings.meta_dtype)
        else:
            if self.together is not None and self.together.group is not None:
                self.together.ranks.vote()
                self.together.check_same(parameters)
            was_evaluated = self.slow.fast or self.evaluates_before  # after zero_grad(), or as SAM asks for
            if closure is not None and (not was_evaluated or all(p.grad is None for p in parameters)):
                self.slow.take(parameters, self.method.meta_dtype)  # its first forward pass comes in the closure
            self._open(parameters)
        settings = self.settings
        if settings.inner_steps is not None and self.inner_step >= settings.inner_steps:
            raise RuntimeError(
                f"all {settings.inner_steps} inner steps were taken but the interpolation failed: "
                "call rollback() to return to the slow weights, or interpolate() to try again"
            )
        if self._alignment is not None:
            if scaling is not None:
                scaling = scaling.unscale(self.optimizer)
            if scaling is None or not scaling.overflowed():
                closure = self._measuring(closure, self._alignment)
        take = partial(self.wrapped_step, closure, scaling)
        watches = settings.inner_state == "reset" or self.inner_state.saved is not None
        loss = self.inner_state.watch(take) if watches else take()
        self.inner_step += 1
        if self.domain is not None:
            self._domains.append(self.domain)
            self.domain = None
        if self.inner_step == settings.inner_steps:
            self.interpolate()
        elif self.inner_step == MANY_STEPS and settings.inner_steps is None and self._warns:
            self._warns = False
            warnings.warn(
                f"{MANY_STEPS} inner steps were taken without an interpolation, so Fish has matched nothing yet: pass "
                "Fish(inner_steps=S), call interpolate() after the last domain, or use meta_step()",
                stacklevel=4,
            )
        return loss

    def _measuring(self, closure: Callable[[], Any] | None, alignment: GradientAlignment) -> Callable[[], Any] | None:
        """Return the closure to pass on; measure this inner step's gradients now, or after its first call.

        If the step then fails, the count of gradients no longer matches that of inner steps, and the alignment of
        this meta-iteration is not reported.

        Args:
            closure: The user's, or None.
            alignment: Where to measure.

        Returns:
            The closure.
        """
        expected = len(alignment) + 1

        def measure() -> None:
            gradients = [p.grad for p in self.parameters()]
            if len(alignment) < expected and any(g is not None for g in gradients):
                alignment.add(gradients)

        if closure is None or self.evaluates_before:
            measure()
            return closure
        user_closure = closure

        def measuring_closure() -> Any:
            loss = user_closure()
            measure()
            return loss

        return measuring_closure

    def interpolate(self) -> None:
        """Close the inner loop with the meta-update. See ``GradMatch.interpolate``."""
        self._check_settings("interpolate()")
        settings, together, slow = self.settings, self.together, self.slow
        moving = {} if slow.places is None else slow.moving_buffers()
        if together is None or (together.group is None and settings.nonfinite == "ignore"):
            self._check_end(moving)
        else:
            facts = together.facts(self.optimizer, self.parameters(), shown_settings(settings))
            with together.ranks.together({**facts, "number of inner steps": self.inner_step}):
                self._check_end(moving)
        if settings.buffers == "latest":
            moving = {}
        theta = [*slow.weights, *(s for s, _ in moving.values())]
        fast = [*slow.fast, *(f for _, f in moving.values())]
        with record_function("GradMatch.interpolate"):
            if together is None or together.group is None:
                ops.interpolate_(theta, fast, settings.meta_lr)
            else:
                means = together.average_walks(theta, fast, slow.places.named().values() if slow.places else ())
                ops.interpolate_(theta, means, settings.meta_lr)
                copy_all_(fast, means)
                self.inner_state.reset()  # so that all ranks are the same now and not only when the next loop begins
        domains = tuple(self._domains) if len(self._domains) == self.inner_step else None
        self.last = MetaStep(domains=domains)
        if self._alignment is not None and len(self._alignment) == self.inner_step:
            found = self._alignment.result()
            self.last = MetaStep(None, found.inner_product, found.cosine, found.grad_norms, found.cosines, domains)
        self._close()

    def _check_end(self, moving: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Raise if the inner loop cannot be closed."""
        if self.inner_step == 0:
            raise RuntimeError(
                "interpolate() needs at least one inner step since the last interpolation: call step() first"
            )
        for p, slow in zip(self.slow.fast, self.slow.weights, strict=True):
            if p.shape != slow.shape:
                raise RuntimeError(
                    f"a parameter has shape {tuple(p.shape)} and had {tuple(slow.shape)} when the inner loop began: "
                    "call rollback() to return to the slow weights, and change shapes between two inner loops"
                )
        if self.settings.nonfinite == "raise":
            if self._losses and self.together is not None and self.together.in_step:
                for index, value in enumerate(read(self._losses)):
                    refuse_loss(index, value)
            self._refuse_nonfinite(moving)

    def _refuse_nonfinite(self, moving: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Raise if a parameter, or a buffer that was finite, holds NaN or infinity; leave out other such buffers."""
        fast, names = self.slow.fast, list(moving)
        pairs = list(moving.values())
        found = set(find_nonfinite([*fast, *(s for s, _ in pairs), *(f for _, f in pairs)]))
        diverged = [p for i, p in enumerate(fast) if i in found]
        how = None
        if diverged:
            first = next(name for name, p in self.named_parameters().items() if p is diverged[0])
            first = f"number {first}" if isinstance(first, int) else repr(first)
            shape = tuple(diverged[0].shape)
            how = f"{len(diverged)} parameters hold NaN or infinity, the first is {first} of shape {shape}"
        for i, name in enumerate(names, start=len(fast)):
            if i in found:
                del moving[name]
            elif i + len(names) in found and how is None:
                how = f"the buffer {name!r} holds NaN or infinity"
        if how is not None:
            raise RuntimeError(
                f"the inner loop diverged: after {self.inner_step} inner steps {how}. The slow weights are intact: "
                'call rollback() to return to them; Fish(nonfinite="ignore") turns this check off'
            )

    def rollback(self) -> None:
        """Abandon the inner loop. See ``GradMatch.rollback``."""
        self._check_settings("rollback()")
        if not self.slow.is_open:
            return
        self.slow.restore()
        self._close()
        if self.settings.inner_state != "reset" and self.inner_state.nonfinite():
            self.inner_state.recover()
            warnings.warn(
                "the inner optimizer's state held NaN or infinity, from which no later step could have recovered: "
                "it was reset, to what it was when the optimizer was wrapped if that was new, else to zero",
                RuntimeWarning,
                stacklevel=3,
            )

    def _close(self) -> None:
        self.inner_step, self._alignment, self._domains = 0, None, []
        self.slow.close()
        self.slow.rest(self.parameters(), self.settings.meta_dtype)

    def theta(self) -> dict[Tensor, Tensor]:
        """Return the slow weights, with all their digits. See ``MetaLoop.theta``."""
        return {p: self.slow.copies.get(p, p) for p in self.parameters()}

    def slow_weights(self) -> AbstractContextManager[None]:
        """Let parameters and buffers hold the slow weights for a while. See ``GradMatch.slow_weights``."""
        return self.slow.shown()

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return counter, slow weights and slow buffers. See ``MetaLoop.state_dict``."""
        self._check_settings("state_dict()")
        if self.together is not None and self.together.group is not None and self.inner_step:
            raise RuntimeError(
                f"state_dict() in the middle of a walk ({self.inner_step} steps taken): each rank is at a point of its "
                "own, and a checkpoint would hold one of them. Save between two inner loops (inner_step is 0), "
                "or call rollback() first"
            )
        counters = sorted(name for of_group, name in self.inner_state.counters if of_group)
        return {"inner_step": self.inner_step, "counters": counters, **self.slow.state_dict(self.named_parameters())}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` naming the first entry that cannot be loaded. See ``MetaLoop.check_state_dict``."""
        self._check_settings("load_state_dict()")
        if not state:
            return
        for key, kind in (("inner_step", int), ("is_open", bool), ("counters", list)):
            check_entry(state, key, kind)
        if not all(isinstance(name, str) for name in state["counters"]):
            raise ValueError(f"the state dict's 'counters' should be names (got {state['counters']!r:.80})")
        self.slow.check_state_dict(state, self.named_parameters())
        inner_step = check_int("the state dict's inner_step", state["inner_step"], at_least=0)
        inner_steps = self.method.inner_steps
        if inner_steps is not None and inner_step > inner_steps:
            raise ValueError(f"the state dict was saved after {inner_step} inner steps but inner_steps={inner_steps}")
        if inner_step > 0 and not (state["is_open"] and state["slow_weights"]):
            raise ValueError(
                f"the state dict was saved after {inner_step} inner steps and lacks the slow weights: save it by "
                "torch.save, or between two inner loops (inner_step is 0)"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was saved. See ``MetaLoop.load_state_dict``."""
        if not state and self.method.meta_dtype is not None:
            warnings.warn(
                "the state dict has nothing of GradMatch: the digits of the slow weights beyond those of the "
                "parameters are lost. torch.distributed.checkpoint does not keep them, torch.save does",
                stacklevel=4,
            )
        if self.together is not None:
            self.together.has_same(())
        self.settings = copy.copy(self.method)
        self.slow.load_state_dict(state, self.named_parameters(), self.settings.meta_dtype)
        self.inner_state.counters |= {(True, name) for name in state.get("counters", ())}
        self.inner_step, self.last = state.get("inner_step", 0), None
        self._alignment, self._domains = None, []  # those of an inner loop in progress are not carried over
