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

import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.profiler import record_function

from torch_gradmatch._checks import (
    check_choice,
    check_choice_or_function,
    check_entry,
    check_floating_dtype,
    check_fraction,
    check_int,
    check_loss,
    check_model,
    check_tracking,
    name_of,
    optional,
)
from torch_gradmatch._foreach import clone_all, copy_all_, is_sharded, local_of
from torch_gradmatch.gradients.alignment import GradientAlignment
from torch_gradmatch.methods.base import MetaLoop, MetaStep, Method, add_note, report_of
from torch_gradmatch.methods.divergence import refuse_nonfinite
from torch_gradmatch.methods.first_call import first_call
from torch_gradmatch.methods.scaling import LossScaling
from torch_gradmatch.methods.suitability import judge, warn_of_reset
from torch_gradmatch.methods.walks import Walks
from torch_gradmatch.parallel.ranks import check_process_group
from torch_gradmatch.slow import ops
from torch_gradmatch.slow.buffers import SlowBuffers, check_buffers, no_buffers
from torch_gradmatch.slow.finite import read
from torch_gradmatch.slow.inner_state import InnerState
from torch_gradmatch.slow.iterates import SlowIterates
from torch_gradmatch.slow.layout import BUFFER, SLOW, alignment_entries, host_of, is_own
from torch_gradmatch.slow.saved_buffers import ForwardBuffers, SavedBuffers
from torch_gradmatch.slow.weights import SlowWeights
from torch_gradmatch.wrapped.initialization import is_initialization
from torch_gradmatch.wrapped.members import shown_name

__all__ = ["Fish"]


