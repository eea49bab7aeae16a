"""Builds the native extension, where it can be built. The metadata stand in pyproject.toml.

    TORCH_GRADMATCH_NATIVE=off|auto|require   auto: build it if torch and a compiler are there, else go on without
    TORCH_GRADMATCH_CUDA=0|1|auto             auto: its CUDA library too where torch has CUDA and nvcc is found
    TORCH_CUDA_ARCH_LIST="8.0;Hopper"         the architectures of the CUDA library, instead of ARCHITECTURES below
    TORCH_GRADMATCH_SANITIZE=1                with ASan and UBSan, for ``make test-sanitize``

The extension is two shared libraries on LibTorch's stable ABI for torch 2.10 and later, which use nothing of Python:
``_C`` has the operators and their CPU kernel, ``_C_cuda`` only adds the CUDA kernel. What became of them is kept in
``torch_gradmatch/_build.json``, so that ``native_status()`` can say it. Without the first it is a pure package. The
licence stands here, since setuptools 65 does not know the way in which later ones want it in pyproject.toml.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGE = "torch_gradmatch"
CPU, CUDA = f"{PACKAGE}._C", f"{PACKAGE}._C_cuda"
# The oldest torch whose stable ABI the extension asks for; a header of torch beside it is an error.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
ARCHITECTURES = ("75", "80", "90", "100", "120")  # those of them that nvcc knows; later ones take the PTX


def setting(name: str, choices: tuple[str, ...]) -> str:
    """Read an environment variable whose last choice is the default."""
    value = os.environ.get(name, choices[-1])
    if value not in choices:
        sys.exit(f"{name} should be one of {', '.join(choices)} (got {value!r})")
    return value


NATIVE = setting("TORCH_GRADMATCH_NATIVE", ("off", "require", "auto"))
ASKED_FOR_CUDA = setting("TORCH_GRADMATCH_CUDA", ("0", "1", "auto"))

# Why each library was not built, "" if it was.
REASONS = {"cpu": "", "cuda": ""}


def say(message: str) -> None:
    """Tell whoever builds; pip shows it with -v."""
    sys.stderr.write(f"{PACKAGE}: {message}\n")


def leave_out(reason: str, *libraries: str, remedy: str = "") -> None:
    """Go on without libraries, and keep the reason; end if one of them is required."""
    for which, switch, required in ("cpu", "NATIVE=require", NATIVE), ("cuda", "CUDA=1", ASKED_FOR_CUDA):
        if which in libraries:
            if required == switch.partition("=")[2]:
                sys.exit(f"{PACKAGE}: TORCH_GRADMATCH_{switch}, but {reason}{remedy}")
            REASONS[which] = reason
    without = "the native extension: everything works, the interpolation is slower" if "cpu" in libraries else "CUDA"
    say(f"{reason}{remedy}; installing without {without}")


def keep_reasons(folder: Path) -> None:
    """Write what became of the libraries beside the package's own files."""
    if (folder / "__init__.py").exists():
        (folder / "_build.json").write_text(json.dumps(REASONS, indent=1) + "\n")


class BuildPython(build_py):
    """Copies the package, and says what became of the libraries where none is built."""

    def run(self) -> None:
        """Carry it out."""
        super().run()
        keep_reasons(Path(PACKAGE) if self.editable_mode else Path(self.build_lib) / PACKAGE)


# ------------------------------------------------------------------------------------------------- the CUDA library


