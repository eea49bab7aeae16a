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
DIST = f"torch_gradmatch-{torch_gradmatch.__version__}"
LIBRARY = next(iter(Path(torch_gradmatch.__file__).parent.glob("_C.*.so")), None)
WORKS = (
    "import torch; from torch_gradmatch.slow.ops import interpolate_; s, f = torch.zeros(3), torch.ones(3); "
    "interpolate_([s], [f], 0.5); assert s.tolist() == f.tolist() == [0.5] * 3; "
)

needs_library = pytest.mark.skipif(LIBRARY is None, reason="the extension was not built")
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler is found: set CXX"
)


def without(program: str) -> str:
    """The path, less the folders that have a program."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if shutil.which(program, path=folder) is None)


def python(code: str, *options: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", code]
    env = {k: v for k, v in os.environ.items() if k != "TORCH_GRADMATCH_NATIVE"} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without the extension, in a folder from which it is imported."""
    shutil.copytree(
        ROOT / "torch_gradmatch", tmp_path / "torch_gradmatch", ignore=shutil.ignore_patterns("_C*", "_build*")
    )
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
    where = f"{package}/torch_gradmatch was imported as it lies there; from another folder Python imports what was"
    assert f"torch._foreach: the extension was not built ({where} installed)" in done.stdout
    assert "this builds it: in a clone of the repository, pip install" in done.stdout
    assert "--no-build-isolation" in done.stdout


def test_a_clone_that_was_not_built_is_silent_and_says_what_builds_it_where_it_is(package: Path):
    (package / "a clone").mkdir()
    clone = (package / "torch_gradmatch").rename(package / "a clone" / "torch_gradmatch").parent
    (clone / "setup.py").touch()
    done = python(WORKS + "import torch_gradmatch as t; print(t.native_status())", "-W", "error", cwd=clone)
    assert done.returncode == 0, done.stderr
    editable = f"pip install --no-build-isolation --no-deps --editable '{clone}'\n"
    assert done.stdout.endswith(f"this builds it: pip install setuptools wheel && {editable}")


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


def test_a_library_that_fails_to_load_warns_once_and_everything_works(package: Path):
    (package / "torch_gradmatch" / "_C.abi3.so").write_bytes(b"no library")
    code = WORKS + "import torch_gradmatch as t; print(t.native_status())"
    done = python(code, cwd=package)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: torch_gradmatch goes on without its native kernel") == 1
    assert f"does not load with torch {torch.__version__}" in done.stdout


def test_what_the_build_kept_is_said_in_silence(package: Path):
    code = WORKS + "import torch_gradmatch as t; print(t.native_status())"
    (package / "torch_gradmatch" / "_build.json").write_text(json.dumps({"cpu": "the compiler had gone home"}))
    done = python(code, "-W", "error", cwd=package)
    assert done.returncode == 0, done.stderr
    assert "torch._foreach: the extension was not built (the compiler had gone home); with torch" in done.stdout


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
    for path in (package / "csrc").glob("**/*.cpp"):  # what is tried out is setup.py
        path.write_text("static int nothing __attribute__((unused));")
    return package


