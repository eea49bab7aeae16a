"""The report's pictures. Colours are Okabe and Ito's, and every line has a marker or dash of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    # Of several processes.
    "Fish over fully_shard": {"color": "0.5", "marker": "X"},
    "Fish over DDP": {"color": BLACK, "marker": "o"},
    "IDGM, data": {"color": AMBER, "marker": "v"},
    "IDGM, domains": {"color": ORANGE, "marker": "^"},
    "Fish, walks, reset": {"color": BLUE, "marker": "s"},
    "Fish, walks": {"color": BLUE, "marker": "s"},
    "Fish, alone": {"color": SKY, "marker": "", "linestyle": ":"},
    "IDGM, alone": {"color": AMBER, "marker": "", "linestyle": ":"},
    "random orders": {"color": ORANGE, "marker": "^"},
    "opposite pairs": {"color": BLUE, "marker": "s"},
}
RING = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
Row = Mapping[str, Any]
Rows = Sequence[Row]


def of(rows: Rows, **values: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def distinct(rows: Rows, *keys: str) -> list[Any]:
    """The values of a column, or of several together, in the order in which they come."""
    return list(dict.fromkeys(itemgetter(*keys)(row) for row in rows))


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    values = list(values)
    low, _, high = quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return low, median(values), high


def over_repeats(rows: Rows, quantity: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """Values of ``at``, and for each the least, the median and the greatest over repeats."""
    found: dict[float, list[float]] = {}
    for row in of(rows, resolved=True):
        found.setdefault(row["at"], []).append(row[quantity])
    x = sorted(found)
    return x, [min(found[a]) for a in x], [median(found[a]) for a in x], [max(found[a]) for a in x]


def style(name: str) -> dict[str, Any]:
    of_head = {"color": BLACK, "marker": "$h$", "linestyle": "--" if "keep" in name else "-."}
    return {"linestyle": "-", "markersize": 5, "linewidth": 1.6, "label": name} | STYLES.get(name, of_head)


def grid(rows: int, columns: int, title: str, height: float = 2.7) -> tuple[Figure, np.ndarray]:
    """Axes at the width of a column of text."""
    figure = Figure(figsize=(3.9 * columns, height * rows + 1.3), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.grid(alpha=0.25, which="major")
    return figure, axes


def band(ax: Axes, x: Sequence[float], low: Any, middle: Any, high: Any, **looks: Any) -> None:
    """A line in a band of its colour."""
    ax.plot(x, middle, **looks)
    ax.fill_between(x, low, high, color=looks["color"], alpha=0.2, linewidth=0)


def save(figure: Figure, path: Path, axes: Iterable[Axes], columns: int = 3) -> None:
    """Save, with one legend below for what is in several axes."""
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = sorted(handles, key=lambda name: list(STYLES).index(name) if name in STYLES else len(STYLES))
    figure.legend(
        [handles[n] for n in names], names, loc="outside lower center", ncols=min(len(names), columns), frameon=False
    )
    figure.savefig(path)


def at_the_values(ax: Axes, values: Sequence[float]) -> None:
    """Label a logarithmic axis at the measured values."""
    ax.set_xscale("log")
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.set_xticks([], minor=True)


def round_numbers(ax: Axes) -> None:
    """Label the other axis, when all is drawn."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ticks = [digit * 10**power for power in range(-1, 4) for digit in (1, 2, 3, 5)]
    ticks = [tick for tick in ticks if low < tick < high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_yticks([], minor=True)


def panels(rows: Rows, title: str, x_label: str, *quantities: str) -> tuple[Figure, list[str], list[list[Axes]]]:
    """The networks, and axes for each quantity, one of each network."""
    networks = distinct(rows, "network")
    number = len(networks) * len(quantities)
    columns = min(2, number)
    figure, axes = grid(-(-number // columns), columns, title)
    for ax in axes.flat[number:]:
        ax.remove()
    placed = axes.flat[:number].reshape(len(networks), len(quantities))
    for network, of_network in zip(networks, placed, strict=True):
        for quantity, ax in zip(quantities, of_network, strict=True):
            ax.set_title(network, fontsize=11)
            ax.set_xlabel(x_label)
            ax.set_ylabel(quantity)
    return figure, networks, placed.T.tolist()


def grow(path: Path, rows: Rows, quantity: str, unit: float, title: str, y_label: str) -> None:
    """One panel for each network, one line for each way, against the number of domains; bands are quartiles."""
    rows = [row for row in rows if row[quantity]]
    figure, networks, (axes,) = panels(rows, title, "number of domains S", y_label)
    for ax, network in zip(axes, networks, strict=True):
        for way in distinct(rows, "way"):
            some = of(rows, network=network, way=way)
            if some:
                low, middle, high = np.transpose([spread(np.ravel(r[quantity]) / unit) for r in some])
                band(ax, [r["domains"] for r in some], low, middle, high, **style(way))
        at_the_values(ax, distinct(rows, "domains"))
        round_numbers(ax)
    save(figure, path, axes)


def fidelity_by_rate(path: Path, measured: Rows) -> None:
    title = "Direction beyond ERM against the exact one (bands: all repeats)"
    quantities = ("cosine with exact", "relative error")
    figure, networks, (top, bottom) = panels(measured, title, "inner learning rate", *quantities)
    looks = {"ReLU": {"color": BLUE, "marker": "s"}, "GELU": {"color": ORANGE, "marker": "^", "linestyle": "--"}}
    rings = {"SmoothFish": RING, "SmoothFish, symmetric": RING | {"marker": "H", "markersize": 13}}
    for upper, lower, network in zip(top, bottom, networks, strict=True):
        rows = of(measured, against="learning rate", network=network)
        for activation, look in looks.items():
            for ax, quantity in ((upper, "cosine"), (lower, "error")):
                some = of(rows, activation=activation, method="Fish")
                band(ax, *over_repeats(some, quantity), label=f"Fish by SGD, {activation}", markersize=4, **look)
                for method, ring in rings.items():
                    x, _, middle, _ = over_repeats(of(rows, activation=activation, method=method), quantity)
                    ax.plot(x, middle, label=f"{method}, {activation}", **ring | {"color": look["color"]})
        upper.set(xscale="log", ylim=(-0.6, 1.05))
        lower.set(xscale="log", yscale="log", ylim=(1e-3, 1e2))
        lower.plot([1e-4, 1e-1], [3e-3, 3], color="0.6", linewidth=1, linestyle=":", label="slope 1, as in the theorem")
    save(figure, path, [*top, *bottom])


def fidelity_by_batch(path: Path, measured: Rows, rate: float) -> None:
    title = f"Direction beyond ERM against the exact one (inner learning rate {rate:g}; bands: all repeats)"
    figure, networks, (axes,) = panels(measured, title, "batch size of a domain", "relative error")
    for ax, network in zip(axes, networks, strict=True):
        rows = of(measured, against="batch size", network=network)
        for method in ("Fish", "IDGM, one_pass", "IDGM, finite_difference"):
            band(ax, *over_repeats(of(rows, method=method), "error"), **style(method))
        for method, marker in (("SmoothFish", "o"), ("SmoothFish, symmetric", "H")):
            x, _, middle, _ = over_repeats(of(rows, method=method), "error")
            ax.plot(x, middle, label=method, color=BLACK, **RING | {"marker": marker})
        ax.set(yscale="log", ylim=(5e-3, 2e1))
        at_the_values(ax, distinct(rows, "at"))
    save(figure, path, axes)


def outcome(path: Path, outcomes: Rows) -> None:
    figure, ((by_time, by_gradients),) = grid(1, 2, "CdSprites-15 (mean and range over seeds)", 3.1)
    for title in distinct(outcomes, "title"):
        runs = of(outcomes, title=title)
        accuracy = np.array([run["accuracy"] for run in runs])
        curves = accuracy.min(axis=0), accuracy.mean(axis=0), accuracy.max(axis=0)
        looks = style(title) | {"markevery": 2, "markersize": 4}
        band(by_time, np.mean([run["seconds"] for run in runs], axis=0), *curves, **looks)
        band(by_gradients, np.add(runs[0]["gradients"], runs[0]["hessian_products"]), *curves, **looks)
    by_time.set(xlabel="seconds of training, one thread", ylabel="accuracy on unseen colours")
    by_gradients.set_xlabel("gradients and Hessian-vector products")
    by_gradients.locator_params(axis="x", nbins=5)
    for ax in (by_time, by_gradients):
        ax.axhline(0.5, color="0.6", linewidth=1, linestyle=":")
        ax.set_ylim(0.45, 1.02)
    save(figure, path, [by_time])
