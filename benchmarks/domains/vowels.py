"""Vowels by speaker: Deterding's eleven vowels of British English, as R's package mlbench has them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from benchmarks.domains.source import Loaded, Source, find

__all__ = ["SOURCE"]

COMMAND = "apt-get download r-cran-mlbench && dpkg-deb --extract r-cran-mlbench*.deb ROOT"
FILE = "usr/lib/R/site-library/mlbench/data/Vowel.rda"
FEATURES = [f"V{number}" for number in range(2, 11)]


def load(root: Path) -> Loaded:
    """Read R's data frame.

    Args:
        root: Where the package was put, or the file.

    Returns:
        Nine coefficients of the log area ratio for each sample, shape (990, 9), without a unit; the class is the vowel.

    Raises:
        MissingDataError: If the file is not there.
        ModuleNotFoundError: If rdata, which reads R's files, is not installed.
        ValueError: If it is another file, or damaged.
    """
    path = find(root, (FILE, Path(FILE).name), COMMAND)
    import rdata  # only where the data is there

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unknown encoding", UserWarning)  # R of long ago did not write it down
        try:
            frame = rdata.read_rda(path)["Vowel"]
            columns = frame[[*FEATURES, "V1", "Class"]]
        except Exception as error:  # of many kinds, by where a file is damaged
            raise ValueError(f"{path} is not mlbench's Vowel: {error}") from error
    classes = [str(label) for label in columns["Class"].cat.categories]
    inputs = torch.tensor(columns[FEATURES].to_numpy("float32"))
    targets = torch.tensor(columns["Class"].cat.codes.to_numpy("int64"))
    if (targets < 0).any():
        raise ValueError(f"{path} has samples without a class")
    speakers = [f"speaker {label}" for label in columns["V1"]]
    utterances = [f"{speaker}, {label}" for speaker, label in zip(speakers, columns["Class"], strict=True)]
    return Loaded(inputs, targets, speakers, classes, utterances)


def make_model() -> nn.Module:
    """Make a perceptron with two hidden layers.

    Returns:
        The network.
    """
    return nn.Sequential(nn.Linear(9, 64), nn.ReLU(), nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 11))


SOURCE = Source(
    "vowels",
    "Vowels by speaker",
    "another person speaks",
    COMMAND,
    "GPL-2 (of the package; the measurements are Deterding's of 1989, in the UCI repository)",
    (
        (
            "Fifteen speakers, eleven vowels of six frames each: 990 rows of ten columns, of which the first is the "
            "speaker. The six frames are of one utterance: a group, which is never on both sides of validation."
        ),
        "Two vowels differ by a capital letter only: hOd and hod, hUd and hud, hEd and hed, hId and hid, hAd and had.",
    ),
    load,
    make_model,
)
