"""The pictures of the report that are over all data sets, and that by domain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from torch_gradmatch import Evidence
from torch_gradmatch.evaluation.plots import plot_agreement_by_domain

__all__ = ["plot_all", "plot_domains"]

WON, LOST, UNDECIDED, BLANK = "#8fd3bb", "#f2b48f", "#ececec", "#ffffff"


def plot_all(found: Mapping[str, Evidence], path: Path) -> None:
    """Draw the answer to "where would I have won?": a row for each data set, a column for each method.

    Args:
        found: By the title of the data set.
        path: Where to save the picture.
    """
    methods = list(dict.fromkeys(row.name for evidence in found.values() for row in evidence.rows[1:]))
    figure = Figure(figsize=(2.6 + 1.15 * len(methods), 1.9 + 0.62 * len(found)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for y, evidence in enumerate(found.values()):
        known = {row.name: row for row in evidence.rows}
        for x, method in enumerate(methods):
            row = known.get(method)
            difference = None if row is None else row.difference
            colour, text = BLANK, ""
            if difference is not None:
                colour = WON if difference.low > 0 else LOST if difference.high < 0 else UNDECIDED
                half = difference.high - difference.mean
                text = f"{100 * difference.mean:+.1f}\n± {100 * half:.1f}"
            axes.fill_between([x - 0.48, x + 0.48], y - 0.46, y + 0.46, color=colour, linewidth=0)
            weight = "bold" if colour in (WON, LOST) else "normal"
            axes.text(x, y, text, ha="center", va="center", fontsize=8.5, weight=weight)
    axes.set_xticks(range(len(methods)), [m.replace(", ", ",\n") for m in methods], fontsize=8)
    names = [f"{title}\n(ERM {100 * evidence.rows[0].mean:.1f} %)" for title, evidence in found.items()]
    axes.set_yticks(range(len(found)), names, fontsize=8.5)
    axes.set_xlim(-0.5, len(methods) - 0.5)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(
        "points of accuracy over ERM on the held-out domain, ± half of the 95 % interval for another domain\n"
        "green: better beyond the interval, orange: worse beyond it, grey: undecided, empty: not run",
        fontsize=8.5,
    )
    figure.savefig(path)


def plot_domains(curves: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw which training domains pull against the others.

    Args:
        curves: Of each domain, gradients and cosines.
        title: Of the picture.
        path: Where to save it.
    """
    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    plot_agreement_by_domain({name: (x, y) for name, (x, y) in curves.items()}, axes, smoothing=0)
    axes.set_xlabel("gradients of one batch")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.25)
    figure.savefig(path)
