"""The pictures of ``python -m benchmarks scale``, in the colours of the other parts."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.plots import Rows, at_the_values, band, distinct, grid, of, panels, round_numbers, save, spread, style
from benchmarks.scale.times import DDP, SPREAD

COUNTED = ("Fish over fully_shard", DDP, "IDGM, data", SPREAD, "Fish, walks, reset")
DOTTED = {"color": "0.4", "linestyle": ":", "linewidth": 1.2}


def counts(path: Path, rows: Rows) -> None:
    title = "What a rank sends in a meta-iteration: promised (lines), counted (markers)"
    figure, ((ax,),) = grid(1, 1, title, 4.2)
    figure.set_figwidth(7.5)
    for name in COUNTED:
        some = of(rows, way=name)
        if some:
            x, looks = [r["domains"] for r in some], style(name)
            ax.plot(x, [r["promised"] for r in some], color=looks["color"], linewidth=1.4)
            looks |= {"linestyle": "none", "markersize": 7, "label": f"{name}: {some[0]['formula']}"}
            ax.plot(x, [r["all_reduces"] for r in some], **looks)
    ax.set_xlabel("domains S, batches of a rank in a meta-iteration")
    ax.set_ylabel("bytes sent, in all-reduces of all parameters")
    at_the_values(ax, distinct(rows, "domains"))
    round_numbers(ax)
    save(figure, path, [ax], columns=2)


def wall(path: Path, times: Rows) -> None:
    title = "Time of a meta-iteration by number of processes (bands: quartiles)"
    figure, networks, (axes,) = panels(times, title, "processes R", "ms for a meta-iteration")
    for ax, network in zip(axes, networks, strict=True):
        for name in distinct(times, "way"):
            some = of(times, network=network, way=name)
            low, middle, high = 1e3 * np.transpose([spread(r["seconds"]) for r in some])
            looks = style(name) | {"label": name.replace("alone", "nothing sent")}
            band(ax, [r["ranks"] for r in some], low, middle, high, **looks)
        at_the_values(ax, distinct(times, "ranks"))
        round_numbers(ax)
    save(figure, path, axes)


def middle_of(rows: Rows, quantity: str) -> float:
    """Over draws: root of the mean square of the errors, median of the cosines."""
    values = [row[quantity] for row in rows]
    return mean(v * v for v in values) ** 0.5 if quantity == "error" else median(values)


def over_draws(ax: Axes, rows: Rows, against: str, quantity: str, **looks: Any) -> tuple[np.ndarray, list[float]]:
    """Plot a quantity with the range over draws; return where, and the middle."""
    x = sorted(distinct(rows, against))
    at = [of(rows, **{against: value}) for value in x]
    values = [[r[quantity] for r in some] for some in at]
    middle = [middle_of(some, quantity) for some in at]
    band(ax, x, [min(v) for v in values], middle, [max(v) for v in values], **looks)
    at_the_values(ax, x)
    ax.set_ylabel({"cosine": "cosine with exact", "error": "relative error"}[quantity])
    return np.array(x), middle


def directions(path: Path, rows: Rows) -> None:
    title = "The mean of R walks against the exact direction beyond ERM (bands: all draws)"
    figure, ((cosine, error, by_rate),) = grid(1, 3, title, 3.6)
    random, pairs = style("random orders"), style("opposite pairs")
    for ax, quantity in ((cosine, "cosine"), (error, "error")):
        over_draws(ax, of(rows, orders="pairs"), "walks", quantity, **pairs)
        numbers, middle = over_draws(ax, of(rows, orders="random"), "walks", quantity, **random)
        ax.set_xlabel(f"walks R (alpha {of(rows, orders='random')[0]['rate']:g})")
    error.plot(numbers, middle[0] / np.sqrt(numbers), label="1/sqrt(R)", **DOTTED)
    rates, middle = over_draws(by_rate, of(rows, orders="one pair"), "rate", "error", **pairs | {"label": "one pair"})
    by_rate.plot(rates, middle[0] * rates / rates[0], label="slope 1", **DOTTED | {"linestyle": "--"})
    by_rate.set_xlabel("step alpha of the walks (R = 2)")
    for ax in (error, by_rate):
        ax.set_yscale("log")
    save(figure, path, [error, by_rate], columns=5)
