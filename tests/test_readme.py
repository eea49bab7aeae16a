"""Every Python block of the README runs, in order, its diff changes one line, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def shape_of(text: str) -> str:
    """The words, with any number for a number: rounding differs from one machine to another."""
    return " ".join(re.sub(r"[\d.]*\d", "0", text).split())


def test_every_python_block_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]):
    namespace: dict[str, object] = {}
    code = blocks("python")
    printed = [*re.findall(r"^print.*  # (.*)$", code[0], flags=re.MULTILINE), *blocks("text")]
    assert len(code) == len(printed) == 2
    for number, block in enumerate(code):
        exec(compile(block, f"README block {number}", "exec", dont_inherit=True), namespace)
        assert shape_of(capsys.readouterr().out) == shape_of(printed[number])
    assert namespace["optimizer"].inner_step == 0
    assert namespace["loss"].item() < 0.6


def test_the_loop_differs_from_an_ordinary_one_in_one_line():
    (diff,) = blocks("diff")
    removed, added = ([line[1:] for line in diff.splitlines() if line.startswith(sign)] for sign in "-+")
    assert len(removed) == len(added) == 1
    assert removed[0].removeprefix("optimizer = ") in added[0]
    assert added[0] in blocks("python")[0]


def test_it_fits_on_one_screen():
    assert len(README.read_text().splitlines()) <= 110


def test_every_command_and_file_it_names_exists():
    text = README.read_text()
    makefile = (README.parent / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", text)) - {"and"}:
        assert f"\n{target}:" in makefile, target
    ignored = [line.strip("/") for line in (README.parent / ".gitignore").read_text().split()]
    for name in re.findall(r"!?\[[^]]*\]\((?!http)([^)]+)\)", text):
        assert not any(name.startswith(f"{folder}/") for folder in ignored), f"{name} is in no clone"
        assert (README.parent / name.partition("#")[0]).exists(), name
