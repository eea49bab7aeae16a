"""The native extension: how it is built or not, loaded or not, and that it uses torch's stable ABI alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from check_abi import judge, undefined_symbols

import torch_gradmatch

ROOT = Path(__file__).parents[2]
LIBRARY = next(iter(Path(torch_gradmatch.__file__).parent.glob("_C.*.so")), None)
WORKS = (
    "import torch; from torch_gradmatch.slow.ops import interpolate_; s, f = torch.zeros(3), torch.ones(3); "
    "interpolate_([s], [f], 0.5); assert s.tolist() == f.tolist() == [0.5] * 3; "
)

needs_library = pytest.mark.skipif(LIBRARY is None, reason="the extension was not built")


def python(code: str, *options: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", code]
    env = {k: v for k, v in os.environ.items() if k != "TORCH_GRADMATCH_NATIVE"} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without the extension, in a folder from which it is imported."""
    shutil.copytree(ROOT / "torch_gradmatch", tmp_path / "torch_gradmatch", ignore=shutil.ignore_patterns("_C*"))
    return tmp_path


# --------------------------------------------------------------------------------------------------------- loading


def test_status_says_which_path_runs_and_why():
    status = torch_gradmatch.native_status()
    assert str(status).startswith("native (CPU" if status.cpu else "torch._foreach")
    assert status.reason in str(status)
    assert not (status.cuda and torch.version.cuda is None)


def test_switched_off_is_silent_and_works():
    code = WORKS + "import torch_gradmatch as t; print(t.native_status())"
    done = python(code, "-W", "error", TORCH_GRADMATCH_NATIVE="off")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch._foreach: switched off by TORCH_GRADMATCH_NATIVE=off"


def test_not_built_is_silent_and_works(package: Path):
    code = WORKS + "import torch_gradmatch as t; print(t.__file__, t.native_status())"
    done = python(code, "-W", "error", cwd=package)
    assert done.returncode == 0, done.stderr
    assert str(package) in done.stdout
    assert "torch._foreach: the extension was not built" in done.stdout
    assert "--no-build-isolation" in done.stdout


def test_a_library_that_fails_to_load_warns_once_and_everything_works(package: Path):
    (package / "torch_gradmatch" / "_C.abi3.so").write_bytes(b"no library")
    code = WORKS + "import torch_gradmatch as t; print(t.native_status())"
    done = python(code, cwd=package)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: torch_gradmatch goes on without its native kernel") == 1
    assert f"does not load with torch {torch.__version__}" in done.stdout


CHANGED = """
import torch

asked = torch._C._dispatch_has_kernel_for_dispatch_key


def changed(name, key):
    if key == "CUDA":
        raise {failure}("changed")
    return asked(name, key)


torch._C._dispatch_has_kernel_for_dispatch_key = changed
"""


@needs_library
@pytest.mark.parametrize("failure", ["AttributeError", "TypeError", "RuntimeError"])
def test_a_private_function_of_torch_that_changed_does_not_break_the_import(failure: str):
    code = CHANGED.format(failure=failure) + WORKS + "import torch_gradmatch as t; print(t.native_status())"
    done = python(code, "-W", "error")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"native (CPU): {LIBRARY and LIBRARY.name} loaded; torch {torch.__version__}")
    assert f"does not tell whether it has a CUDA kernel, so that is not used ({failure}: changed)" in done.stdout


@needs_library
def test_a_private_function_that_torch_itself_misses_does_not_break_the_import():
    code = "import torch; del torch._C._dispatch_has_kernel_for_dispatch_key; " + WORKS
    done = python(code + "import torch_gradmatch as t; print(t.native_status())", "-W", "error")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch._foreach: torch") or "does not tell" in done.stdout
    assert "AttributeError" in done.stdout


def test_a_library_of_another_version_is_named_and_everything_works(package: Path):
    (package / "torch_gradmatch" / "_C.abi3.so").write_bytes(b"")
    code = "import torch; torch.ops.load_library = lambda path: None; " + WORKS
    done = python(code + "import torch_gradmatch as t; print(t.native_status())", cwd=package)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: torch_gradmatch goes on without its native kernel") == 1
    assert "torch._foreach: _C.abi3.so was built from another version of torch_gradmatch: build it anew" in done.stdout


# -------------------------------------------------------------------------------------------------------- building


@pytest.fixture
def sources(package: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, package)
    shutil.copytree(ROOT / "csrc", package / "csrc")
    return package


def setup(sources: Path, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    run = "import runpy, sys; sys.argv = ['setup.py', '--quiet', 'build']; "
    return python(code + run + "runpy.run_path('setup.py')", cwd=sources, **environment)


def built(sources: Path) -> list[Path]:
    return sorted(sources.glob("build/lib*/torch_gradmatch/_C*"))


def test_off_builds_pure_python(sources: Path):
    done = setup(sources, TORCH_GRADMATCH_NATIVE="off")
    assert done.returncode == 0, done.stderr
    assert not built(sources)
    assert list(sources.glob("build/lib/torch_gradmatch/methods/fish.py"))


def test_without_a_compiler_the_build_succeeds_and_says_so(sources: Path):
    done = setup(sources, CC="/no/such/compiler", CXX="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    assert "did not compile" in done.stderr
    assert "installing without the native extension" in done.stderr
    assert not built(sources)


def test_require_without_a_compiler_fails(sources: Path):
    done = setup(sources, CC="/no/such/compiler", CXX="/no/such/compiler", TORCH_GRADMATCH_NATIVE="require")
    assert done.returncode != 0
    assert "TORCH_GRADMATCH_NATIVE=require, but the extension did not compile" in done.stderr


@pytest.mark.parametrize(("native", "succeeds"), [("auto", True), ("require", False)])
def test_without_torch_one_line_says_what_to_do(sources: Path, native: str, succeeds: bool):
    done = setup(sources, "import sys; sys.modules['torch'] = None; ", TORCH_GRADMATCH_NATIVE=native)
    assert (done.returncode == 0) is succeeds, done.stderr
    lines = [line for line in done.stderr.splitlines() if "torch is not installed" in line]
    assert len(lines) == 1
    assert "install torch, then pip install --no-build-isolation" in lines[0]


@pytest.mark.parametrize("name", ["TORCH_GRADMATCH_NATIVE", "TORCH_GRADMATCH_CUDA"])
def test_an_unknown_setting_is_named(sources: Path, name: str):
    done = setup(sources, **{name: "yes"})
    assert done.returncode != 0
    assert f"{name} should be one of" in done.stderr
    assert "'yes'" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_cuda_is_refused_where_torch_has_none(sources: Path):
    done = setup(sources, TORCH_GRADMATCH_CUDA="1")
    assert done.returncode != 0
    assert "torch is built without CUDA" in done.stderr


# ------------------------------------------------------------------------------------------------------------- ABI


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not found")
def test_only_the_stable_abi_of_torch_is_used():
    assert LIBRARY is not None
    assert ".abi3." in LIBRARY.name
    stable, unstable = judge(undefined_symbols(str(LIBRARY)))
    assert "aoti_torch_library_init_def" in stable
    assert unstable == []


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not found")
def test_the_abi_check_sees_a_symbol_that_is_not_stable():
    names = ["aoti_torch_get_numel", "malloc", "_ZNK2at6Tensor5numelEv", "_ZN3c105ErrorC1ESs"]
    stable, unstable = judge(names)
    assert stable == ["aoti_torch_get_numel"]
    assert len(unstable) == 2
