"""What the wrapped optimizer keeps from one step to the next: reset for ``Fish(inner_state="reset")``, and restored.

The official code of Fish builds a new inner optimizer in every meta-iteration (``reload_inner_optim`` false). Here the
same optimizer returns to what it was when it was wrapped, so that schedulers, hooks and the user's own reference to it
stay valid.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from torch_gradmatch.parallel.foreach import clone_all, copy_all_, find_nonfinite

__all__ = ["InnerState", "check_points", "members", "shown_name", "wants_closure"]

_MISSING = object()

# Optimizers whose next steps undo an interpolation, because they keep other points of parameter space (some only with
# certain options), and that lack the modes by which a schedule-free optimizer is known.
# tests/methods/test_every_optimizer.py finds them.
KEEPS_POINTS = frozenset({"A2Grad", "AccSGD", "DAdaptAdaGrad", "DAdaptSGD", "EmoFact", "EmoLynx", "EmoNavi", "FOCUS"})
KEEPS_POINTS |= {"FTRL", "Lookahead", "MADGRAD", "Ranger", "Ranger21", "SRMM", "TRAC"}
KEEPS_POINTS |= {"AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure", "SGDScheduleFreeClosure"}
# Optimizers whose step() takes a closure by default None and raises without one.
ASKS_FOR_LOSS = frozenset({"AliG"})


def members(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and all those that it holds (those of SAM, Lookahead or several in one), each once.

    Args:
        optimizer: Any.

    Returns:
        The optimizers, itself first.

    Example:
        >>> import torch
        >>> outer, inner = (torch.optim.SGD([torch.zeros(1)], lr=0.1) for _ in range(2))
        >>> outer.base = inner
        >>> [member is inner for member in members(outer)]
        [False, True]
    """
    found = [optimizer]
    for member in found:
        for value in vars(member).values():
            for held in value if isinstance(value, list | tuple) else (value,):
                if isinstance(held, Optimizer) and not any(held is known for known in found):
                    found.append(held)
    return found


def shown_name(optimizer: Optimizer) -> str:
    """Return what a message should call an optimizer: its class, or of several in one all theirs."""
    several = vars(optimizer).get("optimizers")
    if isinstance(several, list) and several and all(isinstance(one, Optimizer) for one in several):
        return " with ".join(map(shown_name, several))
    return type(optimizer).__name__


