"""What a data set of the benchmark is: where its files come from, how they are read, and which model learns it."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

__all__ = ["Loaded", "MissingDataError", "Source", "accuracy", "content_of", "cross_entropy", "find", "text_of"]


class MissingDataError(FileNotFoundError):
    """The files of a data set are not there; the message says which command gets them."""


@dataclass(frozen=True)
class Loaded:
    """The samples of a data set.

    Attributes:
        inputs: Shape (samples, ...), floating point or integer codes.
        targets: Classes, int64, or numbers, shape (samples,).
        domains: The label of each sample's domain.
        classes: Names of the classes; none where targets are numbers.
        groups: Which samples belong together, such as the windows of one recording; None if each stands alone.
    """

    inputs: Tensor
    targets: Tensor
    domains: list[str]
    classes: list[str]
    groups: list[str] | None = None

    def __post_init__(self) -> None:
        if not len(self.inputs) == len(self.targets) == len(self.domains):
            raise ValueError(
                "inputs, targets and domains should have an entry for each sample "
                f"(got {len(self.inputs)}, {len(self.targets)}, {len(self.domains)})"
            )
        if self.inputs.is_floating_point() and not self.inputs.isfinite().all():
            raise ValueError("inputs should be finite: the files hold NaN or infinity where numbers are expected")

    def dataset(self) -> TensorDataset:
        """Return pairs of input and class."""
        return TensorDataset(self.inputs, self.targets)

    def sizes(self) -> dict[str, int]:
        """Return how many samples each domain has, in the order in which the domains appear."""
        return dict(Counter(self.domains))

    def most_frequent(self) -> float:
        """Return how often a guess of the class that is most frequent everywhere is right, mean over domains."""
        right = self.targets == self.targets.bincount().argmax()
        return fmean(float(right[own].double().mean()) for own in self._places())

    def chance(self) -> str:
        """Say what a guess that does not look at the inputs scores."""
        if self.classes:
            return (
                f"Who always says the most frequent of {len(self.classes)} classes is right in "
                f"{self.most_frequent():.1%}, mean over domains."
            )
        middle = self.targets.median()
        error = fmean(float((self.targets[own] - middle).abs().mean()) for own in self._places())
        return f"Who always says the median is off by {error:.3f}, mean over domains."

    def _places(self) -> list[Tensor]:
        return [torch.tensor([d == domain for d in self.domains]) for domain in self.sizes()]


def content_of(archive: tarfile.TarFile, name: str) -> bytes:
    """Return what is in a file of an archive; raise ``ValueError`` or ``KeyError`` if there is none of that name."""
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file in it")
    return file.read()


def cross_entropy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the mean loss of a batch.

    Args:
        model: The model.
        batch: Inputs and classes.

    Returns:
        Shape ().
    """
    inputs, targets = batch
    return functional.cross_entropy(model(inputs), targets)


def accuracy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return which samples of a batch the model knows.

    Args:
        model: The model.
        batch: Inputs and classes.

    Returns:
        Shape (B,), ones and zeros.
    """
    inputs, targets = batch
    return (model(inputs).argmax(dim=1) == targets).to(torch.float32)


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: On the command line.
        title: In the report.
        shift: What differs between the domains, in a few words.
        command: Gets the files, where ``ROOT`` stands for the folder.
        licence: Of the data, as its package says it.
        notes: What somebody should know of it who reads the figures, a sentence or more each.
        load: Reads the files under a folder.
        make_model: Returns a new model.
        loss_fn, metric: As for ``leave_one_domain_out``.
    """

    name: str
    title: str
    shift: str
    command: str
    licence: str
    notes: tuple[str, ...]
    load: Callable[[Path], Loaded]
    make_model: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, list[Tensor]], Tensor] = cross_entropy
    metric: Callable[[nn.Module, list[Tensor]], Tensor] = accuracy


def find(root: Path, places: Sequence[str], command: str) -> Path:
    """Return the first file that is there of some below a folder; if there is none, an error says the command."""
    for place in places:
        if (root / place).is_file():
            return root / place
    raise MissingDataError(f"{places[0]} is not in {root}. This gets it: {command.replace('ROOT', str(root))}")


def text_of(path: Path) -> str:
    """Read a text file, in UTF-8; raise ``ValueError`` if it is in another encoding, or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
