"""CdSprites-N: coloured squares and ellipses in which colour gives the label away, but only in training.

The shapes follow dSprites (Matthey et al., 2017): squares and ellipses, 6 scales x 40 rotations x 32 x 32 positions, on
black. The colours follow CdSprites-N (Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022):

    training domain i    its own two colours: one on every square, the other on every ellipse
    validation           the colours of training, on either shape alike
    test                 colours that training never shows, on either shape alike

The label is the shape. In the official code the test images wear training colours too; here their colours are new.
"""

from __future__ import annotations

import zipfile
from colorsys import hsv_to_rgb
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

SHAPES = ("square", "ellipse")  # a label is an index into this
Arrangement = Literal["pairs", "random"]  # which hues of the colour wheel the two shapes wear in training
FACTOR_SIZES = (6, 40, 32, 32)  # scale, orientation, posX, posY; the last varies fastest, as in the dSprites file

# At scale 1, in image widths, chosen to look like dSprites: on 64 pixels the square has side 19.2, the ellipse axes
# 25.6 and 14.4, and the centre moves one pixel at a time from 16 to 47. The original sprites come with --dsprites.
SQUARE_SIDE = 0.3
ELLIPSE_AXES = (0.4, 0.225)
CENTRE_RANGE = (16 / 64, 47 / 64)


class Factors(NamedTuple):
    """Values of the dSprites factors of n sprites, each of shape (n,).

    Attributes:
        scale: in [0.5, 1].
        orientation: in radians, in [0, 2 pi], counter-clockwise as seen.
        x: 0 is the leftmost place of the centre, 1 the rightmost.
        y: 0 is the topmost place of the centre, 1 the lowest.
    """

    scale: NDArray[np.float32]
    orientation: NDArray[np.float32]
    x: NDArray[np.float32]
    y: NDArray[np.float32]


class Split(NamedTuple):
    """n sprites.

    Attributes:
        masks: (n, size, size) uint8, brightness of the white sprite.
        colours: (n, 3) float32, red, green and blue in [0, 1].
        labels: (n,) int64, an index into ``SHAPES``.
        domains: (n,) int64, the domain from whose two colours the sprite has its own.
    """

    masks: NDArray[np.uint8]
    colours: NDArray[np.float32]
    labels: NDArray[np.int64]
    domains: NDArray[np.int64]


class CdSprites(NamedTuple):
    """The three splits; no sprite is in two of them."""

    train: Split
    validation: Split
    test: Split


