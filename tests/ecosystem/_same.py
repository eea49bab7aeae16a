"""Whether two nested states are the same, bit for bit."""

from __future__ import annotations

from typing import Any

import torch


def without_prefix(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A ``GradMatch``'s state dict, its buffers named as in the module that another one holds as ``prefix``."""
    buffers = {name.removeprefix(prefix): value for name, value in state["gradmatch"]["slow_buffers"].items()}
    return {**state, "gradmatch": {**state["gradmatch"], "slow_buffers": buffers}}


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
