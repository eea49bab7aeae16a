"""A hash of whatever a run depends on: numbers, tensors, data sets, functions with what they close over, objects.

By joblib's hash of pickles, which is the same in another process of the same Python; with it alone a function is its
name. Here it is its compiled code, defaults, closure and the global names that it uses, and so is a method of a class
of the user's; what an installed package brings is its name.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import torch
from joblib.hashing import NumpyHasher
from torch import Tensor
from torch.utils.data import TensorDataset

from torch_gradmatch.evaluation.task import seeded

__all__ = ["UnhashableError", "fingerprint", "fingerprint_of_data"]

INSTALLED = (*{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}, str(Path(__file__).parents[1]))


class UnhashableError(TypeError):
    """Something cannot be hashed."""


def fingerprint(value: Any) -> str:
    """Return a hash of a value.

    Args:
        value: Anything.

    Returns:
        32 hexadecimal digits.

    Raises:
        UnhashableError: If it, or something in it, can be neither read nor pickled: a file, a lock, a generator.

    Example:
        >>> def scaled(factor):
        ...     return lambda x: factor * x
        >>> fingerprint(scaled(2)) == fingerprint(scaled(2)), fingerprint(scaled(2)) == fingerprint(scaled(3))
        (True, False)
    """
    try:
        return str(_Hasher("md5").hash(value))
    except Exception as error:
        raise UnhashableError(f"something in it cannot be hashed: {error}") from error


def fingerprint_of_data(dataset: Any) -> str:
    """Return a hash of every sample of a data set, with the random numbers that it draws fixed.

    Args:
        dataset: A sequence of samples.

    Returns:
        32 hexadecimal digits.

    Raises:
        UnhashableError: As :func:`fingerprint`.
    """
    if type(dataset) is TensorDataset:
        return fingerprint(dataset.tensors)
    with seeded(0):
        return fingerprint([type(dataset), *(fingerprint(dataset[i]) for i in range(len(dataset)))])


class _Hasher(NumpyHasher):  # type: ignore[misc]
    """Pickles into a hash, and reads functions, classes and tensors by itself."""

    def save(self, value: Any) -> None:
        if isinstance(value, Tensor) and value.layout is torch.strided:
            numbers = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            value = ("tensor", str(value.dtype), tuple(value.shape), value.requires_grad, numbers)
        elif isinstance(value, torch.Generator):
            value = ("generator", value.get_state())
        elif isinstance(value, types.CodeType):
            value = ("code", value.co_code, value.co_names, value.co_varnames, list(value.co_consts))
        elif isinstance(value, types.ModuleType):
            value = ("module", value.__name__)
        elif isinstance(value, types.FunctionType | type) and ("<" in value.__qualname__ or not _is_installed(value)):
            seen = self.__dict__.setdefault("seen", {})  # a function may call itself
            if id(value) in seen:
                value = ("again", seen[id(value)])
            else:
                seen[id(value)] = len(seen)
                value = _read_class(value) if isinstance(value, type) else _read_function(value)
        super().save(value)


def _read_function(function: types.FunctionType) -> tuple[Any, ...]:
    used = sorted(_names(function.__code__) & function.__globals__.keys())
    cells = [_content(cell) for cell in function.__closure__ or ()]
    here = [(name, function.__globals__[name]) for name in used]
    return "function", function.__code__, function.__defaults__, function.__kwdefaults__, cells, here


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a function that is not there yet
        return "empty"


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*inner)


def _read_class(kind: type) -> tuple[Any, ...]:
    parts: list[Any] = []
    for name, part in sorted(vars(kind).items()):
        if isinstance(part, property):
            parts.append((name, part.fget, part.fset))
        elif isinstance(part, staticmethod | classmethod | functools.cached_property):
            parts.append((name, getattr(part, "func", None) or getattr(part, "__func__", None)))
        elif isinstance(part, types.FunctionType) or not (name.startswith(("__", "_abc_")) or hasattr(part, "__get__")):
            parts.append((name, part))
    return "class", kind.__qualname__, list(kind.__bases__), parts


def _is_installed(value: Any) -> bool:
    """Return whether a function or class is of Python, of an installed package or of this one."""
    code = getattr(value, "__code__", None)
    module = sys.modules.get(value.__module__ or "")
    file = getattr(module, "__file__", None) if code is None else code.co_filename
    if file is None:  # built in, or of a notebook
        return value.__module__ in sys.builtin_module_names
    return str(file).startswith(INSTALLED)
