"""CdSprites-N against N: runs of equal cost, resumed where they were broken off, and what is said of their results."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _cdsprites_data import DrawnSprites, factors_of, make_cdsprites, palette
from matplotlib.image import imread

from benchmarks.domains import cli, sprites
from benchmarks.domains.sprites import DEFAULT, FULL, METHODS, QUICK, Result, cdsprites, measure, plot, sentence, table

TINY = replace(
    DEFAULT,
    numbers=(2, 3),
    arrangements=("random",),
    seeds=(0,),
    gradients=24,
    images=240,
    eval_images=40,
    batch_size=8,
)


def without_seconds(results: list[Result]) -> list[Result]:
    return [replace(result, seconds=0.0) for result in results]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sprites")


@pytest.fixture(scope="module")
def measured(folder: Path) -> list[Result]:
    return measure(folder, TINY, processes=1, show=False)


def test_every_method_meets_every_number_of_domains(measured: list[Result]):
    assert [(result.domains, result.method) for result in measured] == [(n, m) for n in (2, 3) for m in METHODS]
    for result in measured:
        assert all(0 <= accuracy <= 1 for accuracy in (result.unseen, result.validation, result.train))
        assert result.seconds > 0


def test_broken_off_it_goes_on_where_it_was(
    measured: list[Result], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lines = (folder / "runs.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == len(measured) == 10
    (tmp_path / "task.json").write_text((folder / "task.json").read_text())
    (tmp_path / "runs.jsonl").write_text("".join(lines[:7]) + lines[7][:40])  # killed while it wrote the eighth
    trained = []
    train = sprites.run
    monkeypatch.setattr(sprites, "run", lambda *where: trained.append(where) or train(*where))
    resumed = measure(tmp_path, TINY, processes=1, show=False)
    assert [where[:3] for where in trained] == [(r.arrangement, r.method, r.domains) for r in measured[7:]]
    assert resumed[:7] == measured[:7]
    # Bit for bit, although trained again:
    assert without_seconds(resumed) == without_seconds(measured)


@pytest.mark.large
def test_two_processes_find_the_same(measured: list[Result]):
    in_parallel = measure(None, replace(TINY, numbers=(2,)), processes=2, show=False)
    assert without_seconds(in_parallel) == without_seconds(measured)[:5]


def test_a_folder_of_other_runs_is_refused(measured: list[Result], folder: Path):
    with pytest.raises(ValueError, match="runs with gamma=0"):
        measure(folder, replace(TINY, gamma=7.0), processes=1, show=False)
    more_seeds = replace(TINY, numbers=(2,), methods=("ERM",), seeds=(0, 1))
    assert measure(folder, more_seeds, processes=1, show=False)[0] == measured[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("domains", [2, 3])
def test_as_many_gradients_are_taken_whatever_method_and_domains(
    method: str, domains: int, measured: list[Result], monkeypatch: pytest.MonkeyPatch
):
    config = sprites.config_of("random", method, domains, 0, TINY)
    data = make_cdsprites(
        DrawnSprites(), domains=domains, images_per_domain=240 // domains, eval_images=40, size=16, seed=0
    )
    name = METHODS[method].name
    of_demo = cdsprites.METHODS[name]
    batches = []

    def counted(optimizer: Any, loss_fn: Any, group: Any) -> Any:
        batches.extend(group)
        return of_demo.iterate(optimizer, loss_fn, group)

    monkeypatch.setitem(cdsprites.METHODS, name, of_demo._replace(iterate=counted))
    cdsprites.train(name, data, config, lambda _: None)
    assert len(batches) * (2 if method == "Exact" else 1) == TINY.gradients
    assert all(len(labels) == TINY.batch_size for _, labels in batches)
    (result,) = [r for r in measured if (r.method, r.domains) == (method, domains)]
    assert result.gradients == len(batches)
    assert result.hessian_products == (len(batches) if method == "Exact" else 0)


@pytest.mark.parametrize("settings", [DEFAULT, QUICK, FULL], ids=["default", "quick", "full"])
def test_settings_spend_the_same_for_every_method_and_number(settings: sprites.Settings):
    for method, (name, order) in METHODS.items():
        of_demo = cdsprites.METHODS[name]
        for domains in settings.numbers:
            config = sprites.config_of("pairs", method, domains, 0, settings)
            each = of_demo.gradients(domains, config) + of_demo.hessian_products(domains)
            assert of_demo.iterations(config) * each == settings.gradients
            assert config.images_per_domain * domains == settings.images
            assert config.images_per_domain % 2 == 0
            assert config.images_per_domain >= config.batch_size
            assert config.order == order
    with pytest.raises(ValueError, match=r"multiples of 2 N \(got gradients=.* for N=7\)"):
        replace(settings, numbers=(2, 7))


def test_the_two_orders_of_fish_serve_the_same_domains_in_different_orders():
    data = make_cdsprites(DrawnSprites(), domains=3, images_per_domain=80, eval_images=40, size=16, seed=0)
    dataset = cdsprites.SpriteDataset(data.train, torch.device("cpu"))

    def visited(method: str) -> list[list[int]]:
        config = sprites.config_of("pairs", method, 3, 0, TINY)
        batches = list(cdsprites.domain_batches(dataset, config))
        domains = [int(dataset.domains[batch[0]]) for batch in batches]
        return [domains[start : start + 3] for start in range(0, len(domains), 3)]

    flipflop, random = visited("Fish"), visited("Fish (random order)")
    assert len(flipflop) == len(random) == 10
    assert all(sorted(group) == [0, 1, 2] for group in flipflop + random)
    assert all(second == first[::-1] for first, second in zip(flipflop[::2], flipflop[1::2], strict=True))
    assert any(second != first[::-1] for first, second in zip(random[::2], random[1::2], strict=True))


# --------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("domains", [2, 5, 15, 50])
def test_random_arrangement_is_of_the_seed_and_keeps_training_and_test_apart(domains: int):
    training, unseen = palette(domains, 0, "random")
    for one, same in zip((training, unseen), palette(domains, 0, "random"), strict=True):
        np.testing.assert_array_equal(one, same)
    in_pairs, unseen_in_pairs = palette(domains, 0)
    np.testing.assert_array_equal(unseen, unseen_in_pairs)
    colours = training.reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) == 2 * domains  # no colour is of two domains or of both shapes
    np.testing.assert_array_equal(np.unique(colours, axis=0), np.unique(in_pairs.reshape(-1, 3), axis=0))
    assert np.linalg.norm(colours[:, None] - unseen.reshape(-1, 3), axis=-1).min() > 0.4

    def squares(arrangement: str, seed: int) -> set[tuple[float, ...]]:
        return set(map(tuple, palette(domains, seed, arrangement)[0][:, 0].tolist()))

    assert len({frozenset(squares("pairs", seed)) for seed in range(8)}) == 1
    assert len({frozenset(squares("random", seed)) for seed in range(8)}) > 2


def test_colour_tells_the_shape_in_training_and_nothing_elsewhere_if_random():
    data = make_cdsprites(
        DrawnSprites(), domains=5, images_per_domain=40, eval_images=200, size=16, seed=3, arrangement="random"
    )
    for split, shapes in ((data.train, 1), (data.validation, 2), (data.test, 2)):
        for colour in np.unique(split.colours, axis=0):
            labels = split.labels[(split.colours == colour).all(axis=1)]
            assert len(np.unique(labels)) == shapes
            assert shapes == 1 or labels.mean() == 0.5


def test_large_sprites_are_those_of_the_largest_scales():
    source = sprites.LargeSprites(2)
    assert source.available == DrawnSprites.available // 3
    numbers = np.array([0, source.available - 1])
    every = np.arange(DrawnSprites.available)
    large = every[factors_of(every).scale > 0.85]
    expected = DrawnSprites().masks(np.zeros(2, int), large[numbers], 16)
    np.testing.assert_array_equal(source.masks(np.zeros(2, int), numbers, 16), expected)
    assert len(large) == source.available


# --------------------------------------------------------------------------------------------------------- showing


def by_hand(unseen: dict[str, dict[int, list[float]]], arrangement: str) -> list[Result]:
    return [
        Result(arrangement, method, domains, seed, value, 0.5, 0.75, 10, 0, 1.0)
        for method, of_domains in unseen.items()
        for domains, values in of_domains.items()
        for seed, value in enumerate(values)
    ]


RESULTS = by_hand(
    {
        "ERM": {2: [0.5, 0.6, 0.7], 10: [0.5, 0.5, 0.5], 50: [0.6, 0.6, 0.9]},
        "Fish": {2: [0.6, 0.7, 0.8], 10: [0.9, 0.9, 0.9], 50: [0.91, 0.95, 1.0]},
        "Fish (random order)": {2: [0.6, 0.7, 0.8], 10: [0.51, 0.9, 0.9], 50: [1.0, 1.0, 1.0]},
        "SmoothFish": {2: [0.8, 0.8, 0.8], 10: [0.9, 0.9, 0.9], 50: [1.0, 1.0, 1.0]},
        "Exact": {2: [0.5, 0.5, 0.5], 10: [0.8, 0.8, 0.8], 50: [0.9, 0.9, 0.9]},
    },
    "pairs",
) + by_hand({method: {n: [0.5, 0.5, 0.55] for n in (2, 10, 50)} for method in METHODS}, "random")


def test_table_has_mean_and_range():
    first, second = table(RESULTS).split("\n\n")
    lines = first.splitlines()
    assert lines[0] == (
        "| N, colours in pairs, as in the demo | ERM | Fish | Fish (random order) | SmoothFish | Exact |"
    )
    assert lines[2].startswith("| 2 | 0.60 (0.50 to 0.70) | 0.70 (0.60 to 0.80) |")
    assert lines[4].startswith("| 50 | 0.70 (0.60 to 0.90) |")
    assert len({line.count("|") for line in lines + second.splitlines()}) == 1
    assert second.splitlines()[2] == f"| 2 |{' 0.52 (0.50 to 0.55) |' * 5}"
    assert table(RESULTS, "train").count("0.75 (0.75 to 0.75)") == 2 * 3 * 5


def test_sentence_says_where_each_method_beats_every_seed_of_erm():
    assert sentence(RESULTS) == (
        "Better than ERM on unseen colours, worst against best of all 3 seeds: With colours in pairs, as in the demo: "
        "Fish and Fish (random order) from N = 10 on; SmoothFish at every N; Exact at N = 10. With colours dealt at "
        "random: Fish, Fish (random order), SmoothFish and Exact at no N. The paper states that Fish succeeds "
        "from N of about 10 on."
    )


def test_picture_shows_every_method(tmp_path: Path):
    plot([result for result in RESULTS if result.method != "Exact"], tmp_path / "sprites.png")
    picture = imread(tmp_path / "sprites.png")[..., :3]

    def count(colour: str) -> int:
        wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return int((np.abs(picture - wanted).max(axis=-1) < 0.02).sum())

    assert all(count(sprites.LOOKS[method]["color"]) > 200 for method in ("Fish", "Fish (random order)", "SmoothFish"))
    assert count(sprites.LOOKS["Exact"]["color"]) == 0


def test_command_writes_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sprites, "QUICK", replace(TINY, numbers=(2,)))
    arguments = ["cdsprites", "--out", str(tmp_path), "--quick", "--processes", "1"]
    assert cli.main(arguments) == 0
    text = (tmp_path / "index.md").read_text()
    assert sprites.PAPER_STATES in text
    assert re.search(r"^\| 2 \|", text, re.MULTILINE)
    assert (tmp_path / "cdsprites.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "cdsprites.json").read_text())
    assert written["settings"]["gradients"] == TINY.gradients
    results = [Result(**row) for row in written["results"]]
    assert {result.method for result in results} == set(METHODS)
    assert table(results) in text
    assert table(results, "train") in text
    monkeypatch.setattr(sprites, "QUICK", replace(TINY, size=20))
    assert cli.main(arguments) == 2
    assert "holds runs with size=16" in capsys.readouterr().err
