"""Eleven sets of emoji, seven families of style, rendered once.

The drawings are those of npm's ``@iconify-json`` packages, aligned by code point; their classes are CLDR's subgroups in
Debian's ``unicode-data``.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.domains.source import content_of, find

__all__ = ["CLASSES", "COMMAND", "SETS", "Images", "build", "images"]

SIZE = 64  # pixels a side


class Drawings(NamedTuple):
    """A set of drawings.

    Attributes:
        package: ``@iconify-json/PACKAGE`` of npm.
        version: Of the package.
        family: Sets of one vendor share drawings.
        licence: Of the drawings.
    """

    package: str
    version: str
    family: str
    licence: str


SETS = (
    Drawings("noto", "1.2.9", "Google", "Apache-2.0"),
    Drawings("noto-v1", "1.2.5", "Google", "Apache-2.0"),
    Drawings("twemoji", "1.2.5", "Twitter", "CC-BY-4.0"),
    Drawings("openmoji", "1.2.29", "OpenMoji", "CC-BY-SA-4.0"),
    Drawings("emojione", "1.2.3", "EmojiOne", "CC-BY-4.0"),
    Drawings("emojione-v1", "1.2.3", "EmojiOne", "CC-BY-SA-4.0"),
    Drawings("emojione-monotone", "1.2.1", "line art", "CC-BY-4.0"),
    Drawings("fxemoji", "1.2.2", "Mozilla", "Apache-2.0"),
    Drawings("fluent-emoji", "1.2.7", "Microsoft", "MIT"),
    Drawings("fluent-emoji-flat", "1.2.6", "Microsoft", "MIT"),
    Drawings("fluent-emoji-high-contrast", "1.2.6", "line art", "MIT"),
)
CLASSES = {
    "mammal": "animal-mammal cat-face monkey-face",
    "bird": "animal-bird",
    "bug": "animal-bug",
    "sea, reptile": "animal-marine animal-reptile animal-amphibian",
    "plant": "plant-flower plant-other",
    "fruit, vegetable": "food-fruit food-vegetable",
    "meal": "food-prepared food-asian",
    "sweet": "food-sweet",
    "drink": "drink dishware",
    "road, rail": "transport-ground",
    "air, water": "transport-air transport-water",
    "sky": "sky&weather",
    "building": "place-building place-religious",
    "clothing": "clothing",
    "face": "face-smiling face-affection face-tongue face-hand face-neutral-skeptical face-sleepy face-unwell face-hat "
    "face-glasses face-concerned face-negative",
    "hand": "hand-fingers-open hand-fingers-partial hand-single-finger hand-fingers-closed hands hand-prop",
    "person": "person-role person-fantasy person",
    "sport": "sport award-medal",
    "tool": "tool",
    "office": "office book-paper mail writing",
    "music": "music musical-instrument sound",
}
EMOJI_TEST = "usr/share/unicode/emoji/emoji-test.txt"
RENDERED = "emoji-styles/images.npz"
COMMAND = "make domains-data"
READ = ("icons.json", "chars.json")  # of each package


class Concept(NamedTuple):
    """What an emoji stands for: its code points, subgroup and English name."""

    key: str
    subgroup: str
    name: str


def concepts(text: str) -> list[Concept]:
    """Read ``emoji-test.txt``: all fully qualified emoji without a skin tone.

    Raises:
        ValueError: If there are none.
    """
    found, subgroup = [], ""
    for line in text.splitlines():
        if line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip().replace(" ", "")
        match = re.match(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.*)", line)
        if match:
            points = match[1].split()
            if not any(0x1F3FB <= int(point, 16) <= 0x1F3FF for point in points):
                key = "-".join(point.lower() for point in points if point != "FE0F")
                found.append(Concept(key, subgroup, match[2]))
    if not found:
        raise ValueError("emoji-test.txt holds no fully-qualified emoji: is it the file of Debian's unicode-data?")
    return found


def plain(name: str) -> str:
    """Return a name's letters and digits, in lower case and without accents."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", letters)


def drawings(icons: Mapping[str, Any], points: Mapping[str, str], wanted: Iterable[Concept]) -> dict[str, str]:
    """Return the drawing of each concept that a set has, as SVG.

    Args:
        icons: The package's ``icons.json``.
        points: Its ``chars.json``: names by code points.
        wanted: The concepts.

    Returns:
        By the concept's key: found by code points, else by name.
    """
    by_key = {c.key: c for c in wanted}
    by_name = {plain(c.name): c.key for c in by_key.values()}
    aliases, names = icons.get("aliases", {}), {}
    for point, name in points.items():
        key = "-".join(part for part in point.lower().split("-") if part != "fe0f")
        if key in by_key:
            names.setdefault(key, name)
    for name in (*icons["icons"], *aliases):
        if (key := by_name.get(plain(name))) is not None:
            names.setdefault(key, name)
    found, height = {}, icons.get("height", 16)
    for key, name in names.items():
        for _ in range(5):
            name = aliases[name]["parent"] if name in aliases else name
        icon = icons["icons"].get(name)
        if icon is not None:
            box = [icon.get(side, icons.get(side, 0)) for side in ("left", "top")]
            box += [icon.get("width", icons.get("width", height)), icon.get("height", height)]
            found[key] = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{" ".join(map(str, box))}" width="{SIZE}" height="{SIZE}" color="#000">{icon["body"]}</svg>'
            )
    return found


