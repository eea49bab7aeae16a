"""The package's files depend on each other in one direction only, and importing it stays lean."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torch_gradmatch

PACKAGE = Path(torch_gradmatch.__file__).parent
LAYERS = [
    {"_checks", "_native", "domain_plan"},
    {"ops", "alignment", "hvp", "random_state", "peak_memory"},
    {"slow_weights", "agreement"},
    {"slow_buffers", "inner_state", "functional", "method", "sampling"},
    {"direction"},
    {"fish", "idgm", "smooth_fish"},
    {"optimizer"},
    {"trial", "loaders"},
    {"fidelity", "cost"},
    {"comparison"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(source: str) -> set[str]:
    """Names of the package's own modules that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            if node.module == "torch_gradmatch":
                found |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("torch_gradmatch."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("torch_gradmatch.")}
    return found


def test_every_file_has_a_layer():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(LEVEL)


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_imports_point_down_only(name: str):
    for other in imported((PACKAGE / f"{name}.py").read_text()):
        assert LEVEL[other] < LEVEL[name], f"{name} imports {other}"


def test_the_check_sees_an_import_inside_a_function():
    assert imported("def f():\n    from torch_gradmatch import fish\n    import torch_gradmatch.ops\n") == {
        "fish",
        "ops",
    }


def test_every_public_name_exists_and_is_documented():
    for name in torch_gradmatch.__all__:
        assert getattr(torch_gradmatch, name).__doc__


def test_importing_is_lean():
    """No plotting or test library, and no CUDA context."""
    code = (
        "import sys, torch_gradmatch, torch\n"
        "heavy = {'matplotlib', 'pytest', 'hypothesis', 'scipy', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
