"""A hash of whatever a run depends on: numbers, tensors, data sets, functions with what they close over, objects.

It is the same in another process of the same Python. A function is its compiled code, defaults, closure and the global
names that it uses, and so is a method of a class of the user's; what an installed package brings is its name.
"""

from __future__ import annotations

import functools
import hashlib
import random
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from torch_gradmatch.gradients.replay import RandomState

__all__ = ["UnhashableError", "fingerprint", "fingerprint_of_data"]

INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
OWN = str(Path(__file__).parents[1])


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
    return _Hash().of(value)


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
    before = RandomState.capture([])
    try:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  the global generator is what a data set may draw from
        random.seed(0)
        return _Hash().of_all([dataset.__class__], (dataset[i] for i in range(len(dataset))))
    finally:
        before.restore()


class _Hash:
    """One hash in the making, which knows what it has seen."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._seen: dict[int, tuple[int, Any]] = {}  # by identity: a number, and the value, kept alive

    def of(self, value: Any) -> str:
        self._add(value)
        return self._hash.hexdigest()

    def of_all(self, *iterables: Any) -> str:
        for values in iterables:
            for value in values:
                _Hash._add(self, value)
                self._seen.clear()  # samples are many
        return self._hash.hexdigest()

    def _note(self, kind: str, data: bytes | str = b"") -> None:
        data = data.encode() if isinstance(data, str) else data
        self._hash.update(f"{kind}:{len(data)}:".encode() + data)

    def _add(self, value: Any) -> None:
        if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device):
            self._note(type(value).__name__, repr(value))
        elif isinstance(value, bytes | bytearray):
            self._note("bytes", bytes(value))
        elif isinstance(value, Tensor) and value.layout is torch.strided:
            self._note("tensor", f"{value.dtype} {tuple(value.shape)} {value.requires_grad}")
            self._note("data", value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self._note("array", f"{value.dtype} {value.shape}")
            self._note("data", np.ascontiguousarray(value).tobytes())
        elif id(value) in self._seen:
            self._note("again", str(self._seen[id(value)][0]))
        else:
            self._seen[id(value)] = len(self._seen), value
            self._add_structure(value)

    def _add_structure(self, value: Any) -> None:
        if isinstance(value, list | tuple):
            self._note(type(value).__name__, str(len(value)))
            for part in value:
                self._add(part)
        elif isinstance(value, set | frozenset):
            self._note("set")
            self._add(sorted(fingerprint(part) for part in value))
        elif isinstance(value, dict):
            self._note("dict", str(len(value)))
            for key, part in value.items():
                self._add(key)
                self._add(part)
        elif isinstance(value, types.ModuleType):
            self._note("module", value.__name__)
        elif isinstance(value, functools.partial):
            self._add(["partial", value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            self._add(["method", value.__func__, value.__self__])
        elif isinstance(value, types.CodeType):
            self._add([value.co_code, value.co_names, value.co_varnames, list(value.co_consts)])
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            self._note("builtin", value.__qualname__)
        else:
            self._add_object(value)

    def _add_function(self, function: types.FunctionType) -> None:
        self._note("function", function.__qualname__)
        if function.__code__.co_filename.startswith((*INSTALLED, OWN)):
            self._note("of", function.__module__)
            return
        self._add([function.__code__, function.__defaults__, function.__kwdefaults__])
        for cell in function.__closure__ or ():
            self._add(_content(cell))
        for name in sorted(_names(function.__code__) & function.__globals__.keys()):
            self._note("global", name)
            self._add(function.__globals__[name])

    def _add_class(self, kind: type) -> None:
        self._note("class", f"{kind.__module__}.{kind.__qualname__}")
        if not _is_installed(kind):
            self._add(list(kind.__bases__))
            for name, part in sorted(vars(kind).items()):
                if isinstance(part, property | functools.cached_property):
                    part = [getattr(part, "fget", None), getattr(part, "fset", None), getattr(part, "func", None)]
                elif isinstance(part, staticmethod | classmethod):
                    part = part.__func__
                elif name.startswith("_abc_") or (name[:2] == "__" and not isinstance(part, types.FunctionType)):
                    continue
                if not isinstance(part, types.GetSetDescriptorType | types.MemberDescriptorType):
                    self._note("attribute", name)
                    self._add(part)

    def _add_object(self, value: Any) -> None:
        if isinstance(value, torch.Generator):
            self._add(["generator", value.get_state()])
            return
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:
            raise UnhashableError(f"a {type(value).__name__} cannot be hashed ({error})") from error
        if isinstance(reduced, str):
            self._note("global", f"{type(value).__module__}.{reduced}")
            return
        self._add(type(value))
        function, arguments, *rest = reduced
        self._add([function, list(arguments), *(list(r) if hasattr(r, "__next__") else r for r in rest)])


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a function that is not there yet
        return "empty"


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*inner)


def _is_installed(kind: type) -> bool:
    """Return whether a class is of Python, of an installed package or of this one."""
    file: str | None = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None:  # built in, or of a notebook
        return kind.__module__ in sys.builtin_module_names
    return file.startswith((*INSTALLED, OWN))
