"""The CdSprites demo: its sprites, its colours, the dSprites file, and a small run from the command line."""

import json
import subprocess
import sys
from pathlib import Path

import cdsprites
import numpy as np
import pytest
import torch
from _cdsprites_data import (
    ELLIPSE_AXES,
    FACTOR_SIZES,
    SQUARE_SIDE,
    DrawnSprites,
    DSpritesFile,
    Factors,
    draw,
    factors_of,
    make_cdsprites,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).parents[1] / "examples" / "cdsprites.py"
SMALL = ["--domains", "3", "--size", "16", "--images-per-domain", "20", "--eval-images", "20", "--batch-size", "6"]
SMALL += ["--iterations", "8", "--exact-iterations", "8", "--smooth-iterations", "8", "--measurements", "4"]


@pytest.mark.parametrize("orientation", [0.0, 0.5, 2.5])
def test_shapes_have_their_area_axes_and_turn(orientation):
    one, half = np.ones(1, np.float32), np.full(1, 0.5, np.float32)
    square, ellipse = (draw(np.array([s]), Factors(one, orientation * one, half, half), 64)[0] / 255 for s in (0, 1))
    assert square.sum() == pytest.approx((64 * SQUARE_SIDE) ** 2, rel=0.03)
    assert ellipse.sum() == pytest.approx(np.pi / 4 * 64**2 * np.prod(ELLIPSE_AXES), rel=0.03)
    rows, columns = np.mgrid[:64, :64] - 31.0
    xx, xy, yy = ((ellipse * product).sum() / ellipse.sum() for product in (columns**2, columns * rows, rows**2))
    variances, axes = np.linalg.eigh([[xx, xy], [xy, yy]])
    long_axis = np.array([np.cos(orientation), -np.sin(orientation)])  # rows run downwards
    assert abs(axes[:, 1] @ long_axis) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(4 * np.sqrt(variances), 64 * np.sort(ELLIPSE_AXES), rtol=0.02)


