"""What the CdSprites demo shows: progress, the table and the figure."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from _cdsprites_data import SHAPES, CdSprites, Split
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.figure import SubFigure

SPRITES_PER_SHAPE = 6
SHOWN_DOMAINS = 3
SMOOTHED = 2
NAMED = 3  # of many domains, how many at either end the legend names
# Okabe and Ito's palette, which colour-blind readers can tell apart.
OKABE_ITO = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")


@dataclass
class Run:
    """What one method did: curves over training, whose first point is before any step, and totals.

    Attributes:
        method: its key in the demo's ``METHODS``.
        title: its name for readers.
        iteration: meta-iterations at each point of the curves.
        gradient_evaluations: the same in gradients of one batch.
        hessian_products: the same in Hessian-vector products of one batch.
        train_accuracy: on a fixed sample of the training images.
        validation_accuracy: on training colours, worn by either shape.
        unseen_accuracy: on colours that training never shows.
        inner_product: mean inner product of two training domains' gradients.
        cosine: mean cosine of the same.
        agreement_with_rest: of each training domain, the cosine of its gradient with the sum of the others'.
        seconds_training: wall-clock time up to each point, without measuring the curves.
        seconds: wall-clock time of the whole run.
        seconds_measuring: the part of it spent on measuring the curves.
        threads: torch threads.
    """

    method: str
    title: str
    iteration: list[int] = field(default_factory=list)
    gradient_evaluations: list[int] = field(default_factory=list)
    hessian_products: list[int] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    unseen_accuracy: list[float] = field(default_factory=list)
    inner_product: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    agreement_with_rest: list[list[float]] = field(default_factory=list)
    seconds_training: list[float] = field(default_factory=list)
    seconds: float = 0.0
    seconds_measuring: float = 0.0
    threads: int = 0

    def final(self) -> dict[str, float]:
        """Sum the run up; inner product and cosine are means over the points of the curve but the first.

        Returns:
            The numbers of the table and some more, by name.
        """
        return {
            "train_accuracy": self.train_accuracy[-1],
            "validation_accuracy": self.validation_accuracy[-1],
            "unseen_accuracy": self.unseen_accuracy[-1],
            "gradient_evaluations": self.gradient_evaluations[-1],
            "hessian_products": self.hessian_products[-1],
            "seconds": self.seconds,
            "mean_inner_product": float(np.mean(self.inner_product[1:])),
            "mean_cosine": float(np.mean(self.cosine[1:])),
        }


class Progress(NamedTuple):
    """News of a run for the reader."""

    method: str
    iteration: int
    unseen_accuracy: float
    loss: float
    cosine: float | None


class Display:
    """Shows how far the runs are: progress bars on a terminal, elsewhere a line at every tenth of the way.

    Args:
        lengths: what to call each method, and its number of meta-iterations.
    """

    def __init__(self, lengths: Mapping[str, tuple[str, int]]) -> None:
        self.lengths = lengths
        self.started = time.perf_counter()
        self.tenths = dict.fromkeys(lengths, 0)
        self.bars: dict[str, tqdm] = {}
        if sys.stderr.isatty():
            for position, (name, (title, iterations)) in enumerate(lengths.items()):
                self.bars[name] = tqdm(total=iterations, desc=f"{title:5}", unit="meta-it", position=position)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        for bar in self.bars.values():  # from the top line down
            bar.close()

    def show(self, progress: Progress) -> None:
        """Take note of news."""
        name, iteration, unseen_accuracy, loss, cosine = progress
        title, iterations = self.lengths[name]
        if bar := self.bars.get(name):
            agreement = "" if cosine is None else f", cosine {cosine:+.3f}"  # ERM measures none
            bar.set_postfix_str(f"loss {loss:.3f}{agreement}, unseen colours {unseen_accuracy:.3f}", refresh=False)
            bar.update(iteration - bar.n)
        elif (tenth := 10 * iteration // iterations) > self.tenths[name]:
            self.tenths[name] = tenth
            print(
                f"{title:5} {iteration:6}/{iterations} meta-iterations, unseen colours "
                f"{unseen_accuracy:.3f}, {time.perf_counter() - self.started:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def table(runs: Sequence[Run]) -> str:
    """Lay out the final numbers, a row for each method.

    Returns:
        Lines of text.
    """
    heads = ("method", "train accuracy", "unseen colours", "gradients", "Hv", "seconds", "mean inner product")
    rows = [heads]
    for run in runs:
        final = run.final()
        rows.append(
            (
                run.title,
                f"{final['train_accuracy']:.3f}",
                f"{final['unseen_accuracy']:.3f}",
                f"{final['gradient_evaluations']}",
                f"{final['hessian_products']}",
                f"{final['seconds']:.0f}",
                f"{final['mean_inner_product']:.2e}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def save_figure(path: Path, data: CdSprites, runs: Sequence[Run]) -> None:
    """Draw sample sprites of the splits above the curves of the runs, to be read at the width of a column."""
    figure = Figure(figsize=(8, 8.2), dpi=180, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.55))
    _sprites(above, data)
    panels = below.subplot_mosaic([["accuracy"] * 2, ["product", "cosine"]], height_ratios=(1.25, 1))
    for run, colour in zip(runs, OKABE_ITO, strict=False):
        x = run.iteration
        panels["accuracy"].plot(x, run.unseen_accuracy, color=colour, linewidth=2.2, label=run.title)
        panels["accuracy"].plot(x, run.train_accuracy, "--", color=colour, linewidth=1.3)
    panels["accuracy"].plot([], [], "--", color="0.4", linewidth=1.3, label="on training images")
    panels["accuracy"].set_title("Accuracy in telling squares from ellipses of unseen colours")
    panels["accuracy"].set_ylim(0.42, 1.02)
    panels["accuracy"].axhline(0.5, color="0.6", linewidth=1, linestyle=":")
    place = {"xy": (0, 0.5), "xytext": (4, -3), "xycoords": panels["accuracy"].get_yaxis_transform()}
    panels["accuracy"].annotate("guessing", **place, textcoords="offset points", ha="left", va="top", color="0.4")
    panels["accuracy"].legend(loc="center right")
    products = {run.title: (run.iteration, run.inner_product) for run in runs}
    cosines = {run.title: (run.iteration, run.cosine) for run in runs}
    _alignment(products, panels["product"], "Inner product of two domains' gradients")
    _alignment(cosines, panels["cosine"], "Their cosine, mean over pairs")
    for axes in panels.values():
        axes.grid(alpha=0.25)
    below.supxlabel(
        f"meta-iteration ({_evaluations(runs)})\n"
        f"thin: every measurement; thick: its mean with up to {SMOOTHED} before and after",
        fontsize=10,
    )
    figure.savefig(path)


def _alignment(curves: dict[str, tuple[Sequence[float], Sequence[float]]], axes: Axes, quantity: str) -> None:
    """Draw the agreement of gradients over training, as in the tracking figure of the paper."""
    for (title, (positions, values)), colour in zip(curves.items(), OKABE_ITO, strict=False):
        axes.plot(positions, values, color=colour, linewidth=1.0, alpha=0.4)
        axes.plot(positions, _smoothed(values), color=colour, linewidth=2.2, label=title)
    axes.axhline(0.0, color="0.6", linewidth=1.0, linestyle=":")
    axes.set_title(quantity, fontsize=11)


def save_agreement(path: Path, runs: Sequence[Run]) -> None:
    """Draw over training which domains pull against the others, a panel for each method."""
    figure = Figure(figsize=(1.0 + 4.2 * len(runs), 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, run in zip(panels, runs, strict=True):
        _by_domain(run, axes)
        axes.set_ylim(-1.02, 1.02)
        axes.set_title(run.title, fontsize=12)
        axes.set_xlabel("meta-iteration")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("cosine with the others' gradients")
    figure.savefig(path)


def _by_domain(run: Run, axes: Axes) -> None:
    """Draw the cosine of each domain's gradient with the others', in the order of the means, the least last."""
    curves = dict(enumerate(zip(*run.agreement_with_rest, strict=True), start=1))
    order = sorted(curves, key=lambda domain: -sum(curves[domain]))
    for rank, domain in enumerate(order):
        few = len(order) <= len(OKABE_ITO)
        colour = OKABE_ITO[rank] if few else (0.84 * rank / len(order), 0.4, 0.7 - 0.7 * rank / len(order))
        label = f"domain {domain}" if few or rank < NAMED or len(order) - rank <= NAMED else None
        axes.plot(run.iteration, _smoothed(curves[domain]), color=colour, linewidth=1.8, label=label)
    axes.axhline(0.0, color="0.6", linewidth=1.0, linestyle=":")
    axes.legend(fontsize="small")


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value with some before and after it.

    Returns:
        As many.
    """
    windows = [values[max(0, i - SMOOTHED) : i + SMOOTHED + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _evaluations(runs: Sequence[Run]) -> str:
    """Say how many gradients a meta-iteration takes, and of which methods also Hessian-vector products.

    Returns:
        Words.
    """
    of: dict[int, list[str]] = {}
    for run in runs:
        of.setdefault(run.gradient_evaluations[-1] // run.iteration[-1], []).append(run.title)
    first = next(iter(of))
    words = [f"{first} gradients each", *(f"of {' and '.join(of[n])} {n}" for n in of if n != first)]
    words += [f"of {run.title} as many Hessian-vector products, too" for run in runs if run.hessian_products[-1]]
    return "; ".join(words)


def _sprites(figure: SubFigure, data: CdSprites) -> None:
    """Show rows of sprites: some training domains, validation and test."""
    domains = int(data.train.domains.max()) + 1
    shown = min(domains, SHOWN_DOMAINS)
    rows: list[tuple[str, Split, np.ndarray]] = [
        (f"training\ndomain {domain + 1}", data.train, data.train.domains == domain) for domain in range(shown)
    ]
    rows.append(("validation:\nsame colours", data.validation, np.full(len(data.validation.labels), True)))
    rows.append(("test: unseen\ncolours", data.test, np.full(len(data.test.labels), True)))
    axes = figure.subplots(len(rows), 1)
    for ax, (title, split, of_row) in zip(axes, rows, strict=True):
        picked = [_pick(split, np.flatnonzero(of_row & (split.labels == label))) for label in range(len(SHAPES))]
        strips = [_strip(split, indices) for indices in picked]
        gap = np.ones((strips[0].shape[0], strips[0].shape[0] // 3, 3))
        ax.imshow(np.concatenate([strips[0], gap, strips[1]], axis=1), interpolation="nearest")
        ax.set_ylabel(title, rotation=0, ha="right", va="center", labelpad=8, fontsize=11)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    for centre, shape in zip((0.24, 0.76), SHAPES, strict=True):
        axes[0].text(
            centre, 1.06, f"label: {shape}", transform=axes[0].transAxes, ha="center", va="bottom", fontsize=11
        )
    figure.suptitle(f"Sample sprites of the data ({shown} of {domains} training domains)", fontsize=12)


def _pick(split: Split, candidates: np.ndarray) -> np.ndarray:
    """Pick sprites from small to large whose colours are spread over all there are.

    Returns:
        Indices into the split.
    """
    colours = np.unique(split.colours[candidates], axis=0)
    picked = []
    for place in range(SPRITES_PER_SHAPE):
        colour = colours[place * len(colours) // SPRITES_PER_SHAPE]
        of_colour = candidates[(split.colours[candidates] == colour).all(axis=1)]
        by_area = of_colour[np.argsort(split.masks[of_colour].sum(axis=(1, 2), dtype=np.int64), kind="stable")]
        picked.append(by_area[int((0.4 + 0.59 * place / (SPRITES_PER_SHAPE - 1)) * (len(by_area) - 1))])
    return np.array(picked)


def _strip(split: Split, indices: np.ndarray) -> np.ndarray:
    """Lay sprites side by side, a thin white line between them.

    Returns:
        (size, width, 3) red, green and blue in [0, 1].
    """
    images = split.masks[indices, :, :, None] / 255 * split.colours[indices, None, None, :]
    line = np.ones((images.shape[1], max(1, images.shape[1] // 32), 3))
    return np.concatenate([part for image in images for part in (image, line)][:-1], axis=1)
