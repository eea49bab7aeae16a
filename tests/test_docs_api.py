"""The reference documents every public name under the package's own name, and none that does not exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import torch_gradmatch

PAGES = Path(__file__).parents[1] / "docs" / "api"
TEXT = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGES.iterdir())}
DIRECTIVE = re.compile(r"^\.\. (?:auto\w+|py:\w+):: (torch_gradmatch[\w.]*)$", flags=re.MULTILINE)
DOCUMENTED = sorted({name for text in TEXT.values() for name in DIRECTIVE.findall(text)})
LINKED = sorted(set(re.findall(r"\{py:\w+\}`(torch_gradmatch[\w.]*)`", TEXT["index.md"])))
MEMBERS = {  # what a page documents by the name of its module
    module: importlib.import_module(module).__all__
    for module in re.findall(r"^\.\. automodule:: (\S+)\n   :members:$", "\n".join(TEXT.values()), flags=re.MULTILINE)
}


def found(name: str) -> Any:
    """As autodoc finds it: the longest part of the name that is a module, then attributes."""
    parts = name.split(".")
    if parts[1:2] == ["integrations"] and len(parts) == 4:  # of a framework that need not be installed
        source = (PAGES.parents[1] / Path(*parts[:3])).with_suffix(".py").read_text(encoding="utf-8")
        (node,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == parts[3]]
        return SimpleNamespace(__doc__=ast.get_docstring(node))
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise ImportError(name)


@pytest.mark.parametrize("name", torch_gradmatch.__all__)
def test_every_public_name_is_documented_once_and_in_the_table(name: str):
    full = f"torch_gradmatch.{name}"
    assert sum(DIRECTIVE.findall(text).count(full) for text in TEXT.values()) == 1
    assert full in LINKED


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_documented_name_exists(name: str):
    assert found(name).__doc__


@pytest.mark.parametrize("name", LINKED)
def test_what_the_table_links_is_documented(name: str):
    module, _, member = name.rpartition(".")
    members = re.findall(rf"automodule:: {module}\n   :members: (.+)$", "\n".join(TEXT.values()), flags=re.MULTILINE)
    assert name in DOCUMENTED or member in MEMBERS.get(module, ()) or member in ", ".join(members).split(", ")


def test_every_page_is_in_the_table_of_contents():
    contents = re.findall(r"^(\w+)$", TEXT["index.md"], flags=re.MULTILINE)
    assert sorted(contents) == sorted(Path(name).stem for name in TEXT if name != "index.md")


RESULTS = PAGES.parents[1] / "benchmarks" / "results"
REPORTS = sorted([*RESULTS.glob("*.md"), *RESULTS.glob("*/index.md")])


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_every_report_of_the_benchmarks_has_a_page_that_the_index_names(report: Path):
    folder = PAGES.parent / "benchmarks"
    name = report.stem if report.parent.name == "results" else report.parent.name
    page = (folder / f"{name}.md").read_text(encoding="utf-8")
    assert (folder / page.partition("{include} ")[2].split("\n")[0]).resolve() == report
    index = (folder / "index.md").read_text(encoding="utf-8")
    assert f"]({name}.md)" in index
    assert f"\n{name}\n" in index