def test_factors_take_the_values_of_dsprites_and_move_the_centre_by_pixels():
    factors = factors_of(np.arange(DrawnSprites.available))
    for values, least, most, count in zip(factors, (0.5, 0, 0, 0), (1, 2 * np.pi, 1, 1), FACTOR_SIZES, strict=True):
        np.testing.assert_allclose(np.unique(values), np.linspace(least, most, count), rtol=1e-6)
    assert factors.y[1] > factors.y[0]  # the last varies fastest
    places = np.arange(32)
    images = draw(np.zeros(32, int), factors_of(np.ravel_multi_index((5, 0, places, 31 - places), FACTOR_SIZES)), 64)
    pixels = np.arange(64) + 0.5
    areas = images.sum((1, 2), dtype=float)
    np.testing.assert_allclose((images.sum(1) * pixels).sum(1) / areas, 16 + places, atol=0.02)
    np.testing.assert_allclose((images.sum(2) * pixels).sum(1) / areas, 47 - places, atol=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_colour_tells_the_shape_in_training_alone(seed):
    settings = {"domains": 5, "images_per_domain": 40, "eval_images": 200, "size": 16}
    train, validation, test = make_cdsprites(DrawnSprites(), seed=seed, **settings)
    worn = np.unique(np.column_stack([train.domains, train.labels, train.colours]), axis=0)
    assert len(worn) == len(np.unique(worn[:, 2:], axis=0)) == 2 * 5  # one, and another, for each domain and shape
    assert all(train.labels[train.domains == domain].mean() == 0.5 for domain in range(5))
    for split in (validation, test):
        colours, of_each = np.unique(split.colours, axis=0, return_inverse=True)
        assert len(colours) == 2 * 5
        assert all(split.labels[of_each.reshape(-1) == colour].mean() == 0.5 for colour in range(10))
    training = np.unique(train.colours, axis=0)
    np.testing.assert_array_equal(np.unique(validation.colours, axis=0), training)
    assert np.linalg.norm(test.colours[:, None] - training, axis=-1).min() > 0.4
    again, other = (make_cdsprites(DrawnSprites(), seed=s, **settings).train for s in (seed, seed + 2))
    assert all(np.array_equal(a, b) for a, b in zip(train, again, strict=True))
    assert not np.array_equal(train.masks, other.masks)
    assert not np.array_equal(train.colours, other.colours)


def test_splits_share_no_sprite():
    class Numbered:
        available = 100

        def masks(self, labels, numbers, size):
            return np.stack([labels, numbers], axis=1).astype(np.uint8)[:, :, None]

    splits = make_cdsprites(Numbered(), domains=3, images_per_domain=40, eval_images=40, size=16, seed=0)
    sprites = np.concatenate([split.masks[..., 0] for split in splits])
    assert len(np.unique(sprites, axis=0)) == len(sprites) == 200
    with pytest.raises(ValueError, match="101 sprites of each shape are needed, and the source has 100"):
        make_cdsprites(Numbered(), domains=3, images_per_domain=40, eval_images=41, size=16, seed=0)


def test_dsprites_file_serves_squares_and_ellipses_also_beyond_one_block_and_resampled(tmp_path):
    numbers = np.arange(9000)
    images = np.zeros((9000, 64, 64), np.uint8)
    images[numbers, numbers % 64, numbers // 64 % 64] = 1
    classes = np.zeros((9000, 6), np.int64)
    classes[:, 1] = numbers % 3  # a third are hearts
    np.savez(tmp_path / "many.npz", imgs=images, latents_classes=classes)
    source = DSpritesFile(tmp_path / "many.npz")
    assert source.available == 3000
    expected = images[[0, 8998, 6142, 6142]]
    labels, chosen = np.array([0, 1, 1, 1]), np.array([0, 2999, 2047, 2047])
    np.testing.assert_array_equal(source.masks(labels, chosen, 64) // 255, expected)
    halved = expected.reshape(4, 32, 2, 32, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(source.masks(labels, chosen, 32) / 255, halved, atol=0.01)


IMAGES, CLASSES = np.full((4, 64, 64), 9, np.uint8), np.array([[0, i // 2, 0, 0, 0, 0] for i in range(4)])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no dSprites file at"),
        ({"imgs": IMAGES}, r"lacks the arrays \['latents_classes'\]"),
        ({"imgs": IMAGES / 2, "latents_classes": CLASSES}, r"'imgs' should be uint8 of shape .* .got float64"),
        ({"imgs": IMAGES, "latents_classes": CLASSES[1:]}, r"should be integers of shape \(4, 6\)"),
        ({"imgs": IMAGES, "latents_classes": CLASSES}, r"should hold only 0 and 1 \(got 9\)"),
    ],
    ids=["absent", "no classes", "wrong dtype", "wrong classes", "grey"],
)
def test_dsprites_file_that_is_another_is_refused(tmp_path, arrays, message):
    path = tmp_path / "other.npz"
    if arrays:
        np.savez(path, **arrays)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DSpritesFile(path).masks(np.array([0]), np.array([0]), 64)
    path.write_text("not an archive")
    with pytest.raises(ValueError, match="is not an npz file"):
        DSpritesFile(path)


@pytest.mark.large
def test_small_run_writes_pictures_and_numbers(tmp_path):
    command = [sys.executable, str(SCRIPT), "--methods", "exact,symmetric,smooth_fish,fish,erm", "--log", "log", *SMALL]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "unseen colours" in finished.stdout
    assert finished.stderr.count("8/8 meta-iterations") == 5
    assert all((tmp_path / "out" / f"cdsprites{which}.png").stat().st_size > 1000 for which in ("", "_domains"))
    results = json.loads((tmp_path / "out" / "cdsprites.json").read_text())
    assert list(results["runs"]) == ["erm", "fish", "smooth_fish", "symmetric", "exact"]
    for name, curves in results["runs"].items():
        assert curves["iteration"] == [0, 2, 4, 6, 8]
        each = 7 if name == "symmetric" else 3
        assert curves["gradient_evaluations"] == [each * iteration for iteration in curves["iteration"]]
        assert curves["hessian_products"] == ([0, 6, 12, 18, 24] if name == "exact" else [0] * 5)
        assert np.isfinite([curves[curve] for curve in ("train_accuracy", "validation_accuracy", "cosine")]).all()
        assert np.shape(curves["agreement_with_rest"]) == (5, 3)
        mean = results["final"][name]["mean_inner_product"]
        assert mean == pytest.approx(np.mean(curves["inner_product"][1:]))
    assert len({run["inner_product"][0] for run in results["runs"].values()}) == 1  # the same first weights
    assert len({run["inner_product"][-1] for run in results["runs"].values()}) == 5
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == sorted(results["runs"])


def test_log_holds_what_every_tenth_meta_iteration_measured(tmp_path, monkeypatch):
    reports, method = [], cdsprites.METHODS["exact"]

    def noted(*arguments):
        reports.append(method.iterate(*arguments))
        return reports[-1]

    monkeypatch.setitem(cdsprites.METHODS, "exact", method._replace(iterate=noted))
    more = ["--exact-iterations", "12", "--methods", "exact", "--log", str(tmp_path)]
    assert cdsprites.main([*SMALL, *more, "--out", str(tmp_path)]) == 0
    board = EventAccumulator(str(tmp_path / "exact")).Reload()
    assert {"loss", "gamma", "cosine", "grad_norm/2"} <= set(board.Tags()["scalars"])
    for tag in board.Tags()["scalars"]:
        found = {step: reports[step - 1].scalars()[tag] for step in (1, 11)}
        assert {event.step: event.value for event in board.Scalars(tag)} == pytest.approx(found, rel=1e-6), tag


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--domains 1", "argument --domains: should be from 2 to 100 (got 1)"),
        ("--gamma -1", "argument --gamma: should be finite and at least 0 (got -1.0)"),
        ("--images-per-domain 7", "argument --images-per-domain: should be even and at least 2 (got 7)"),
        ("--batch-size 3000", "argument --batch-size: should be at most --images-per-domain (got 3000)"),
        ("--meta-lr 2", "argument --meta-lr: should be in (0, 1] (got 2.0)"),
        ("--seed one", "argument --seed: invalid whole number value: 'one'"),
        ("--methods erm,foo", "should be some of erm,fish,smooth_fish,symmetric,exact (got 'foo')"),
        ("--device abacus", "argument --device: 'abacus' cannot be used here"),
        ("--images-per-domain 60000", "453000 different squares and as many ellipses are asked for"),
        ("--out file", "argument --out: "),
        ("--paper --size 32", "argument --size: the network of --paper takes 64 pixels (got 32)"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        cdsprites.parse(arguments.split())
    assert message in capsys.readouterr().err


def test_paper_sets_the_official_configuration_and_flags_still_override_it(tmp_path):
    _, config, _ = cdsprites.parse(["--paper", "--iterations", "10", "--out", str(tmp_path)])
    assert (config.size, config.batch_size, config.domains, config.lr, config.meta_lr) == (64, 64, 15, 1e-3, 0.15 / 15)
    assert config.iterations == 10
    assert cdsprites.PAPER["iterations"] == 100 * (config.images_per_domain // config.batch_size)
    shapes = [tuple(p.shape) for p in cdsprites.make_model(config).parameters() if p.ndim > 1]
    assert shapes == [(32, 3, 4, 4), (32, 32, 4, 4), (64, 32, 4, 4), (128, 64, 4, 4), (128, 128, 4, 4), (2, 128)]


@pytest.mark.parametrize("size", [16, 27, 128])
def test_network_takes_every_size(size, tmp_path):
    _, config, _ = cdsprites.parse(["--size", str(size), "--out", str(tmp_path)])
    assert cdsprites.make_model(config)(torch.zeros(2, 3, size, size)).shape == (2, 2)
