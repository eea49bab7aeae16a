"""The package's rooms depend on each other in one direction only, and importing it stays lean."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import torch_gradmatch
from torch_gradmatch import integrations

PACKAGE = Path(torch_gradmatch.__file__).parent
# DESIGN section 4: a file imports from rooms that stand before its own, and from its own.
ROOMS = ["_checks", "parallel", "slow", "gradients", "methods", "wrapper", "several", "optimizer", "data", "evaluation"]
LEVEL = {room: level for level, room in enumerate([*ROOMS, "__init__"])}
LEVEL |= dict.fromkeys(("__main__", "integrations"), len(LEVEL))
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(source: str) -> set[str]:
    """The package's own modules that a file imports, wherever in the file, without the package's name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            package, _, module = (node.module or "").partition(".")
            if package == "torch_gradmatch":
                found |= {".".join(filter(None, (module, alias.name))) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("torch_gradmatch.")}
    return {known for name in found for known in FILES if name == known or name.startswith(f"{known}.")}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down_only(name: str):
    room = name.partition(".")[0]
    for other in imported(FILES[name].read_text()):
        its_room = other.partition(".")[0]
        assert its_room == room or LEVEL[its_room] < LEVEL[room], f"{name} imports {other}"


def test_no_two_files_import_each_other():
    TopologicalSorter({name: imported(path.read_text()) for name, path in FILES.items()}).prepare()


def test_the_check_sees_an_import_inside_a_function_and_of_a_name():
    code = "def f():\n    from torch_gradmatch.methods.fish import Fish\n    import torch_gradmatch.slow.ops\n"
    assert imported(code) == {"methods.fish", "slow.ops"}
    assert imported("from torch_gradmatch.slow import ops, weights") == {"slow.ops", "slow.weights"}


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [("DomainTrainer", "transformers", "transformers accelerate"), ("GradMatchCallback", "lightning", "lightning")],
)
def test_an_integration_without_its_framework_says_what_to_install(monkeypatch, name: str, package: str, install: str):
    monkeypatch.setitem(sys.modules, package, None)
    for module in list(sys.modules):
        if module.startswith(("torch_gradmatch.integrations.", f"{package}.")):
            monkeypatch.delitem(sys.modules, module)
    with pytest.raises(
        ImportError, match=rf"torch_gradmatch\.integrations\.\w+ needs {package} \(.*pip install {install}$"
    ):
        getattr(integrations, name)
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = integrations.Trainer


def test_importing_is_lean_and_public_modules_are_found_under_the_package():
    """No plotting or test library, no framework that writes the loop, and no CUDA context."""
    code = (
        "import sys, torch_gradmatch, torch\n"
        "heavy = {'matplotlib', 'pytest', 'hypothesis', 'scipy', 'pandas', 'lightning', 'transformers'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    for name in ("functional", "agreement", "alignment", "ops"):
        public = getattr(torch_gradmatch, name).__all__[0]
        code += f"import torch_gradmatch.{name} as m; from torch_gradmatch.{name} import {public} as p\n"
        code += f"assert m is torch_gradmatch.{name} and p is m.{public}\n"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
