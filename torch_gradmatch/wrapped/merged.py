"""``GradMatch.state``: the wrapped optimizer's entry of each parameter and ours, as one.

Checkpointers and trainers look for all of an optimizer's tensors in ``state[parameter]``. The wrapped optimizer should
not see ours, though: some classes take whatever stands there for theirs. So there are two dictionaries, and this is a
view of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch.optim import Optimizer

from torch_gradmatch.wrapped.several import SeveralOptimizers

__all__ = ["MergedEntry", "MergedState"]


class MergedEntry(dict[str, Any]):
    """What belongs to one parameter, read when this was made. What is written goes to where it belongs, too.

    Args:
        values: By name.
        place: Says for a name in which dictionary it belongs; None for a copy that belongs nowhere.
    """

    def __init__(self, values: Any = (), place: Callable[[str], MutableMapping[str, Any] | None] | None = None) -> None:
        super().__init__(values)
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        target = None if self._place is None else self._place(key)
        if target is not None:
            target[key] = value

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        target = None if self._place is None else self._place(key)
        if target is not None:
            target.pop(key, None)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return an entry, which is made if it is missing."""
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *values: Any, **more: Any) -> None:
        """Set several entries."""
        for key, value in dict(*values, **more).items():
            self[key] = value

    def pop(self, key: str, *default: Any) -> Any:
        """Remove an entry and return it."""
        if key not in self:
            return super().pop(key, *default)
        value = self[key]
        del self[key]
        return value

    def clear(self) -> None:
        """Remove all entries."""
        for key in list(self):
            del self[key]


class MergedState(MutableMapping[Any, Any]):
    """Both as one mapping, keyed by parameter. Like a ``defaultdict``, it has an empty entry for any other.

    Args:
        optimizer: The wrapped optimizer.
        own: Our entries by parameter: the dictionary itself.
        entry_of: Returns for a parameter all that should be shown of ours.
        is_own: Says for a name whether such an entry is ours.
        is_kept: Says whether it is kept in ``own``; others are made of what a method keeps elsewhere and not set here.
        is_made: Whether the wrapped optimizer has all the state that it will have, if only ours is there.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        own: MutableMapping[Any, dict[str, Any]],
        entry_of: Callable[[Any], Mapping[str, Any]],
        is_own: Callable[[str], bool],
        is_kept: Callable[[str], bool],
        *,
        is_made: bool = True,
    ) -> None:
        self._optimizer = optimizer
        self._own = own
        self._entry_of = entry_of
        self._is_own = is_own
        self._is_kept = is_kept
        self._is_made = is_made

    def _owners(self) -> list[Optimizer]:
        if isinstance(self._optimizer, SeveralOptimizers):
            return list(self._optimizer.optimizers)
        return [self._optimizer]

    def _wrapped_state(self, parameter: Any) -> MutableMapping[Any, Any]:
        """Return the state in which the wrapped optimizer has, or would have, the entry of a parameter."""
        owners = self._owners()
        for owner in owners:
            if parameter in owner.state or any(parameter is p for g in owner.param_groups for p in g["params"]):
                return owner.state
        return owners[0].state

    def __getitem__(self, parameter: Any) -> Any:
        ours = self._entry_of(parameter) if self._own.get(parameter) else {}
        state = self._wrapped_state(parameter)
        entry = state.get(parameter, {})
        if not isinstance(entry, dict):
            return entry

        def place(key: str) -> MutableMapping[str, Any] | None:
            if key in entry or not self._is_own(key):
                wrapped: MutableMapping[str, Any] = state.setdefault(parameter, entry)
                return wrapped
            return self._own[parameter] if self._is_kept(key) else None

        return MergedEntry({**entry, **{k: v for k, v in ours.items() if k not in entry}}, place)

    def __setitem__(self, parameter: Any, values: Any) -> None:
        state = self._wrapped_state(parameter)
        if not isinstance(values, Mapping):
            state[parameter] = values
            return
        before = state.get(parameter)
        wrapped = before.keys() if isinstance(before, dict) else ()
        theirs = {k: v for k, v in values.items() if k in wrapped or not self._is_own(k)}
        ours = {k: v for k, v in values.items() if k not in theirs and self._is_kept(k)}
        if ours or parameter in self._own:
            self._own[parameter] = ours
        if theirs or before is not None:
            state[parameter] = theirs

    def __delitem__(self, parameter: Any) -> None:
        if parameter not in self:
            raise KeyError(parameter)
        self._own.pop(parameter, None)
        self._wrapped_state(parameter).pop(parameter, None)

    def __contains__(self, parameter: object) -> bool:
        return bool(self._own.get(parameter)) or any(parameter in owner.state for owner in self._owners())

    def __iter__(self) -> Iterator[Any]:
        theirs = (key for owner in self._owners() for key in owner.state)
        return iter(dict.fromkeys([*theirs, *(p for p, entry in self._own.items() if entry)]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __bool__(self) -> bool:
        # If not, torch.distributed.checkpoint lets the optimizer make the state into which it is to load.
        return any(owner.state for owner in self._owners()) or (self._is_made and any(self._own.values()))

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the entry of a parameter, or the default if there is none."""
        if key not in self:
            return default
        return self[key]

    def clear(self) -> None:
        """Remove all entries."""
        self._own.clear()
        for owner in self._owners():
            owner.state.clear()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)!r})"
