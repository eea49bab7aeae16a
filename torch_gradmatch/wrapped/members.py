"""Optimizers inside an optimizer: Lookahead, SAM and their like hold the one that takes the steps as an attribute."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

__all__ = [
    "NO_SETTINGS",
    "NUMBERS",
    "class_name",
    "members",
    "own_attributes",
    "same_classes",
    "shown_name",
]

NUMBERS = "gradmatch"  # in every group; what checkpoints hold of the method is saved there, else it is empty
NO_SETTINGS = frozenset({"params", "param_names", NUMBERS})  # entries of groups
_OWN = {"state", "param_groups", "defaults", "step"}  # what every optimizer has


def members(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Return an optimizer and all those inside it, each once.

    Args:
        optimizer: Any.

    Returns:
        By the attributes that lead there, in order: itself under ``""``, then for instance ``"base_optimizer"`` and
        ``"optimizers[0]"``.

    Example:
        >>> import torch
        >>> inner = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> outer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> outer.base = inner
        >>> list(members(outer))
        ['', 'base']
    """
    found: dict[str, Optimizer] = {}
    _collect(optimizer, "", found)
    return found


def _collect(optimizer: Optimizer, path: str, found: dict[str, Optimizer]) -> None:
    if any(optimizer is known for known in found.values()):
        return
    found[path] = optimizer
    prefix = f"{path}." if path else ""
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer):
            _collect(value, prefix + name, found)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                if isinstance(item, Optimizer):
                    _collect(item, f"{prefix}{name}[{index}]", found)


def own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return what an object keeps besides that which every optimizer has: not state, groups, defaults and hooks.

    Args:
        optimizer: Any.

    Returns:
        Attributes by name. The ``step`` that a scheduler has put on the object is none of its own.
    """
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name not in _OWN and not name.startswith(("_optimizer_", "_zero_grad_"))
    }


def shown_name(optimizer: Optimizer) -> str:
    """Return what a message should call an optimizer.

    Args:
        optimizer: Any.

    Returns:
        The name of its class; of several in one, of all theirs.
    """
    several = vars(optimizer).get("optimizers")
    if isinstance(several, list) and several and all(isinstance(one, Optimizer) for one in several):
        return " with ".join(map(shown_name, several))
    return type(optimizer).__name__


def class_name(optimizer: Optimizer) -> str:
    """Return by what name to recognize an optimizer's class: that of its package and its own.

    Args:
        optimizer: Any.

    Returns:
        For instance ``"torch.Adam"``: packages move classes between their modules.
    """
    package = type(optimizer).__module__.partition(".")[0]
    return f"{'__main__' if package == '__mp_main__' else package}.{type(optimizer).__qualname__}"


def same_classes(theirs: object, ours: list[str]) -> bool:
    """Return whether names by :func:`class_name` are those of the same classes.

    Args:
        theirs: From a state dict.
        ours: Of the optimizers that there are.

    Returns:
        True also if a class of the script that runs is named in one and that script was imported in the other.
    """
    if not isinstance(theirs, list) or len(theirs) != len(ours):
        return False
    for their, our in zip(theirs, ours, strict=True):
        of_script = "__main__" in (str(their).partition(".")[0], our.partition(".")[0])
        if their != our and not (of_script and str(their).partition(".")[2] == our.partition(".")[2]):
            return False
    return True
