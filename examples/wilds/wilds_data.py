"""The six WILDS data sets as the ``wilds`` package opens them: their domains, transforms and batches."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchvision import transforms
from torchvision.transforms import functional as image_functional
from wilds import get_dataset
from wilds.datasets import poverty_dataset
from wilds_settings import PaperSettings

from torch_gradmatch import DomainBatchSampler

__all__ = ["MissingDataError", "Tokens", "TrainingData", "eval_loader", "image_transform", "open_dataset"]

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
Tokens = Callable[[list[str]], dict[str, Tensor]]


def _mean_by_group(src: Tensor, index: Tensor, dim_size: int, reduce: str) -> Tensor:
    if src.ndim != 1 or reduce != "mean":
        raise ValueError(f"only the mean of a vector's groups (got reduce={reduce!r}, shape {src.shape})")
    return src.new_zeros(dim_size).scatter_reduce(0, index, src, "mean", include_self=False)


if importlib.util.find_spec("torch_scatter") is None:
    # The metrics of wilds call one function of torch_scatter, which there is as source code only and takes ten minutes
    # to compile. torch has had the same since 1.12.
    sys.modules["torch_scatter"] = ModuleType("torch_scatter")
    sys.modules["torch_scatter"].scatter = _mean_by_group  # type: ignore[attr-defined]


class MissingDataError(RuntimeError):
    """A data set or the weights of a model are not on this machine. Says which command gets them."""


def open_dataset(settings: PaperSettings, root: Path, fold: str, download: bool) -> Any:
    """Open a data set with the ``wilds`` package, in its newest version and official split.

    Args:
        settings: Those of the data set.
        root: Folder that holds ``iwildcam_v2.0`` and the like.
        fold: Countries that are held out, "A" to "E"; for PovertyMap only.
        download: Whether to download what is missing.

    Returns:
        The ``WILDSDataset``.

    Raises:
        MissingDataError: If it is not there, or a file of it is not.
    """
    name = settings.wilds_name
    kwargs = {"fold": fold} if name == "poverty" else {}
    with warnings.catch_warnings():
        # It makes tensors of pandas' read-only arrays, to which it does not write; some groups may have no sample.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        warnings.filterwarnings("ignore", message="Minimum metadata value for CombinatorialGrouper is not 0")
        warnings.filterwarnings("ignore", message="The 'future.infer_string' option is deprecated")
        try:
            # wilds 2.0 writes numbers into a column of strings, which pandas 3 refuses unless it holds objects.
            with pd.option_context("future.infer_string", False):
                return get_dataset(dataset=name, root_dir=str(root), download=download, **kwargs)
        except FileNotFoundError as error:
            raise MissingDataError(
                f"{name} is not complete in --root {root} ({error}).\n"
                "Run the same command with --download, or get it with\n"
                f"    python -c \"import wilds; wilds.get_dataset('{name}', root_dir='{root}', download=True)\"\n"
                "or by hand from https://wilds.stanford.edu/downloads. Miniatures to try the code with:\n"
                f"    python examples/wilds/make_miniature.py --root miniatures"
            ) from None


def image_transform(settings: PaperSettings, size: int, training: bool) -> Callable[[Any], Tensor] | None:
    """Return what turns the data set's inputs into tensors; None for texts, which are tokenized by the batch.

    As in the authors' code: images are resized and normalized with ImageNet's statistics, and PovertyMap's training
    images are flipped and their colours jittered. There, other than in the authors' code, all eight bands are flipped
    together, colours are jittered in the range in which they are colours (``wilds`` has normalized them), and images
    for evaluation are left as they are.

    Args:
        settings: Those of the data set.
        size: Side of the images in pixels.
        training: Whether for training.

    Returns:
        The transform.
    """
    if settings.model == "distilbert":
        return None
    if settings.wilds_name == "poverty":
        return _PovertyTransform(size, training)
    steps = [
        transforms.Lambda(_as_rgb),
        transforms.Resize((size, size)),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    return transforms.Compose(steps)


def _as_rgb(image: Any) -> Any:
    return image.convert("RGB")


class _PovertyTransform:
    def __init__(self, size: int, training: bool) -> None:
        self.size, self.training = size, training
        self.jitter = transforms.ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.1)
        means, stds = poverty_dataset._MEANS_2009_17, poverty_dataset._STD_DEVS_2009_17
        self.mean, self.std = (
            torch.tensor([values[band] for band in ("RED", "GREEN", "BLUE")]).view(3, 1, 1) for values in (means, stds)
        )

    def __call__(self, bands: Tensor) -> Tensor:
        if bands.shape[-1] != self.size:
            bands = image_functional.resize(bands, [self.size, self.size], antialias=True)
        if not self.training:
            return bands
        for axis in (-1, -2):
            if torch.rand(()) < 0.5:
                bands = bands.flip(axis)
        colours = (bands[[2, 1, 0]] * self.std + self.mean).clamp(0, 1)  # the file has blue, green, red
        colours = (self.jitter(colours) - self.mean) / self.std
        return torch.cat([colours[[2, 1, 0]], bands[3:]])


class _Collate:
    """Batches of (input, label, metadata); texts become tokens, padded to the longest of the batch."""

    def __init__(self, tokens: Tokens | None) -> None:
        self.tokens = tokens

    def __call__(self, samples: Sequence[tuple[Any, Tensor, Tensor]]) -> tuple[Any, Tensor, Tensor]:
        inputs, labels, metadata = zip(*samples, strict=True)
        x = torch.stack(inputs) if self.tokens is None else self.tokens(list(inputs))
        return x, torch.stack(labels), torch.stack(metadata)


class TrainingData:
    """The training split, and which of its samples each domain has.

    Args:
        dataset: From :func:`open_dataset`.
        settings: Those of the data set.
        transform: From :func:`image_transform`.
        tokens: Turns texts into tensors; None for images.
        workers: Processes of each ``DataLoader``.

    Attributes:
        subset: The training split.
        domains: Label of each domain -> positions of its samples in ``subset``.
    """

    def __init__(
        self,
        dataset: Any,
        settings: PaperSettings,
        transform: Callable[[Any], Tensor] | None,
        tokens: Tokens | None,
        workers: int,
    ) -> None:
        self.subset = dataset.get_subset("train", transform=transform)
        self._collate, self._workers = _Collate(tokens), workers
        self._metadata = self.subset.metadata_array
        self._fields = list(dataset.metadata_fields)
        self._names: Mapping[str, Any] = dataset.metadata_map or {}
        masks = (self._identity_masks if settings.overlapping else self._value_masks)(settings.fields)
        found = {label: torch.nonzero(mask).squeeze(1).numpy() for label, mask in masks.items()}
        self.domains = {label: indices for label, indices in found.items() if indices.size}
        self._domains_of: dict[int, set[str]] = {}
        for label, indices in self.domains.items():
            for index in indices.tolist():
                self._domains_of.setdefault(index, set()).add(label)

    def _column(self, field: str) -> Tensor:
        return self._metadata[:, self._fields.index(field)]

    def _value_masks(self, fields: Sequence[str]) -> dict[str, Tensor]:
        columns = torch.stack([self._column(field).long() for field in fields], dim=1)
        values, owner = columns.unique(dim=0, return_inverse=True)
        return {
            ", ".join(
                f"{field} {self._names[field][value] if field in self._names else value}"
                for field, value in zip(fields, row, strict=True)
            ): owner == number
            for number, row in enumerate(values.tolist())
        }

    def _identity_masks(self, fields: Sequence[str]) -> dict[str, Tensor]:
        # A comment belongs to every identity that it mentions, or to "none", each split by the label.
        mentioned = {name: self._column(name) == 1 for name in fields if name != "y"}
        mentioned["none"] = ~torch.stack(list(mentioned.values())).any(dim=0)
        return {
            f"{name}, {kind}": mask & (self._column("y") == label)
            for (name, mask), (label, kind) in itertools.product(mentioned.items(), enumerate(("civil", "toxic")))
        }

    def by_domain(self, batch_size: int, domains_per_step: int, seed: int) -> StatefulDataLoader[Any]:
        """Return a loader whose consecutive groups of S batches come from S distinct domains.

        Args:
            batch_size: Samples in a batch.
            domains_per_step: S.
            seed: Of the sampler.

        Returns:
            The loader; its ``batch_sampler`` is a ``DomainBatchSampler``.
        """
        # A sample of several domains stands in the data set once for each, as the sampler gives a sample to one only.
        samples = np.concatenate(list(self.domains.values()))
        labels = [label for label, indices in self.domains.items() for _ in indices]
        sampler = DomainBatchSampler(  # in the order of the authors' code
            labels, batch_size, domains_per_step, seed=seed, order="random"
        )
        return self._loader(sampler, seed, samples.tolist())

    def shuffled(self, batch_size: int, seed: int) -> StatefulDataLoader[Any]:
        """Return a loader of batches from all domains together, for ordinary training.

        Args:
            batch_size: Samples in a batch.
            seed: Of the sampler.

        Returns:
            The loader. All samples are one domain to its sampler, which can be resumed in the middle of an epoch.
        """
        samples = range(len(self.subset))
        return self._loader(DomainBatchSampler({"all": samples}, batch_size, 1, seed=seed), seed, samples)

    def _loader(self, sampler: DomainBatchSampler, seed: int, samples: Sequence[int]) -> StatefulDataLoader[Any]:
        # A generator of its own: a loader otherwise draws from the global one each time it is iterated.
        return StatefulDataLoader(
            _WithPosition(self.subset, samples),
            batch_sampler=sampler,
            num_workers=self._workers,
            collate_fn=_CollateWithPosition(self._collate),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(seed),
        )

    def domains_served(self, positions: Tensor) -> list[str]:
        """Return the domains that hold all samples of a batch: one, but where domains share samples.

        Args:
            positions: Of the samples in ``subset``, the last entry of a batch.

        Returns:
            Their labels, sorted; none for a batch of several domains.
        """
        return sorted(set.intersection(*(self._domains_of[position] for position in positions.tolist())))


class _WithPosition(Dataset[Any]):
    """Samples of a data set that tell their position, by which a log can say which domain was served."""

    def __init__(self, subset: Any, samples: Sequence[int]) -> None:
        self.subset, self.samples = subset, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        position = self.samples[index]
        return self.subset[position], position


class _CollateWithPosition:
    def __init__(self, collate: _Collate) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[tuple[Any, int]]) -> tuple[Any, Tensor, Tensor, Tensor]:
        batch, positions = zip(*samples, strict=True)
        return *self.collate(batch), torch.tensor(positions)


def eval_loader(
    dataset: Any,
    split: str,
    transform: Callable[[Any], Tensor] | None,
    tokens: Tokens | None,
    batch_size: int,
    workers: int,
) -> DataLoader[Any]:
    """Return a loader over a split in its order.

    Args:
        dataset: From :func:`open_dataset`.
        split: Name of the split.
        transform: From :func:`image_transform`.
        tokens: Turns texts into tensors; None for images.
        batch_size: Samples in a batch.
        workers: Processes that load.

    Returns:
        The loader of (input, label, metadata).
    """
    subset = dataset.get_subset(split, transform=transform)
    return DataLoader(subset, batch_size, num_workers=workers, collate_fn=_Collate(tokens))
