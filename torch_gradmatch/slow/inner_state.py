"""The inner optimizer's state: reset for ``Fish(inner_state="reset")``, saved and restored around a meta-iteration.

The official code of Fish builds a new inner optimizer in every meta-iteration (``reload_inner_optim`` false). Here the
same optimizer is made new again, so that schedulers, hooks and the user's own reference to it stay valid.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_gradmatch._foreach import by_kind, clone_all
from torch_gradmatch.slow.finite import find_nonfinite

__all__ = ["InnerState"]


def _constructor_arguments(optimizer: Optimizer) -> tuple[frozenset[str], bool]:
    """Return the names that an optimizer's constructor takes and whether it takes any others too (``**kwargs``)."""
    parameters = inspect.signature(type(optimizer).__init__).parameters.values()
    return frozenset(p.name for p in parameters), any(p.kind is p.VAR_KEYWORD for p in parameters)


def _build_again(optimizer: Optimizer) -> Optimizer | None:
    """Build an optimizer of the same class over the same parameters and present hyperparameters.

    Args:
        optimizer: The one to imitate. It is not touched.

    Returns:
        The new optimizer, or None if its constructor does not take the hyperparameters it keeps.
    """
    accepted, _ = _constructor_arguments(optimizer)
    hyperparameters = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    groups = [{k: v for k, v in g.items() if k == "params" or k in accepted} for g in optimizer.param_groups]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were given when the user built it
            return type(optimizer)(groups, **hyperparameters)
    except Exception:  # noqa: BLE001  any class of optimizer, any reason: the caller has another way
        return None


def _same(a: object, b: object) -> bool:
    try:
        equal: Any = a == b
        return bool(equal.all() if isinstance(equal, Tensor) else equal)
    except (RuntimeError, ValueError):  # tensors or arrays of different shapes, or inside a list
        return False


class InnerState:
    """What the wrapped optimizer keeps from one step to the next: in its ``state`` and, as counters, in its groups.

    It knows how the optimizer looked when it was built. Its per-parameter state then is what its constructor makes:
    nothing for most classes, the initial sums for Adagrad. Some optimizers also count in their parameter groups
    (``step``, Prodigy's ``d``, schedule-free's ``weight_sum``). An entry of a group is such a counter if the
    optimizer's own ``step`` adds or changes it and its constructor takes no argument of that name; everything else in
    the groups, above all what a scheduler changed, is left alone.

    An optimizer whose constructor cannot be called again from its groups goes back to what it was when it was wrapped.

    Args:
        optimizer: The wrapped optimizer.
        resets: Whether :meth:`reset` may be called, for which the optimizer is built once more here.
        keep_state: Whether that fallback includes the per-parameter state (a copy, if there is any by now) or leaves
            it empty.

    Attributes:
        counters: Names of the entries of groups that count.
        resets: As given.
    """

    def __init__(self, optimizer: Optimizer, *, resets: bool, keep_state: bool = True) -> None:
        self.optimizer = optimizer
        self.resets = resets
        self._accepted, takes_any = _constructor_arguments(optimizer)
        self.counters: set[str] = {"step"} - self._accepted
        self._saved: _Saved | None = None
        self._new_groups: list[dict[str, Any]] = []
        if not resets:
            return
        new = _build_again(optimizer)
        self._rebuilds_state = new is not None and len(new.state) > 0
        self._state_when_wrapped = _copy_state(optimizer) if new is None and keep_state else {}
        self._new_groups = [self._counting(group) for group in (new or optimizer).param_groups]
        if new is not None and optimizer.state and not takes_any:  # trained before: counters may have moved already
            for group, fresh in zip(optimizer.param_groups, self._new_groups, strict=True):
                moved = {k for k, v in fresh.items() if k in group and not _same(group[k], v)}
                self.counters |= {k for k in moved if not isinstance(fresh[k], bool)}  # a mode is no counter

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_saved": None}  # lives within one meta-iteration

    def _counting(self, group: dict[str, Any]) -> dict[str, Any]:
        """Copy the entries of a group that may turn out to be counters."""
        skipped = {"params", "param_names", *self._accepted}
        return {k: copy.deepcopy(v) for k, v in group.items() if k not in skipped}

    def before_step(self) -> list[dict[str, Any]]:
        """Note the groups before a step of the wrapped optimizer.

        Returns:
            What :meth:`after_step` wants.
        """
        if self.resets:
            for group in self.optimizer.param_groups[len(self._new_groups) :]:
                self._new_groups.append(self._counting(group))
        return [dict(group) for group in self.optimizer.param_groups]

    def after_step(self, before: list[dict[str, Any]]) -> None:
        """Learn from a step of the wrapped optimizer which entries of the groups it counts in.

        Args:
            before: What :meth:`before_step` returned.
        """
        for old, group in zip(before, self.optimizer.param_groups, strict=False):
            for key, value in group.items():
                if key in old and old[key] is value:
                    continue
                if key not in self._accepted and key != "params" and not (key in old and _same(old[key], value)):
                    self.counters.add(key)

    def reset(self) -> None:
        """Make the wrapped optimizer new, with the hyperparameters it has now.

        Raises:
            RuntimeError: If its constructor makes state but refuses the present hyperparameters.
        """
        state = self.optimizer.state
        new_state = {p: copy.deepcopy(entry) for p, entry in self._state_when_wrapped.items()}
        if self._rebuilds_state:
            new = _build_again(self.optimizer)
            if new is None:
                raise RuntimeError(
                    f"{type(self.optimizer).__name__} could not be built again with its present hyperparameters; "
                    'use inner_state="carry"'
                )
            new_state = dict(new.state)
        state.clear()
        state.update(new_state)
        self._put_counters(self._new_groups)

    def _put_counters(self, groups: list[dict[str, Any]]) -> None:
        for group, values in zip(self.optimizer.param_groups, groups, strict=False):
            for key in self.counters:
                if key in values:
                    group[key] = copy.deepcopy(values[key])
                else:
                    group.pop(key, None)

    def is_nonfinite(self) -> bool:
        """Return whether the state holds NaN or infinity, from which no later step could recover."""
        entries = [entry for entry in self.optimizer.state.values() if isinstance(entry, dict)]
        tensors = [v for entry in entries for v in entry.values() if isinstance(v, Tensor)]
        return bool(find_nonfinite([t for t in tensors if t.is_floating_point() or t.is_complex()]))

    # ------------------------------------------------------------------------------------------- for a meta-iteration

    def save(self, *, by_reference: bool = False) -> None:
        """Save the state, so that :meth:`restore` can undo the inner steps of a meta-iteration.

        Args:
            by_reference: Copy no tensor, since the state is about to be reset: then the steps write into others.
        """
        groups = [self._counting(group) for group in self.optimizer.param_groups]
        self._saved = _Saved(self.optimizer, groups, by_reference, self._saved)

    def restore(self) -> bool:
        """Return to the state saved, the very same tensors with the values that they had.

        Returns:
            Whether there was one.
        """
        if self._saved is None or self._saved.is_spent:
            return False
        self._saved.restore(self.optimizer)
        self._put_counters(self._saved.groups)
        self._saved.spend()
        return True

    def forget(self) -> None:
        """Do without the state saved; its memory is for the next."""
        if self._saved is not None:
            self._saved.spend()


