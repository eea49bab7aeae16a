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
    CENTRE_RANGE,
    ELLIPSE_AXES,
    FACTOR_SIZES,
    SQUARE_SIDE,
    DrawnSprites,
    DSpritesFile,
    Factors,
    draw,
    factors_of,
    make_cdsprites,
    palette,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).parents[1] / "examples" / "cdsprites.py"
SQUARE, ELLIPSE = 0, 1


def draw_one(shape, scale=1.0, orientation=0.0, x=0.5, y=0.5, size=64):
    factors = Factors(*(np.array([value], np.float32) for value in (scale, orientation, x, y)))
    return draw(np.array([shape]), factors, size)[0] / 255


def moments(image):
    """Area, centre and second moments about it, in pixels; pixel centres lie at halves."""
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    area = image.sum()
    x, y = (image * columns).sum() / area, (image * rows).sum() / area
    dx, dy = columns - x, rows - y
    return area, (x, y), [(image * product).sum() / area for product in (dx * dx, dx * dy, dy * dy)]


def analytic_area(shape, scale, size):
    at_scale_1 = SQUARE_SIDE**2 if shape == SQUARE else np.pi / 4 * np.prod(ELLIPSE_AXES)
    return at_scale_1 * (scale * size) ** 2


# -------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("shape", [SQUARE, ELLIPSE], ids=["square", "ellipse"])
@pytest.mark.parametrize(("size", "tolerance"), [(16, 0.15), (32, 0.04), (64, 0.03), (128, 0.015)])
def test_area_is_that_of_the_shape(shape, size, tolerance):
    for scale in np.linspace(0.5, 1, 6):
        for orientation in (0.0, 0.3, np.pi / 4):
            area = draw_one(shape, scale, orientation, size=size).sum()
            assert area == pytest.approx(analytic_area(shape, scale, size), rel=tolerance)


def test_edges_are_soft_and_the_inside_is_full():
    image = draw_one(SQUARE, orientation=0.3)
    assert ((image > 0) & (image < 1)).sum() > 40
    assert image[32, 32] == 1
    assert image[0, 0] == 0


@pytest.mark.parametrize("orientation", [0.0, 0.5, np.pi / 2, 2.5])
def test_ellipse_has_its_axes_and_turns_counter_clockwise(orientation):
    _, _, (xx, xy, yy) = moments(draw_one(ELLIPSE, orientation=orientation))
    long_axis = np.array([np.cos(orientation), -np.sin(orientation)])  # rows run downwards
    variances, axes = np.linalg.eigh([[xx, xy], [xy, yy]])
    assert abs(axes[:, 1] @ long_axis) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(4 * np.sqrt(variances), 64 * np.sort(ELLIPSE_AXES), rtol=0.02)


def test_symmetries_of_the_shapes():
    np.testing.assert_allclose(
        draw_one(SQUARE, orientation=0.4), draw_one(SQUARE, orientation=0.4 + np.pi / 2), atol=0.01
    )
    np.testing.assert_allclose(
        draw_one(ELLIPSE, orientation=0.4), draw_one(ELLIPSE, orientation=0.4 + np.pi), atol=0.01
    )
    assert np.abs(draw_one(ELLIPSE) - draw_one(ELLIPSE, orientation=np.pi / 2)).sum() > 50


def test_positions_move_the_centre_by_one_pixel_as_in_dsprites():
    places = np.arange(32)
    numbers = np.ravel_multi_index((5, 0, places, 31 - places), FACTOR_SIZES)
    images = draw(np.full(32, SQUARE), factors_of(numbers), 64) / 255
    centres = np.array([moments(image)[1] for image in images])
    np.testing.assert_allclose(centres[:, 0], 16 + places, atol=0.02)
    np.testing.assert_allclose(centres[:, 1], 47 - places, atol=0.02)


def test_factors_take_the_values_of_dsprites():
    factors = factors_of(np.arange(DrawnSprites.available))
    for values, least, most, count in zip(factors, (0.5, 0, 0, 0), (1, 2 * np.pi, 1, 1), FACTOR_SIZES, strict=True):
        np.testing.assert_allclose(np.unique(values), np.linspace(least, most, count), rtol=1e-6)
    assert len(np.unique(np.stack(factors), axis=1).T) == 6 * 40 * 32 * 32
    # The last factor varies fastest.
    assert factors.y[1] > factors.y[0]
    assert factors.x[32] > factors.x[0]


