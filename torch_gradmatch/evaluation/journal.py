"""A folder of runs, a line of JSON for each, from which work that was broken off goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Journal", "Key"]

RUNS, TASK = "runs.jsonl", "task.json"


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


class Journal:
    """Runs by key, kept in a folder if there is one: what is added is on the disk before the next run begins.

    Args:
        folder: Where; made if it is not there. None to keep nothing.
        task: What the runs depend on, in plain numbers and text: a folder with runs of something else is refused.

    Raises:
        ValueError: If the folder holds runs of another task, names the first difference; or a line that is no run.
    """

    def __init__(self, folder: Path | None, task: Mapping[str, Any]) -> None:
        self._runs: dict[Key, dict[str, Any]] = {}
        self._path: Path | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RUNS
        described = json.loads(json.dumps(task))
        known = folder / TASK
        if known.exists():
            self._refuse_another(folder, json.loads(known.read_text()), described)
        elif self._path.exists():
            raise ValueError(f"{folder} has {RUNS} but no {TASK} that says what they are runs of: pass another folder")
        else:
            _write(known, json.dumps(described, indent=1) + "\n")
        if self._path.exists():
            self._read(self._path)

    @staticmethod
    def _refuse_another(folder: Path, known: dict[str, Any], described: dict[str, Any]) -> None:
        for name in {**known, **described}:
            if known.get(name) != described.get(name):
                raise ValueError(
                    f"{folder} holds runs with {name}={known.get(name)!r:.200}, and here it is "
                    f"{described.get(name)!r:.200}: pass another folder, or remove this one"
                )

    def _read(self, path: Path) -> None:
        text = path.read_text()
        whole, separator, _torn = text.rpartition("\n")  # a line that was being written when it was killed
        if len(whole + separator) < len(text):
            _write(path, whole + separator)
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                run = json.loads(line)
                key = Key(*(run.pop(name) for name in Key._fields))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"line {number} of {path} is no run: remove it to go on ({error})") from error
            self._runs[key] = run

    def find(self, key: Key, expected: Mapping[str, Any]) -> bool:
        """Return whether it has a run.

        Args:
            key: Which.
            expected: By what it was trained.

        Returns:
            Whether.

        Raises:
            ValueError: If it was trained by something else.
        """
        run = self._runs.get(key)
        if run is None:
            return False
        for name, value in json.loads(json.dumps(expected)).items():
            if run[name] != value:
                raise ValueError(
                    f"the folder has a run of {key.method!r} with {name}={run[name]!r:.200}, and here it is "
                    f"{value!r:.200}: give the method another name, or pass another folder"
                )
        return True

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self._runs[key]

    @property
    def is_kept(self) -> bool:
        """Whether there is a folder."""
        return self._path is not None

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, key: Key, run: Mapping[str, Any]) -> None:
        """Keep a run.

        Args:
            key: Which.
            run: Plain numbers and text by name.
        """
        line = json.dumps(key._asdict() | dict(run))
        self._runs[key] = {name: value for name, value in json.loads(line).items() if name not in Key._fields}
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    """Write a file so that there is all of it or what was there before."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