def setup(
    sources: Path, command: str = "build", code: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    run = f"import runpy, sys; sys.argv = ['setup.py', '--quiet', {command!r}]; "
    return python(code + run + "runpy.run_path('setup.py')", cwd=sources, **environment)


def wheel(sources: Path) -> dict[str, str]:
    """The files of the wheel that was built, with their text."""
    (path,) = sources.glob("dist/*.whl")
    with ZipFile(path) as archive:
        return {name: archive.read(name).decode(errors="replace") for name in archive.namelist()}


def built(sources: Path) -> list[Path]:
    return sorted(sources.glob("build/lib*/torch_gradmatch/_C*"))


def kept(sources: Path) -> dict[str, Any]:
    (path,) = sources.glob("build/lib*/torch_gradmatch/_build.json")
    return json.loads(path.read_text())


def test_off_builds_pure_python(sources: Path):
    done = setup(sources, TORCH_GRADMATCH_NATIVE="off")
    assert done.returncode == 0, done.stderr
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
    done = setup(sources, "bdist_wheel", CC=compiler, CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert why in done.stderr
    assert "installing without the native extension" in done.stderr
    files = wheel(sources)
    assert f"{DIST}.dist-info/WHEEL" in files
    assert "Tag: py3-none-any" in files[f"{DIST}.dist-info/WHEEL"]
    assert why in files["torch_gradmatch/_build.json"]
    assert not [name for name in files if name.endswith(".so") or ".data/" in name]


REQUIRED = {"TORCH_GRADMATCH_NATIVE": "require"}
NO_TORCH = "import sys; sys.modules['torch'] = None; "
BUILDS: dict[str, tuple[str, dict[str, str], bool, str]] = {
    "no compiler": ("", {"CXX": "/no/such/compiler"} | REQUIRED, False, "=require, but there is no C.. compiler"),
    "bad compiler": (
        "",
        {"CC": "false", "CXX": "false"} | REQUIRED,
        False,
        "=require, but the extension did not compile",
    ),
    "no torch": (NO_TORCH, {}, True, "torch is not installed.*install torch, then pip install --no-build-isolation"),
    "no torch, required": (NO_TORCH, REQUIRED, False, "torch is not installed"),
    "no torch, CUDA": (
        NO_TORCH,
        {"TORCH_GRADMATCH_CUDA": "1"},
        False,
        "TORCH_GRADMATCH_CUDA=1, but torch is not installed",
    ),
    "off, CUDA": (
        "",
        {"TORCH_GRADMATCH_CUDA": "1", "TORCH_GRADMATCH_NATIVE": "off"},
        False,
        "asks for what TORCH_GRADMATCH_NATIVE=off leaves out",
    ),
    "unknown": ("", {"TORCH_GRADMATCH_NATIVE": "yes"}, False, "TORCH_GRADMATCH_NATIVE should be one of.*'yes'"),
    "unknown CUDA": ("", {"TORCH_GRADMATCH_CUDA": "yes"}, False, "TORCH_GRADMATCH_CUDA should be one of.*'yes'"),
}


@pytest.mark.parametrize("case", BUILDS)
def test_what_cannot_be_built_is_said_and_only_what_was_asked_for_ends_the_build(sources: Path, case: str):
    code, environment, succeeds, says = BUILDS[case]
    done = setup(sources, code=code, **environment)
    assert (done.returncode == 0) is succeeds, done.stderr
    assert re.search(says, done.stderr, flags=re.DOTALL), done.stderr
    assert done.stderr.count("torch is not installed where") == ("no torch" in case)
    assert not built(sources)


HAS_CUDA = "import torch; torch.version.cuda = '13.0'; "


@pytest.mark.large
@needs_compiler
def test_cuda_without_nvcc_is_refused_if_it_is_asked_for_and_its_reason_kept_else(sources: Path):
    hidden = {"PATH": without("nvcc"), "CUDA_HOME": "", "CUDA_PATH": ""}
    nowhere = "import os, pathlib; real = os.access; "
    nowhere += "os.access = lambda path, mode: 'nvcc' not in str(path) and real(path, mode); "
    done = setup(sources, code=nowhere, TORCH_GRADMATCH_CUDA="1", **hidden)
    assert done.returncode != 0
    assert "TORCH_GRADMATCH_CUDA=1, but nvcc was not found" in done.stderr
    done = setup(sources, code=nowhere + HAS_CUDA, **hidden)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in built(sources)] == ["_C.abi3.so"]
    assert "nvcc was not found" in kept(sources)["cuda"]


@pytest.mark.large
@needs_compiler
@pytest.mark.parametrize(
    ("version", "asked", "tries"), [(None, "auto", False), (None, "1", True), ("13.0", "auto", True)]
)
def test_cuda_is_compiled_where_torch_has_it_or_it_is_asked_for(
    sources: Path, version: str | None, asked: str, tries: bool
):
    nvcc = sources / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\ntouch tried\nexit 3\n")
    nvcc.chmod(0o755)
    code = f"import torch; torch.version.cuda = {version!r}; "
    done = setup(sources, code=code, CUDA_HOME=str(nvcc.parents[1]), TORCH_GRADMATCH_CUDA=asked)
    assert (sources / "tried").exists() is tries
    assert (done.returncode == 0) is (asked == "auto"), done.stderr
    if not tries:
        assert kept(sources)["cuda"] == f"it was installed beside torch {torch.__version__}, which has no CUDA"


@pytest.mark.large
@needs_compiler
def test_an_nvcc_that_fails_takes_nothing_else_with_it(sources: Path):
    nvcc = sources / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n[ $1 = --list-gpu-arch ] && echo compute_80 && exit 0\nexit 3\n")
    nvcc.chmod(0o755)
    done = setup(sources, code=HAS_CUDA, CUDA_HOME=str(nvcc.parents[1]))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in built(sources)] == ["_C.abi3.so"]
    assert "its CUDA library did not compile" in kept(sources)["cuda"]
    done = setup(sources, CUDA_HOME=str(nvcc.parents[1]), TORCH_GRADMATCH_CUDA="1")
    assert done.returncode != 0
    assert "TORCH_GRADMATCH_CUDA=1, but its CUDA library did not compile" in done.stderr