@pytest.mark.parametrize("shape", [SQUARE, ELLIPSE], ids=["square", "ellipse"])
def test_no_sprite_touches_the_border(shape):
    corners = [draw_one(shape, 1.0, angle, x, y) for angle in np.linspace(0, 3, 7) for x in (0, 1) for y in (0, 1)]
    assert all(image[[0, -1]].sum() + image[:, [0, -1]].sum() == 0 for image in corners)
    assert CENTRE_RANGE[0] * 64 > 64 * SQUARE_SIDE * np.sqrt(0.5)


# --------------------------------------------------------------------------------------------------------- colours


def pairs(split):
    """Distinct (domain, label, colour) of a split."""
    table = np.column_stack([split.domains, split.labels, split.colours])
    return np.unique(table, axis=0)


@pytest.fixture(scope="module", params=[0, 1], ids=["seed 0", "seed 1"])
def splits(request):
    return make_cdsprites(DrawnSprites(), domains=5, images_per_domain=40, eval_images=200, size=16, seed=request.param)


def test_training_colour_tells_the_shape_in_each_domain(splits):
    found = pairs(splits.train)
    assert len(found) == 2 * 5  # one colour for each domain and shape
    assert len(np.unique(found[:, 2:], axis=0)) == 2 * 5  # all of them different


@pytest.mark.parametrize("name", ["validation", "test"])
def test_colour_tells_nothing_in_validation_and_test(splits, name):
    split = getattr(splits, name)
    counts = {}
    for label, colour in zip(split.labels.tolist(), split.colours.tolist(), strict=True):
        counts.setdefault(tuple(colour), [0, 0])[label] += 1
    assert len(counts) == 2 * 5
    assert all(squares == ellipses > 0 for squares, ellipses in counts.values())


def test_validation_wears_training_colours_and_test_none_of_them(splits):
    training = np.unique(splits.train.colours, axis=0)
    np.testing.assert_array_equal(np.unique(splits.validation.colours, axis=0), training)
    distance = np.linalg.norm(splits.test.colours[:, None] - training, axis=-1)
    assert distance.min() > 0.4


def test_every_split_and_domain_has_as_many_squares_as_ellipses(splits):
    for domain in range(5):
        assert splits.train.labels[splits.train.domains == domain].mean() == 0.5
    assert splits.validation.labels.mean() == splits.test.labels.mean() == 0.5


def test_labels_match_the_drawn_shapes():
    split = make_cdsprites(DrawnSprites(), domains=2, images_per_domain=20, eval_images=2, size=64, seed=0).train
    for mask, label in zip(split.masks, split.labels, strict=True):
        _, _, (xx, xy, yy) = moments(mask / 255)
        ratio = np.divide(*np.linalg.eigvalsh([[xx, xy], [xy, yy]])[::-1])
        assert (ratio > 2) == (label == ELLIPSE)  # variances: 1 for a square, (0.4 / 0.225)^2 for an ellipse


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


def test_the_seed_decides_everything():
    def make(seed):
        return make_cdsprites(DrawnSprites(), domains=3, images_per_domain=20, eval_images=20, size=16, seed=seed)

    one, same, other = make(3), make(3), make(4)
    for first, second in zip(one, same, strict=True):
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.train.masks, other.train.masks)
    assert not np.array_equal(one.train.colours, other.train.colours)


@pytest.mark.parametrize("domains", [2, 3, 15, 50])
def test_palette_is_bright_and_distinct(domains):
    training, unseen = palette(domains, seed=0)
    colours = np.concatenate([training, unseen]).reshape(-1, 3)
    assert training.shape == unseen.shape == (domains, 2, 3)
    assert colours.max(axis=1).min() == 1
    assert len(np.unique(colours.round(4), axis=0)) == 4 * domains


# ---------------------------------------------------------------------------------------------------- dSprites file


