"""A copy of an optimizer that takes steps in its place."""

from __future__ import annotations

import copy
from typing import Any

from torch.optim import Optimizer

from torch_gradmatch.slow.inner_state import members

__all__ = ["copy_optimizer"]


def copy_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer in the same state over the same parameters, which shares nothing else with the original.

    Hooks do not come along, and neither does what a scheduler wrapped around ``step``: whatever they do, they do to
    the original.

    Args:
        optimizer: The original.

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
    inside = members(optimizer)
    copies = [object.__new__(type(member)) for member in inside]
    memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    memo |= {id(member): copied for member, copied in zip(inside, copies, strict=True)}
    for member, copied in zip(inside, copies, strict=True):
        attributes = {k: v for k, v in vars(member).items() if k != "step" and not k.startswith("_optimizer_")}
        vars(copied).update(copy.deepcopy(attributes, memo))
        Optimizer.__setstate__(copied, {})
    return copies[0]
