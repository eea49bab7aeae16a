"""Whether two nested states are the same, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import torch


def without_prefix(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A ``GradMatch``'s state dict, its buffers named as in the module that another one holds as ``prefix``."""
    key, groups = f"slow_buffer:{prefix}", []
    for group in state["param_groups"]:
        numbers = json.loads(group["gradmatch"])
        for names in ("held_buffers", "left_buffers"):
            numbers[names] = [name.removeprefix(prefix) for name in numbers[names]]
        numbers["places"] = {name.replace(key, "slow_buffer:", 1): at for name, at in numbers["places"].items()}
        groups.append({**group, "gradmatch": json.dumps(numbers)})
    entries = {
        i: {name.replace(key, "slow_buffer:", 1): value for name, value in entry.items()}
        for i, entry in state["state"].items()
    }
    return {**state, "state": entries, "param_groups": groups}


def assert_same(one: Any, other: Any, path: str = "state") -> None:
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path
