"""``GradMatch``: gradient matching as a drop-in wrapper around any ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_gradmatch._checks import check_int, named_batches, naming
from torch_gradmatch.methods.base import MetaStep, Method
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.methods.scaling import LossScaling
from torch_gradmatch.slow.layout import check_tensors, is_standard, join, part, read_numbers, take_out
from torch_gradmatch.wrapped.hooks import load_with_hooks, save_with_hooks
from torch_gradmatch.wrapped.members import NUMBERS, class_name, members, own_attributes, same_classes, shown_name
from torch_gradmatch.wrapped.merged import MergedState
from torch_gradmatch.wrapped.several import as_one

__all__ = ["GradMatch", "MetaStep"]

# 1 had no "held_buffers", 2 no "optimizers" and no "slow_iterates", 3 the other layout always; they can be loaded, too.
FORMAT_VERSION = 4
IN_TWO_STEPS = ("first_step", "second_step")  # of SAM and those like it, which evaluate twice in one step

MethodT = TypeVar("MethodT", bound=Method)


class GradMatch(Optimizer, Generic[MethodT]):
    r"""Wraps an optimizer so that training prefers updates on which the domains' gradients agree.

    A real ``torch.optim.Optimizer``: learning-rate schedulers, ``GradScaler``, hooks, closures, deepcopy and pickle
    work. Parameter groups and defaults *are* the wrapped optimizer's, at all times; nothing is ever written into its
    ``state``, and into its groups one entry for checkpoints, ``"gradmatch"``. With :class:`~torch_gradmatch.Fish`, the
    model's parameters are the fast weights :math:`\tilde\theta` during an inner loop and the slow weights
    :math:`\theta` between two. :class:`~torch_gradmatch.SmoothFish` and :class:`~torch_gradmatch.IDGM` hand the wrapped
    optimizer a gradient of their own, one in each meta-iteration.

    Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937.

    Methods of the wrapped optimizer that this class has not, such as schedule-free's ``train`` and ``eval``, can be
    called on it, too. Of SAM's two ``second_step`` is the one that counts as a step.

    Args:
        optimizer: The optimizer to wrap: any class, freshly built or in the middle of training. A list of several, over
            disjoint parameters, is wrapped as one: a step is one step of each. A learning-rate scheduler takes this
            object or any of them.
        method: How to match gradients; ``Fish()`` if left out.

    Attributes:
        optimizer: The wrapped optimizer. Of several, an object with the list as ``optimizer.optimizers``.
        method: The method. Its settings may be changed between meta-iterations: ``optimizer.method.meta_lr = 0.1``.

    Raises:
        TypeError: If ``optimizer`` is no ``torch.optim.Optimizer`` or is wrapped already, or ``method`` is no method
            object.
        ValueError: If the method's model does not hold the optimizer's parameters, two optimizers hold the same
            parameter, or the method cannot serve an optimizer of this class; the message says what can.

    Example:
        >>> import torch
        >>> from torch_gradmatch import Fish, GradMatch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), Fish(meta_lr=0.5, inner_steps=2))
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
    def __init__(self: GradMatch[Fish], optimizer: Optimizer | Sequence[Optimizer]) -> None: ...

    @overload
    def __init__(self, optimizer: Optimizer | Sequence[Optimizer], method: MethodT) -> None: ...

    def __init__(self, optimizer: Optimizer | Sequence[Optimizer], method: Method | None = None) -> None:
        if isinstance(optimizer, list | tuple):
            if any(isinstance(one, GradMatch) for one in optimizer):
                raise TypeError("optimizer holds a GradMatch: list the plain optimizers and wrap them once")
            optimizer = as_one(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer should be a torch.optim.Optimizer to wrap, already built (got {_kind(optimizer)})"
            )
        if isinstance(optimizer, GradMatch):
            raise TypeError("optimizer is a GradMatch already: wrap the plain optimizer once")
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(
                f"optimizer is a {_kind(optimizer)}, which has no param_groups, so it is no whole optimizer: wrap one "
                "whose __init__ calls that of torch.optim.Optimizer"
            )
        if method is None:
            method = Fish()
        if not isinstance(method, Method):
            raise TypeError(f"method should be a method object such as Fish() (got {_kind(method)})")
        self.optimizer = optimizer
        self.method = cast("MethodT", method)
        self._linked = False  # Optimizer.__init__ is about to register groups that are registered already
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._linked = True
        for member in members(optimizer).values():
            take_out(member.param_groups, member.state)  # it has loaded a state dict of ours
        self._own_state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        self._has_standard_layout = all(
            type(one).state_dict is Optimizer.state_dict for one in getattr(optimizer, "optimizers", [optimizer])
        )
        self._loop = method.start(optimizer, self._own_state)

    # -------------------------------------------------------------------------------- shared with the wrapped optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups. It is the same list, whatever is done to either.

        Of several optimizers a new list of theirs: what is done to a group is done to it, but a group that is appended
        here is nobody's. ``optimizer.optimizer.optimizers[0].add_param_group(...)`` adds one.
        """
        groups = self.optimizer.param_groups
        if self._has_standard_layout:
            for group in groups:
                group.setdefault(NUMBERS, "")  # torch.distributed.checkpoint restores only what groups have
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._linked:
            self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's entry of each parameter with the method's tensors beside it, ``"slow"`` for one.

        A view: it is read anew each time, and what is written goes to where it belongs. The wrapped optimizer's own
        ``state`` never has ours.
        """
        loop = self._loop
        return MergedState(
            self.optimizer, self._own_state, loop.entry, loop.is_own, loop.is_kept, is_made=loop.has_stepped
        )

    @state.setter
    def state(self, state: Mapping[Any, Any]) -> None:
        if self._linked:
            entries = {
                parameter: entry if not isinstance(entry, dict) else dict(entry) for parameter, entry in state.items()
            }
            self.state.clear()
            self.state.update(entries)

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; in an inner loop its parameters join from their present values.

        Args:
            param_group: As in ``torch.optim.Optimizer.add_param_group``.
        """
        if self._linked:
            self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters.

        Args:
            set_to_none: As in ``torch.optim.Optimizer.zero_grad``.
        """
        self.optimizer.zero_grad(set_to_none=set_to_none)
        self._loop.before_forward()

    if not TYPE_CHECKING:  # which would accept any name for the sake of this

        def __getattr__(self, name: str) -> Any:
            wrapped = vars(self).get("optimizer")
            found = None if wrapped is None or name.startswith("_") else getattr(wrapped, name, None)
            if not callable(found):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            if name not in IN_TWO_STEPS:
                return found
            carry_out = getattr(self._loop, name)
            return lambda *args, **settings: carry_out(partial(found, *args, **settings))

    # ---------------------------------------------------------------------------------------------------- the method

    @property
    def inner_step(self) -> int:
        """Number of inner steps taken since the last meta-update."""
        return self._loop.inner_step

    @property
    def last_meta_step(self) -> MetaStep | None:
        """What the last meta-iteration measured, or None before the first."""
        return self._loop.last

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the wrapped optimizer; under ``Fish(inner_steps=S)`` every S-th also interpolates.

        Under ``IDGM`` and ``SmoothFish``, whose steps are taken by :meth:`meta_step`, this is ordinary training. A step
        that raises does not count. One whose gradients overflowed under a ``torch.amp.GradScaler``, so that it moves
        nothing, does: the domain had its turn.

        Args:
            closure: Re-evaluates the model and returns the loss; passed on to the wrapped optimizer.

        Returns:
            What the wrapped optimizer returns: the loss if there is a closure.

        Raises:
            RuntimeError: If the inner loop diverged (see ``Fish.nonfinite``). The slow weights are intact.
        """
        scaling = LossScaling.of(self)
        try:
            return self._loop.step(closure) if scaling is None else self._loop.step(closure, scaling)
        except BaseException:
            if scaling is not None:  # the GradScaler will not take them away
                vars(self).pop("found_inf", None)
                vars(self).pop("grad_scale", None)
            raise
        finally:
            torch.clear_autocast_cache()  # autocast around several steps would go on with the weights of the first

    def interpolate(self) -> None:
        r"""Close the inner loop: :math:`\theta \leftarrow \theta + \epsilon(\tilde\theta - \theta)`.

        Raises:
            RuntimeError: If no inner step was taken since the last interpolation, the inner loop diverged, or the
                method has none.
        """
        self._loop.interpolate()
        torch.clear_autocast_cache()

    def rollback(self) -> None:
        """Abandon the inner loop: parameters (and buffers, if followed) return to the slow weights, exactly.

        Between two inner loops there is nothing to undo and nothing happens. The wrapped optimizer keeps its state;
        if that holds NaN or infinity it is reset, with a warning, since no later step could recover.
        """
        self._loop.rollback()
        torch.clear_autocast_cache()

    def slow_weights(self) -> AbstractContextManager[None]:
        r"""Let parameters and followed buffers hold the slow weights :math:`\theta` inside a ``with`` block.

        For evaluating, exporting, averaging or saving a model in the middle of an inner loop, whose parameters are
        those of a walk half done. On leaving the block they are again what they were, bit for bit, also if it raises;
        what the block does to them is lost. Between two inner loops, and under methods that have none, nothing is
        changed and nothing is lost. Takes the memory of one more copy of the parameters. ``step``, ``meta_step``,
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

    def meta_step(
        self, loss_fn: Callable[[Any], Tensor], batches: Iterable[Any] | Mapping[Any, Any], scaler: Any = None
    ) -> MetaStep:
        """Carry out one whole meta-iteration by the chosen method.

        If anything raises on the way, parameters, buffers, ``.grad`` and the wrapped optimizer's state are back at what
        they were before the call. Exceptions: under ``IDGM`` and ``SmoothFish``, if it is the wrapped optimizer's own
        step that raises, which comes last, parameters and state stay where it left them; with ``nonfinite="ignore"``
        ``Fish`` keeps no copy of that state, nor of buffers unless it was given ``model``. A note on the error says
        what was restored.

        Args:
            loss_fn: ``loss_fn(batch)`` calls the model as usual and returns a scalar.
            batches: One batch of each of S domains, whatever ``loss_fn`` takes. A mapping names the domains, in its
                order, as does a list by :func:`~torch_gradmatch.meta_batches`: messages and the result then name them.
            scaler: A ``torch.amp.GradScaler`` for training in half precision: losses are scaled, gradients unscaled,
                steps on gradients that overflowed are skipped, and the scale is updated. ``loss_fn`` returns the plain
                loss.

        Returns:
            What was measured.

        Raises:
            RuntimeError: In the middle of a manual inner loop; if training diverges; under ``IDGM`` if an operation
                lacks the derivative needed; if ``loss_fn`` calls ``backward()`` or ``step()`` itself; if ``scaler`` is
                given and the wrapped optimizer needs a closure. The message says what to do.
            TypeError: If ``loss_fn`` cannot be called, a loss is not a tensor, or ``scaler`` no ``GradScaler``.
            ValueError: If a loss was scaled by a ``GradScaler`` that was not given; if there are no batches (under
                ``IDGM`` and ``SmoothFish``: fewer than two), or not as many as ``Fish(inner_steps=S)`` says, or a loss
                is not a scalar, not finite or depends on no parameter.

        Example:
            >>> import torch
            >>> from torch_gradmatch import Fish, GradMatch
            >>> w = torch.nn.Parameter(torch.zeros(()))
            >>> optimizer = GradMatch(torch.optim.SGD([w], lr=0.1), Fish(meta_lr=1.0, track_alignment=True))
            >>> report = optimizer.meta_step(lambda target: (w - target).square(), [1.0, 2.0])
            >>> report.losses, report.grad_norms
            (tensor([1.0000, 3.2400]), tensor([2.0000, 3.6000]))
        """
        try:
            domains, batches, step = self._check_meta_step(loss_fn, batches, scaler)
        except (TypeError, ValueError, RuntimeError) as error:
            self._loop.refuse(error)
            raise
        with naming(domains):
            report = self._loop.meta_step(loss_fn, batches, step, scaler)
        if domains is not None and report.domains is None:
            report = self._loop.last = replace(report, domains=domains)
        return report

    def _check_meta_step(
        self, loss_fn: object, batches: Iterable[Any] | Mapping[Any, Any], scaler: Any
    ) -> tuple[tuple[Any, ...] | None, list[Any], Callable[..., Any]]:
        """Return the domains' names, the batches and the step to take, or raise if something is wrong with them."""
        if not callable(loss_fn):
            swapped = ", the batches. The two arguments are swapped" if callable(batches) else ""
            raise TypeError(
                f"loss_fn should be a function of a batch (got {_kind(loss_fn)}{swapped}): meta_step(loss_fn, batches)"
            )
        domains, batches = named_batches(batches)
        if not batches:
            raise ValueError("batches is empty: meta_step() needs one batch of each domain")
        if domains is not None and len(domains) != len(batches):
            raise ValueError(
                f"batches holds {len(batches)} batches of {len(domains)} domains {domains!r:.200}: pass one of each"
            )
        return domains, batches, self.step if scaler is None else self._scaled_step(scaler)

    def _scaled_step(self, scaler: Any) -> Callable[..., Any]:
        """Return the step that a scaler takes, or raise if it cannot."""
        if not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler should be None or a torch.amp.GradScaler (got {_kind(scaler)})")
        if self._loop.needs_closure:
            raise RuntimeError(
                f"{shown_name(self.optimizer)} needs a closure, which a GradScaler does not support: train it "
                "without a scaler"
            )
        return partial(scaler.step, self)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict with the method's tensors and numbers in it.

        Tensors that belong to a parameter are in its entry beside the wrapped optimizer's, ``state[0]["slow"]``; slow
        buffers in that of the first parameter; all numbers (inner-step counter, format version) as text in each group,
        ``"gradmatch"``. ``torch.distributed.checkpoint`` saves and restores that, and
        ``torch.load(..., weights_only=True)`` reads it. As usual in torch, tensors are not copied. In the middle of an
        inner loop the model's own state dict holds the fast weights; the two together resume bit for bit.

        The entries are the same ones at all times, since
        ``torch.distributed.checkpoint`` restores only those that the optimizer which loads has, too: between two inner
        loops a checkpoint holds a copy of the parameters that need not be there, and with ``track_alignment`` zeros.

        If the wrapped optimizer's state dict has a layout of its own (one that holds another optimizer), all is in one
        more entry of it, ``"gradmatch"``, which ``torch.distributed.checkpoint`` cannot save.

        Returns:
            The state. For a plain optimizer of the wrapped class save ``optimizer.optimizer.state_dict()``; many load
            this one, too, and carry ours along unused.
        """
        return save_with_hooks(self, self._save)

    def _save(self) -> dict[str, Any]:
        state_dict: dict[str, Any] = dict(self.optimizer.state_dict())
        own = {
            "version": FORMAT_VERSION,
            "method": type(self.method).__name__,
            "optimizers": [class_name(member) for member in members(self.optimizer).values()],
            "shapes": self._shapes(),
        }
        parameters = self._loop.parameters()
        if is_standard(state_dict, len(parameters)):
            self._has_standard_layout = True
            joined = join(state_dict, {**own, **self._loop.state_dict(whole=True)}, parameters)
            if joined is not None:
                return joined
        state_dict["gradmatch"] = {**own, **self._loop.state_dict()}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Args:
            state_dict: The state.

        Raises:
            TypeError: If it is not a dictionary.
            ValueError: If it is of another model, method or version, or malformed; the message names the first
                mismatch and nothing has changed.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict should be a dictionary (got {_kind(state_dict)})")
        load_with_hooks(self, state_dict, self._load)

    def _load(self, state_dict: dict[str, Any]) -> None:
        try:
            wrapped, own = self._check_state_dict(state_dict)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"the state dict is malformed: {error!r:.200}") from error
        self._load_wrapped(wrapped)
        self._loop.load_state_dict(own)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the wrapped optimizer's part and ours, or raise if either cannot be loaded."""
        own = state_dict.get("gradmatch")
        is_joined = own is None
        if is_joined:
            own = read_numbers(state_dict)
            groups = state_dict.get("param_groups")
            if own is None and not (isinstance(groups, list) and groups) and "state" in state_dict:
                self._check_groups(state_dict)
        if not isinstance(own, dict):
            raise ValueError(
                "the state dict has no 'gradmatch' entry: it is a plain optimizer's. "
                "To continue from that, load it into the wrapped optimizer: optimizer.optimizer.load_state_dict(...)"
            )
        version = check_int("the state dict's version", own.get("version"), at_least=0)
        if version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(f"the state dict has format version {version}; this package reads 1 to {FORMAT_VERSION}")
        method = type(self.method).__name__
        if own.get("method") != method:
            raise ValueError(f"the state dict was saved by method {own.get('method')!r}; this optimizer uses {method}")
        own = dict(own)
        ours = [class_name(member) for member in members(self.optimizer).values()]
        theirs = own.setdefault("optimizers", ours)
        if not same_classes(theirs, ours):
            raise ValueError(
                f"the state dict is of {_listed(theirs)} and this optimizer wraps {_listed(ours)}: build the same "
                "optimizer to continue"
            )
        if version < 3:
            own = {"slow_iterates": None, "average_weights": [], **own}
        if is_joined or type(self.optimizer).state_dict is Optimizer.state_dict:
            self._check_groups(state_dict)
        saved = own.get("shapes")
        if not isinstance(saved, list) or len(saved) != len(self._shapes()):
            raise ValueError("the state dict's 'shapes' is missing or malformed")
        for position, (saved_shape, shape) in enumerate(zip(saved, self._shapes(), strict=True)):
            if saved_shape != shape:
                raise ValueError(f"parameter {position} has shape {saved_shape} in the state dict and {shape} here")
        if is_joined:
            wrapped, own = part(state_dict, own, self._loop.parameters())
        else:
            wrapped = {k: v for k, v in state_dict.items() if k != "gradmatch"}
        check_tensors(own, self._loop.parameters())
        self._loop.check_state_dict(own)
        return wrapped, own

    def _check_groups(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict.get("param_groups")
        if not isinstance(groups, list) or not all(isinstance(g, dict) and "params" in g for g in groups):
            raise ValueError("the state dict's 'param_groups' is missing or malformed")
        if not isinstance(state_dict.get("state"), dict):
            raise ValueError("the state dict's 'state' is missing or malformed")
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"the state dict has {len(groups)} parameter groups and this optimizer {len(self.param_groups)}"
            )
        for index, (theirs, ours) in enumerate(zip(groups, self.param_groups, strict=True)):
            if len(theirs["params"]) != len(ours["params"]):
                raise ValueError(
                    f"group {index} has {len(theirs['params'])} parameters in the state dict "
                    f"and {len(ours['params'])} in this optimizer"
                )
            if not all(isinstance(name, int | str) for name in theirs["params"]):
                raise ValueError(f"group {index} of the state dict should have its parameters by number or by name")
            strange = [key for key in theirs if not isinstance(key, str)]
            if strange:
                raise ValueError(f"group {index} of the state dict has an entry {strange[0]!r:.80}, which is no name")

    def _shapes(self) -> list[list[int]]:
        return [list(p.shape) for group in self.optimizer.param_groups for p in group["params"]]

    def _load_wrapped(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped optimizer's part; put everything back if it refuses."""
        before = [(vars(member), dict(vars(member))) for member in members(self.optimizer).values()]
        try:
            self.optimizer.load_state_dict(state_dict)
            _check_entries(self.optimizer)
        except Exception as error:
            for attributes, kept in before:  # loading makes new dictionaries for state and groups
                attributes.clear()
                attributes.update(kept)
            raise ValueError(f"the wrapped {shown_name(self.optimizer)} cannot load the state dict: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer.__getstate__ knows nothing of a subclass's own attributes; hooks are dropped, as it does. It also
        # drops such attributes of the wrapped optimizer (LBFGS has some), which are carried along for it here.
        return {
            "optimizer": self.optimizer,
            "method": self.method,
            "_own_state": self._own_state,
            "_has_standard_layout": self._has_standard_layout,
            "_linked": True,
            "_loop": self._loop,
            "_wrapped_attributes": [
                (member, {"defaults": member.defaults, **own_attributes(member)})
                for member in members(self.optimizer).values()
            ],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "state" in state:  # of a version in which that held what is ours
            state |= {"_own_state": state.pop("state"), "_has_standard_layout": False}
        for member, attributes in state.pop("_wrapped_attributes", ()):
            for name, value in attributes.items():
                vars(member).setdefault(name, value)
        super().__setstate__(state)

    def __repr__(self) -> str:
        lines = repr(self.optimizer).splitlines()
        shown = "\n".join(line for line in lines if line.strip() != f"{NUMBERS}:")
        return f"GradMatch(\n{shown},\n{self.method!r}\n)"


def _check_entries(optimizer: Optimizer) -> None:
    """Raise if an optimizer has loaded plain data for what it keeps of a parameter, which torch does not see."""
    for member in members(optimizer).values():
        for key, entry in member.state.items():
            if isinstance(key, Tensor) and isinstance(entry, str | int | float | list | None):
                raise ValueError(f"the state of a parameter should be a dictionary (got {entry!r:.80})")


def _listed(names: object) -> str:
    return " with ".join(map(str, names)) if isinstance(names, list) else repr(names)[:80]


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
