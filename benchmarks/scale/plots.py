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


def wall(path: Path, times: Rows, predicted: Rows) -> None:
    networks = list(dict.fromkeys(r["network"] for r in times))
    title = "Time of a meta-iteration by number of processes: measured (lines, quartiles), predicted (rings)"
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
            rings = [r for r in predicted if (r["network"], r["way"]) == (network, name)]
            if rings:
                ax.plot(
                    [r["ranks"] for r in rings],
                    [1e3 * r["seconds"] for r in rings],
                    color=look["color"], marker="o", markersize=11, markerfacecolor="none", linestyle="none",
                    label="predicted" if name == DDP else None,
                )  # fmt: skip
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


def outcomes(path: Path, runs: Rows, wanted: float) -> None:
    figure, ((ax,),) = grid(1, 1, "CdSprites-15: Fish by one walk and by the mean of two", 4.0)
    figure.set_size_inches(7.5, 5.2)
    for walks, look in ((1, {"color": ORANGE, "linestyle": "--"}), (2, {"color": BLUE})):
        some = [r for r in runs if r["walks"] == walks]
        for run in some:
            ax.plot(run["iteration"], run["accuracy"], linewidth=1, alpha=0.55, **look)
        label = "1 walk" if walks == 1 else f"{walks} walks, opposite orders"
        ax.plot(
            some[0]["iteration"], np.mean([r["accuracy"] for r in some], axis=0), linewidth=2.4, label=label, **look
        )
    ax.axhline(wanted, color="0.4", linewidth=1, linestyle=":")
    ax.set_ylim(0.45, 1.02)
    ax.set_xlabel("meta-iterations (thick: mean over seeds)")
    ax.set_ylabel("accuracy on unseen colours")
    legend(figure, [ax], 2)
    figure.savefig(path)


def predictions(path: Path, predicted: Mapping[str, Any], times: Rows) -> None:
    rows = predicted["rows"]
    cases = list(dict.fromkeys((r["workload"], r["fabric"]) for r in rows))
    columns = -(-len(cases) // 2)
    title = (
        f"Predicted time of a meta-iteration of {predicted['domains']} batches on each rank\n"
        "GPUs: computing and network assumed. Gloo: both measured here, on 1 and 2 processes; more are extrapolated"
    )
    figure, axes = grid(2, columns, title)
    order = [case for i in range(2) for case in cases[i::2]]  # a workload with both networks in a column
    for ax, (workload, fabric) in zip((ax for row in axes for ax in row), order, strict=False):
        some = [r for r in rows if (r["workload"], r["fabric"]) == (workload, fabric)]
        lines = {
            (way, o): [r for r in some if (r["way"], r["overlap"]) == (way, o)]
            for way in LOOKS
            for o in ((0.0, 1.0) if way == DDP else (0.0,))
        }
        x = [r["ranks"] for r in lines[DDP, 0.0]]
        seconds = {key: [r["seconds"] for r in line] for key, line in lines.items()}
        ax.fill_between(
            x, seconds[DDP, 1.0], seconds[DDP, 0.0], color=BLACK, alpha=0.15, linewidth=0,
            label="DDP, some hidden by backward",
        )  # fmt: skip
        for (way, overlap), y in seconds.items():
            look = {key: value for key, value in LOOKS[way].items() if key == "color"}
            label = {0.0: f"{way}, nothing hidden", 1.0: f"{way}, all hidden that fits"}[overlap]
            ax.plot(x, y, linestyle="--" if overlap else "-", label=label if way == DDP else way, **look)
            shown = [t for t in times if (t["network"], t["way"]) == (workload, way)] if not overlap else []
            for row in shown:
                ax.plot(
                    row["ranks"], median(row["seconds"]), **LOOKS[way], markersize=6, linestyle="none",
                    label=f"{way}, measured" if row is shown[0] else None,
                )  # fmt: skip
        ax.set_title(f"{workload}\n{fabric}", fontsize=10)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_locator(FixedLocator([1, 4, 16, 64, 256, 1024]))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        ax.tick_params(which="minor", labelsize=7)
    for left, *_ in axes:
        left.set_ylabel("seconds")
    for ax in axes[-1]:
        ax.set_xlabel("GPUs, or processes, R")
    legend(figure, [ax for row in axes for ax in row], 4)
    figure.savefig(path)
