"""What was done, one line of JSON for each case, and a page with the figures."""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import torch_gradmatch


def read(path: Path, seed: int, cases: list[str]) -> dict[str, dict[str, Any]]:
    """Return the lines of cases that were carried out before and went well; what is half written is passed over."""
    found: dict[str, dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["ok"] and line["seed"] == seed and line["case"] in cases:
            found[line["case"]] = line
    return found


def write(path: Path, line: dict[str, Any]) -> None:
    """Append a line, at once."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def command(part: str, line: dict[str, Any]) -> str:
    """What carries out a case again."""
    return f"PYTHONPATH=.:tests python -m soak {part} --seed {line['seed']} --only '{line['case']}'"


def page(parts: dict[str, ModuleType], lines: dict[str, list[dict[str, Any]]], share: float, seconds: float) -> str:
    """Return the figures in Markdown, and every failure with the command that carries it out again."""
    versions = f"torch_gradmatch {torch_gradmatch.__version__}, torch {torch.__version__}"
    today = f"{datetime.now(timezone.utc):%d %B %Y}"
    measured = f"Python {platform.python_version()}; share {share:g}, {seconds / 60:.1f} minutes."
    text = ["# Soak", "", f"{today}, {versions}, {measured}"]
    for name, part in parts.items():
        good = [line for line in lines[name] if line["ok"]]
        failed = [line for line in lines[name] if not line["ok"]]
        spent = sum(line["seconds"] for line in lines[name])
        text += ["", f"## {name}", "", f"{len(good)} of {len(lines[name])} cases went well, in {spent:,.0f} s of work."]
        text += ["", *(part.figures(good) if good else [])]
        for line in failed:
            text += ["", f"FAILED `{command(name, line)}`", "", "```", line["error"].strip()[-3000:], "```"]
    return "\n".join(text) + "\n"
