"""Exercises from a watch's sensors, by person: ``seglearn``'s watch data (Burns et al., 2018, arXiv 1802.01489)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from benchmarks.domains.source import Loaded, Source, find

__all__ = ["SOURCE"]

COMMAND = "python -m pip install --no-deps --target ROOT seglearn==1.2.5"
FILE = "seglearn/data/watch_dataset.npy"
WIDTH = 100  # samples in a window: 2 s at 50 Hz
ALLOWED = {
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
FIELDS = ("X", "y", "y_labels", "subject")


class _Arrays(pickle.Unpickler):
    """Reads arrays and containers of them, and refuses all else that a pickle can name."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of arrays")


def read(path: Path) -> dict[str, Any]:
    """Read the dictionary that a ``.npy`` file holds.

    Args:
        path: The file.

    Returns:
        What is in it.

    Raises:
        ValueError: If it is no such file, or is damaged.
    """
    try:
        with path.open("rb") as file:
            _skip_header(file)
            found = _Arrays(file).load().item()
    except (ValueError, EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
        raise ValueError(f"{path} is not seglearn's watch data: {error}") from error
    missing = [field for field in FIELDS if not isinstance(found, dict) or field not in found]
    if missing:
        raise ValueError(f"{path} is not seglearn's watch data: it has no {missing[0]!r}")
    return dict(found)


def _skip_header(file: BinaryIO) -> None:
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = reader(file)
    if shape != () or not dtype.hasobject:
        raise ValueError(f"it holds an array of shape {shape} and {dtype}")


def load(root: Path) -> Loaded:
    """Cut the series into windows of two seconds, one after the other; what is left at the end is dropped.

    Args:
        root: Where the package was put, or the file.

    Returns:
        Windows (samples, 6, 100): acceleration and angular velocity in the package's units; the class is the exercise.

    Raises:
        MissingDataError: If the file is not there.
        ValueError: If it is another one, or damaged.
    """
    path = find(root, (FILE, Path(FILE).name), COMMAND)
    found = read(path)
    lengths = {field: len(found[field]) for field in ("X", "y", "subject")}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path} is damaged: it has {lengths}")
    windows, targets, domains, groups = [], [], [], []
    for position, (series, exercise, subject) in enumerate(zip(found["X"], found["y"], found["subject"], strict=True)):
        number = len(series) // WIDTH
        windows.append(np.asarray(series)[: number * WIDTH].reshape(number, WIDTH, -1).transpose(0, 2, 1))
        targets += [int(exercise)] * number
        domains += [f"person {int(subject)}"] * number
        groups += [f"series {position}"] * number
    inputs = torch.from_numpy(np.ascontiguousarray(np.concatenate(windows), dtype=np.float32))
    return Loaded(inputs, torch.tensor(targets), domains, [str(label) for label in found["y_labels"]], groups)


def make_model() -> nn.Module:
    """Make a small convolutional network over time.

    Returns:
        The network.
    """
    return nn.Sequential(
        nn.Conv1d(6, 16, 5, stride=3),
        nn.ReLU(),
        nn.Conv1d(16, 24, 5, stride=3),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(4),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(96, 7),
    )


SOURCE = Source(
    "watch",
    "Exercises by person",
    "another person wears the watch",
    COMMAND,
    "BSD 3-Clause (of the package, which ships the data)",
    (
        (
            "Ten people, seven shoulder exercises of twenty repetitions each, on the left and on the right side: 140 "
            "series at 50 Hz, cut into windows of two seconds without overlap."
        ),
        "The windows of one series are a group, which is never on both sides of validation.",
        "The side is not given to the model; left and right are mirror images.",
    ),
    load,
    make_model,
)
