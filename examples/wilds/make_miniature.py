"""Miniatures of the six WILDS data sets of the paper, in each one's own format on disk.

    python examples/wilds/make_miniature.py --root miniatures
    python examples/wilds/train.py --root miniatures --dataset poverty --method fish --image-size 32

The ``wilds`` package opens them unmodified: same folders and version files, same columns of the metadata, same names
of the splits, same kinds of files (jpeg, png, npz of eight bands, csv of texts). A few hundred samples each, random but
for a weak trace of the label; PovertyMap has 2,000 more, because ``wilds`` sets that many aside for its two splits
within the training countries, whatever there is. They are for trying the training code, and teach nothing about the
methods: the data sets themselves come from ``wilds`` (``train.py --download``).
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

# Regions as fMoW's country codes have them; a code that is not listed becomes "Other".
FMOW_COUNTRIES = {"KEN": "Africa", "BRA": "Americas", "JPN": "Asia", "FRA": "Europe", "FJI": "Oceania"}
FMOW_CLASSES = ("airport", "airport_hangar", "zoo", "multi-unit_residential", "lake_or_pond")
# Countries of PovertyMap's fold A.
POVERTY_TRAIN = ("cameroon", "ghana", "kenya", "malawi", "nigeria", "senegal")
POVERTY_OTHER = ("benin", "guinea", "angola", "mali")
POVERTY_SET_ASIDE = 2000  # by wilds, for id_val and id_test together
IDENTITIES = ("male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")
ATTRIBUTES = (
    "identity_any",
    "severe_toxicity",
    "obscene",
    "threat",
    "insult",
    "identity_attack",
    "sexual_explicit",
)
FILLER = (
    "the",
    "a",
    "one",
    "this",
    "it",
    "was",
    "is",
    "and",
    "but",
    "with",
    "about",
    "people",
    "thing",
    "time",
    "very",
)


def _picture(generator: np.random.Generator, size: int, label: int, domain: int) -> Image.Image:
    # The label is the place of a bright square, the domain a tint: the kind of difference that cameras make.
    pixels = generator.integers(0, 120, (size, size, 3))
    pixels[..., domain % 3] += 30 * (1 + domain % 4)
    side = size // 4
    row, column = divmod(label % 16, 4)
    pixels[row * side : (row + 1) * side, column * side : (column + 1) * side] += 100
    return Image.fromarray(np.minimum(pixels, 255).astype(np.uint8))


def _sentence(generator: np.random.Generator, label: int, domain: int) -> str:
    words = [*generator.choice(FILLER, size=int(generator.integers(6, 30))), f"label{label}", f"domain{domain}"]
    generator.shuffle(words)
    return " ".join(words)


def _release(root: Path, folder: str, version: str) -> Path:
    # wilds takes a folder for a complete download if the file of its release lies in it.
    directory = root / f"{folder}_v{version}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"RELEASE_v{version}.txt").write_text("A miniature made by torch_gradmatch: not the data set.\n")
    return directory


def make_iwildcam(root: Path, samples: int, size: int, generator: np.random.Generator) -> None:
    """Write photographs of camera traps: ``metadata.csv`` and ``train/*.jpg``, which holds all splits.

    Args:
        root: Folder of the data sets.
        samples: Number of training samples.
        size: Side of an image, in pixels.
        generator: Source of randomness.
    """
    directory = _release(root, "iwildcam", "2.0")
    (directory / "train").mkdir(exist_ok=True)
    classes, train_locations, other = 7, 12, max(20, samples // 8)
    splits = ["train"] * samples + ["id_val", "id_test"] * other + ["val", "test"] * other
    rows = []
    for index, split in enumerate(splits):
        location = {"val": train_locations, "test": train_locations + 1}.get(split, index % train_locations)
        label = index % classes if split == "train" else int(generator.integers(classes))
        filename = f"{index:08x}-21bc-11ea-a13a-137349068a90.jpg"
        _picture(generator, size, label, location).save(directory / "train" / filename, quality=95)
        rows.append(
            {
                "split": split,
                "location_remapped": location,
                "location": 100 + location,
                "sequence_remapped": index,
                "datetime": f"2013-06-{1 + index % 28:02d} 16:57:01.{index % 1000:03d}",
                "seq_id": f"{index:08x}-21bc",
                "y": label,
                "filename": filename,
                "image_id": filename[:-4],
            }
        )
    pd.DataFrame(rows).to_csv(directory / "metadata.csv")


def make_fmow(root: Path, samples: int, size: int, generator: np.random.Generator) -> None:
    """Write satellite images: ``rgb_metadata.csv``, ``country_code_mapping.csv`` and ``images/rgb_img_N.png``.

    Args:
        root: Folder of the data sets.
        samples: Number of training samples.
        size: Side of an image, in pixels.
        generator: Source of randomness.
    """
    directory = _release(root, "fmow", "1.1")
    (directory / "images").mkdir(exist_ok=True)
    pd.DataFrame(
        {"name": list(FMOW_COUNTRIES), "alpha-3": list(FMOW_COUNTRIES), "region": list(FMOW_COUNTRIES.values())}
    ).to_csv(directory / "country_code_mapping.csv", index=False)
    countries = [*FMOW_COUNTRIES, "ZZZ"]  # the last has no region
    other = max(20, samples // 8)
    # Years before 2013 are the training domains, 2013 to 2015 validation, from 2016 on test; "seq" was never released.
    plan = [("train", (2004, 2007, 2010, 2012)[index % 4]) for index in range(samples)]
    plan += [(split, year) for split in ("val", "test") for year in (2010, 2013, 2016) for _ in range(other)]
    plan += [("seq", 2011)] * 5
    rows = []
    for index, (split, year) in enumerate(plan):
        label, country = int(generator.integers(len(FMOW_CLASSES))), (index // 4) % len(countries)
        _picture(generator, size, label, country).save(directory / "images" / f"rgb_img_{index}.png")
        rows.append(
            {
                "split": split,
                "img_filename": f"{FMOW_CLASSES[label]}_{index}_rgb.jpg",
                "img_path": f"{split}/{FMOW_CLASSES[label]}",
                "category": FMOW_CLASSES[label],
                "country_code": countries[country],
                "lat": 0.0,
                "lon": 0.0,
                "timestamp": f"{year}-03-{1 + index % 28:02d}T10:11:12Z",
            }
        )
    table = pd.DataFrame(rows)
    # wilds reads the order of the rows as the numbers of the images; the sequestered ones lie between the others.
    table.to_csv(directory / "rgb_metadata.csv", index=False)


def make_camelyon17(root: Path, samples: int, size: int, generator: np.random.Generator) -> None:
    """Write tissue patches of 96 x 96 pixels: ``metadata.csv`` and ``patches/patient_P_node_N/*.png``.

    Args:
        root: Folder of the data sets.
        samples: Number of training samples.
        size: Not used: patches have 96 pixels.
        generator: Source of randomness.
    """
    del size
    directory = _release(root, "camelyon17", "1.0")
    other = max(20, samples // 8)
    # Hospitals 0, 3 and 4 train; 1 is validation and 2 test, which wilds knows by itself. Split 1 is id_val.
    plan = [((0, 3, 4)[index % 3], 0) for index in range(samples)]
    plan += [((0, 3, 4)[index % 3], 1) for index in range(other)] + [(1, 0), (2, 0)] * other
    rows = []
    for index, (hospital, split) in enumerate(plan):
        patient, node, label = f"{hospital * 20 + index % 2:03d}", index % 2, int(generator.integers(2))
        folder = directory / "patches" / f"patient_{patient}_node_{node}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"patch_patient_{patient}_node_{node}_x_{32 * index}_y_64.png"
        _picture(generator, 96, 5 * label, hospital).save(folder / name)
        rows.append(
            {
                "patient": patient,
                "node": node,
                "x_coord": 32 * index,
                "y_coord": 64,
                "tumor": label,
                "slide": hospital * 10 + index % 2,
                "center": hospital,
                "split": split,
            }
        )
    pd.DataFrame(rows).to_csv(directory / "metadata.csv")


def make_poverty(root: Path, samples: int, size: int, generator: np.random.Generator) -> None:
    """Write images of eight bands, fold A: ``dhs_metadata.csv`` and ``images/landsat_poverty_img_N.npz``.

    Args:
        root: Folder of the data sets.
        samples: Number of training samples.
        size: Side of an image, in pixels.
        generator: Source of randomness.
    """
    directory = _release(root, "poverty", "1.1")
    (directory / "images").mkdir(exist_ok=True)
    countries = [POVERTY_TRAIN[index % len(POVERTY_TRAIN)] for index in range(POVERTY_SET_ASIDE + samples)]
    countries += [POVERTY_OTHER[index % len(POVERTY_OTHER)] for index in range(max(40, samples // 4))]
    generator.shuffle(countries)
    rows = []
    for index, country in enumerate(countries):
        wealth = float(generator.normal())
        bands = generator.normal(size=(8, size, size)) * 0.5
        bands[: 1 + index % 7] += wealth * 0.5
        np.savez(directory / "images" / f"landsat_poverty_img_{index}.npz", x=bands.astype(np.float16))
        rows.append(
            {
                "country": country,
                "year": 2010 + index % 6,
                "urban": bool(index % 2),
                "wealthpooled": wealth,
                "lat": 0.0,
                "lon": 0.0,
                "nl_mean": 0.0,
                "nl_center": 0.0,
            }
        )
    pd.DataFrame(rows).to_csv(directory / "dhs_metadata.csv", index=False)


def make_amazon(root: Path, samples: int, size: int, generator: np.random.Generator) -> None:
    """Write reviews: ``reviews.csv`` and ``splits/user.csv``.

    Args:
        root: Folder of the data sets.
        samples: Number of training samples.
        size: Not used: reviews have no pixels.
        generator: Source of randomness.
    """
    del size
    directory = _release(root, "amazon", "2.1")
    (directory / "splits").mkdir(exist_ok=True)
    train_users, other = 9, max(20, samples // 8)
    # Splits: 0 train, 1 val, 2 id_val, 3 test, 4 id_test, -1 in none of them.
    plan = [(0, index % train_users) for index in range(samples)]
    plan += [(split, index % train_users) for split in (2, 4) for index in range(other)]
    plan += [(split, 100 * split + index % 4) for split in (1, 3) for index in range(other)] + [(-1, 500)] * 5
    rows = []
    for index, (_, user) in enumerate(plan):
        stars = int(generator.integers(1, 6))
        rows.append(
            {
                "reviewerID": f"A{user:09d}XYZ",
                "asin": f"B{index % 30:09d}",
                "overall": float(stars),
                "reviewTime": "03 11, 2014",
                "unixReviewTime": 1394496000 + index,
                "reviewText": _sentence(generator, stars, user)
                + (', "quoted"\nin two lines' if index % 7 == 0 else ""),
                "summary": "Summary",
                "verified": index % 3 > 0,
                "category": ("Books", "Electronics", "Home_and_Kitchen")[index % 3],
                "reviewYear": 2000 + index % 18,
            }
        )
    pd.DataFrame(rows).to_csv(directory / "reviews.csv", index=False, quoting=csv.QUOTE_NONNUMERIC)
    pd.DataFrame({"split": [split for split, _ in plan]}).to_csv(directory / "splits" / "user.csv", index=False)


def make_civilcomments(root: Path, samples: int, size: int, generator: np.random.Generator) -> None:
    """Write comments: ``all_data_with_identities.csv``, whose identities are fractions of the annotators.

    Args:
        root: Folder of the data sets.
        samples: Number of training samples.
        size: Not used: comments have no pixels.
        generator: Source of randomness.
    """
    del size
    directory = _release(root, "civilcomments", "1.0")
    other = max(60, samples // 4)
    rows: list[dict[str, Any]] = []
    for index, split in enumerate(["train"] * samples + ["val", "test"] * other):
        toxic = index % 2
        # Every second comment mentions one identity, some a second one, and a ninth of the others none.
        identities = dict.fromkeys(IDENTITIES, 0.0)
        group = (index // 2) % 9
        if group:
            identities[IDENTITIES[group - 1]] = float(generator.uniform(0.5, 1.0))
            if index % 5 == 0:
                identities[IDENTITIES[group % 8]] = 1.0
        rows.append(
            {
                "id": 10_000 + index,
                "comment_text": _sentence(generator, toxic, group),
                "split": split,
                "created_date": "2016-01-01 00:00:00+00",
                "toxicity": float(generator.uniform(0.5, 1.0) if toxic else generator.uniform(0.0, 0.49)),
                **identities,
                **{name: float(generator.uniform(0.0, 1.0)) for name in ATTRIBUTES},
            }
        )
    pd.DataFrame(rows).to_csv(directory / "all_data_with_identities.csv")


MAKERS: dict[str, Callable[[Path, int, int, np.random.Generator], None]] = {
    "fmow": make_fmow,
    "camelyon": make_camelyon17,
    "poverty": make_poverty,
    "iwildcam": make_iwildcam,
    "amazon": make_amazon,
    "civil": make_civilcomments,
}


def main(arguments: list[str] | None = None) -> None:
    """Write the miniatures.

    Args:
        arguments: Command line without the program's name; None for that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder to write to; must not hold the real data sets")
    parser.add_argument("--dataset", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--samples", type=int, default=360, help="training samples of each data set (default 360)")
    parser.add_argument("--size", type=int, default=32, help="side of images in pixels (Camelyon17 has 96; default 32)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.samples < 36 or options.size < 8:
        parser.error(f"--samples should be at least 36 and --size 8 (got {options.samples} and {options.size})")
    note = options.root / "MINIATURES.json"
    if options.root.exists() and any(options.root.iterdir()) and not note.exists():
        parser.error(f"--root {options.root} holds other files: choose a new or empty folder")
    options.root.mkdir(parents=True, exist_ok=True)
    settings = {"samples": options.samples, "size": options.size, "seed": options.seed}
    note.write_text(json.dumps({"what": "Miniatures in the formats of WILDS, not its data.", **settings}) + "\n")
    for number, name in enumerate(MAKERS):
        if name in options.dataset:
            MAKERS[name](options.root, options.samples, options.size, np.random.default_rng([options.seed, number]))
            print(f"{name}: written to {options.root}")


if __name__ == "__main__":
    main()
