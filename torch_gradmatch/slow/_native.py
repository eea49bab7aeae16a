"""Finds and loads the native extension, and remembers why not.

The extension is a shared library that registers ``torch.ops.torch_gradmatch.interpolate_``; ``csrc/ops.cpp`` has its
schema. Nothing here initializes CUDA.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["NativeStatus", "native_status"]

SWITCH = "TORCH_GRADMATCH_NATIVE"
# Where a function is gone, takes other arguments, or refuses.
WHATEVER_TORCH_RAISES = (AttributeError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class NativeStatus:
    """Which path the interpolation takes, and why.

    Attributes:
        cpu: Whether tensors on a CPU go through the native kernel.
        cuda: Whether tensors on an NVIDIA GPU go through the native kernel.
        reason: Why, in words.
    """

    cpu: bool
    cuda: bool
    reason: str

    def __str__(self) -> str:
        kernels = [name for name, there in (("CPU", self.cpu), ("CUDA", self.cuda)) if there]
        path = f"native ({' and '.join(kernels)})" if kernels else "torch._foreach"
        return f"{path}: {self.reason}"


def _load() -> NativeStatus:
    if os.environ.get(SWITCH) == "off":
        return NativeStatus(False, False, f"switched off by {SWITCH}=off")
    found = sorted(Path(__file__).parents[1].glob("_C.*"))
    libraries = [path for path in found if path.suffix in (".so", ".pyd", ".dylib")]
    if not libraries:
        remedy = "with torch and a C++ compiler at hand, pip install --no-build-isolation builds it"
        return NativeStatus(False, False, f"the extension was not built; {remedy}")
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        reason = f"the extension does not load with torch {torch.__version__}: {error}"
        warnings.warn(f"torch_gradmatch goes on without its native kernel: {reason}", RuntimeWarning, stacklevel=2)
        return NativeStatus(False, False, reason)
    name, operators = libraries[0].name, torch.ops.torch_gradmatch
    if not all(hasattr(operators, operator) for operator in ("interpolate_", "interpolate_taken_")):
        reason = f"{name} was built from another version of torch_gradmatch: build it anew"
        warnings.warn(f"torch_gradmatch goes on without its native kernel: {reason}", RuntimeWarning, stacklevel=2)
        return NativeStatus(False, False, reason)
    # An operator can be asked whether it leaves an empty pair. On a GPU that would initialize CUDA.
    empty = torch.empty(0, device="cpu")
    cpu = operators.interpolate_taken_([empty], [empty], 0.0) == []
    try:  # private, and torch has nothing public that asks: whatever becomes of it, the import goes on
        cuda = bool(torch._C._dispatch_has_kernel_for_dispatch_key("torch_gradmatch::interpolate_", "CUDA"))
    except WHATEVER_TORCH_RAISES as error:
        unknown = f"torch {torch.__version__} does not tell whether it has a CUDA kernel, so that is not used"
        return NativeStatus(cpu, False, f"{name} loaded; {unknown} ({type(error).__name__}: {error})")
    return NativeStatus(cpu, cuda, f"{name} loaded")


_STATUS = _load()


def give_up(reason: str) -> None:
    """Go on without the kernel. Only the import of ``ops`` calls this, before anyone can have asked."""
    global _STATUS
    _STATUS = NativeStatus(False, False, reason)


def native_status() -> NativeStatus:
    """Say which path the interpolation takes and why.

    Returns:
        The status, settled when the package was imported. ``str()`` of it is a sentence.

    Example:
        >>> native_status().reason != ""
        True
    """
    return _STATUS
