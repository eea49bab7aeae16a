"""The report's pictures. Colours are Okabe and Ito's, and every line has a marker or dash of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

ORANGE, BLUE, GREEN, PINK = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
AMBER, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
STYLES: dict[str, dict[str, Any]] = {
    "ERM": {"color": BLACK, "marker": "o"},
    "Fish": {"color": BLUE, "marker": "s"},
    "SmoothFish": {"color": SKY, "marker": "D"},
    "SmoothFish, gamma=2": {"color": SKY, "marker": "d", "linestyle": ":"},
    "SmoothFish, symmetric": {"color": SKY, "marker": "H", "linestyle": "--"},
    "IDGM": {"color": ORANGE, "marker": "^"},
    "Exact": {"color": ORANGE, "marker": "^"},
    "IDGM, keep_graphs": {"color": ORANGE, "marker": "v", "linestyle": "--"},
    "IDGM, one_pass": {"color": AMBER, "marker": "P"},
    "IDGM, forward": {"color": GREEN, "marker": "<", "linestyle": "--"},
    "IDGM, finite_difference": {"color": GREEN, "marker": ">"},
    "create_graph": {"color": PINK, "marker": "X"},
    "curvlinops": {"color": "0.5", "marker": "*", "linestyle": ":"},
}
RING = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
Rows = Sequence[Mapping[str, Any]]


def style(name: str) -> dict[str, Any]:
    of_head = {"color": BLACK, "marker": "$h$", "linestyle": "--" if "keep" in name else "-."}
    return {"linestyle": "-", "markersize": 5, "linewidth": 1.6} | STYLES.get(name, of_head)


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    values = list(values)
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, median(values), high


def panels(networks: Sequence[str], title: str, x_label: str, *quantities: str) -> tuple[Figure, list[list[Axes]]]:
    """Axes for each quantity, one of each network, at the width of a column of text."""
    columns = min(2, len(networks) * len(quantities))
    rows = -(-len(networks) * len(quantities) // columns)
    figure = Figure(figsize=(3.9 * columns, 2.7 * rows + 1.3), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    placed = [[next(axes) for _ in quantities] for _ in networks]
    for ax in axes:  # what is left of an odd number
        ax.remove()
    for network, of_network in zip(networks, placed, strict=True):
        for quantity, ax in zip(quantities, of_network, strict=True):
            ax.set_title(network, fontsize=11)
            ax.set_xlabel(x_label)
            ax.set_ylabel(quantity)
            ax.grid(alpha=0.25, which="major")
    return figure, [list(of_quantity) for of_quantity in zip(*placed, strict=True)]


def legend_below(figure: Figure, axes: Iterable[Axes]) -> None:
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    order = [name for name in STYLES if name in handles]
    names = order + [name for name in handles if name not in STYLES]
    figure.legend(
        [handles[n] for n in names], names, loc="outside lower center", ncols=min(len(names), 3), frameon=False
    )


def at_the_values(ax: Axes, values: Sequence[float]) -> None:
    """Label a logarithmic axis at the measured values."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(list(values)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(ScalarFormatter())