@pytest.fixture
def miniature(tmp_path):
    """Write a file like dSprites with few rotations and positions, its rows shuffled; return it and its factors."""
    classes = np.array([(0, shape, scale, turn, x, y) for shape in range(3) for scale in range(6) for turn in (0, 5)
                        for x in (0, 10, 31) for y in (3, 20)], np.int64)  # fmt: skip
    classes = np.random.default_rng(0).permutation(classes)
    factors = factors_of(np.ravel_multi_index(classes[:, 2:].T, FACTOR_SIZES))
    images = (draw(classes[:, 1] % 2, factors, 64) > 127).astype(np.uint8)
    images[classes[:, 1] == 2] = 0  # hearts should never be seen: here they are blank
    path = tmp_path / "dsprites.npz"
    np.savez_compressed(path, imgs=images, latents_classes=classes, latents_values=classes.astype(float))
    return path, images, classes


def test_dsprites_file_serves_squares_and_ellipses(miniature):
    path, images, classes = miniature
    source = DSpritesFile(path)
    assert source.available == 72
    labels = np.array([1, 0, 0, 1, 0])
    numbers = np.array([71, 0, 40, 3, 40])
    expected = [images[classes[:, 1] == label][number] for label, number in zip(labels, numbers, strict=True)]
    np.testing.assert_array_equal(source.masks(labels, numbers, 64), 255 * np.stack(expected))


def test_dsprites_file_resamples_by_area(miniature):
    path, images, classes = miniature
    masks = DSpritesFile(path).masks(np.array([0, 1]), np.array([7, 9]), 32)
    originals = np.stack([images[classes[:, 1] == 0][7], images[classes[:, 1] == 1][9]])
    np.testing.assert_allclose(masks / 255, originals.reshape(2, 32, 2, 32, 2).mean(axis=(2, 4)), atol=0.01)


def test_dsprites_file_gives_the_splits(miniature):
    splits = make_cdsprites(
        DSpritesFile(miniature[0]), domains=2, images_per_domain=40, eval_images=20, size=64, seed=0
    )
    assert all((split.masks.max(axis=(1, 2)) == 255).all() for split in splits)  # no blank heart


def test_dsprites_file_reads_more_than_one_block(tmp_path):
    numbers = np.arange(9000)
    images = np.zeros((9000, 64, 64), np.uint8)
    images[numbers, numbers % 64, numbers // 64 % 64] = 1
    classes = np.zeros((9000, 6), np.int64)
    classes[1::2, 1] = 1
    path = tmp_path / "many.npz"
    np.savez(path, imgs=images, latents_classes=classes)
    masks = DSpritesFile(path).masks(np.array([0, 1, 1]), np.array([0, 4499, 2047]), 64)
    np.testing.assert_array_equal(masks // 255, images[[0, 8999, 4095]])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"imgs": np.zeros((4, 64, 64), np.uint8)}, r"lacks the arrays \['latents_classes'\]"),
        ({"latents_classes": np.zeros((4, 6), np.int64)}, r"lacks the arrays \['imgs'\]"),
        (
            {"imgs": np.zeros((4, 32, 64), np.uint8), "latents_classes": np.zeros((4, 6), np.int64)},
            r"'imgs' should be uint8 of shape .* \(got uint8 of shape \(4, 32, 64\)\)",
        ),
        (
            {"imgs": np.zeros((4, 64, 64)), "latents_classes": np.zeros((4, 6), np.int64)},
            "'imgs' should be uint8 of shape .* .got float64",
        ),
        (
            {"imgs": np.zeros((4, 64, 64), np.uint8), "latents_classes": np.zeros((3, 6), np.int64)},
            r"'latents_classes' should be integers of shape \(4, 6\)",
        ),
    ],
    ids=["no classes", "no images", "wrong shape", "wrong dtype", "wrong classes"],
)
def test_dsprites_file_that_is_another_is_refused(tmp_path, arrays, message):
    path = tmp_path / "other.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
        DSpritesFile(path)


def test_dsprites_file_missing_or_no_archive(tmp_path):
    with pytest.raises(FileNotFoundError, match="no dSprites file at"):
        DSpritesFile(tmp_path / "absent.npz")
    text = tmp_path / "text.npz"
    text.write_text("not an archive")
    with pytest.raises(ValueError, match="is not an npz file"):
        DSpritesFile(text)


