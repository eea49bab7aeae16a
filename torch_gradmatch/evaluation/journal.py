"""A folder of runs, a line of JSON for each, from which work that was broken off goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Journal", "Key"]

RUNS, TASK = "runs.jsonl", "task.json"
OR_NAME = "give the method another name, or "


class Key(NamedTuple):
    """Which run it is.

    Attributes:
        method: The recipe's name.
        held_out: The domain's label, as text.
        draw: Number of the draw of hyperparameters.
        seed: Of the run.
    """

    method: str
    held_out: str
    draw: int
    seed: int


class Journal(dict[Key, dict[str, Any]]):
    """Runs by key, kept in a folder if there is one: what is added is on the disk before the next run begins.

    Args:
        folder: Where; made if it is not there. None to keep nothing.
        task: What the runs depend on, in plain numbers and text: a folder with runs of something else is refused.

    Attributes:
        path: Of the file of runs, None without a folder.

    Raises:
        ValueError: If the folder holds runs of another task, names the first difference; or a line that is no run.
    """

    def __init__(self, folder: Path | None, task: Mapping[str, Any]) -> None:
        super().__init__()
        self.path = None if folder is None else folder / RUNS
        if folder is None or self.path is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        described, known = json.loads(json.dumps(task)), folder / TASK
        if known.exists():
            _refuse_another(f"{folder} holds runs", json.loads(known.read_text()), described, "")
        elif self.path.exists():
            raise ValueError(f"{folder} has {RUNS} but no {TASK} that says what they are runs of: pass another folder")
        else:
            _write(known, json.dumps(described, indent=1) + "\n")
        if self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        text = path.read_text()
        whole, separator, torn = text.rpartition("\n")
        if torn:  # a line that was being written when it was killed
            _write(path, whole + separator)
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                run = json.loads(line)
                self[Key(*(run.pop(name) for name in Key._fields))] = run
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"line {number} of {path} is no run: remove it to go on ({error})") from error

    def has(self, key: Key, expected: Mapping[str, Any]) -> bool:
        """Return whether it has a run.

        Args:
            key: Which.
            expected: By what it was trained.

        Returns:
            Whether.

        Raises:
            ValueError: If it was trained by something else.
        """
        if key in self:
            there = {name: self[key][name] for name in expected}
            _refuse_another(f"the folder has a run of {key.method!r}", there, json.loads(json.dumps(expected)), OR_NAME)
        return key in self

    def add(self, key: Key, run: Mapping[str, Any]) -> None:
        """Keep a run.

        Args:
            key: Which.
            run: Plain numbers and text by name.
        """
        self[key] = json.loads(json.dumps(run))
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(key._asdict() | dict(run)) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _refuse_another(where: str, known: Mapping[str, Any], here: Mapping[str, Any], remedy: str) -> None:
    for name in {**known, **here}:
        if known.get(name) != here.get(name):
            raise ValueError(
                f"{where} with {name}={known.get(name)!r:.200}, and here it is {here.get(name)!r:.200}: {remedy}pass "
                "another folder"
            )


def _write(path: Path, text: str) -> None:
    """Write a file so that there is all of it or what was there before."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
