"""What a release is made of: the sdist, the version, the citation, the checklist. ``make release`` tries it out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import torch_gradmatch

ROOT = Path(__file__).parents[1]
HIDE_TORCH = "import runpy, sys; sys.modules['torch'] = None; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py')"


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_GRADMATCH")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a checkout in which the extension was built, unpacked."""
    folder = tmp_path_factory.mktemp("release")
    checkout = folder / "checkout"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("torch_gradmatch", "csrc"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, checkout)
    (checkout / "tests").mkdir()
    (checkout / "tests" / "test_release.py").write_text("")
    for name in ("_C.abi3.so", "_C_cuda.abi3.so", "_build.json"):
        (checkout / "torch_gradmatch" / name).write_text("{}")
    done = run(sys.executable, "-c", HIDE_TORCH, "--quiet", "sdist", cwd=checkout)
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout / "dist").iterdir()
    assert archive.name == f"torch_gradmatch-{torch_gradmatch.__version__}.tar.gz"
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_sdist_has_every_source_and_nothing_that_was_built(sdist: Path):
    files = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    sources = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "torch_gradmatch").rglob("*.py")]
    expected = {str(path.relative_to(ROOT)) for path in sources if path.suffix in {".py", ".h", ".cpp", ".cu"}}
    assert "csrc/cuda/interpolate.cu" in expected
    assert expected <= files
    others = {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    assert others | {"torch_gradmatch/py.typed"} <= files
    assert not [file for file in files if file.endswith((".so", ".pyc", "_build.json")) or file.startswith("tests/")]


def test_what_is_built_from_it_in_isolation_is_pure_and_says_what_to_do(sdist: Path):
    """As ``pip install .`` does it, which shows nothing of what the build says: torch is not there, then it is."""
    done = run(sys.executable, "-c", HIDE_TORCH, "--quiet", "bdist_wheel", cwd=sdist)
    assert done.returncode == 0, done.stderr
    (wheel,) = (sdist / "dist").iterdir()
    assert wheel.name == f"torch_gradmatch-{torch_gradmatch.__version__}-py3-none-any.whl"
    code = "import torch_gradmatch as t; print(t.__file__, t.native_status())"
    done = run(sys.executable, "-W", "error", "-c", code, cwd=sdist / "build/lib")
    assert done.returncode == 0, done.stderr
    assert str(sdist) in done.stdout
    assert "torch._foreach: the extension was not built (torch is not installed where this is built)" in done.stdout
    assert "pip install setuptools wheel && pip install --no-build-isolation --no-deps" in done.stdout


def test_a_setuptools_that_makes_no_wheels_is_said_to_need_wheel(sdist: Path):
    """As in a new environment of Python 3.11."""
    hide = "import importlib.util as u; found = u.find_spec\n"
    hide += "u.find_spec = lambda name: None if 'wheel' in name else found(name)\n"
    done = run(sys.executable, "-c", hide + HIDE_TORCH, "--quiet", "bdist_wheel", cwd=sdist)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith("needs wheel to build it: pip install wheel, and try again")


def test_the_version_is_written_once_and_the_metadata_and_the_citation_have_it(sdist: Path):
    for path, pattern in ((sdist / "PKG-INFO", r"^Version: (.*)$"), (ROOT / "CITATION.cff", r"^version: (.*)$")):
        assert re.findall(pattern, path.read_text(), flags=re.MULTILINE) == [torch_gradmatch.__version__]
    assert 'dynamic = ["version", "license"]' in (ROOT / "pyproject.toml").read_text()


def test_every_command_and_file_of_the_checklist_exists():
    text = (ROOT / "docs" / "releasing.md").read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = set(re.findall(r"`make ([a-z-]+)", text))
    assert {"release", "soak", "test-ecosystem", "test-large", "test-cuda"} <= named
    assert named <= set(targets)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link
