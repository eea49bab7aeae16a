"""Values that an optimizer may keep outside its state, copied and compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["copy_plain", "is_plain", "same"]

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def is_plain(value: object) -> bool:
    """Return whether a value is a number, a string, a tensor or a container of such: it can be copied and compared."""
    if isinstance(value, nn.Parameter):
        return False
    if isinstance(value, Mapping):
        return all((isinstance(k, Tensor) or is_plain(k)) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    return isinstance(value, (Tensor, torch.Generator, *_SIMPLE))


def copy_plain(values: Mapping[str, Any], parameters: list[Any]) -> dict[str, Any]:
    """Copy those of some values that are plain.

    Args:
        values: By name.
        parameters: Tensors that are not copied but stay themselves: dictionaries may be keyed by them.

    Returns:
        The copies.
    """
    memo = {id(p): p for p in parameters}
    return {
        name: value.clone_state() if isinstance(value, torch.Generator) else copy.deepcopy(value, memo)
        for name, value in values.items()
        if is_plain(value)
    }


def same(one: object, other: object) -> bool:
    """Return whether two plain values are the same, tensors element by element."""
    if isinstance(one, torch.Generator) and isinstance(other, torch.Generator):
        return torch.equal(one.get_state(), other.get_state())
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return (
            isinstance(one, Tensor)
            and isinstance(other, Tensor)
            and one.shape == other.shape
            and bool((one == other).all())
        )
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError):  # arrays have no one answer
        return False