class SpriteSource(Protocol):
    """Where white sprites come from: ``available`` of each shape, numbered from 0."""

    available: int

    def masks(self, labels: NDArray[np.int64], numbers: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
        """Return (n, size, size) brightness of the sprites with these labels (n,) and numbers (n,)."""


def factors_of(numbers: NDArray[np.int64]) -> Factors:
    """Decode the number of a sprite, counted as within one shape of the dSprites file.

    Returns:
        The factors of each sprite.
    """
    ranges = ((0.5, 1.0), (0.0, 2 * np.pi), (0.0, 1.0), (0.0, 1.0))
    grids = [np.linspace(*ends, n, dtype=np.float32) for ends, n in zip(ranges, FACTOR_SIZES, strict=True)]
    classes = np.unravel_index(numbers, FACTOR_SIZES)
    return Factors(*(grid[index] for grid, index in zip(grids, classes, strict=True)))


def draw(labels: NDArray[np.int64], factors: Factors, size: int) -> NDArray[np.uint8]:
    """Draw white sprites on black, their edges one pixel soft.

    A pixel is as bright as clip(d + 1/2, 0, 1), d the signed distance of its centre to the outline in pixels. For the
    ellipse f(u, v) = 1 that distance is taken to first order: (1 - f) / |grad f|.

    Returns:
        (n, size, size) brightness, 0 to 255.
    """
    masks = np.empty((len(labels), size, size), np.uint8)
    pixel = np.arange(size, dtype=np.float32) + 0.5
    low, high = CENTRE_RANGE
    for start in range(0, len(labels), 1024):  # bounds the memory of the images in float32
        part = slice(start, start + 1024)
        scale, angle, x, y = (values[part, None, None] for values in factors)
        dx = pixel[None, None, :] - size * (low + (high - low) * x)
        dy = pixel[None, :, None] - size * (low + (high - low) * y)  # rows run downwards
        cos, sin = np.cos(angle), np.sin(angle)
        u, v = np.abs(cos * dx - sin * dy), np.abs(sin * dx + cos * dy)

        half_side = scale * (size * SQUARE_SIDE / 2)
        square = half_side - np.maximum(u, v)

        a, b = (scale * (size * axis / 2) for axis in ELLIPSE_AXES)
        f = np.maximum(np.hypot(u / a, v / b), 1e-3)
        ellipse = (1 - f) * f / np.maximum(np.hypot(u / a**2, v / b**2), 1e-6)

        distance = np.where(labels[part, None, None] == 0, square, ellipse)
        masks[part] = np.rint(255 * np.clip(distance + 0.5, 0, 1))
    return masks


class DrawnSprites:
    """Squares and ellipses drawn on demand, with the factors of dSprites."""

    available = int(np.prod(FACTOR_SIZES))

    def masks(self, labels: NDArray[np.int64], numbers: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
        """Draw sprites.

        Returns:
            (n, size, size) brightness.
        """
        return draw(labels, factors_of(numbers), size)


class DSpritesFile:
    """Squares and ellipses of the original file, ``dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz``.

    The images (3 GB unpacked) are streamed and only those asked for are kept.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not the dSprites file; the message says in what it differs.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no dSprites file at {str(path)!r}")
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{str(path)!r} is not an npz file")
        self.path = path
        with zipfile.ZipFile(path) as archive:
            missing = sorted({"imgs.npy", "latents_classes.npy"} - set(archive.namelist()))
            if missing:
                raise ValueError(f"{str(path)!r} lacks the arrays {[name.removesuffix('.npy') for name in missing]}")
            with archive.open("imgs.npy") as stream:
                self.image_shape, fortran, dtype = self._header(stream)
            with archive.open("latents_classes.npy") as stream:
                classes = np.lib.format.read_array(stream, allow_pickle=False)
        n = self.image_shape[0] if self.image_shape else 0
        if len(self.image_shape) != 3 or self.image_shape[1:] != (64, 64) or dtype != np.uint8 or fortran:
            raise ValueError(
                f"'imgs' should be uint8 of shape (737280, 64, 64) (got {dtype} of shape {self.image_shape})"
            )
        if classes.shape != (n, 6) or not np.issubdtype(classes.dtype, np.integer):
            raise ValueError(
                f"'latents_classes' should be integers of shape ({n}, 6) (got {classes.dtype} of shape {classes.shape})"
            )
        self._rows = [np.flatnonzero(classes[:, 1] == shape) for shape in range(len(SHAPES))]
        self.available = min(len(rows) for rows in self._rows)

    @staticmethod
    def _header(stream: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
        if np.lib.format.read_magic(stream) == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        return np.lib.format.read_array_header_2_0(stream)

    def masks(self, labels: NDArray[np.int64], numbers: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
        """Read sprites; sizes other than 64 are resampled by area.

        Returns:
            (n, size, size) brightness.

        Raises:
            ValueError: if the file ends early or an image holds anything but 0 and 1.
        """
        rows = np.where(labels == 0, self._rows[0][numbers], self._rows[1][numbers])
        order = np.argsort(rows)
        wanted = rows[order]
        masks = np.empty((len(rows), size, size), np.uint8)
        total, height, width = self.image_shape
        with zipfile.ZipFile(self.path) as archive, archive.open("imgs.npy") as stream:
            self._header(stream)
            for start in range(0, total, 4096):
                count = min(4096, total - start)
                content = stream.read(count * height * width)
                if len(content) < count * height * width:
                    raise ValueError(f"{str(self.path)!r} ends early: image {start + count - 1} is missing")
                first, last = np.searchsorted(wanted, (start, start + count))
                images = np.frombuffer(content, np.uint8).reshape(count, height, width)[wanted[first:last] - start]
                if images.size and images.max() > 1:
                    raise ValueError(f"'imgs' should hold only 0 and 1 (got {images.max()})")
                resized = functional.adaptive_avg_pool2d(torch.from_numpy(images).float(), size)
                masks[order[first:last]] = (255 * resized).round().byte().numpy()
        return masks


def palette(
    domains: int, seed: int, arrangement: Arrangement = "pairs"
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Choose the colours: vivid ones for training and pastel ones never seen there.

    The training hues stand evenly around the colour wheel: by ``"pairs"`` two for squares, two for ellipses and so on,
    by ``"random"`` half of them, drawn, for squares. The seed decides that, and which two colours share a domain. The
    unseen hues stand between those of training, at half the saturation.

    How hard colour is to learn decides the outcome, so this order is a choice. Measured with Fish by Adam, meta_lr 0.3:
    where the shapes take turns at every hue, ERM learns shape, too (1.00 on unseen colours); where the hues are dealt
    to the shapes at random, even a few simple rules of colour go far, and Fish, too, learns colour (0.51 to 0.55).

    Returns:
        Colours of the training domains, of squares and of ellipses, and unseen colours: each (domains, 2, 3).
    """
    turns = np.arange(2 * domains)
    vivid = np.array([hsv_to_rgb(turn / (2 * domains), 1.0, 1.0) for turn in turns], np.float32)
    pastel = np.array([hsv_to_rgb((turn + 0.5) / (2 * domains), 0.5, 1.0) for turn in turns], np.float32)
    rng = np.random.default_rng(seed)
    if arrangement == "pairs":
        shape = turns // 2 % 2
        shape[-1] = 1  # with an odd number of domains, squares would have two colours more than ellipses
    else:
        shape = rng.permutation(turns % 2)
    training = np.stack([rng.permutation(vivid[shape == label]) for label in range(len(SHAPES))], axis=1)
    return training, pastel.reshape(domains, 2, 3)


def make_cdsprites(
    source: SpriteSource,
    *,
    domains: int,
    images_per_domain: int,
    eval_images: int,
    size: int,
    seed: int,
    arrangement: Arrangement = "pairs",
) -> CdSprites:
    """Draw the three splits of CdSprites-N from disjoint sprites, each with as many squares as ellipses.

    Args:
        source: where the white sprites come from.
        domains: N, the number of training domains.
        images_per_domain: training images of each domain.
        eval_images: images of validation, and as many of test.
        size: side of the images in pixels.
        seed: decides which sprites and which colours go where.
        arrangement: which hues the shapes wear in training, see ``palette``.

    Returns:
        The splits.

    Raises:
        ValueError: if the source has too few sprites.
    """
    counts = (domains * images_per_domain, eval_images, eval_images)
    labels = np.arange(sum(counts)) % 2  # images_per_domain and eval_images are even: every part is balanced
    needed = (len(labels) + 1) // 2
    if needed > source.available:
        raise ValueError(
            f"{needed} sprites of each shape are needed, and the source has {source.available}: ask for fewer"
        )
    rng = np.random.default_rng(seed)
    numbers = np.empty_like(labels)
    for shape in range(len(SHAPES)):
        drawn = rng.permutation(source.available)
        numbers[labels == shape] = drawn[: np.count_nonzero(labels == shape)]
    masks = source.masks(labels, numbers, size)
    training_colours, unseen_colours = palette(domains, seed, arrangement)

    domain = np.repeat(np.arange(domains), images_per_domain)
    colour_laws = [(training_colours, domain, labels[: counts[0]])]
    for colours in (training_colours, unseen_colours):
        # Every shape gets every colour equally often: colour and label are independent.
        turn = np.arange(eval_images) // 2 % (2 * domains)
        colour_laws.append((colours, turn // 2, turn % 2))

    splits = []
    for (colours, domain, which), end in zip(colour_laws, np.cumsum(counts), strict=True):
        part = slice(end - len(domain), end)
        splits.append(Split(masks[part], colours[domain, which], labels[part], domain))
    return CdSprites(*splits)


class SpriteDataset(Dataset):
    """A split on a device, handing out whole batches: an image is mask times colour, made when it is asked for.

    ``DataLoader`` calls ``__getitems__`` where there is one; its ``collate_fn`` then only passes the batch on.

    Args:
        split: the sprites.
        device: where they are kept.
    """

    def __init__(self, split: Split, device: torch.device) -> None:
        self.masks, self.colours, self.labels = (torch.from_numpy(array).to(device) for array in split[:3])
        self.domains = torch.from_numpy(split.domains)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Fetch a batch.

        Returns:
            Images (n, 3, size, size) in [0, 1] and labels (n,).
        """
        index = torch.as_tensor(indices, device=self.labels.device)
        images = self.masks[index, None].float() * (self.colours[index, :, None, None] / 255)
        return images, self.labels[index]
