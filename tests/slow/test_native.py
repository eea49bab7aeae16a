"""The native extension: how it is built or not, loaded or not, and that it uses torch's stable ABI alone."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from check_abi import judge, undefined_symbols
from check_machine_code import Kernel

import torch_gradmatch
from torch_gradmatch import NativeStatus, native_status
from torch_gradmatch.slow import _native

ROOT = Path(__file__).parents[2]
LIBRARY = next(iter(Path(torch_gradmatch.__file__).parent.glob("_C.*.so")), None)
WORKS = (
    "import torch; from torch_gradmatch.slow.ops import interpolate_; s, f = torch.zeros(3), torch.ones(3); "
    "interpolate_([s], [f], 0.5); assert s.tolist() == f.tolist() == [0.5] * 3; "
    "import torch_gradmatch as t; print(t.native_status())"
)
needs_library = pytest.mark.skipif(LIBRARY is None, reason="the extension was not built")
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler is found: set CXX"
)


def python(code: str, *options: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", code]
    env = {k: v for k, v in os.environ.items() if k != "TORCH_GRADMATCH_NATIVE"} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def status_in(folder: Path, before: str = "", *, warns_of: str = "", **environment: str) -> str:
    """What a new process says of the native extension, once the interpolation has worked; and whether it warned."""
    options = [] if warns_of else ["-W", "error"]
    done = python(before + WORKS, *options, cwd=folder, **environment)
    assert done.returncode == 0, done.stderr
    if warns_of:
        assert done.stderr.count(f"RuntimeWarning: torch_gradmatch goes on without its {warns_of} kernel") == 1
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without the extension, in a folder from which it is imported."""
    without_extension = shutil.ignore_patterns("_C*", "_build*")
    shutil.copytree(ROOT / "torch_gradmatch", tmp_path / "torch_gradmatch", ignore=without_extension)
    return tmp_path


# --------------------------------------------------------------------------------------------------------- loading


def test_status_says_which_path_runs_and_why():
    status = native_status()
    assert str(status).startswith("native (CPU" if status.cpu else "torch._foreach")
    assert status.reason in str(status)
    assert not (status.cuda and torch.version.cuda is None)


def test_switched_off_is_silent_and_works():
    off = "torch._foreach: switched off by TORCH_GRADMATCH_NATIVE=off"
    assert status_in(ROOT, TORCH_GRADMATCH_NATIVE="off") == off


def test_not_built_is_silent_and_says_what_builds_it_or_why_the_build_failed(package: Path):
    where = f"{package}/torch_gradmatch was imported as it lies there; from another folder Python imports what was"
    said = status_in(package)
    assert f"torch._foreach: the extension was not built ({where} installed)" in said
    assert "this builds it: in a clone of the repository, pip install" in said
    assert "--no-build-isolation" in said
    (package / "torch_gradmatch" / "_build.json").write_text(json.dumps({"cpu": "the compiler had gone home"}))
    (package / "a clone").mkdir()
    clone = (package / "torch_gradmatch").rename(package / "a clone" / "torch_gradmatch").parent
    (clone / "setup.py").touch()
    said = status_in(clone)
    assert "torch._foreach: the extension was not built (the compiler had gone home); with torch" in said
    editable = f"pip install --no-build-isolation --no-deps --editable '{clone}'"
    assert said.endswith(f"this builds it: pip install setuptools wheel && {editable}")


@pytest.mark.parametrize(
    ("url", "source"),
    [
        ("file://{}/the%20clone", "--no-cache-dir --force-reinstall '{}/the clone'"),
        ("file://{}/of.tar.gz", "--no-cache-dir --force-reinstall {}/of.tar.gz"),
        ("file://{}/a.whl", "--force-reinstall ."),
        ("file://{}/lost", "--force-reinstall ."),
        ("https://somewhere.org/the%20clone", "--force-reinstall ."),
    ],
    ids=["folder", "archive", "wheel", "folder that is gone", "elsewhere"],
)
def test_the_command_that_builds_it_names_what_was_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, source: str
):
    for name in "the clone", "of.tar.gz", "a.whl":
        (tmp_path / name).touch()
    info = tmp_path / "torch_gradmatch-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_gradmatch\nVersion: 1\n")
    (info / "direct_url.json").write_text(json.dumps({"url": url.format(tmp_path), "dir_info": {}}))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path / "torch_gradmatch")
    assert _native._command().endswith(f"--no-build-isolation --no-deps {source.format(tmp_path)}")


