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

FILES = [str(file) for file in distribution("torch_gradmatch").files or ()]


def installed(how: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(os.environ["INSTALLED"] != how, reason=f"what was installed is no {how}")


def status_without_warnings() -> str:
    code = "import torch_gradmatch; print(torch_gradmatch.native_status())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_the_installed_package():
    assert Path(torch_gradmatch.__file__).is_relative_to(sys.prefix)
    assert version("torch_gradmatch") == torch_gradmatch.__version__
    assert not any("editable" in file for file in FILES)
    metadata = f"torch_gradmatch-{torch_gradmatch.__version__}.dist-info"
    assert {Path(file).parts[0] for file in FILES} <= {"torch_gradmatch", metadata}
    assert not torch.cuda.is_initialized()


@installed("wheel")
def test_one_wheel_has_the_kernels_that_torch_has_a_use_for():
    assert "torch_gradmatch/_C.abi3.so" in FILES
    status = status_without_warnings()
    if torch.version.cuda is None:
        assert status == "native (CPU): _C.abi3.so loaded"
    elif "torch_gradmatch/_C_cuda.abi3.so" in FILES:
        both = "native (CPU and CUDA): _C.abi3.so loaded; _C_cuda.abi3.so loaded, with the run time of CUDA "
        assert status.startswith(both)
    else:
        assert status.startswith("native (CPU): _C.abi3.so loaded; there is no CUDA kernel: nvcc was not found")


@installed("sdist")
def test_an_sdist_built_beside_torch_has_the_cpu_kernel():
    assert status_without_warnings().startswith("native (CPU): _C.abi3.so loaded")
    assert "torch_gradmatch/_C_cuda.abi3.so" not in FILES


@installed("isolated")
def test_an_sdist_built_in_isolation_says_why_it_is_slower_and_what_to_do():
    assert not any(file.endswith(".so") for file in FILES)
    assert "Tag: py3-none-any" in (distribution("torch_gradmatch").read_text("WHEEL") or "")
    status = status_without_warnings()
    assert status.startswith("torch._foreach: the extension was not built (torch is not installed")
    assert "pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall /" in status