def find_nvcc() -> str | None:
    """Look where torch's own extensions do, though torch does so only if it has CUDA itself."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and os.access(Path(home) / "bin" / "nvcc", os.X_OK):
            return str(Path(home) / "bin" / "nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if os.access(usual, os.X_OK) else None)


def code_flags(nvcc: str) -> list[str]:
    """Machine code for each architecture, and PTX of the first and the last, so that every later GPU has a kernel."""
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        from torch.utils import cpp_extension

        try:  # it translates names like Hopper, and has no public twin
            translated = " ".join(cpp_extension._get_cuda_arch_flags())
        except (ValueError, IndexError) as error:
            what = "should name architectures that torch knows, like '8.0;9.0' or 'Ampere;Hopper'"
            raise ValueError(f"TORCH_CUDA_ARCH_LIST={asked!r} {what}: {error}") from error
        names = set(re.findall(r"code=sm_(\w+)", translated))
    else:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        names = {name for name in ARCHITECTURES if f"compute_{name}" in known}
    names = sorted(names, key=lambda name: int(re.sub(r"\D", "", name)))
    flags = []
    for name in names:
        code = f"[sm_{name},compute_{name}]" if name in {names[0], names[-1]} else f"sm_{name}"
        flags += ["-gencode", f"arch=compute_{name},code={code}"]
    return flags


def compile_cuda(nvcc: str, library: Path, torch_include: list[str], torch_lib: Path) -> None:
    """Compile and link the CUDA library, against any torch.

    Its run time is linked into it. Of torch's CUDA library it needs one function, so it has to name that library; an
    empty one of this name will do, and is there also where torch has no CUDA.
    """
    compiler = os.environ.get("CXX", "c++")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / "libtorch_cuda.so"
        empty = ["-x", "c++", os.devnull, "-shared", f"-Wl,-soname,{stub.name}", "-o", str(stub)]
        subprocess.run([compiler, *empty], check=True)
        command = [nvcc, "-ccbin", compiler, "-std=c++17", "-O3", "--threads", "0", *DEFINES, "-DUSE_CUDA"]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", *code_flags(nvcc)]
        for include in torch_include:
            command += ["-isystem", include]
        command += ["-shared", "-cudart", "static", "csrc/cuda/interpolate.cu", "-o", str(library)]
        command += [f"-L{torch_lib}", "-ltorch_cpu", f"-L{folder}", "-Xlinker", "--no-as-needed", "-ltorch_cuda"]
        subprocess.run(command, check=True)


# ---------------------------------------------------------------------------------------------------- both of them


def native_arguments() -> dict[str, Any]:
    """Return what ``setup`` needs to build the extension; nothing if it is not to be built."""
    if NATIVE == "off":
        REASONS["cpu"] = REASONS["cuda"] = "it was installed with TORCH_GRADMATCH_NATIVE=off"
        if ASKED_FOR_CUDA == "1":
            sys.exit(f"{PACKAGE}: TORCH_GRADMATCH_CUDA=1 asks for what TORCH_GRADMATCH_NATIVE=off leaves out")
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        install = ": install torch, then pip install --no-build-isolation"
        leave_out("torch is not installed where this is built", "cpu", "cuda", remedy=install)
        return {}
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if sys.platform != "win32" and shutil.which(compiler) is None:
        leave_out(f"there is no C++ compiler ({compiler}) where this is built", "cpu", "cuda")
        return {}

    torch_folder = Path(torch.__path__[0])
    instrument = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O2"]
    sanitize = instrument if "TORCH_GRADMATCH_SANITIZE" in os.environ else []
    cpu = cpp_extension.CppExtension(
        CPU,
        ["csrc/ops.cpp", "csrc/cpu/interpolate.cpp"],
        depends=["csrc/interpolate.h"],
        extra_compile_args={"cxx": ["-O3", "-g0", "-fvisibility=hidden", "-Wall", *DEFINES, *sanitize]},
        extra_link_args=sanitize,
        py_limited_api=True,
    )
    cuda = cpp_extension.CppExtension(
        CUDA,
        ["csrc/cuda/interpolate.cu"],
        depends=["csrc/interpolate.h", "csrc/cuda/kernel.h"],
        py_limited_api=True,
    )

    class Build(cpp_extension.BuildExtension):  # type: ignore[misc]
        """Builds the libraries; one that does not compile takes nothing else with it."""

        def build_extensions(self) -> None:
            built = []
            for extension, which in ((cpu, "cpu"), (cuda, "cuda")):
                self.extensions = [extension]
                try:
                    if self.build_one(which):
                        built.append(extension)
                except Exception as error:  # noqa: BLE001  whatever a compiler or its absence may raise
                    what = "the extension" if which == "cpu" else "its CUDA library"
                    leave_out(f"{what} did not compile ({error})", which)
                if extension not in built:  # nor is one to be packed that an earlier build has left
                    Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = built

        def build_one(self, which: str) -> bool:
            """Build a library, or keep the reason why there is none to be built."""
            if which == "cpu":
                super().build_extensions()
                return True
            if REASONS["cpu"]:
                REASONS["cuda"] = f"without the CPU's library there is none for CUDA: {REASONS['cpu']}"
            elif ASKED_FOR_CUDA == "0":
                REASONS["cuda"] = "it was installed with TORCH_GRADMATCH_CUDA=0"
            elif not sys.platform.startswith("linux"):
                REASONS["cuda"] = f"it is built on Linux only, and this was {sys.platform}"
            elif ASKED_FOR_CUDA == "auto" and torch.version.cuda is None:
                REASONS["cuda"] = f"it was installed beside torch {torch.__version__}, which has no CUDA"
            elif (nvcc := find_nvcc()) is None:
                REASONS["cuda"] = "nvcc was not found when it was installed: set CUDA_HOME, or take a wheel that has it"
            else:
                say(f"building the CUDA library by {nvcc}")
                library = Path(self.get_ext_fullpath(CUDA))
                compile_cuda(nvcc, library, cpp_extension.include_paths(), torch_folder / "lib")
                return True
            if ASKED_FOR_CUDA == "1":
                sys.exit(f"{PACKAGE}: TORCH_GRADMATCH_CUDA=1, but {REASONS['cuda']}")
            return False

        def run(self) -> None:
            super().run()
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if REASONS["cpu"]:
                self.distribution.ext_modules = None
                if wheel is not None:
                    wheel.root_is_pure = True  # it has taken it for a platform's
            for folder in {Path(self.build_lib) / PACKAGE, *([Path(PACKAGE)] if self.inplace else [])}:
                keep_reasons(folder)

        def get_export_symbols(self, _extension: Any) -> list[str]:
            """They are no Python modules: they export no init function."""
            return []

    say(f"building the native extension against torch {torch.__version__}")
    return {
        "ext_modules": [cpu, cuda],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if {"dist_info", "bdist_wheel", "editable_wheel"} & set(sys.argv) and not (
    find_spec("setuptools.command.bdist_wheel") or find_spec("wheel")
):
    sys.exit(f"{PACKAGE}: setuptools before 70.1 needs wheel to build it: pip install wheel, and try again")
arguments = native_arguments()
arguments.setdefault("cmdclass", {})["build_py"] = BuildPython
setup(license="MIT", **arguments)