ARCHITECTURES = {
    "": "arch=compute_80,code=[sm_80,compute_80] arch=compute_90,code=[sm_90,compute_90]",
    "8.6+PTX;9.0a 12.0": "arch=compute_86,code=[sm_86,compute_86] arch=compute_90a,code=sm_90a "
    "arch=compute_120,code=[sm_120,compute_120]",
    "Ampere;Hopper": "arch=compute_80,code=[sm_80,compute_80] arch=compute_86,code=sm_86 "
    "arch=compute_90,code=[sm_90,compute_90]",
    "Turing;8.0": "arch=compute_75,code=[sm_75,compute_75] arch=compute_80,code=[sm_80,compute_80]",
}


def test_architectures_are_those_asked_for_by_number_or_by_name(sources: Path):
    nvcc = sources / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_80 compute_90\n")
    nvcc.chmod(0o755)
    code = "import os, runpy, setuptools; setuptools.setup = lambda **arguments: None\n"
    code += f"for os.environ['TORCH_CUDA_ARCH_LIST'] in {list(ARCHITECTURES)!r}:\n"
    code += f"    print(*runpy.run_path('setup.py')['code_flags']({str(nvcc)!r})[1::2])"
    done = python(code, cwd=sources, TORCH_GRADMATCH_NATIVE="off")
    assert done.stdout.splitlines() == list(ARCHITECTURES.values()), done.stderr


@pytest.mark.large
@needs_compiler
def test_an_architecture_that_torch_does_not_know_ends_the_build_only_where_cuda_is_required(sources: Path):
    nvcc = sources / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 0\n")
    nvcc.chmod(0o755)
    asked = {"CUDA_HOME": str(nvcc.parents[1]), "TORCH_CUDA_ARCH_LIST": "8.0;Hoper"}
    why = "TORCH_CUDA_ARCH_LIST='8.0;Hoper' should name architectures that torch knows"
    done = setup(sources, code=HAS_CUDA, **asked)
    assert done.returncode == 0, done.stderr
    assert why in kept(sources)["cuda"]
    done = setup(sources, TORCH_GRADMATCH_CUDA="1", **asked)
    assert done.returncode != 0
    assert why in done.stderr


def test_every_instruction_set_that_the_cpu_code_uses_is_asked_for():
    text = (ROOT / "csrc" / "cpu" / "interpolate.cpp").read_text()
    used = {name for target in re.findall(r'target\("(.*)"\)', text) for name in target.split(",")}
    asked = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', text))
    assert "f16c" in asked
    assert used - {"prefer-vector-width=512"} == asked


# ------------------------------------------------------------------------------------------------------------ CUDA


def cuda_library(folder: Path, runtime: int, driver: int, more: str = "") -> Path:
    """What answers as the CUDA library does, on a machine that has no CUDA."""
    source = f"""
    int torch_gradmatch_cuda_runtime_version() {{ return {runtime}; }}
    int torch_gradmatch_cuda_driver_version() {{ return {driver}; }}
    {more}"""
    (folder / "fake.c").write_text(source)
    library = folder / "_C_cuda.abi3.so"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", str(library), str(folder / "fake.c")]
    subprocess.run(command, check=True)
    return library


OBSTACLE = """const char* torch_gradmatch_cuda_obstacle(int device) { return device ? "no machine code for it" : 0; }"""


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the package's for what loads the CUDA library; no status of it is kept."""
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_native, "_OBSTACLE", None)
    monkeypatch.setattr(_native, "cuda_obstacle", functools.cache(_native.cuda_obstacle.__wrapped__))
    return tmp_path


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
    cuda_library(alone, runtime, driver, OBSTACLE)
    cuda, about = _native._load_cuda()
    assert cuda is used
    assert says in about


@needs_compiler
@pytest.mark.parametrize(("devices", "cuda"), [([""], True), (["", "too old"], True), (["too old", "too old"], False)])
def test_a_gpu_without_machine_code_is_named_once_torch_uses_cuda(
    alone: Path, monkeypatch: pytest.MonkeyPatch, devices: list[str], cuda: bool
):
    cases = " ".join(f'if (device == {i} && {int(bool(why))}) return "{why}";' for i, why in enumerate(devices))
    more = f"const char* torch_gradmatch_cuda_obstacle(int device) {{ {cases} return 0; }}"
    cuda_library(alone, 13000, 13000, more)
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
    status = WORKS + "import torch_gradmatch as t; print(t.native_status())"
    done = python("import torch; torch.version.cuda = None; " + status, "-W", "error", cwd=package)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "native (CPU): _C.abi3.so loaded"  # where torch has no CUDA it is not looked at
    done = python("import torch; torch.version.cuda = '13.0'; " + status, cwd=package)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("native (CPU): _C.abi3.so loaded; _C_cuda.abi3.so does not load with torch")
    assert done.stderr.count("RuntimeWarning: torch_gradmatch goes on without its CUDA kernel") == 1


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
