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
