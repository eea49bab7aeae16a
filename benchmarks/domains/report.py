"""The report of ``python -m benchmarks domains``: what was found over all data sets, then each of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.domains.source import Loaded, Source
from benchmarks.report import table
from torch_gradmatch import Evidence
from torch_gradmatch.evaluation.evidence import AVERAGED
from torch_gradmatch.evaluation.statistics import LEVEL

__all__ = ["Found", "smallest_seen", "write"]

SELECTED = ("meta_lr", "inner_lr", "strength", "beta", "eta")
HOW = (
    "Every method differentiates the same number of samples, with the same draws of hyperparameters; nothing of the "
    "held-out domain is used for selection. Differences to ERM are paired, in hundredths of the metric, with half the "
    "95 % interval for another domain. **Bold**: better, *italics*: worse, for another domain and for another seed, "
    "after Holm's correction for the rows of its data set. `least p`: the smallest, so corrected. `seen`: the smallest "
    "true difference that the study tells from none in 80 % of cases, with the spread found. `time`: of the shortest "
    "run, without averaging, over ERM's, median over a table's data sets; other work can make a run longer."
)


@dataclass(frozen=True)
class Found:
    """What was found on one data set.

    Attributes:
        source: The data set.
        loaded: Its samples.
        evidence: What the call returned.
        folder: Of the runs and of the picture.
        every: One of so many domains was held out.
    """

    source: Source
    loaded: Loaded
    evidence: Evidence
    folder: Path
    every: int

    def line(self) -> list[str]:
        """Return its line of the table of all data sets."""
        first, best, found = self.evidence.rows[0], self.evidence.best, self.evidence.differences
        seeds = len(next(iter(first.by_domain.values())))
        p, nearest = min(((d.corrected, name) for name, d in found.items() if d.domains.mean > 0), default=(1.0, ""))
        answer = f"yes: {best}" if best != first.name else f"no; least p: {nearest}, {p:.2g}" if p < 1 else "no"
        return [self.source.name, self.source.shift, f"{len(first.by_domain)} x {seeds}", answer]

    def section(self) -> str:
        """Return what the report says of it."""
        sizes = ", ".join(f"{label} {number}" for label, number in self.loaded.sizes().items())
        held_out = f"{'Each' if self.every == 1 else f'One of {self.every} domains'} is held out."
        parts = [
            f"## {self.source.title}",
            f"Shift: {self.source.shift}. Get it: `{self.source.command}`. Licence: {self.source.licence}.",
            "\n".join(f"- {note}" for note in self.source.notes),
            f"{len(self.loaded.targets)} samples: {sizes}. {self.loaded.chance()} {held_out}",
            curve(self.folder, self.evidence.rows[0].name),
            f"```text\n{self.evidence}\n```",
            f"![Differences to ERM]({self.source.name}.png)",
        ]
        return "\n\n".join(parts)


def runs_of(folder: Path) -> list[dict[str, Any]]:
    """Return the runs of a data set."""
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(folder: Path, method: str) -> str:
    """Say how a method's runs came along: whether they had converged at the end of their budget."""
    curves = [run["plain"]["curve"] for run in runs_of(folder) if run["method"] == method and run["stopped"] is None]
    if not curves:
        return f"All runs of {method} ended early."
    longest = max(map(len, curves))
    whole = [c for c in curves if len(c) == longest]  # large batches pass two moments at once
    points = ", ".join(
        f"{fmean(v for _, v in at):.3f} after {fmean(n for n, _ in at):,.0f}" for at in zip(*whole, strict=True)
    )
    return f"{method} on its validation parts, mean over {len(whole)} runs: {points} samples."


def shortest(folder: Path) -> dict[str, float]:
    """Return the seconds of training of each method's shortest run; all methods have the same draws of batch sizes."""
    found: dict[str, float] = {}
    for run in runs_of(folder):
        if run["stopped"] is None:
            found[run["method"]] = min(run["seconds"], found.get(run["method"], math.inf))
    return found


def smallest_seen(evidence: Evidence, share: float = 0.8) -> float:
    """Return the smallest true difference that a study tells from none in that share of cases, to 0.0001; inf: none."""
    if evidence.power(1.0) < share:
        return math.inf
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if evidence.power(middle) >= share else (middle, high)
    return high


def hundredths(value: float) -> str:
    """Return a number as text; a study of one domain or with large spread says nothing."""
    return f"{100 * value:.1f}" if math.isfinite(value) else "?"


def differences(found: Sequence[Found]) -> list[list[str]]:
    """Return a table: a line for each method, a column for each data set, and what the method costs."""
    names = dict.fromkeys(row.name for f in found for row in f.evidence.rows)
    lines = [["", *(f.source.name for f in found), "time"]]
    lines.append(["ERM", *(f"{f.evidence.rows[0].mean:.3f}" for f in found), "1"])
    seconds = [shortest(f.folder) for f in found]
    for name in list(names)[1:]:
        cells, times = [name], []
        for f, of in zip(found, seconds, strict=True):
            d = f.evidence.differences.get(name)
            if d is None:
                cells.append("")
                continue
            mark = "**" if d.is_better else "*" if d.corrected < LEVEL else ""
            cells.append(
                f"{mark}{100 * d.domains.mean:+.1f} ± {hundredths((d.domains.high - d.domains.low) / 2)}{mark}"
            )
            times.append(of[name.removesuffix(AVERAGED)] / of[f.evidence.rows[0].name])
        lines.append([*cells, f"{median(times):.2f}"])
    return [*lines, ["seen", *(hundredths(smallest_seen(f.evidence)) for f in found), ""]]


def selected(found: Sequence[Found]) -> list[list[str]]:
    """Return a table of the methods' own hyperparameters that were selected: median and range over folds."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in (row for f in found for row in f.evidence.rows):
        for setting in SELECTED:
            here = [float(s[setting]) for s in row.settings.values() if setting in s]
            if here:
                values.setdefault((row.name, setting), []).extend(here)
    lines = [["", "setting", "median", "range", "folds"]]
    for (name, setting), of in values.items():
        lines.append([name, setting, f"{median(of):.2g}", f"{min(of):.2g} to {max(of):.2g}", str(len(of))])
    return lines


def write(found: Sequence[Found], command: str, on: Mapping[str, object], missing: Sequence[str], path: Path) -> None:
    """Write the page."""
    parts = [
        "# Does gradient matching help on real data?",
        f"`{command}`, {on['date']}: torch {on['torch']}, Python {on['python']}, {on['cpu']}, {on['cpus']} CPUs.",
        HOW,
        table([["data set", "shift", "held out x seeds", "is anything better?"], *(f.line() for f in found)]),
        *(table(differences(found[i : i + 5])) for i in range(0, len(found), 5)),  # more do not fit into the page
    ]
    if len(own := selected(found)) > 1:
        parts += ["Hyperparameters selected, over all folds and data sets:", table(own)]
    path.write_text("\n\n".join([*parts, *(f.section() for f in found), *missing]) + "\n", encoding="utf-8")