def test_dsprites_file_with_grey_images_is_refused(tmp_path):
    path = tmp_path / "grey.npz"
    classes = np.zeros((4, 6), np.int64)
    classes[2:, 1] = 1
    np.savez(path, imgs=np.full((4, 64, 64), 9, np.uint8), latents_classes=classes)
    with pytest.raises(ValueError, match=r"should hold only 0 and 1 \(got 9\)"):
        DSpritesFile(path).masks(np.array([0]), np.array([0]), 64)


# ---------------------------------------------------------------------------------------------------- command line


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


SMALL = (
    *("--domains", 3, "--size", 16, "--images-per-domain", 20, "--eval-images", 20),
    *("--batch-size", 6, "--iterations", 8, "--exact-iterations", 8, "--smooth-iterations", 8),
    *("--measurements", 4, "--seed", 5),
)


@pytest.mark.large
def test_small_run_writes_figure_and_numbers(tmp_path):
    methods = "exact,symmetric,smooth_fish,fish,erm"
    finished = run("--out", "out", "--methods", methods, "--log", "log", *SMALL, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "unseen colours" in finished.stdout
    assert finished.stderr.count("8/8 meta-iterations") == 5
    for name in ("cdsprites.png", "cdsprites_domains.png"):
        png = (tmp_path / "out" / name).read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert png.endswith(b"IEND\xaeB`\x82")
    results = json.loads((tmp_path / "out" / "cdsprites.json").read_text())
    assert list(results["runs"]) == ["erm", "fish", "smooth_fish", "symmetric", "exact"]
    assert results["config"]["seed"] == 5
    assert results["config"]["sprites"] == "drawn"
    for name, curves in results["runs"].items():
        assert curves["iteration"] == [0, 2, 4, 6, 8]
        each = 7 if name == "symmetric" else 3
        assert curves["gradient_evaluations"] == [each * iteration for iteration in curves["iteration"]]
        assert curves["seconds_training"] == sorted(curves["seconds_training"])
        assert 0 <= curves["seconds_training"][0] < curves["seconds_training"][-1] < curves["seconds"]
        assert curves["hessian_products"] == ([0, 6, 12, 18, 24] if name == "exact" else [0] * 5)
        for curve in ("train_accuracy", "validation_accuracy", "unseen_accuracy", "inner_product", "cosine"):
            assert len(curves[curve]) == 5
            assert np.isfinite(curves[curve]).all()
        assert np.shape(curves["agreement_with_rest"]) == (5, 3)
        assert (np.abs(curves["agreement_with_rest"]) <= 1).all()
        final = results["final"][name]
        assert final["gradient_evaluations"] == 8 * each
        assert final["mean_inner_product"] == pytest.approx(np.mean(curves["inner_product"][1:]))
        assert 0 <= final["unseen_accuracy"] <= 1
    runs = results["runs"].values()
    # The same initial weights:
    assert len({run["unseen_accuracy"][0] for run in runs}) == 1
    assert len({run["inner_product"][0] for run in runs}) == 1
    assert len({run["inner_product"][-1] for run in runs}) == 5
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == sorted(results["runs"])


@pytest.mark.parametrize("name", ["erm", "fish", "smooth_fish", "exact"])
def test_log_holds_what_every_tenth_meta_iteration_measured(name, tmp_path, monkeypatch):
    reports = []
    method = cdsprites.METHODS[name]

    def noted(*arguments):
        reports.append(method.iterate(*arguments))
        return reports[-1]

    monkeypatch.setitem(cdsprites.METHODS, name, method._replace(iterate=noted))
    more = ["--iterations", "12", "--exact-iterations", "12", "--smooth-iterations", "12"]
    where = ["--out", str(tmp_path), "--log", str(tmp_path)]
    assert cdsprites.main([*map(str, SMALL), *more, "--methods", name, *where]) == 0
    tags = {"loss"}
    if name != "erm":
        tags |= {"grad_norm", "inner_product", "cosine"}
        tags |= {f"{tag}/{domain}" for tag in ("loss", "grad_norm", "agreement_with_rest") for domain in range(3)}
    tags |= {"gamma"} if name == "exact" else set()
    board = EventAccumulator(str(tmp_path / name)).Reload()
    known = set(board.Tags()["scalars"])
    assert known <= tags
    assert all("rest" in tag for tag in tags - known)  # of one that was first both times
    assert len(reports) == 12
    for tag in known:
        shown = {event.step: event.value for event in board.Scalars(tag)}
        found = {step: reports[step - 1].scalars() for step in (1, 11)}
        expected = {step: scalars[tag] for step, scalars in found.items() if tag in scalars}
        assert shown == pytest.approx(expected, rel=1e-6), tag
        assert len(shown) == 2 or "rest" in tag  # with those before it, the first of a walk has none


def test_one_method_on_a_dsprites_file(tmp_path, miniature):
    finished = run("--methods", "fish", "--dsprites", miniature[0], *SMALL, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "out" / "cdsprites.json").read_text())
    assert list(results["runs"]) == ["fish"]
    assert results["config"]["sprites"] == "dsprites file"
    assert str(tmp_path) not in json.dumps(results)


