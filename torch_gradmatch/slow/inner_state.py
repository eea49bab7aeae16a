"""The inner optimizer's state: reset for ``Fish(inner_state="reset")``, saved and restored around a meta-iteration.

The official code of Fish builds a new inner optimizer in every meta-iteration (``reload_inner_optim`` false). Here the
same optimizer is made new again, so that schedulers, hooks and the user's own reference to it stay valid.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_gradmatch._foreach import by_kind, clone_all
from torch_gradmatch._random_state import RandomState
from torch_gradmatch.slow.finite import find_nonfinite
from torch_gradmatch.wrapped.members import NO_SETTINGS, members, shown_name
from torch_gradmatch.wrapped.traits import STEPS, Traits
from torch_gradmatch.wrapped.twin import build_again, constructor_arguments
from torch_gradmatch.wrapped.values import copy_plain, same
from torch_gradmatch.wrapped.watched import Twin

__all__ = ["InnerState", "resets_all"]


class _Member:
    """One of the optimizers whose state is kept, and how it looked when it was new.

    Args:
        optimizer: The optimizer.
        counters: Names of those of its attributes that its steps change.
        accepted: What constructors take: entries of groups that are hyperparameters and no counters.
    """

    def __init__(self, optimizer: Optimizer, counters: tuple[str, ...], accepted: frozenset[str]) -> None:
        self.optimizer = optimizer
        self.accepted = accepted
        self.takes_any = constructor_arguments(optimizer)[1]
        self.counters = counters
        self.rebuilds_state = False
        self.new_state: dict[Any, Any] = {}
        self.new_groups: list[dict[str, Any]] = []
        self.new_attributes: dict[str, Any] = {}

    def counting(self, group: dict[str, Any], *, hyperparameters: bool = False) -> dict[str, Any]:
        """Copy the entries of a group that may turn out to be counters, with or without what is a hyperparameter."""
        skipped = NO_SETTINGS | (frozenset() if hyperparameters else self.accepted)
        return {k: copy.deepcopy(v) for k, v in group.items() if k not in skipped}

    def attributes(self) -> dict[str, Any]:
        """Copy the attributes that count."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        held = vars(self.optimizer)
        return copy_plain({name: held[name] for name in self.counters if name in held}, parameters)

    def put_counters(self, groups: list[dict[str, Any]], attributes: dict[str, Any], names: set[str]) -> None:
        """Set the counters of groups and object."""
        for group, values in zip(self.optimizer.param_groups, groups, strict=False):
            for key in names:
                if key in values:
                    group[key] = copy.deepcopy(values[key])
                else:
                    group.pop(key, None)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        vars(self.optimizer).update(copy_plain(attributes, parameters))


