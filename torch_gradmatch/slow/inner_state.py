"""Return the wrapped optimizer to what it was when it was built: ``Fish(inner_state="reset")``.

The official code of Fish builds a new inner optimizer in every meta-iteration (``reload_inner_optim`` false). Here the
same optimizer is made new again, so that schedulers, hooks and the user's own reference to it stay valid.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["NewlyBuilt"]


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


class NewlyBuilt:
    """Knows how the wrapped optimizer looked when it was built, and makes it look so again.

    Its per-parameter state becomes what its constructor makes: nothing for most classes, the initial sums for Adagrad.
    Some optimizers also count in their parameter groups (``step``, Prodigy's ``d``, schedule-free's ``weight_sum``).
    An entry of a group is such a counter if the optimizer's own ``step`` adds or changes it and its constructor takes
    no argument of that name; everything else in the groups, above all what a scheduler changed, stays.

    An optimizer whose constructor cannot be called again from its groups goes back to what it was when it was wrapped.

    Args:
        optimizer: The wrapped optimizer.
        keep_state: Whether that fallback includes the per-parameter state (a copy, if there is any by now) or leaves
            it empty.
    """

    def __init__(self, optimizer: Optimizer, *, keep_state: bool = True) -> None:
        self.optimizer = optimizer
        self._accepted, takes_any = _constructor_arguments(optimizer)
        new = _build_again(optimizer)
        self._rebuilds_state = new is not None and len(new.state) > 0
        self._state_when_wrapped = self._copy_state(optimizer) if new is None and keep_state else {}
        self._new_groups = [self._entries(group) for group in (new or optimizer).param_groups]
        self.counters: set[str] = {"step"} - self._accepted
        if new is not None and optimizer.state and not takes_any:  # trained before: counters may have moved already
            for group, fresh in zip(optimizer.param_groups, self._new_groups, strict=True):
                moved = {k for k, v in fresh.items() if k in group and not _same(group[k], v)}
                self.counters |= {k for k in moved if not isinstance(fresh[k], bool)}  # a mode is no counter

    @staticmethod
    def _copy_state(optimizer: Optimizer) -> dict[Any, Any]:
        return {parameter: copy.deepcopy(entry) for parameter, entry in optimizer.state.items()}

    def _entries(self, group: dict[str, Any]) -> dict[str, Any]:
        """Copy the entries of a group that may turn out to be counters."""
        skipped = {"params", "param_names", *self._accepted}
        return {k: copy.deepcopy(v) for k, v in group.items() if k not in skipped}

    def before_step(self) -> list[dict[str, Any]]:
        """Note the groups before a step of the wrapped optimizer.

        Returns:
            What :meth:`after_step` wants.
        """
        for group in self.optimizer.param_groups[len(self._new_groups) :]:
            self._new_groups.append(self._entries(group))
        return [dict(group) for group in self.optimizer.param_groups]

    def after_step(self, before: list[dict[str, Any]]) -> None:
        """Learn from a step of the wrapped optimizer which entries of the groups it counts in.

        Args:
            before: What :meth:`before_step` returned.
        """
        for old, group in zip(before, self.optimizer.param_groups, strict=False):
            for key, value in group.items():
                unchanged = key in old and (old[key] is value or _same(old[key], value))
                if key not in self._accepted and key != "params" and not unchanged:
                    self.counters.add(key)

    def reset(self) -> None:
        """Make the wrapped optimizer new, with the hyperparameters it has now.

        Raises:
            RuntimeError: If its constructor makes state but refuses the present hyperparameters.
        """
        state = self.optimizer.state
        state.clear()
        if self._rebuilds_state:
            new = _build_again(self.optimizer)
            if new is None:
                raise RuntimeError(
                    f"{type(self.optimizer).__name__} could not be built again with its present hyperparameters; "
                    'use inner_state="carry"'
                )
            state.update(new.state)
        else:
            state.update({p: copy.deepcopy(entry) for p, entry in self._state_when_wrapped.items()})
        for group, fresh in zip(self.optimizer.param_groups, self._new_groups, strict=False):
            for key in self.counters:
                if key in fresh:
                    group[key] = copy.deepcopy(fresh[key])
                else:
                    group.pop(key, None)