def test_grey_dsprites_file_ends_with_a_message(tmp_path):
    classes = np.zeros((200, 6), np.int64)
    classes[100:, 1] = 1
    np.savez(tmp_path / "grey.npz", imgs=np.full((200, 64, 64), 9, np.uint8), latents_classes=classes)
    arguments = ["--dsprites", str(tmp_path / "grey.npz"), "--out", str(tmp_path), *map(str, SMALL)]
    assert cdsprites.main(arguments) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domains", "1"], "argument --domains: should be from 2 to 100 (got 1)"),
        (["--size", "200"], "argument --size: should be from 16 to 128 (got 200)"),
        (["--iterations", "0"], "argument --iterations: should be at least 1 (got 0)"),
        (["--exact-iterations", "0"], "argument --exact-iterations: should be at least 1 (got 0)"),
        (["--gamma", "-1"], "argument --gamma: should be finite and at least 0 (got -1.0)"),
        (["--images-per-domain", "7"], "argument --images-per-domain: should be even and at least 2 (got 7)"),
        (["--batch-size", "3000"], "argument --batch-size: should be at most --images-per-domain (got 3000)"),
        (["--meta-lr", "2"], "argument --meta-lr: should be in (0, 1] (got 2.0)"),
        (["--seed", "one"], "argument --seed: invalid whole number value: 'one'"),
        (["--methods", "erm,foo"], "should be some of erm,fish,smooth_fish,symmetric,exact (got 'foo')"),
        (["--device", "abacus"], "argument --device: 'abacus' cannot be used here"),
        (["--dsprites", "absent.npz"], "argument --dsprites: no dSprites file at 'absent.npz'"),
        (["--images-per-domain", "60000"], "453000 different squares and as many ellipses are asked for"),
        (["--out", "file"], "argument --out: "),
        (["--paper", "--size", "32"], "argument --size: the network of --paper takes 64 pixels (got 32)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()

    with pytest.raises(SystemExit) as exit_:
        cdsprites.parse(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_paper_sets_the_official_configuration_and_flags_still_override_it(tmp_path):
    _, config, source = cdsprites.parse(["--paper", "--iterations", "10", "--out", str(tmp_path)])
    assert (config.size, config.batch_size, config.domains, config.lr, config.meta_lr) == (64, 64, 15, 1e-3, 0.15 / 15)
    assert config.iterations == 10
    assert cdsprites.PAPER["iterations"] == 100 * (config.images_per_domain // config.batch_size)
    assert (15 * config.images_per_domain + 2 * config.eval_images) // 2 <= source.available
    kinds = [type(layer).__name__ for layer in cdsprites.make_model(config)]
    assert kinds == ["Conv2d", "ReLU"] * 5 + ["Flatten", "Linear"]
    shapes = [tuple(p.shape) for p in cdsprites.make_model(config).parameters() if p.ndim > 1]
    assert shapes == [(32, 3, 4, 4), (32, 32, 4, 4), (64, 32, 4, 4), (128, 64, 4, 4), (128, 128, 4, 4), (2, 128)]


@pytest.mark.parametrize("size", [16, 27, 32, 50, 64, 128])
def test_network_takes_every_size(size, tmp_path):
    _, config, _ = cdsprites.parse(["--size", str(size), "--out", str(tmp_path)])
    assert cdsprites.make_model(config)(torch.zeros(2, 3, size, size)).shape == (2, 2)
