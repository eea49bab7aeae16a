"""Builds the native extension, where it can be built. The metadata stand in pyproject.toml.

    TORCH_GRADMATCH_NATIVE=off|auto|require   auto: build it if torch and a compiler are there, else go on without
    TORCH_GRADMATCH_CUDA=0|1|auto             auto: with CUDA if torch has CUDA and nvcc is found
    TORCH_GRADMATCH_SANITIZE=1                with ASan and UBSan, for ``make test-sanitize``

The extension is one shared library on LibTorch's stable ABI for torch 2.10 and later. It uses nothing of Python.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from setuptools import setup

TORCH_2_10 = "0x020a000000000000"  # the oldest torch whose stable ABI the extension asks for
CUDA_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0+PTX"


def setting(name: str, choices: tuple[str, ...]) -> str:
    """Read an environment variable whose last choice is the default."""
    value = os.environ.get(name, choices[-1])
    if value not in choices:
        sys.exit(f"{name} should be one of {', '.join(choices)} (got {value!r})")
    return value


def say(message: str) -> None:
    """Tell whoever builds; pip shows it with -v."""
    sys.stderr.write(f"torch_gradmatch: {message}\n")


def give_up(native: str, reason: str) -> None:
    """Go on without the extension, or end if it is required."""
    if native == "require":
        sys.exit(f"torch_gradmatch: TORCH_GRADMATCH_NATIVE=require, but {reason}")
    say(f"{reason}; installing without the native extension: everything works, the interpolation is slower")


def with_cuda(asked: str, torch: Any, cuda_home: str | None) -> bool:
    """Decide whether to compile for CUDA, and say why not if it was asked for."""
    has_cuda = torch.version.cuda is not None
    if asked == "1" and not has_cuda:
        sys.exit("torch_gradmatch: TORCH_GRADMATCH_CUDA=1, but the installed torch is built without CUDA")
    if asked == "1" and cuda_home is None:
        sys.exit("torch_gradmatch: TORCH_GRADMATCH_CUDA=1, but nvcc is not found: set CUDA_HOME")
    return asked != "0" and has_cuda and cuda_home is not None


def native_arguments() -> dict[str, Any]:
    """Return what ``setup`` needs to build the extension; nothing if it is not to be built."""
    native = setting("TORCH_GRADMATCH_NATIVE", ("off", "require", "auto"))
    asked_for_cuda = setting("TORCH_GRADMATCH_CUDA", ("0", "1", "auto"))
    if native == "off":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        give_up(
            native, "torch is not installed where this is built: install torch, then pip install --no-build-isolation"
        )
        return {}

    cuda = with_cuda(asked_for_cuda, torch, cpp_extension.CUDA_HOME)
    sources = ["csrc/ops.cpp", "csrc/cpu/interpolate.cpp"]
    define = f"-DTORCH_TARGET_VERSION={TORCH_2_10}"
    sanitize = (
        ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
        if "TORCH_GRADMATCH_SANITIZE" in os.environ
        else []
    )
    flags = {"cxx": ["-O3", "-g0", "-fvisibility=hidden", "-Wall", define, *sanitize]}
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        sources.append("csrc/cuda/interpolate.cu")
        flags["nvcc"] = ["-O3", "-DUSE_CUDA", define]
    make_extension = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    extension = make_extension(
        "torch_gradmatch._C",
        sources,
        depends=["csrc/interpolate.h"],
        extra_compile_args=flags,
        extra_link_args=sanitize,
        py_limited_api=True,
    )

    class Build(cpp_extension.BuildExtension):  # type: ignore[misc]
        """Builds the extension; without a working compiler the package is installed all the same."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # noqa: BLE001  whatever a compiler or its absence may raise
                give_up(native, f"the extension did not compile ({error})")
                self.extensions.clear()

        def get_export_symbols(self, _extension: Any) -> list[str]:
            """It is no Python module: it exports no init function."""
            return []

    say(f"building the native extension {'with' if cuda else 'without'} CUDA, against torch {torch.__version__}")
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native_arguments())
