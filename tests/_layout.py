"""What a ``GradMatch``'s state dict says in numbers, and how to make it say something else."""

from __future__ import annotations

import json
from typing import Any


def numbers_of(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The numbers, decoded."""
    numbers: dict[str, Any] = json.loads(state_dict["param_groups"][0]["gradmatch"])
    return numbers


def with_numbers(state_dict: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
    """The same state dict with other numbers."""
    groups = [{**group, "gradmatch": json.dumps(numbers)} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def in_format_3(optimizer: Any) -> dict[str, Any]:
    """The state dict as it was before format 4: all that is not the wrapped optimizer's in one entry."""
    numbers = numbers_of(optimizer.state_dict())
    own = {"version": 3, **{key: numbers[key] for key in ("method", "optimizers", "shapes")}}
    own |= optimizer._loop.state_dict()
    own.pop("held_iterates", None)
    several = getattr(optimizer.optimizer, "optimizers", None)
    if several is None:
        return {**optimizer.optimizer.state_dict(), "gradmatch": own}
    return {"optimizers": [one.state_dict() for one in several], "gradmatch": own}