def plain_numbers(ax: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    ticks = [
        t for t in (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000, 2000, 5000) if low * 0.7 < t < high * 1.4
    ]
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(ScalarFormatter())


def grow(
    path: Path,
    rows: Rows,
    networks: Sequence[str],
    values_of: Callable[[Mapping[str, Any]], Sequence[float]],
    title: str,
    y_label: str,
) -> None:
    """One panel for each network, one line for each way, against the number of domains; bands are quartiles."""
    figure, (axes,) = panels(networks, title, "number of domains S", y_label)
    for ax, network in zip(axes, networks, strict=True):
        shown: list[float] = []
        for way in dict.fromkeys(row["way"] for row in rows):
            points = [(r["domains"], spread(values_of(r))) for r in rows if (r["network"], r["way"]) == (network, way)]
            points = [p for p in points if p[1][1] > 0]
            if points:
                x = [s for s, _ in points]
                low, middle, high = zip(*(values for _, values in points), strict=True)
                ax.plot(x, middle, label=way, **style(way))
                ax.fill_between(x, low, high, color=style(way)["color"], alpha=0.2, linewidth=0)
                shown += middle
        ax.set_yscale("log")
        at_the_values(ax, sorted({r["domains"] for r in rows}))
        plain_numbers(ax, shown)
    legend_below(figure, axes)
    figure.savefig(path)


def cost(path: Path, times: Rows, networks: Sequence[str]) -> None:
    rows = [row for row in times if row["seconds"]]
    title = "Time of a meta-iteration over that of the ERM gradient and a step"
    grow(path, rows, networks, lambda row: row["of_erm"], title, "time / ERM")


def memory(path: Path, peaks: Rows, networks: Sequence[str]) -> None:
    rows = [row for row in peaks if row["bytes"]]
    title = "Peak memory of a meta-iteration above model and batches"
    grow(path, rows, networks, lambda row: [row["bytes"] / 1e6], title, "MB")


def over_repeats(rows: Rows, quantity: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """Values of ``at``, and for each the least, the median and the greatest over repeats."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["resolved"]:
            found.setdefault(row["at"], []).append(row[quantity])
    x = sorted(found)
    return x, [min(found[a]) for a in x], [median(found[a]) for a in x], [max(found[a]) for a in x]


def fidelity_by_rate(path: Path, measured: Rows, networks: Sequence[str]) -> None:
    rows = [row for row in measured if row["against"] == "learning rate"]
    title = "Direction beyond ERM against the exact one (bands: all repeats)"
    figure, (top, bottom) = panels(networks, title, "inner learning rate", "cosine with exact", "relative error")
    looks = {"ReLU": {"color": BLUE, "marker": "s"}, "GELU": {"color": ORANGE, "marker": "^", "linestyle": "--"}}
    for upper, lower, network in zip(top, bottom, networks, strict=True):
        of_network = [row for row in rows if row["network"] == network]
        for activation, look in looks.items():
            for method in ("Fish", "SmoothFish", "SmoothFish, symmetric"):
                some = [r for r in of_network if (r["activation"], r["method"]) == (activation, method)]
                for ax, quantity in ((upper, "cosine"), (lower, "error")):
                    x, low, middle, high = over_repeats(some, quantity)
                    if method != "Fish":
                        marker = RING if method == "SmoothFish" else RING | {"marker": "H", "markersize": 13}
                        ax.plot(x, middle, color=look["color"], label=f"{method}, {activation}", **marker)
                    else:
                        ax.plot(x, middle, label=f"Fish by SGD, {activation}", **look, markersize=4)
                        ax.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        upper.set_xscale("log")
        upper.set_ylim(-0.6, 1.05)
        lower.set_xscale("log")
        lower.set_yscale("log")
        lower.set_ylim(1e-3, 1e2)
        rates = np.array([1e-4, 1e-1])
        lower.plot(rates, 30 * rates, color="0.6", linewidth=1, linestyle=":", label="slope 1, as in the theorem")
    legend_below(figure, [*top, *bottom])
    figure.savefig(path)


def fidelity_by_batch(path: Path, measured: Rows, networks: Sequence[str], rate: float) -> None:
    rows = [row for row in measured if row["against"] == "batch size"]
    title = f"Direction beyond ERM against the exact one (inner learning rate {rate:g}; bands: all repeats)"
    figure, (axes,) = panels(networks, title, "batch size of a domain", "relative error")
    for ax, network in zip(axes, networks, strict=True):
        for method in ("Fish", "IDGM, one_pass", "IDGM, finite_difference"):
            x, low, middle, high = over_repeats(
                [r for r in rows if (r["network"], r["method"]) == (network, method)], "error"
            )
            ax.plot(x, middle, label=method, **style(method))
            ax.fill_between(x, low, high, color=style(method)["color"], alpha=0.2, linewidth=0)
        for method, marker in (("SmoothFish", "o"), ("SmoothFish, symmetric", "H")):
            x, _, middle, _ = over_repeats(
                [r for r in rows if (r["network"], r["method"]) == (network, method)], "error"
            )
            ax.plot(x, middle, label=method, color=BLACK, **RING | {"marker": marker})
        ax.set_yscale("log")
        ax.set_ylim(5e-3, 2e1)
        at_the_values(ax, sorted({r["at"] for r in rows if r["network"] == network}))
    legend_below(figure, axes)
    figure.savefig(path)


def outcome(path: Path, outcomes: Rows) -> None:
    figure = Figure(figsize=(7.8, 4.4), dpi=150, layout="constrained")
    by_time, by_gradients = figure.subplots(1, 2, sharey=True)
    figure.suptitle("CdSprites-15 (mean and range over seeds)", fontsize=12)
    for title in dict.fromkeys(row["title"] for row in outcomes):
        runs = [row for row in outcomes if row["title"] == title]
        accuracy = np.array([run["accuracy"] for run in runs])
        products = np.array(runs[0]["hessian_products"])
        looks = style(title) | {"markevery": 2, "markersize": 4}
        for ax, x in (
            (by_time, np.mean([run["seconds"] for run in runs], axis=0)),
            (by_gradients, np.array(runs[0]["gradients"]) + products),
        ):
            ax.plot(x, accuracy.mean(axis=0), label=title, **looks)
            ax.fill_between(
                x, accuracy.min(axis=0), accuracy.max(axis=0), color=looks["color"], alpha=0.15, linewidth=0
            )
    by_time.set_xlabel("seconds of training, one thread")
    by_gradients.locator_params(axis="x", nbins=5)
    by_gradients.set_xlabel("gradients and Hessian-vector products")
    by_time.set_ylabel("accuracy on unseen colours")
    for ax in (by_time, by_gradients):
        ax.axhline(0.5, color="0.6", linewidth=1, linestyle=":")
        ax.grid(alpha=0.25)
        ax.set_ylim(0.45, 1.02)
    legend_below(figure, [by_time])
    figure.savefig(path)