@pytest.mark.parametrize(
    ("content", "before", "says"),
    [
        (b"no library", "", f"does not load with torch {torch.__version__}"),
        (
            b"",
            "import torch; torch.ops.load_library = lambda path: None; ",
            "another version of torch_gradmatch: build",
        ),
    ],
    ids=["damaged", "of another version"],
)
def test_a_library_that_is_of_no_use_is_warned_of_once_and_everything_works(
    package: Path, content: bytes, before: str, says: str
):
    (package / "torch_gradmatch" / "_C.abi3.so").write_bytes(content)
    said = status_in(package, before, warns_of="native")
    assert said.startswith("torch._foreach: ")
    assert says in said


# -------------------------------------------------------------------------------------------------------- building


@pytest.fixture
def sources(package: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, package)
    shutil.copytree(ROOT / "csrc", package / "csrc")
    for path in (package / "csrc").glob("**/*.cpp"):  # what is tried out is setup.py
        path.write_text("static int nothing __attribute__((unused));")
    return package


def setup(sources: Path, command: str = "build", code: str = "", **environment: str) -> tuple[bool, str]:
    """Whether it succeeded, and what it said."""
    run = f"import runpy, sys; sys.argv = ['setup.py', '--quiet', {command!r}]; "
    done = python(code + run + "runpy.run_path('setup.py')", cwd=sources, **environment)
    return done.returncode == 0, done.stderr


def built(sources: Path) -> list[str]:
    return sorted(path.name for path in sources.glob("build/lib*/torch_gradmatch/_C*"))


def kept(sources: Path) -> dict[str, Any]:
    (path,) = sources.glob("build/lib*/torch_gradmatch/_build.json")
    return json.loads(path.read_text())


def test_off_builds_pure_python(sources: Path):
    succeeded, said = setup(sources, TORCH_GRADMATCH_NATIVE="off")
    assert succeeded, said
    assert not built(sources)
    assert list(sources.glob("build/lib/torch_gradmatch/methods/fish.py"))


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("/no/such/compiler", "there is no C++ compiler (/no/such/compiler) where this is built"),
        ("false", "not compile"),
    ],
    ids=["none", "one that fails"],
)
def test_without_a_compiler_a_pure_wheel_is_built_and_says_so(sources: Path, compiler: str, why: str):
    stale = sources / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "torch_gradmatch"
    stale.mkdir(parents=True)
    (stale / "_C.abi3.so").touch()
    succeeded, said = setup(sources, "bdist_wheel", CC=compiler, CXX=compiler)
    assert succeeded, said
    assert why in said
    assert "installing without the native extension" in said
    (path,) = sources.glob("dist/*.whl")
    with ZipFile(path) as wheel:
        names = wheel.namelist()
        info = wheel.read(f"torch_gradmatch-{torch_gradmatch.__version__}.dist-info/WHEEL").decode()
        assert why in wheel.read("torch_gradmatch/_build.json").decode()
    assert "Tag: py3-none-any" in info
    assert not [name for name in names if name.endswith(".so") or ".data/" in name]