@dataclass
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
            the next; ``"reset"`` starts every meta-iteration as if the optimizer were newly built, with the
            hyperparameters it has by then. A function is called with the wrapped optimizer at the start of every inner
            loop, to reset what it will.
        model: The model, if its buffers (BatchNorm statistics) are to be followed, too.
        buffers: With ``model``: ``"interpolate"`` moves floating-point buffers by the same interpolation as the
            parameters, as the official code does; ``"latest"`` keeps what the inner loop left. Integer buffers
            always take the latest value.
        meta_dtype: Keep slow weights in this dtype where it is wider than the parameter's: with bf16 or fp16
            parameters a small ``meta_lr`` moves nothing otherwise.
        track_alignment: Measure how well the inner gradients agree: ``GradMatch.last_meta_step`` and the result of
            ``meta_step`` then hold inner product, cosine and norms, and the cosine of each domain's gradient with the
            sum of those before it. Costs three vectors of the size of the parameters.
            ``"pairs"`` measures the cosine of each pair of domains, too, and copies every gradient for it: S times the
            parameters. Each gradient is taken where the steps before it have led.
        nonfinite: ``"raise"`` refuses to interpolate towards parameters or buffers that hold NaN or infinity, so the
            slow weights survive a diverged inner loop (waits for an accelerator once in a meta-iteration). In
            ``meta_step`` it also refuses each domain's loss that is not finite before the step on it (waits once more
            for each), and keeps a copy of the wrapped optimizer's state, to which a failed meta-iteration returns.
            ``"ignore"`` does not look, never waits and keeps no such copy. On several ranks what one of them finds is
            raised on all, and losses are looked at when the inner loop is over.
        process_group: Ranks that walk by themselves, each with batches of its own in an order of its own, from the
            same parameters: the meta-update goes to the mean of their walks,
            :math:`\theta \leftarrow \theta + \epsilon(\frac1R\sum_r\tilde\theta_r - \theta)`. One all-reduce of the
            parameters in a meta-iteration, and the slow weights are the same bits on every rank afterwards. The wrapped
            optimizer's state is averaged if it is carried, which is reduced, too, and else reset; buffers, with
            ``model``, are averaged. The model must not be in ``DistributedDataParallel``. What is measured is this
            rank's own walk. ``torch.distributed.group.WORLD`` for all ranks; None for one process, for
            ``DistributedDataParallel`` and for ``fully_shard``, whose gradients are averaged in every step.

    Any of them but ``model`` and ``process_group`` may be changed between meta-iterations; within one the settings are
    those that it began with.

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

    checks: ClassVar[Mapping[str, Callable[[Any], object]]] = {
        "meta_lr": partial(check_fraction, "meta_lr"),
        "inner_steps": optional(partial(check_int, "inner_steps", at_least=1)),
        "inner_state": partial(check_choice_or_function, "inner_state", choices=("carry", "reset")),
        "model": optional(partial(check_model, "model")),
        "buffers": partial(check_choice, "buffers", choices=("interpolate", "latest")),
        "meta_dtype": optional(partial(check_floating_dtype, "meta_dtype")),
        "track_alignment": check_tracking,
        "nonfinite": partial(check_choice, "nonfinite", choices=("raise", "ignore")),
        "process_group": check_process_group,
    }

    def __repr__(self) -> str:
        model = None if self.model is None else type(self.model).__name__
        settings = {field.name: getattr(self, field.name) for field in fields(self)} | {"model": model}
        if self.process_group is None:
            del settings["process_group"]
        else:
            settings["process_group"] = f"{self.process_group.size()} ranks"
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

    Raises:
        ValueError: If ``method.model`` holds none of the optimizer's parameters.
    """

    def __init__(self, method: Fish, optimizer: Optimizer, state: MutableMapping[Tensor, Any]) -> None:
        super().__init__(optimizer)
        self.method = method
        self.is_open = False
        self.settings = copy.copy(method)  # of the inner loop in progress
        self.weights = SlowWeights(state)
        self.iterates = SlowIterates(state, optimizer, self.traits.iterates, self.traits.averages)
        self.buffers = None if method.model is None else SlowBuffers(self._check_model(method.model))
        self.inner_state = InnerState(optimizer, resets=method.inner_state == "reset", counters=self.traits.counters)
        self.alignment = GradientAlignment(pairs=method.track_alignment == "pairs") if method.track_alignment else None
        self._other_buffers = ForwardBuffers()  # of models that nobody told us of
        self._knows_loss_fn = False  # whether meta_step has called one before
        self._losses: list[Tensor] = []  # of a meta_step in progress, where they are not looked at one by one
        self._undoes = False  # whether the inner steps in progress are a meta_step's, which undoes them if it fails
        self._holds_slow = False  # whether we are inside slow_weights()
        self._looked = False  # whether it was seen whether a reset finds anything
        self._judged = method.inner_state
        self._walks = Walks(optimizer, method.process_group)
        judge(optimizer, self.traits, method.inner_state, stacklevel=4)

    def _check_model(self, model: nn.Module) -> nn.Module:
        parameters = self.parameters()
        if parameters and set(parameters).isdisjoint(model.parameters()):
            raise ValueError(
                f"model should hold the parameters that the optimizer trains: {type(model).__name__} has none of them. "
                "Is it another one, or a copy?"
            )
        return model

    # ------------------------------------------------------------------------------------------------ inner loop

    def _refuse_another_model(self) -> None:
        followed = None if self.buffers is None else self.buffers.model
        if self.method.model is not followed:
            raise RuntimeError(
                "Fish.model was changed after the optimizer was wrapped, so nobody has followed the buffers of that "
                "model: wrap the optimizer anew, GradMatch(optimizer, Fish(model=model))"
            )

    def _begin(self, settings: Fish) -> None:
        """Take over the settings for the inner loop about to begin."""
        self._refuse_another_model()
        if settings.process_group is not self._walks.given:
            raise RuntimeError(
                "Fish.process_group was changed after the optimizer was wrapped: wrap the optimizer anew, "
                "GradMatch(optimizer, Fish(process_group=...))"
            )
        if settings.inner_state != self._judged:
            judge(self.optimizer, self.traits, settings.inner_state, stacklevel=5)
            self._judged = settings.inner_state
        self.settings = settings
        pairs = settings.track_alignment == "pairs"
        if not settings.track_alignment:
            self.alignment = None
        elif self.alignment is None or self.alignment.pairs is not pairs:
            self.alignment = GradientAlignment(pairs=pairs)
        if self.alignment is not None and any(map(is_sharded, self.parameters())):
            self.alignment.reset()
            self.alignment.reserve(self.parameters())  # whose elements are spread over which ranks

    def _open(self) -> None:
        """Begin an inner loop with its first step."""
        if not self._undoes:
            self._begin(copy.copy(self.method))
            self._walks.begin(self.parameters(), follows_buffers=self.buffers is not None)
        inner_state = self.settings.inner_state
        resets = inner_state == "reset"
        if resets and not self.inner_state.resets:  # the setting was changed
            learned = self.inner_state.counters
            self.inner_state = InnerState(self.optimizer, resets=True, counters=self.traits.counters)
            self.inner_state.counters |= learned
        if self._undoes and self.settings.nonfinite == "raise":
            self.inner_state.save(by_reference=resets)
        if resets:
            self.inner_state.reset()
        elif callable(inner_state):
            inner_state(self.optimizer)
        self.iterates.snapshot(self.parameters())
        if self.buffers is not None:
            self.buffers.settle(self.settings.meta_dtype, stepped=True)
        self.is_open = True

    def before_forward(self) -> None:
        """Bring the copies of buffers up to date, which a compiled forward pass would not. See ``MetaLoop``."""
        if self.buffers is not None:
            self.buffers.follow()

    def step(self, closure: Callable[[], Any] | None, scaling: LossScaling | None = None) -> Any:
        """Take one inner step; the S-th also interpolates. See ``GradMatch.step``."""
        if not self.has_stepped and scaling is None and is_initialization(self.optimizer, closure):
            return self._initialize()
        if closure is not None and self.buffers is not None and (self.traits.asks_first or not self.needs_closure):
            self.buffers.follow()  # the first forward pass is still to come, in the closure
        self._enter("step()")
        if self.alignment is not None:
            if scaling is not None:
                scaling = scaling.unscale(self.optimizer)
            if scaling is None or not scaling.overflowed():
                closure = self._measuring(closure, self.alignment)
        return self._count(self.wrapped_step, closure, scaling)

    def _initialize(self) -> None:
        """Let ``torch.distributed.checkpoint`` make what it then loads into; that is no inner step."""
        self._refuse_while_slow("step()")
        if self.needs_closure:
            raise RuntimeError(
                f"{shown_name(self.optimizer)} needs a closure, so torch.distributed.checkpoint cannot make its state "
                "by a step without gradients: take a first step before, or save optimizer.state_dict() by torch.save"
            )
        before = self.inner_state.before_step()
        self.optimizer.step()
        self.inner_state.after_step(before)
        self.has_stepped = True
        self._complete()

    def _complete(self) -> None:
        """Let everything have a copy that can be in an inner loop."""
        self.weights.complete(self.parameters(), self.method.meta_dtype)
        self.iterates.complete(self.parameters())

    def first_step(self, take: Callable[[], Any]) -> Any:
        """Keep the slow weights before the optimizer leaves them. See ``MetaLoop.first_step``."""
        self._enter("first_step()")
        if self.alignment is not None:
            self._measuring(None, self.alignment)
        return take()

    def second_step(self, take: Callable[[], Any]) -> Any:
        """Count the step as an inner step. See ``MetaLoop.second_step``."""
        self._enter("second_step()")
        return self._count(take)

    def _enter(self, call: str) -> None:
        """Make sure that there is an inner loop and that everything that can move has a slow copy."""
        self._refuse_while_slow(call)
        if self.is_open and self.iterates.places:
            self._take_note_of_mode(call)
        parameters = self.parameters_in_loop() if self.is_open else self.parameters()
        if not self.is_open:
            self._open()
        inner_steps = self.settings.inner_steps
        if inner_steps is not None and self.inner_step >= inner_steps:
            raise RuntimeError(
                f"all {inner_steps} inner steps were taken but the interpolation failed: "
                "call rollback() to return to the slow weights, or interpolate() to try again"
            )
        self.weights.snapshot(parameters, self.settings.meta_dtype)

    def _take_note_of_mode(self, call: str) -> None:
        """Begin the inner loop anew if its first step failed and the optimizer was switched to another mode since."""
        if self.inner_step == 0 and self.iterates.changed_modes():
            self.weights.close()  # of where the parameters stood in the other mode
            self.is_open = False
        else:
            self.iterates.check_mode(call)

    def _count(self, take: Callable[..., Any], *arguments: Any) -> Any:
        """Take the wrapped optimizer's step, count it, and interpolate after the last."""
        before = self.inner_state.before_step()
        loss = take(*arguments)
        self.has_stepped = True
        self.inner_state.after_step(before)
        if self.iterates.places:
            self.iterates.note_modes()
        self.inner_step += 1
        if self.inner_step == self.settings.inner_steps:
            self.interpolate()
        return loss

    def _measuring(self, closure: Callable[[], Any] | None, alignment: GradientAlignment) -> Callable[[], Any] | None:
        """Take this inner step's gradients into the alignment: now, or after the first call of the closure.

        If the step then fails, the count of gradients no longer matches that of inner steps, and the alignment of
        this meta-iteration is not reported.

        Args:
            closure: The user's, or None.
            alignment: Where to measure.

        Returns:
            The closure to pass on, or None.
        """
        expected = len(alignment) + 1

        def measure() -> None:
            gradients = [None if p.grad is None else local_of(p.grad) for p in self.parameters()]
            if len(alignment) < expected and any(g is not None for g in gradients):
                alignment.add(gradients)

        if closure is None or (self.needs_closure and not self.traits.asks_first):  # SAM's is asked elsewhere
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
        self._refuse_while_slow("interpolate()")
        settings, walks = self.settings, self._walks
        iterates = self._iterates()
        moving = {} if self.buffers is None else self.buffers.moving()
        if not walks.ranks:
            self._check_end(iterates, moving)
        else:
            with walks.agreeing(_described(settings), self.inner_step, looks=settings.nonfinite == "raise"):
                self._check_end(iterates, moving)
                if walks.group is not None and settings.inner_state != "reset":
                    walks.check_state(self.inner_state.counters, [fast for _, fast in iterates], self.traits.counters)
        latest = []
        if settings.buffers == "latest":
            latest, moving = list(moving.values()), {}
        pairs = [*iterates, *moving.values()]
        slow = [*self.weights.slow, *(slow for slow, _ in pairs)]
        fast = [*self.weights.fast, *(fast for _, fast in pairs)]
        with record_function("GradMatch.interpolate"):
            if walks.group is None:
                ops.interpolate_(slow, fast, settings.meta_lr)
            else:
                others = [] if self.buffers is None else self.buffers.buffers().values()
                walks.interpolate_(slow, fast, settings.meta_lr, latest, others)
        self.iterates.interpolate_weights(settings.meta_lr)
        self._close()
        if walks.group is not None and settings.inner_state == "reset":
            self.inner_state.reset()  # so that all ranks are the same now and not only when the next loop begins
            self.has_stepped = False

    def _check_end(self, iterates: list[tuple[Tensor, Tensor]], moving: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Raise if the inner loop cannot be closed."""
        if self.inner_step == 0:
            raise RuntimeError(
                "interpolate() needs at least one inner step since the last interpolation: call step() first"
            )
        self.iterates.check_mode("interpolate()")
        if self.settings.nonfinite == "raise":
            self._check_losses()
            refuse_nonfinite(self.weights.fast, [fast for _, fast in iterates], moving, self.optimizer, self.inner_step)
        self._walks.check_buffers()

    def _iterates(self) -> list[tuple[Tensor, Tensor]]:
        """Return slow copy and present value of what the wrapped optimizer keeps in parameter space."""
        if not self.iterates.places:
            return []
        return self.iterates.pairs(dict(zip(self.weights.fast, self.weights.slow, strict=True)))

    def rollback(self) -> None:
        """Abandon the inner loop. See ``GradMatch.rollback``."""
        self._refuse_while_slow("rollback()")
        self._return_to_slow()
        was_open, self.is_open, self.inner_step = self.is_open, False, 0
        if was_open and self.settings.inner_state != "reset" and self.inner_state.is_nonfinite():
            InnerState(self.optimizer, resets=True, keep_state=False).reset()
            self.has_stepped = False
            warnings.warn(
                "the inner optimizer's state held NaN or infinity, from which no later step could have recovered: "
                "it was reset as if the optimizer were newly built",
                RuntimeWarning,
                stacklevel=3,
            )

    def _return_to_slow(self) -> None:
        iterates = self._iterates()
        _write([fast for _, fast in iterates], [slow for slow, _ in iterates])
        self.iterates.set_weights(self.iterates.slow_weights_of_averages())
        self.iterates.close()
        self.weights.rollback()
        if self.buffers is not None:
            self.buffers.settle(self.method.meta_dtype, stepped=self.is_open)
            self.buffers.rollback()
        if self.alignment is not None:
            self.alignment.reset()

    def _close(self) -> None:
        if self.settings.inner_state == "reset" and not (self.traits.known or self._looked):
            self._looked = True  # no twin of the optimizer could be watched
            if self.inner_state.is_empty():
                warn_of_reset(self.optimizer, stacklevel=4)
        self.weights.close()
        self.iterates.close()
        if self.buffers is not None:
            self.buffers.close()
        self.last = MetaStep()
        if self.alignment is not None:
            if len(self.alignment) == self.inner_step:
                measured = self.alignment.result()
                self.last = report_of(None, measured)
            self.alignment.reset()
        self.inner_step = 0
        self.is_open = False

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Let parameters and buffers hold the slow weights for a while. See ``GradMatch.slow_weights``."""
        if self.buffers is not None:
            self.buffers.settle(self.method.meta_dtype, stepped=self.is_open)
        if self._holds_slow or not (self.is_open or (self.buffers is not None and self.buffers.slow_values())):
            yield
            return
        self.iterates.check_mode("slow_weights()")
        iterates, modes = self._iterates(), self.iterates.modes() if self.iterates.places else {}
        weights = [*self.weights.fast, *(fast for _, fast in iterates)]
        slow = [*self.weights.slow, *(slow for slow, _ in iterates)]
        values, average_weights = clone_all(weights), self.iterates.weights()
        buffers = None if self.buffers is None else SavedBuffers(self.buffers.slots)
        self._holds_slow = True
        try:
            _write(weights, slow)
            self.iterates.set_weights(self.iterates.slow_weights_of_averages())
            if self.buffers is not None:
                self.buffers.write_slow()
            yield
        finally:
            _write(weights, values)
            self.iterates.set_weights(average_weights)
            self.iterates.set_modes(modes)
            if buffers is not None:
                buffers.restore()
            self._holds_slow = False

    def _refuse_while_slow(self, call: str) -> None:
        if self._holds_slow:
            raise RuntimeError(
                f"{call} inside slow_weights(): parameters hold the slow weights there, for evaluating or saving a "
                "model. Leave the block first"
            )

    # -------------------------------------------------------------------------------------------- meta-iteration

    def meta_step(
        self, loss_fn: Callable[[Any], Tensor], batches: Sequence[Any], step: Callable[..., Any], scaler: Any = None
    ) -> MetaStep:
        """Carry out one meta-iteration. See ``GradMatch.meta_step``."""
        settings, walks = copy.copy(self.method), self._walks
        try:
            self._check_meta_step(settings, batches)
            self._begin(settings)
        except Exception as error:
            self.refuse(error)
            raise
        parameters = self.parameters()
        walks.begin(parameters, follows_buffers=self.buffers is not None)
        if walks.lockstep and settings.nonfinite == "raise":
            walks.ranks.agree(None, {"number of batches": len(batches), "method": _described(settings)})
        gradients = [p.grad for p in parameters]
        if self.buffers is not None:
            self.buffers.begin(settings.meta_dtype)
        watches = self.buffers is None and settings.nonfinite == "raise"
        losses: list[Tensor] = []
        self._losses = losses if walks.lockstep else []
        with self._other_buffers if watches else nullcontext():
            self._undoes = True
            try:
                for index, batch in enumerate(batches):
                    evaluate = partial(self._differentiate, loss_fn, batch, index, losses, scaler)
                    evaluate()
                    if scaler is not None:
                        step()
                        scaler.update()
                    elif self.needs_closure:
                        asks_first = self.traits.asks_first
                        step(_evaluated_already(evaluate, losses[-1], parameters) if asks_first else evaluate)
                    else:
                        step()
                if self.is_open:
                    self.interpolate()
                self.last = replace(self.last or MetaStep(), losses=torch.stack(losses))
            except BaseException as error:
                self._undo(error, gradients)
                walks.tell(error)
                raise
            finally:
                self._undoes, self._losses = False, []
                self.inner_state.forget()
        return self.last

    def refuse(self, error: Exception) -> None:
        """Let the other ranks know. See ``MetaLoop.refuse``."""
        walks = self._walks
        walks.begin(self.parameters(), follows_buffers=self.buffers is not None)
        if walks.lockstep and self.method.nonfinite == "raise":
            walks.ranks.agree(error)
        else:
            walks.tell(error)

    def _check_meta_step(self, settings: Fish, batches: Sequence[Any]) -> None:
        self._refuse_while_slow("meta_step()")
        if self.is_open:
            raise RuntimeError(
                f"meta_step() in the middle of a manual inner loop ({self.inner_step} steps taken): "
                "call interpolate() or rollback() first"
            )
        if settings.inner_steps is not None and len(batches) != settings.inner_steps:
            raise ValueError(
                f"batches holds {len(batches)} batches but Fish(inner_steps={settings.inner_steps}): pass as many "
                "batches as inner steps, or leave inner_steps out"
            )

    def _check_losses(self) -> None:
        """Raise if a loss of the meta-iteration in progress is not finite, where that was not seen at once."""
        for index, value in enumerate(read(self._losses)):
            try:
                _refuse_loss(index, value)
            except ValueError as error:
                vars(error)["happened"] = index  # from there on the gradients of all ranks are NaN
                raise

    def _differentiate(
        self, loss_fn: Callable[[Any], Tensor], batch: Any, index: int, losses: list[Tensor], scaler: Any
    ) -> Tensor:
        """Leave the gradient of one domain's loss in ``.grad``; what LBFGS calls again and again."""
        for p in self.parameters():
            p.grad = None
        with record_function("GradMatch.domain_gradient"):
            if self._knows_loss_fn:
                returned = loss_fn(batch)
            else:
                returned = first_call(loss_fn, batch, self.optimizer, self.parameters(), scales=scaler is not None)
                self._knows_loss_fn = True
            loss = check_loss(returned, index)
            scaled: Tensor = loss if scaler is None else scaler.scale(loss)
            scaled.backward()
        if index == len(losses):  # not again
            losses.append(loss.detach())
            # On an accelerator this waits: best while it is at work on the backward pass, not before. Where passes are
            # collectives, a rank that stopped here would leave the others in the next one.
            if self.settings.nonfinite == "raise" and not self._walks.lockstep:
                _refuse_loss(index, float(losses[-1]))
        return loss

    def _undo(self, error: BaseException, gradients: list[Tensor | None]) -> None:
        """Return to what there was before a ``meta_step`` that failed, and let the error say what that is."""
        was_open, taken = self.is_open, self.inner_step
        self._return_to_slow()
        self.is_open, self.inner_step = False, 0
        for p, gradient in zip(self.parameters(), gradients, strict=False):
            p.grad = gradient
        restored = ["parameters", ".grad"]
        if self.buffers is not None:
            restored.append("the model's buffers")
        elif self.settings.nonfinite == "raise":
            self._other_buffers.restore()
            restored.append("the buffers of the modules that loss_fn ran")
        kept = ""
        if self.inner_state.restore() or not was_open:
            restored.append("the wrapped optimizer's state")
            self.has_stepped = False  # perhaps never
        else:
            kept = f"; the wrapped optimizer's state is that after {taken} inner steps"
        add_note(error, f"meta_step() failed: as before the call are {', '.join(restored)}{kept}")

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """Return counter, slow weights, slow buffers and running sums. See ``MetaLoop.state_dict``."""
        self._refuse_while_slow("state_dict()")
        if self._walks.group is not None and self.inner_step:
            raise RuntimeError(
                f"state_dict() in the middle of a walk ({self.inner_step} steps taken): each rank is at a point of its "
                "own, and a checkpoint would hold one of them. Save between two inner loops (inner_step is 0), "
                "or call rollback() first"
            )
        if self.buffers is not None:
            self.buffers.settle(self.method.meta_dtype, stepped=self.is_open)
        if whole:
            self._complete()
        needed = whole or self.is_open or self.method.meta_dtype is not None
        return {
            "inner_step": self.inner_step,
            "is_open": self.is_open,
            **self.weights.state_dict(self.parameters() if needed else []),
            **self.iterates.state_dict(self.parameters(), whole=whole),
            **(no_buffers() if self.buffers is None else self._buffers(whole)),
            "alignment": None if self.alignment is None else self._alignment(whole),
            "counters": sorted(self.inner_state.counters),
        }

    def _buffers(self, whole: bool) -> dict[str, Any]:
        assert self.buffers is not None
        return self.buffers.state_dict(whole=whole, meta_dtype=self.method.meta_dtype)

    def _alignment(self, whole: bool, only: Collection[int] | None = None) -> dict[str, Any]:
        """Return the running sums; whole, with room for the gradients of all domains."""
        assert self.alignment is not None
        state = self.alignment.state_dict(only)
        if whole and "gradients" in state:
            state["gradients"] += [{}] * ((self.settings.inner_steps or 0) - len(state["gradients"]))
        return state

    def entry(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return slow weights, slow iterates and running sums of one parameter. See ``MetaLoop.entry``."""
        found: dict[str, Tensor] = dict(self.weights.state.get(parameter, {}))
        if SLOW not in found:
            return found
        parameters = self.parameters()
        index = next((i for i, p in enumerate(parameters) if p is parameter), None)
        if self.alignment is not None and index is not None:
            found |= alignment_entries(self._alignment(True, [index]), index, parameter)
        if (
            self.buffers is not None
            and host_of(p for p in parameters if self.weights.copy_of(p) is not None) is parameter
        ):
            values = self._buffers(True)["slow_buffers"]
            found |= {f"{BUFFER}{name}": value for name, value in values.items()}
        return found

    def is_own(self, key: str) -> bool:
        """Return whether an entry is one of those. See ``MetaLoop.is_own``."""
        return is_own(key) or self.is_kept(key)

    def is_kept(self, key: str) -> bool:
        """Return whether an entry is slow weights or slow iterates. See ``MetaLoop.is_kept``."""
        return key == SLOW or key in self.iterates.places

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` naming the first entry that cannot be loaded. See ``MetaLoop.check_state_dict``."""
        self._refuse_while_slow("load_state_dict()")
        self._refuse_another_model()
        for key, kind in (("inner_step", int), ("is_open", bool), ("alignment", dict | None), ("counters", list)):
            check_entry(state, key, kind)
        for key, since in (("held_buffers", 2), ("left_buffers", 4), ("held_iterates", 4)):
            if state.get("version", 0) >= since and key not in state:  # else what earlier versions meant would be read
                raise ValueError(f"the state dict's {key!r} is missing or malformed (got None)")
        if not all(isinstance(name, str) for name in state["counters"]):
            raise ValueError(f"the state dict's 'counters' should be names (got {state['counters']!r:.80})")
        inner_step = check_int("the state dict's inner_step", state["inner_step"], at_least=0)
        inner_steps = self.method.inner_steps
        if inner_steps is not None and inner_step > inner_steps:
            raise ValueError(f"the state dict was saved after {inner_step} inner steps but inner_steps={inner_steps}")
        if inner_step > 0 and not state["is_open"]:
            raise ValueError(f"the state dict has inner_step={inner_step} in an inner loop that is not open")
        parameters = self.parameters()
        self.weights.check_state_dict(state, parameters)
        self.iterates.check_state_dict(state, parameters)
        check_buffers(state, {} if self.buffers is None else self.buffers.buffers())
        if self.method.track_alignment and state["alignment"] is not None:
            sizes = [local_of(p).numel() * (2 if p.is_complex() else 1) for p in parameters]
            pairs = self.method.track_alignment == "pairs"
            GradientAlignment(pairs=pairs).check_state_dict(state["alignment"], sizes)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was saved. See ``MetaLoop.load_state_dict``."""
        self._begin(copy.copy(self.method))
        self.weights.load_state_dict(state, self.parameters(), self.settings.meta_dtype)
        self.iterates.load_state_dict(state, self.parameters())
        if self.buffers is not None:
            self.buffers.load_state_dict(state)
        if self.alignment is not None:
            self.alignment.reset()
            if state["alignment"] is not None:
                self.alignment.load_state_dict(state["alignment"])
        self.inner_state.counters.update(state["counters"])
        self.inner_step, self.is_open, self.last = state["inner_step"], state["is_open"], None


def _described(settings: Fish) -> str:
    """Return the settings as text that is the same on every rank."""
    told = copy.copy(settings)
    if callable(told.inner_state):
        vars(told)["inner_state"] = getattr(told.inner_state, "__qualname__", "a function")
    return repr(told)


def _refuse_loss(index: int, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"the loss of {name_of(index)} is {value}: nothing was changed by this meta_step(); look at that batch, or "
            "lower a learning rate"
        )


def _evaluated_already(evaluate: Callable[[], Tensor], loss: Tensor, parameters: list[Tensor]) -> Callable[[], Tensor]:
    """Return a closure that knows the answer the first time, unless the optimizer has moved the parameters by then."""
    known = {sum(p._version for p in parameters): loss}

    def closure() -> Tensor:
        first = known.pop(sum(p._version for p in parameters), None)
        return evaluate() if first is None else first

    return closure


def _write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    copy_all_(tensors, values)
    torch.clear_autocast_cache()  # which has the values of before