def _copy_state(optimizer: Optimizer) -> dict[Any, Any]:
    return {parameter: copy.deepcopy(entry) for parameter, entry in optimizer.state.items()}


class _Saved:
    """A copy of an optimizer's ``state``, all tensors in one operation.

    Args:
        optimizer: The optimizer.
        groups: The entries of its groups that may be counters.
        by_reference: Copy no tensor.
        older: Whose memory to use again if it fits.
    """

    def __init__(
        self, optimizer: Optimizer, groups: list[dict[str, Any]], by_reference: bool, older: _Saved | None
    ) -> None:
        self.groups = groups
        self.is_spent = False
        self._entries: list[tuple[Any, Any, dict[Any, Any]]] = []
        self._tensors: list[Tensor] = []
        for key, entry in optimizer.state.items():
            values: dict[Any, Any] = {}
            for name, value in entry.items() if isinstance(entry, dict) else ():
                if isinstance(value, Tensor):
                    self._tensors.append(value)
                    values[name] = value
                else:
                    values[name] = value if by_reference else copy.deepcopy(value)
            self._entries.append((key, entry if isinstance(entry, dict) else copy.deepcopy(entry), values))
        self._copies: list[Tensor] = []
        self._by_kind: list[list[list[Tensor]]] = []  # copies and tensors
        if by_reference:
            return
        if older is not None and older.is_of(self._tensors):
            self._copies, self._by_kind = older._copies, older._by_kind
            with torch.no_grad():
                for copies, tensors in self._by_kind:
                    torch._foreach_copy_(copies, tensors)
        else:
            self._copies = clone_all(self._tensors)
            self._by_kind = [lists for _, lists in by_kind(self._copies, self._tensors)]

    def is_of(self, tensors: list[Tensor]) -> bool:
        """Return whether the copies here are of just these tensors."""
        return len(tensors) == len(self._copies) == len(self._tensors) and all(map(is_, tensors, self._tensors))

    def restore(self, optimizer: Optimizer) -> None:
        optimizer.state.clear()
        for key, entry, values in self._entries:
            if isinstance(entry, dict):
                entry.clear()
                entry.update(values)
            optimizer.state[key] = entry
        with torch.no_grad():
            for copies, tensors in self._by_kind:
                torch._foreach_copy_(tensors, copies)

    def spend(self) -> None:
        self.is_spent = True
        self._entries = []
        if not self._copies:
            self._tensors = []