REQUIRED, CUDA = {"TORCH_GRADMATCH_NATIVE": "require"}, {"TORCH_GRADMATCH_CUDA": "1"}
NO_COMPILER, BAD_COMPILER = {"CXX": "/no/such/compiler"}, {"CC": "false", "CXX": "false"}
NO_TORCH = "import sys; sys.modules['torch'] = None; "
INSTALL_TORCH = "torch is not installed.*install torch, then pip install --no-build-isolation"
BUILDS: dict[str, tuple[str, dict[str, str], bool, str]] = {
    "no compiler": ("", NO_COMPILER | REQUIRED, False, "=require, but there is no C.. compiler"),
    "bad compiler": ("", BAD_COMPILER | REQUIRED, False, "=require, but the extension did not compile"),
    "no torch": (NO_TORCH, {}, True, INSTALL_TORCH),
    "no torch, required": (NO_TORCH, REQUIRED, False, "torch is not installed"),
    "no torch, CUDA": (NO_TORCH, CUDA, False, "TORCH_GRADMATCH_CUDA=1, but torch is not installed"),
    "off, CUDA": ("", CUDA | {"TORCH_GRADMATCH_NATIVE": "off"}, False, "what TORCH_GRADMATCH_NATIVE=off leaves out"),
    "unknown": ("", {"TORCH_GRADMATCH_NATIVE": "yes"}, False, "TORCH_GRADMATCH_NATIVE should be one of.*'yes'"),
    "unknown CUDA": ("", {"TORCH_GRADMATCH_CUDA": "yes"}, False, "TORCH_GRADMATCH_CUDA should be one of.*'yes'"),
}


@pytest.mark.parametrize("case", BUILDS)
def test_what_cannot_be_built_is_said_and_only_what_was_asked_for_ends_the_build(sources: Path, case: str):
    code, environment, succeeds, says = BUILDS[case]
    succeeded, said = setup(sources, code=code, **environment)
    assert succeeded is succeeds, said
    assert re.search(says, said, flags=re.DOTALL), said
    assert said.count("torch is not installed where") == ("no torch" in case)
    assert not built(sources)


def nvcc_that(sources: Path, script: str) -> dict[str, str]:
    """The environment in which a shell script is nvcc."""
    nvcc = sources / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(nvcc.parents[1])}


HAS_CUDA = "import torch; torch.version.cuda = '13.0'; "
NO_NVCC = "import os, pathlib; real = os.access; "
NO_NVCC += "os.access = lambda path, mode: 'nvcc' not in str(path) and real(path, mode); "
OF_NO_USE = {  # what is nvcc, code before, more of the environment, why nothing comes of it
    "none": (None, NO_NVCC, {"CUDA_PATH": ""}, "nvcc was not found"),
    "fails": (
        "[ $1 = --list-gpu-arch ] && echo compute_80 && exit 0\nexit 3", "", {}, "its CUDA library did not compile"
    ),
    "unknown architecture": (
        "exit 0", "", {"TORCH_CUDA_ARCH_LIST": "8.0;Hoper"},
        "TORCH_CUDA_ARCH_LIST='8.0;Hoper' should name architectures that torch knows",
    ),
}  # fmt: skip


@pytest.mark.large
@needs_compiler
@pytest.mark.parametrize("case", OF_NO_USE)
def test_an_nvcc_of_no_use_ends_the_build_if_cuda_is_asked_for_and_is_a_reason_that_is_kept_else(
    sources: Path, case: str
):
    script, code, environment, why = OF_NO_USE[case]
    environment = environment | ({"CUDA_HOME": ""} if script is None else nvcc_that(sources, script))
    if script is None:
        folders = os.environ["PATH"].split(os.pathsep)
        environment["PATH"] = os.pathsep.join(f for f in folders if shutil.which("nvcc", path=f) is None)
    succeeded, said = setup(sources, code=code + HAS_CUDA, **environment)
    assert succeeded, said
    assert built(sources) == ["_C.abi3.so"]
    assert why in kept(sources)["cuda"]
    succeeded, said = setup(sources, code=code, TORCH_GRADMATCH_CUDA="1", **environment)
    assert not succeeded
    assert why in said
    assert case == "unknown architecture" or f"TORCH_GRADMATCH_CUDA=1, but {why}" in said


@pytest.mark.large
@needs_compiler
@pytest.mark.parametrize(
    ("version", "asked", "tries"), [(None, "auto", False), (None, "1", True), ("13.0", "auto", True)]
)
def test_cuda_is_compiled_where_torch_has_it_or_it_is_asked_for(
    sources: Path, version: str | None, asked: str, tries: bool
):
    environment = nvcc_that(sources, "touch tried\nexit 3")
    code = f"import torch; torch.version.cuda = {version!r}; "
    succeeded, said = setup(sources, code=code, TORCH_GRADMATCH_CUDA=asked, **environment)
    assert (sources / "tried").exists() is tries
    assert succeeded is (asked == "auto"), said
    if not tries:
        assert kept(sources)["cuda"] == f"it was installed beside torch {torch.__version__}, which has no CUDA"


