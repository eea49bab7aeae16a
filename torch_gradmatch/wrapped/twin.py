"""Another optimizer like one that there is: of the same class, with the same hyperparameters, as if newly built.

A class of optimizers says nowhere how an object of it was built. What its constructor takes is looked for by name: in
the hyperparameters (``defaults``), in the groups, and in the object's attributes, which is where classes that hold
another optimizer keep that and their own settings.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torch_gradmatch.wrapped.members import NO_SETTINGS, members, own_attributes

__all__ = ["build_again", "constructor_arguments", "copy_optimizer"]


def constructor_arguments(optimizer: Optimizer) -> tuple[frozenset[str], bool]:
    """Return what the constructor of an optimizer's class takes.

    Args:
        optimizer: Any.

    Returns:
        The arguments' names, and whether it takes any others too (``**kwargs``).
    """
    parameters = inspect.signature(type(optimizer).__init__).parameters.values()
    return frozenset(p.name for p in parameters), any(p.kind is p.VAR_KEYWORD for p in parameters)


def build_again(
    optimizer: Optimizer, stand_ins: Mapping[Tensor, Tensor] | None = None, *, decays: bool = True
) -> Optimizer | None:
    """Build an optimizer of the same class with the present hyperparameters.

    Args:
        optimizer: The one to imitate. It is not touched.
        stand_ins: For some parameters the one to take instead; the others are left out. None for the same parameters.
        decays: Whether to keep weight decay; without it weight decay is 0, where the class calls it that.

    Returns:
        The new optimizer, or None if there is no way to build it from what the old one keeps.
    """
    for positional, keywords in _ways(optimizer, stand_ins, decays):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they were given when the user built it
                new = type(optimizer)(*positional, **keywords)
            if len(new.param_groups) == len(optimizer.param_groups) or stand_ins is not None:
                return new
        except Exception:  # noqa: BLE001  any class of optimizer, any reason: there may be another way
            continue
    return None


def copy_optimizer(optimizer: Optimizer, stand_ins: Mapping[Tensor, Tensor] | None = None) -> Optimizer:
    """Return an optimizer in the same state over the same parameters, which shares nothing else with the original.

    Hooks do not come along, and neither does what a scheduler wrapped around ``step``: whatever they do, they do to
    the original.

    Args:
        optimizer: The original.
        stand_ins: For some parameters the one to take instead; the others are left out of the groups.

    Returns:
        The copy.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(()))
        >>> original = torch.optim.SGD([w], lr=0.5)
        >>> copied = copy_optimizer(original)
        >>> copied.param_groups[0]["params"][0] is w, copied.param_groups is original.param_groups
        (True, False)
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    memo: dict[int, Any] = {id(p): p if stand_ins is None else stand_ins.get(p, p) for p in parameters}
    copies = {path: object.__new__(type(member)) for path, member in members(optimizer).items()}
    memo |= {id(member): copies[path] for path, member in members(optimizer).items()}
    for path, member in members(optimizer).items():
        attributes = {k: v for k, v in vars(member).items() if k != "step" and not k.startswith("_optimizer_")}
        vars(copies[path]).update(copy.deepcopy(attributes, memo))
        Optimizer.__setstate__(copies[path], {})
    if stand_ins is not None:
        kept = set(stand_ins.values())
        for group in copies[""].param_groups:
            group["params"] = [p for p in group["params"] if p in kept]
    return copies[""]


def _ways(
    optimizer: Optimizer, stand_ins: Mapping[Tensor, Tensor] | None, decays: bool
) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Yield arguments to try, the most likely first."""
    accepted, takes_any = constructor_arguments(optimizer)
    defaults: Mapping[str, Any] = getattr(optimizer, "defaults", {})
    hyperparameters = {k: v for k, v in defaults.items() if k in accepted}
    plain, whole = (_groups(optimizer, stand_ins, names, decays) for names in (accepted, None))
    settings = _undecayed(hyperparameters, decays)
    if takes_any:
        yield [plain], _undecayed(dict(defaults), decays)
    yield [plain], settings
    attributes = {name.lstrip("_"): value for name, value in own_attributes(optimizer).items()}
    kept = {k: v for k, v in attributes.items() if k in accepted and not isinstance(v, Optimizer)}
    yield [plain], kept | settings
    yield [whole], kept | settings  # the class distinguishes its groups by entries that are no arguments
    for name in accepted:  # a class that holds another optimizer was given that, or its class
        base = attributes.get(name)
        if isinstance(base, list) and base and all(isinstance(one, Optimizer) for one in base):
            twins = [build_again(one, stand_ins, decays=decays) for one in base]
            if None not in twins:
                yield [], settings | kept | {name: twins}
        if not isinstance(base, Optimizer):
            continue
        if twin := build_again(base, stand_ins, decays=decays):
            yield [], settings | kept | {name: twin}  # its defaults may be the other's
        of_base = constructor_arguments(base)[0]
        its = {k: v for k, v in base.defaults.items() if k in of_base and k not in accepted}
        yield [plain], kept | settings | _undecayed(its, decays) | {name: type(base)}


def _groups(
    optimizer: Optimizer, stand_ins: Mapping[Tensor, Tensor] | None, names: frozenset[str] | None, decays: bool
) -> list[dict[str, Any]]:
    """Return the groups, with those entries that have these names or with all."""
    groups = []
    for group in optimizer.param_groups:
        params = group["params"] if stand_ins is None else [stand_ins[p] for p in group["params"] if p in stand_ins]
        if not params and stand_ins is not None:
            continue
        kept = {k: v for k, v in group.items() if k not in NO_SETTINGS and (names is None or k in names)}
        groups.append({"params": list(params), **_undecayed(kept, decays)})
    return groups


def _undecayed(settings: dict[str, Any], decays: bool) -> dict[str, Any]:
    """Copy settings, without weight decay if there should be none."""
    copied = {k: v if isinstance(v, Tensor | type) else copy.deepcopy(v) for k, v in settings.items()}
    if not decays:
        for name, value in copied.items():
            if "weight_decay" in name and isinstance(value, float | int) and not isinstance(value, bool):
                copied[name] = 0.0
    return copied
