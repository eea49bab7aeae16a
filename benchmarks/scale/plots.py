"""The pictures of ``python -m benchmarks scale``, in the colours of the other parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.plots import AMBER, BLACK, BLUE, ORANGE, SKY, at_the_values, spread
from benchmarks.scale.times import COMPUTES_AS, DDP, SPREAD, WALKS

Rows = Sequence[Mapping[str, Any]]
LOOKS: dict[str, dict[str, Any]] = {
    DDP: {"color": BLACK, "marker": "o"},
    WALKS: {"color": BLUE, "marker": "s"},
    SPREAD: {"color": ORANGE, "marker": "^"},
}
COUNTED: dict[str, dict[str, Any]] = {
    "Fish over fully_shard": {"color": "0.5", "marker": "X"},
    DDP: {"color": BLACK, "marker": "o"},
    "IDGM, data": {"color": AMBER, "marker": "v"},
    SPREAD: {"color": ORANGE, "marker": "^"},
    "Fish, walks, reset": {"color": BLUE, "marker": "s"},
}


def grid(rows: int, columns: int, title: str, height: float = 3.4) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(4.0 * columns + 0.6, height * rows + 1.1), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.grid(alpha=0.25, which="major")
    return figure, [list(row) for row in axes]


def legend(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)


def counts(path: Path, rows: Rows) -> None:
    figure, ((ax,),) = grid(1, 1, "What a rank sends in a meta-iteration: promised (lines), counted (markers)", 4.2)
    figure.set_size_inches(7.5, 5.6)
    for name, look in COUNTED.items():
        some = sorted((r for r in rows if r["way"] == name), key=lambda r: r["domains"])
        if some:
            x = [r["domains"] for r in some]
            ax.plot(x, [r["promised"] for r in some], color=look["color"], linewidth=1.4)
            counted = [r["all_reduces"] for r in some]
            ax.plot(x, counted, linestyle="none", markersize=7, label=f"{name}: {some[0]['formula']}", **look)
    ax.set_xlabel("domains S, batches of a rank in a meta-iteration")
    ax.set_ylabel("bytes sent, in all-reduces of all parameters")
    at_the_values(ax, sorted({r["domains"] for r in rows}))
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def wall(path: Path, times: Rows) -> None:
    networks = list(dict.fromkeys(r["network"] for r in times))
    title = "Time of a meta-iteration by number of processes (bands: quartiles)"
    figure, (axes,) = grid(1, len(networks), title)
    for ax, network in zip(axes, networks, strict=True):
        for name in dict.fromkeys(r["way"] for r in times):
            some = [r for r in times if (r["network"], r["way"]) == (network, name)]
            x = [r["ranks"] for r in some]
            low, middle, high = (
                1e3 * np.array(v) for v in zip(*(spread(r["seconds"]) for r in some), strict=True)
            )  # fmt: skip
            exact = name in (SPREAD, COMPUTES_AS[SPREAD])
            look = LOOKS.get(name, {"color": AMBER if exact else SKY, "marker": "", "linestyle": ":"})
            label = name.replace("alone", "nothing sent")
            ax.plot(x, middle, label=label, markersize=5, **look)
            ax.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
        ax.set_title(network, fontsize=11)
        ax.set_xlabel("processes R")
        at_the_values(ax, sorted({r["ranks"] for r in times}))
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0].set_ylabel("ms for a meta-iteration")
    legend(figure, axes, 3)
    figure.savefig(path)


def directions(path: Path, rows: Rows) -> None:
    rate = next(r["rate"] for r in rows if r["orders"] == "random")
    title = "The mean of R walks against the exact direction beyond ERM (bands: all draws)"
    figure, ((cosine, error, by_rate),) = grid(1, 3, title, 3.6)
    looks = {
        "random": ("random orders", {"color": ORANGE, "marker": "^"}),
        "pairs": ("opposite pairs", {"color": BLUE, "marker": "s"}),
    }
    for kind, (label, look) in looks.items():
        some = [r for r in rows if r["orders"] == kind]
        for ax, quantity in ((cosine, "cosine"), (error, "error")):
            band(ax, some, "walks", quantity, label, look)
    band(by_rate, [r for r in rows if r["orders"] == "one pair"], "rate", "error", "one pair", looks["pairs"][1])
    numbers = np.array(sorted({r["walks"] for r in rows if r["orders"] == "random"}))
    first = middle_of([r for r in rows if (r["orders"], r["walks"]) == ("random", 1)], "error")
    error.plot(numbers, first / np.sqrt(numbers), color="0.4", linestyle=":", linewidth=1.2, label="1/sqrt(R)")
    rates = np.array(sorted({r["rate"] for r in rows if r["orders"] == "one pair"}))
    least = middle_of([r for r in rows if (r["orders"], r["rate"]) == ("one pair", rates[0])], "error")
    by_rate.plot(rates, least * rates / rates[0], color="0.4", linestyle="--", linewidth=1.2, label="slope 1")
    for ax in (cosine, error):
        ax.set_xlabel(f"walks R (alpha {rate:g})")
        at_the_values(ax, numbers.tolist())
    by_rate.set_xlabel("step alpha of the walks (R = 2)")
    at_the_values(by_rate, rates.tolist())
    cosine.set_ylabel("cosine with exact")
    error.set_ylabel("relative error")
    for ax in (error, by_rate):
        ax.set_yscale("log")
    legend(figure, [error, by_rate], 5)
    figure.savefig(path)


def middle_of(rows: Rows, quantity: str) -> float:
    """Over draws: root of the mean square of the errors, median of the cosines."""
    values = [row[quantity] for row in rows]
    return mean(v * v for v in values) ** 0.5 if quantity == "error" else median(values)


def band(ax: Axes, rows: Rows, against: str, quantity: str, label: str, look: Mapping[str, Any]) -> None:
    x = sorted({r[against] for r in rows})
    at = [[r for r in rows if r[against] == value] for value in x]
    values = [[r[quantity] for r in some] for some in at]
    middle = [middle_of(some, quantity) for some in at]
    ax.plot(x, middle, label=label, markersize=5, **look)
    ax.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=look["color"], alpha=0.18, linewidth=0)