AMPERE = "arch=compute_80,code=[sm_80,compute_80]"
ARCHITECTURES = {
    "": f"{AMPERE} arch=compute_90,code=[sm_90,compute_90]",
    "8.6+PTX;9.0a 12.0": "arch=compute_86,code=[sm_86,compute_86] arch=compute_90a,code=sm_90a "
    "arch=compute_120,code=[sm_120,compute_120]",
    "Ampere;Hopper": f"{AMPERE} arch=compute_86,code=sm_86 arch=compute_90,code=[sm_90,compute_90]",
    "Turing;8.0": f"arch=compute_75,code=[sm_75,compute_75] {AMPERE}",
}


def test_architectures_are_those_asked_for_by_number_or_by_name(sources: Path):
    nvcc = Path(nvcc_that(sources, "echo compute_80 compute_90")["CUDA_HOME"]) / "bin" / "nvcc"
    code = "import os, runpy, setuptools; setuptools.setup = lambda **arguments: None\n"
    code += f"for os.environ['TORCH_CUDA_ARCH_LIST'] in {list(ARCHITECTURES)!r}:\n"
    code += f"    print(*runpy.run_path('setup.py')['code_flags']({str(nvcc)!r})[1::2])"
    done = python(code, cwd=sources, TORCH_GRADMATCH_NATIVE="off")
    assert done.stdout.splitlines() == list(ARCHITECTURES.values()), done.stderr


def test_every_instruction_set_that_the_cpu_code_uses_is_asked_for():
    text = (ROOT / "csrc" / "cpu" / "interpolate.cpp").read_text()
    used = {name for target in re.findall(r'target\("(.*)"\)', text) for name in target.split(",")}
    asked = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', text))
    assert "f16c" in asked
    assert used - {"prefer-vector-width=512"} == asked


# ------------------------------------------------------------------------------------------------------------ CUDA


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the package's for what loads the CUDA library; no status of it is kept."""
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_native, "_OBSTACLE", None)
    monkeypatch.setattr(_native, "cuda_obstacle", functools.cache(_native.cuda_obstacle.__wrapped__))
    return tmp_path


def cuda_library(folder: Path, runtime: int, driver: int, obstacles: list[str] | None = None) -> None:
    """What answers as the CUDA library does, on a machine that has no CUDA; each GPU has its obstacle."""
    source = f"int torch_gradmatch_cuda_runtime_version() {{ return {runtime}; }}\n"
    source += f"int torch_gradmatch_cuda_driver_version() {{ return {driver}; }}\n"
    if obstacles is not None:
        cases = " ".join(f'if (device == {i} && {int(bool(why))}) return "{why}";' for i, why in enumerate(obstacles))
        source += f"const char* torch_gradmatch_cuda_obstacle(int device) {{ {cases} return 0; }}"
    (folder / "fake.c").write_text(source)
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", folder / "_C_cuda.abi3.so", folder / "fake.c"]
    subprocess.run(command, check=True)


@needs_compiler
@pytest.mark.parametrize(
    ("runtime", "driver", "used", "says"),
    [
        (13000, 0, True, "the run time of CUDA 13.0; there is no NVIDIA driver here"),
        (13000, 12080, False, "the driver knows CUDA 12.8 at most: update it, or build with nvcc"),
        (13020, 13000, True, "the run time of CUDA 13.2; the driver knows CUDA 13.0"),
        (12080, 13000, True, "the run time of CUDA 12.8; the driver knows CUDA 13.0"),
    ],
)
def test_a_driver_is_asked_before_it_is_needed(alone: Path, runtime: int, driver: int, used: bool, says: str):
    cuda_library(alone, runtime, driver, [])
    cuda, about = _native._load_cuda()
    assert cuda is used
    assert says in about


