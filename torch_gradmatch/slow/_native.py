"""Finds and loads the native extension, and remembers why not.

The extension is two shared libraries. ``_C`` registers ``torch.ops.torch_gradmatch.interpolate_`` and its CPU kernel;
``csrc/ops.cpp`` has the schema. ``_C_cuda`` adds the CUDA kernel and is loaded only where torch has CUDA; whatever
becomes of it, the first goes on. Nothing here initializes CUDA.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shlex
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch

__all__ = ["NativeStatus", "native_status"]

SWITCH = "TORCH_GRADMATCH_NATIVE"
CUDA = "TORCH_GRADMATCH_CUDA=1 "  # or it is built beside a torch that has CUDA only
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class NativeStatus:
    """Which path the interpolation takes, and why.

    Attributes:
        cpu: Whether tensors on a CPU go through the native kernel.
        cuda: Whether tensors on an NVIDIA GPU go through the native kernel. Where several GPUs are in use and it does
            not run on all of them, it is true if it runs on any, and ``reason`` names the others.
        reason: Why, in words.
    """

    cpu: bool
    cuda: bool
    reason: str

    def __str__(self) -> str:
        kernels = [name for name, there in (("CPU", self.cpu), ("CUDA", self.cuda)) if there]
        path = f"native ({' and '.join(kernels)})" if kernels else "torch._foreach"
        return f"{path}: {self.reason}"


def _library(stem: str) -> Path | None:
    found = (path for path in sorted(_PACKAGE.glob(f"{stem}.*")) if path.suffix in {".so", ".pyd", ".dylib"})
    return next(found, None)


def _kept_from_the_build() -> dict[str, str]:
    """Why setup.py built no library; nothing where it has not run, as in a checkout that was only put on the path."""
    try:
        return dict(json.loads((_PACKAGE / "_build.json").read_text()))
    except (OSError, ValueError):
        return {}


def _command(setting: str = "") -> str:
    """What builds the extension: a line to be pasted, with the folder or archive that this was installed from."""
    clone = _PACKAGE.parent
    install = f"pip install setuptools wheel && {setting}pip install --no-build-isolation --no-deps"
    if (clone / "setup.py").exists():
        return f"{install} --editable {shlex.quote(str(clone))}"
    with suppress(PackageNotFoundError, KeyError):
        installed = distribution("torch_gradmatch")
        url = urlparse(json.loads(installed.read_text("direct_url.json") or "{}")["url"])
        source = Path(unquote(url.path))
        is_this = Path(str(installed.locate_file("torch_gradmatch"))).absolute() == _PACKAGE
        if is_this and url.scheme == "file" and source.suffix != ".whl" and source.exists():
            # Without pip's cache, which may have what it built of an archive in isolation, where there is no torch.
            return f"{install} --no-cache-dir --force-reinstall {shlex.quote(str(source))}"
    return f"in a clone of the repository, {install} --force-reinstall ."


def _warned(kernel: str, reason: str) -> str:
    """Say once, at import, that something is missing which was meant to be there."""
    warnings.warn(f"torch_gradmatch goes on without its {kernel} kernel: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _lost(reason: str) -> NativeStatus:
    return NativeStatus(False, False, _warned("native", reason))


def _load() -> NativeStatus:
    if os.environ.get(SWITCH) == "off":
        return NativeStatus(False, False, f"switched off by {SWITCH}=off")
    library = _library("_C")
    if library is None:
        here = f"{_PACKAGE} was imported as it lies there; from another folder Python imports what was installed"
        because = _kept_from_the_build().get("cpu") or here
        build = f"with torch and a C++ compiler at hand, this builds it: {_command()}"
        return NativeStatus(False, False, f"the extension was not built ({because}); {build}")
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return _lost(f"the extension does not load with torch {torch.__version__}: {error.__cause__ or error}")
    try:  # a pair is missing, which the CPU kernel refuses by a ValueError; on a GPU this would initialize CUDA
        torch.ops.torch_gradmatch.interpolate_([torch.empty(0, device="cpu")], [], 0.0)
    except ValueError:
        pass
    except (AttributeError, RuntimeError):
        return _lost(f"{library.name} was built from another version of torch_gradmatch: build it anew")
    if torch.version.cuda is None:
        return NativeStatus(True, False, f"{library.name} loaded")
    cuda, about = _load_cuda()
    return NativeStatus(True, cuda, f"{library.name} loaded; {about}")


# ------------------------------------------------------------------------------------------------------------- CUDA


def _load_cuda() -> tuple[bool, str]:
    """Load the second library and ask it, but no GPU, what it is good for."""
    library = _library("_C_cuda")
    if library is None:
        because = _kept_from_the_build().get("cuda") or "its library was not built"
        return False, f"there is no CUDA kernel: {because}; with nvcc at hand, this builds it: {_command(CUDA)}"
    try:
        torch.ops.load_library(str(library))
        asked = ctypes.CDLL(str(library))
        runtime: int = asked.torch_gradmatch_cuda_runtime_version()
        driver: int = asked.torch_gradmatch_cuda_driver_version()
        obstacle = asked.torch_gradmatch_cuda_obstacle
    except (OSError, RuntimeError, AttributeError) as error:
        stale = "was built from another version of torch_gradmatch, build it anew"
        how = stale if isinstance(error, AttributeError) else f"does not load with torch {torch.__version__}"
        return False, _warned("CUDA", f"{library.name} {how}: {error.__cause__ or error}")
    obstacle.restype = ctypes.c_char_p
    global _OBSTACLE
    _OBSTACLE = obstacle
    loaded = f"{library.name} loaded, with the run time of CUDA {_version(runtime)}"
    if not driver:
        return True, f"{loaded}; there is no NVIDIA driver here"
    if driver // 1000 < runtime // 1000:  # within one major version a driver serves newer run times
        about = f"the driver knows CUDA {_version(driver)} at most: update it, or build with nvcc of that version"
        return False, f"{library.name} is not used: it has the run time of CUDA {_version(runtime)} and {about}"
    return True, f"{loaded}; the driver knows CUDA {_version(driver)}"


_OBSTACLE: Any = None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def cuda_obstacle(index: int) -> str:
    """Ask why the CUDA kernel does not run on a GPU that torch uses already.

    Returns:
        Why, in the words of CUDA: no machine code for this architecture, say. Empty if it runs.
    """
    if _OBSTACLE is None:
        return "there is no CUDA kernel"
    why = _OBSTACLE(index)
    return "" if why is None else why.decode()


_STATUS = _load()


def native_status() -> NativeStatus:
    """Say which path the interpolation takes and why.

    Returns:
        The status. It is settled when the package is imported, except whether the kernel runs on a GPU. That is known
        once torch uses CUDA, which asking does not begin. ``str()`` of it is a sentence.

    Example:
        >>> native_status().reason != ""
        True
    """
    if not (_STATUS.cuda and torch.cuda.is_initialized()):
        return _STATUS
    obstacles = {f"cuda:{index}": cuda_obstacle(index) for index in range(torch.cuda.device_count())}
    refused = [f"{device} takes torch._foreach ({why})" for device, why in obstacles.items() if why]
    if not refused:
        return _STATUS
    return replace(_STATUS, cuda=len(refused) < len(obstacles), reason="; ".join([_STATUS.reason, *refused]))