def render(svg: str) -> np.ndarray[Any, Any] | None:
    """Draw an SVG on white, shape (3, 64, 64), uint8; None where it cannot be drawn."""
    import resvg_py
    from PIL import Image

    try:
        drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))))
    except ValueError:
        return None
    white = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
    white.alpha_composite(drawn.convert("RGBA"))
    if white.size != (SIZE, SIZE):
        white = white.resize((SIZE, SIZE))
    return np.asarray(white.convert("RGB")).transpose(2, 0, 1)


def download(root: Path) -> None:
    """Get the packages that are not there, by npm."""
    for one in SETS:
        folder = root / "emoji-styles" / one.package
        if all((folder / name).is_file() for name in READ):
            continue
        with tempfile.TemporaryDirectory() as place:
            wanted = f"@iconify-json/{one.package}@{one.version}"
            subprocess.run(["npm", "pack", wanted, "--silent", "--pack-destination", place], check=True)
            (archive,) = Path(place).iterdir()
            folder.mkdir(parents=True, exist_ok=True)
            with tarfile.open(archive) as file:
                for name in READ:
                    (folder / name).write_bytes(content_of(file, f"package/{name}"))


def build(root: Path) -> Path:
    """Render all sets, once: 14,787 images in a minute or two of one core.

    Args:
        root: Where the packages are unpacked.

    Returns:
        The file of the images.

    Raises:
        MissingDataError: If a package is not there.
        ValueError: If what is drawn is not what was drawn when the figures were taken.
    """
    path = root / RENDERED
    if path.is_file():
        return path
    wanted = concepts(find(root, (EMOJI_TEST,), COMMAND).read_text(encoding="utf-8"))
    images, keys, sets = [], [], []
    for number, one in enumerate(SETS):
        folder = find(root, (f"emoji-styles/{one.package}/icons.json",), COMMAND).parent
        icons, points = (json.loads((folder / name).read_text(encoding="utf-8")) for name in READ)
        for key, svg in sorted(drawings(icons, points, wanted).items()):
            image = render(svg)
            if image is not None:
                images.append(image)
                keys.append(key)
                sets.append(number)
    np.savez_compressed(path, images=np.stack(images), keys=np.array(keys), sets=np.array(sets))
    notes = [
        f"{one.package} {one.version}: {one.licence} (https://icon-sets.iconify.design/{one.package})" for one in SETS
    ]
    (path.parent / "LICENCES.txt").write_text("\n".join(notes) + "\n", encoding="utf-8")
    return path


def statistics(images: np.ndarray[Any, Any], sets: np.ndarray[Any, Any]) -> str:
    """Return a hash of how many images each set has and of their mean colours, to a hundredth."""
    counted = [
        (int((sets == number).sum()), images[sets == number].mean(axis=(0, 2, 3)).round(2).tolist())
        for number in range(len(SETS))
    ]
    return hashlib.sha256(json.dumps(counted).encode()).hexdigest()[:16]


STATISTICS = "83265beecd66d297"  # of resvg-py 0.5.0


class Images(NamedTuple):
    """The images of concepts that have a class.

    Attributes:
        pixels: Shape (samples, 3, 64, 64), uint8.
        targets: Classes, shape (samples,).
        families: Of each sample.
        concepts: Of each sample.
    """

    pixels: Tensor
    targets: Tensor
    families: list[str]
    concepts: list[str]


def images(root: Path) -> Images:
    """Read the images, rendering them where that was not done.

    Raises:
        ValueError: If they are others than those of which the figures are.
    """
    with np.load(build(root)) as file:
        pixels, keys, sets = file["images"], file["keys"], file["sets"]
    found = statistics(pixels, sets)
    if found != STATISTICS:
        raise ValueError(
            f"{root / RENDERED} holds other images than those of which the figures are (their statistics hash to "
            f"{found}, not {STATISTICS}): delete it, get the versions that `make domains-data` names, render again"
        )
    number_of = {subgroup: i for i, subgroups in enumerate(CLASSES.values()) for subgroup in subgroups.split()}
    subgroup_of = {c.key: c.subgroup for c in concepts((root / EMOJI_TEST).read_text(encoding="utf-8"))}
    kept = [i for i, key in enumerate(keys.tolist()) if subgroup_of[key] in number_of]
    return Images(
        torch.from_numpy(pixels[kept]),
        torch.tensor([number_of[subgroup_of[key]] for key in keys[kept].tolist()]),
        [SETS[number].family for number in sets[kept].tolist()],
        keys[kept].tolist(),
    )