@needs_compiler
@pytest.mark.parametrize(("devices", "cuda"), [([""], True), (["", "too old"], True), (["too old", "too old"], False)])
def test_a_gpu_without_machine_code_is_named_once_torch_uses_cuda(
    alone: Path, monkeypatch: pytest.MonkeyPatch, devices: list[str], cuda: bool
):
    cuda_library(alone, 13000, 13000, devices)
    monkeypatch.setattr(_native, "_STATUS", NativeStatus(True, *_native._load_cuda()))
    before = native_status()
    assert before.cuda
    assert "cuda:" not in before.reason
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    after = native_status()
    assert after.cuda is cuda
    for index, why in enumerate(devices):
        assert (f"cuda:{index} takes torch._foreach (too old)" in after.reason) is bool(why)
        assert _native.cuda_obstacle(index) == why


@needs_compiler
def test_a_cuda_library_that_fails_is_warned_of_and_one_that_is_not_there_is_not(alone: Path):
    for because in "its library was not built", "nvcc was on holiday":
        found, about = _native._load_cuda()
        assert not found
        assert about.startswith(f"there is no CUDA kernel: {because}; with nvcc at hand, this builds it: ")
        assert "&& TORCH_GRADMATCH_CUDA=1 pip install" in about
        (alone / "_build.json").write_text(json.dumps({"cpu": "", "cuda": "nvcc was on holiday"}))
    cuda_library(alone, 13000, 13000)
    with pytest.warns(RuntimeWarning, match=r"_C_cuda\.abi3\.so was built from another version"):
        assert not _native._load_cuda()[0]


@needs_library
def test_what_becomes_of_the_cuda_library_does_not_touch_the_cpu_kernel(package: Path):
    assert LIBRARY is not None
    shutil.copy(LIBRARY, package / "torch_gradmatch")
    (package / "torch_gradmatch" / "_C_cuda.abi3.so").write_bytes(b"no library")
    without = status_in(package, "import torch; torch.version.cuda = None; ")
    assert without == "native (CPU): _C.abi3.so loaded"  # where torch has no CUDA it is not looked at
    said = status_in(package, HAS_CUDA, warns_of="CUDA")
    assert said.startswith("native (CPU): _C.abi3.so loaded; _C_cuda.abi3.so does not load with torch")


# ------------------------------------------------------------------------------------------------------------- ABI


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not found")
def test_only_the_stable_abi_of_torch_is_used():
    for library in Path(torch_gradmatch.__file__).parent.glob("_C*.so"):
        assert ".abi3." in library.name
        stable, unstable = judge(undefined_symbols(str(library)))
        assert "aoti_torch_library_init_impl" in stable
        assert unstable == []


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not found")
def test_the_abi_check_sees_a_symbol_that_is_not_stable():
    names = ["aoti_torch_get_numel", "malloc", "_ZNK2at6Tensor5numelEv", "_ZN3c105ErrorC1ESs"]
    stable, unstable = judge([*names, "cudaLaunchKernel", "__cudaRegisterFatBinary", "cuInit"])
    assert stable == ["aoti_torch_get_numel"]
    assert len(unstable) == 5


def test_the_check_of_the_machine_code_sees_a_spill_and_narrow_accesses():
    good = Counter({("LDG", 128): 9, ("LDG", 64): 5, ("STG", 128): 5, ("STG", 64): 5, ("LDG", 32): 3})
    name = "_ZN15torch_gradmatch4cuda18interpolate_kernelIf13__nv_bfloat16fEEvNS0_5TableET1_S4_"
    assert Kernel("sm_90", name, 48, good).faults() == []
    assert Kernel("sm_90", name, 48, good + Counter({("STL", 32): 1})).faults() == [
        "spills: 1 accesses to local memory"
    ]
    assert len(Kernel("sm_90", name, 65, good).faults()) == 1
    assert len(Kernel("sm_90", name, 48, good - Counter({("STG", 64): 1})).faults()) == 1
    both = name.replace("If13__nv_bfloat16f", "I6__halfS2_f")
    assert len(Kernel("sm_90", both, 48, Counter({("LDG", 128): 9, ("STG", 128): 10})).faults()) == 1
    assert len(Kernel("sm_90", "another_kernel", 48, good).faults()) == 1
