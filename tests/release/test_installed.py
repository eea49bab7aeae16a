"""What stands in the environment is what was installed there, and ``native_status()`` says which kernels it has.

``INSTALLED`` names what was installed: ``wheel``; ``sdist``, built beside torch; or ``isolated``, an sdist built by pip
in an environment of its own, where torch is not seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
import torch

import torch_gradmatch

INSTALLED = os.environ["INSTALLED"]
IMPORT = "import torch_gradmatch; print(torch_gradmatch.native_status())"


def files() -> list[str]:
    return [str(file) for file in distribution("torch_gradmatch").files or ()]


def imported(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", IMPORT], capture_output=True, text=True, check=False)


def test_it_is_the_installed_package():
    assert Path(torch_gradmatch.__file__).is_relative_to(sys.prefix)
    assert version("torch_gradmatch") == torch_gradmatch.__version__
    assert not any("editable" in file for file in files())
    assert {Path(file).parts[0] for file in files()} <= {
        "torch_gradmatch",
        f"torch_gradmatch-{torch_gradmatch.__version__}.dist-info",
    }


@pytest.mark.skipif(INSTALLED != "wheel", reason="a wheel was not installed")
def test_one_wheel_has_the_kernels_that_torch_has_a_use_for():
    assert "torch_gradmatch/_C.abi3.so" in files()
    done = imported("-W", "error")
    assert done.returncode == 0, done.stderr
    if torch.version.cuda is None:
        assert done.stdout.strip() == "native (CPU): _C.abi3.so loaded"
    elif "torch_gradmatch/_C_cuda.abi3.so" in files():
        both = "native (CPU and CUDA): _C.abi3.so loaded; _C_cuda.abi3.so loaded, with the run time of CUDA "
        assert done.stdout.startswith(both)
    else:
        assert done.stdout.startswith("native (CPU): _C.abi3.so loaded; there is no CUDA kernel: nvcc was not found")


@pytest.mark.skipif(INSTALLED != "sdist", reason="no sdist was built beside torch")
def test_an_sdist_built_beside_torch_has_the_cpu_kernel():
    done = imported("-W", "error")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("native (CPU): _C.abi3.so loaded")
    assert "torch_gradmatch/_C_cuda.abi3.so" not in files()


@pytest.mark.skipif(INSTALLED != "isolated", reason="no sdist was built in isolation")
def test_an_sdist_built_in_isolation_says_why_it_is_slower_and_what_to_do():
    assert not any(file.endswith(".so") for file in files())
    assert "Tag: py3-none-any" in (distribution("torch_gradmatch").read_text("WHEEL") or "")
    done = imported("-W", "error")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch._foreach: the extension was not built (torch is not installed")
    assert "pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall /" in done.stdout


def test_the_import_leaves_cuda_alone():
    assert not torch.cuda.is_initialized()
