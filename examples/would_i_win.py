"""Would a method have won on my domains? Handwritten digits, each domain turned by another angle.

scikit-learn's 1,797 digits of 8 x 8 pixels are dealt out to six domains, turned by 0, 15, 30, 45, 60 and 75 degrees.
Each domain is held out in turn; every method trains on the other five with the same number of samples. Put your own
model, data set and column of domain labels in the place of these::

    python examples/would_i_win.py --folder out/would_i_win

Break it off and call it again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from torch_gradmatch import LogUniform, leave_one_domain_out

ANGLES = (0, 15, 30, 45, 60, 75)
METHODS = ("ERM", "ERM, balanced", "Fish", "SmoothFish")
SEARCH = {"lr": LogUniform(1e-3, 3e-2, 1e-2)}  # the default is for longer runs


def turned_digits() -> tuple[TensorDataset, list[str]]:
    """Deal the digits out to the angles, and turn them.

    Returns:
        Images (1797, 1, 8, 8) in [0, 1] with their digits, and the domain of each.
    """
    digits = load_digits()
    angles = np.resize(ANGLES, len(digits.images))
    turned = [
        rotate(image, int(angle), reshape=False, order=1) for image, angle in zip(digits.images, angles, strict=True)
    ]
    images = torch.tensor(np.stack(turned), dtype=torch.float32)[:, None] / 16
    return TensorDataset(images, torch.tensor(digits.target)), [f"{angle} degrees" for angle in angles]


def make_model() -> nn.Module:
    """Make a small convolutional network.

    Returns:
        The network.
    """
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the loss of a batch.

    Args:
        model: The model.
        batch: Images and digits.

    Returns:
        Shape ().
    """
    images, digits = batch
    return nn.functional.cross_entropy(model(images), digits)


def accuracy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return which digits of a batch the model knows.

    Args:
        model: The model.
        batch: Images and digits.

    Returns:
        Shape (B,), ones and zeros.
    """
    images, digits = batch
    return (model(images).argmax(dim=1) == digits).float()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("out/would_i_win"), help="keeps every run; default %(default)s")
    add("--methods", nargs="+", default=METHODS, help="default: %(default)s")
    add("--budget", type=int, default=12_000, help="samples differentiated in a run; default %(default)s")
    add("--draws", type=int, default=3, help="of hyperparameters; default %(default)s")
    add("--seeds", type=int, default=3, help="default %(default)s")
    add("--processes", type=int, default=min(4, os.cpu_count() or 1), help="default %(default)s")
    arguments = parser.parse_args()
    dataset, domains = turned_digits()
    found = leave_one_domain_out(
        make_model,
        dataset,
        domains,
        loss_fn,
        accuracy,
        arguments.methods,
        budget=arguments.budget,
        draws=arguments.draws,
        seeds=arguments.seeds,
        search=SEARCH,
        folder=arguments.folder,
        processes=arguments.processes,
    )
    picture = arguments.folder / "would_i_win.png"
    found.plot(picture)
    print(f"\npicture: {picture}")


if __name__ == "__main__":
    main()