class InnerState:
    """What the wrapped optimizer keeps from one step to the next: in ``state``, and as counters in groups and object.

    It knows how the optimizer looked when it was built. Its per-parameter state then is what its constructor makes:
    nothing for most classes, the initial sums for Adagrad. Some optimizers also count in their parameter groups
    (``step``, Prodigy's ``d``, schedule-free's ``weight_sum``). An entry of a group is such a counter if the
    optimizer's own ``step`` adds or changes it and its constructor takes no argument of that name; everything else in
    the groups, above all what a scheduler changed, is left alone. Counters that are attributes of the object are those
    that a twin's steps have changed. Optimizers inside the optimizer (Lookahead's, SAM's) are treated alike.

    An optimizer whose constructor cannot be called again from what it keeps goes back to what it was when it was
    wrapped.

    Args:
        optimizer: The wrapped optimizer.
        resets: Whether :meth:`reset` may be called, for which the optimizer is built once more here.
        keep_state: Whether that fallback includes the per-parameter state (a copy, if there is any by now) or leaves
            it empty.
        counters: For each member (see :func:`~torch_gradmatch.wrapped.members.members`) the names of the object's
            attributes that its steps change.

    Attributes:
        counters: Names of the entries of groups that count.
        resets: As given.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        resets: bool,
        keep_state: bool = True,
        counters: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.resets = resets
        inside = members(optimizer)
        # A group belongs to the optimizer that holds another as well as to that one.
        self._accepted = frozenset().union(*(constructor_arguments(member)[0] for member in inside.values()))
        self._members = {p: _Member(m, (counters or {}).get(p, ()), self._accepted) for p, m in inside.items()}
        self.counters: set[str] = {"step"} - self._accepted
        self._written: set[str] = set()  # hyperparameters that its steps change as a scheduler would
        self._saved: _Saved | None = None
        if not resets:
            return
        random_state = RandomState.capture({p.device for group in optimizer.param_groups for p in group["params"]})
        new = build_again(optimizer)
        random_state.restore()
        of_new = {} if new is None else members(new)
        for path, member in self._members.items():
            fresh = of_new.get(path)
            member.rebuilds_state = fresh is not None and len(fresh.state) > 0
            if fresh is None and keep_state:
                member.new_state = {p: copy.deepcopy(entry) for p, entry in member.optimizer.state.items()}
            member.new_groups = [member.counting(group) for group in (fresh or member.optimizer).param_groups]
            newest = member if fresh is None else _Member(fresh, member.counters, self._accepted)
            member.new_attributes = newest.attributes()
            if fresh is not None and member.optimizer.state and not member.takes_any:
                # Trained before: counters may have moved already. A mode is no counter.
                for group, values in zip(member.optimizer.param_groups, member.new_groups, strict=True):
                    moved = {k for k, v in values.items() if k in group and not same(group[k], v)}
                    self.counters |= {k for k in moved if not isinstance(values[k], bool)}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_saved": None}  # lives within one meta-iteration

    def before_step(self) -> list[dict[str, Any]]:
        """Note the groups before a step of the wrapped optimizer.

        Returns:
            What :meth:`after_step` wants.
        """
        groups = self.optimizer.param_groups
        if self.resets:
            for member in self._members.values():
                for group in member.optimizer.param_groups[len(member.new_groups) :]:
                    member.new_groups.append(member.counting(group))
        return [dict(group) for group in groups]

    def after_step(self, before: list[dict[str, Any]]) -> None:
        """Learn from a step of the wrapped optimizer which entries of the groups it counts in.

        Args:
            before: What :meth:`before_step` returned.
        """
        accepted = self._accepted
        for old, group in zip(before, self.optimizer.param_groups, strict=False):
            for key, value in group.items():
                if key in old and old[key] is value:
                    continue
                if key not in NO_SETTINGS and not (key in old and same(old[key], value)):
                    (self._written if key in accepted else self.counters).add(key)

    def reset(self) -> None:
        """Make the wrapped optimizer new, with the hyperparameters it has now.

        Raises:
            RuntimeError: If its constructor makes state but refuses the present hyperparameters.
        """
        of_new: dict[str, Optimizer] = {}
        if any(member.rebuilds_state for member in self._members.values()):
            new = build_again(self.optimizer)
            if new is None:
                raise RuntimeError(
                    f"{shown_name(self.optimizer)} could not be built again with its present hyperparameters; "
                    'use inner_state="carry"'
                )
            of_new = members(new)
        done: set[int] = set()  # two members may share one state
        for path, member in self._members.items():
            state = member.optimizer.state
            if id(state) not in done:
                done.add(id(state))
                fresh = member.new_state
                new_state = {p: copy.deepcopy(entry) for p, entry in fresh.items()}
                if member.rebuilds_state:
                    new_state = dict(of_new[path].state)
                state.clear()
                state.update(new_state)
            member.put_counters(member.new_groups, member.new_attributes, self.counters)

    def is_empty(self) -> bool:
        """Return whether there is nothing that :meth:`reset` could reset."""
        counts = any(name in group for group in self.optimizer.param_groups for name in self.counters)
        return not counts and not any(member.optimizer.state for member in self._members.values())

    def is_nonfinite(self) -> bool:
        """Return whether the state holds NaN or infinity, from which no later step could recover."""
        states = [member.optimizer.state for member in self._members.values()]
        entries = [entry for state in states for entry in state.values() if isinstance(entry, dict)]
        tensors = [v for entry in entries for v in entry.values() if isinstance(v, Tensor)]
        return bool(find_nonfinite([t for t in tensors if t.is_floating_point() or t.is_complex()]))

    # ------------------------------------------------------------------------------------------- for a meta-iteration

    def save(self, *, by_reference: bool = False) -> None:
        """Save the state, so that :meth:`restore` can undo the inner steps of a meta-iteration.

        Args:
            by_reference: Copy no tensor, since the state is about to be reset: then the steps write into others.
        """
        self._saved = _Saved(list(self._members.values()), by_reference, self._saved)

    def restore(self) -> bool:
        """Return to the state saved, the very same tensors with the values that they had.

        Returns:
            Whether there was one.
        """
        if self._saved is None or self._saved.is_spent:
            return False
        self._saved.restore(self.counters | self._written)
        self._saved.spend()
        return True

    def forget(self) -> None:
        """Do without the state saved; its memory is for the next."""
        if self._saved is not None:
            self._saved.spend()


def resets_all(optimizer: Optimizer, traits: Traits) -> bool:
    """Return whether :meth:`InnerState.reset` makes an optimizer new: whether it then steps as at first.

    Seen at a twin, which takes the same steps twice, with a reset in between.

    Args:
        optimizer: The wrapped optimizer, which is not touched.
        traits: What it is like; it has to be known.

    Returns:
        False if it keeps something where no reset reaches.
    """
    if type(optimizer).__module__.startswith("torch.optim."):
        return True  # every one of them is a test
    random_state = RandomState.capture({p.device for group in optimizer.param_groups for p in group["params"]})
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
            warnings.simplefilter("ignore")
            twin = Twin(optimizer, traits.dtype, traits.manner)
            state = InnerState(twin.optimizer, resets=True, counters=traits.counters)
            walks = []
            for _ in range(2):
                before = state.before_step()
                begin = [p.detach().clone() for p in twin.points]
                twin.run(STEPS[-1])
                walks.append([p.detach().clone() for p in twin.points])
                state.after_step(before)
                with torch.no_grad():
                    for p, value in zip(twin.points, begin, strict=True):
                        p.copy_(value)
                state.reset()
    except Exception:  # noqa: BLE001  any class of optimizer, any reason: nobody knows
        return False
    finally:
        random_state.restore()
    return all(map(torch.equal, *walks))


class _Saved:
    """A copy of what some optimizers keep, all tensors in one operation.

    Args:
        kept: The optimizers.
        by_reference: Copy no tensor.
        older: Whose memory to use again if it fits.
    """

    def __init__(self, kept: list[_Member], by_reference: bool, older: _Saved | None) -> None:
        self.is_spent = False
        self._kept = [
            (m, m.attributes(), [m.counting(group, hyperparameters=True) for group in m.optimizer.param_groups])
            for m in kept
        ]
        self._entries: list[tuple[Any, Any, Any, dict[Any, Any]]] = []
        self._tensors: list[Tensor] = []
        states = {id(m.optimizer.state): m.optimizer.state for m in kept}
        self._states = list(states.values())
        for state in self._states:
            for key, entry in state.items():
                values: dict[Any, Any] = {}
                for name, value in entry.items() if isinstance(entry, dict) else ():
                    if isinstance(value, Tensor):
                        self._tensors.append(value)
                        values[name] = value
                    else:
                        values[name] = value if by_reference else copy.deepcopy(value)
                self._entries.append((state, key, entry if isinstance(entry, dict) else copy.deepcopy(entry), values))
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

    def restore(self, counters: set[str]) -> None:
        for state in self._states:
            state.clear()
        for state, key, entry, values in self._entries:
            if isinstance(entry, dict):
                entry.clear()
                entry.update(values)
            state[key] = entry
        with torch.no_grad():
            for copies, tensors in self._by_kind:
                torch._foreach_copy_(tensors, copies)
        for member, attributes, groups in self._kept:
            member.put_counters(groups, attributes, counters)

    def spend(self) -> None:
        self.is_spent = True
        self._entries, self._kept, self._states = [], [], []
        if not self._copies:
            self._tensors = []