def wants_closure(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's ``step`` cannot do without a closure, by its signature and its class.

    SAM and its kind, which have the two halves of a step as ``first_step`` and ``second_step``, take a closure that is
    None by default and raise then.
    """
    if hasattr(optimizer, "first_step") or type(optimizer).__name__ in ASKS_FOR_LOSS:
        return True
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def check_points(optimizer: Optimizer, *, can_reset: bool) -> None:
    """Raise if an optimizer cannot go on through the interpolations of Fish with the state that it has by then.

    An optimizer that keeps points of parameter space (schedule-free, Lookahead) would step from where they were left,
    and an interpolation that moves the parameters alone would be undone by its next step.

    Args:
        optimizer: The wrapped optimizer.
        can_reset: Whether a reset would leave it without such points.

    Raises:
        ValueError: Names what works.
    """
    for member in members(optimizer):
        has_modes = callable(getattr(member, "train", None)) and callable(getattr(member, "eval", None))
        if has_modes or {cls.__name__ for cls in type(member).__mro__} & KEEPS_POINTS:
            reset = 'Fish(inner_state="reset"), ' if can_reset else ""
            raise ValueError(
                f"{type(member).__name__} keeps points of parameter space in its state, which Fish would have to "
                f"interpolate as well: use {reset}SmoothFish or IDGM, or wrap the plain optimizer that it is made of"
            )


def _holders(member: Optimizer) -> list[dict[str, Any]]:
    """Return the dictionaries in which an optimizer may count its steps: its attributes, and its groups."""
    return [vars(member), *member.param_groups]


class _Snapshot:
    """State, groups and numbers of some optimizers at one moment.

    Tensors are restored in place: a captured graph, or another optimizer that shares them, goes on with the same ones.
    """

    def __init__(self, optimizers: Sequence[Optimizer], *, by_reference: bool = False) -> None:
        parameters = {id(p): p for m in optimizers for group in m.param_groups for p in group["params"]}
        leaves = [leaf for m in optimizers for leaf in tree_leaves(dict(m.state))]
        for m in optimizers:  # entries of groups that are no hyperparameters
            leaves += [v for g in m.param_groups for k, v in g.items() if k not in getattr(m, "defaults", {})]
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
        self.tensors: list[Tensor] = [t for key, t in tensors.items() if key not in parameters]
        self._values = [] if by_reference else clone_all(self.tensors)
        self._kept: list[Tensor] = [*parameters.values(), *self.tensors]  # are never copied themselves
        self._states = [copy.deepcopy(dict(m.state), {id(t): t for t in self._kept}) for m in optimizers]
        self.numbers = [[dict(holder) for holder in _holders(m)] for m in optimizers]

    def restore(self, optimizers: Sequence[Optimizer], counters: set[tuple[bool, str]]) -> None:
        """Put it back.

        Args:
            optimizers: The optimizers.
            counters: Which entries of groups, and which numbers among the attributes.
        """
        if self._values:
            copy_all_(self.tensors, self._values)
        for member, state, numbers in zip(optimizers, self._states, self.numbers, strict=True):
            member.state.clear()
            member.state.update(copy.deepcopy(state, {id(t): t for t in self._kept}))
            for holder, before in zip(_holders(member), numbers, strict=False):
                for name in (name for of_group, name in counters if of_group is (holder is not vars(member))):
                    if name in before:
                        holder[name] = before[name]
                    else:
                        holder.pop(name, None)


class InnerState:
    """The wrapped optimizer's state as it was when it was wrapped, and before a ``meta_step``.

    Besides ``state``, some optimizers count in their groups (Prodigy's ``d``, schedule-free's ``weight_sum``) or in
    attributes. What a step changes there is such a counter; everything else, above all what a scheduler changed, is
    left alone.

    Args:
        optimizer: The wrapped optimizer.
        resets: Whether :meth:`reset` will be called, for which a state that there is by now is copied.

    Attributes:
        counters: The counters seen so far: whether it is an entry of a group (or an attribute), and its name.
        saved: What :meth:`save` saved.
    """

    def __init__(self, optimizer: Optimizer, *, resets: bool) -> None:
        self.counters: set[tuple[bool, str]] = set()
        # Several optimizers as one have no state of their own.
        self._members = [m for m in members(optimizer) if isinstance(m.state, MutableMapping)]
        self._wrapped = _Snapshot(self._members, by_reference=not resets)
        self.can_reset = resets or self.was_new
        self.saved: _Snapshot | None = None

    @property
    def was_new(self) -> bool:
        """Whether the optimizer had no state when it was wrapped."""
        return not self._wrapped.tensors

    def watch(self, step: Callable[[], Any]) -> Any:
        """Take a step and note which counters it changes.

        Args:
            step: Takes it.

        Returns:
            What it returns.
        """
        for m, numbers in zip(self._members, self._wrapped.numbers, strict=True):
            numbers += [dict(holder) for holder in _holders(m)[len(numbers) :]]  # of groups that were added since
        holders = [holder for m in self._members for holder in _holders(m)]
        before = [dict(holder) for holder in holders]
        returned = step()
        for holder, old in zip(holders, before, strict=True):
            is_group = "params" in holder
            for name, value in holder.items():
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if value is not old.get(name, _MISSING) and (is_group or is_number):
                    self.counters.add((is_group, name))
        return returned

    def reset(self) -> None:
        """Return the optimizer to what it was when it was wrapped, with the hyperparameters that it has now."""
        self._wrapped.restore(self._members, self.counters - {(True, "lr")})  # which is the user's

    def save(self, *, resets: bool) -> None:
        """Save the state, so that :meth:`restore` can undo the steps of a meta-iteration.

        Args:
            resets: Whether :meth:`reset` comes next. If that leaves an empty state, the steps write into new tensors
                and nothing has to be copied.
        """
        self.saved = _Snapshot(self._members, by_reference=resets and self.was_new)

    def restore(self) -> bool:
        """Return to what was saved.

        Returns:
            Whether anything was.
        """
        if self.saved is None:
            return False
        self.saved.restore(self._members, self.counters)
        return True

    def nonfinite(self) -> list[Tensor]:
        """Return what holds NaN or infinity in the state, from which no later step could recover."""
        leaves = [leaf for m in self._members for leaf in tree_leaves(dict(m.state))]
        found = [t for t in leaves if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]
        return [found[i] for i in find_nonfinite(found)]

    def recover(self) -> None:
        """Reset a state that holds NaN or infinity; without a copy of what it was when wrapped set that to zero."""
        if self.can_reset:
            self.reset()
        for tensor in self.nonfinite():
            tensor.zero_()
