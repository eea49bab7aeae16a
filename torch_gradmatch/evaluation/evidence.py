"""What ``leave_one_domain_out`` found: selection without peeking, paired differences, a table, an answer, a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch_gradmatch.evaluation.plots import OKABE_ITO
from torch_gradmatch.evaluation.tables import aligned, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Evidence", "EvidenceRow", "Interval", "Point", "best", "differences", "interval_of", "last"]

LEVEL = 0.95
Point = dict[str, Any]  # of a run's curve


@dataclass(frozen=True)
class Interval:
    """A mean and its interval of confidence, 95 %.

    Attributes:
        mean: The mean.
        low: Lower end; minus infinity of a single number.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{self.mean:+.3f} [-]"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def interval_of(values: Sequence[float]) -> Interval:
    """Return Student's interval of the mean of some numbers.

    Args:
        values: The numbers, at least one.

    Returns:
        The mean and its 95 % interval.

    Example:
        >>> print(interval_of([1.0, 2.0, 3.0]))
        +2.000 [-0.484, +4.484]
    """
    from scipy.stats import t  # only where numbers are there

    mean, number = fmean(values), len(values)
    if number == 1:
        return Interval(mean, -math.inf, math.inf)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (number - 1) / number)
    half = float(t.ppf((1 + LEVEL) / 2, number - 1)) * error
    return Interval(mean, mean - half, mean + half)


def best(curve: Sequence[Point]) -> Point:
    """Return the point of a run where the validation parts of the training domains are known best: the first of them.

    Args:
        curve: Of the run; points whose validation is NaN count last.

    Returns:
        The point.
    """
    return max(curve, key=lambda point: -math.inf if math.isnan(point["validation"]) else point["validation"])


def last(curve: Sequence[Point]) -> Point:
    """Return the end of a run.

    Args:
        curve: Of the run.

    Returns:
        The point.
    """
    return curve[-1]


@dataclass(frozen=True)
class EvidenceRow:
    """What was found of one method.

    Attributes:
        name: Its name.
        by_domain: Of each held-out domain, by its label as text: the metric there for each seed. Hyperparameters and
            moment of training are those that are best on the validation parts of the training domains.
        oracle_by_domain: The same for the hyperparameters that are best on the held-out domain itself, at the end of
            training: what nobody can have who does not know that domain.
        settings: Of each held-out domain: the hyperparameters selected.
        seconds: Of training, mean over runs, without measuring.
        curves: Of each held-out domain and seed: the curve of the selected run.
        stopped: What ended selected runs early, and how often.
        difference: Paired difference to the first method, the mean over seeds of each held-out domain: the interval is
            for another domain like these.
        difference_here: The same of the mean over domains of each seed: the interval is for these domains and another
            seed.
        oracle_difference: As :attr:`difference`, by the oracle's selection.
    """

    name: str
    by_domain: dict[str, list[float]]
    oracle_by_domain: dict[str, list[float]]
    settings: dict[str, dict[str, Any]]
    seconds: float
    curves: dict[str, list[list[Point]]] = field(repr=False)
    stopped: dict[str, int]
    difference: Interval | None = None
    difference_here: Interval | None = None
    oracle_difference: Interval | None = None

    @property
    def mean(self) -> float:
        """Mean of the metric over held-out domains and seeds."""
        return fmean(fmean(values) for values in self.by_domain.values())

    @property
    def oracle_mean(self) -> float:
        """The same by the oracle's selection."""
        return fmean(fmean(values) for values in self.oracle_by_domain.values())

    @property
    def worst(self) -> tuple[str, float]:
        """The held-out domain where the mean over seeds is least, and that mean."""
        found = {label: fmean(values) for label, values in self.by_domain.items()}
        label = min(found, key=found.__getitem__)
        return label, found[label]


def differences(
    row: EvidenceRow, other: EvidenceRow, of: Callable[[EvidenceRow], Mapping[str, list[float]]]
) -> dict[str, list[float]]:
    """Return the paired differences of two methods.

    Args:
        row: One.
        other: What is subtracted.
        of: Which numbers.

    Returns:
        By held-out domain, for each seed.
    """
    return {label: [a - b for a, b in zip(values, of(other)[label], strict=True)] for label, values in of(row).items()}


@dataclass(frozen=True)
class Evidence:
    """What :func:`~torch_gradmatch.leave_one_domain_out` found. Prints as a table and an answer.

    Attributes:
        setting: Data and protocol in words.
        rows: A row for each method; the first is what the others are compared to.
    """

    setting: str
    rows: list[EvidenceRow]

    def __getitem__(self, name: str) -> EvidenceRow:
        """Return the row of that name.

        Raises:
            KeyError: If there is none.
        """
        return {row.name: row for row in self.rows}[name]

    @property
    def answer(self) -> str:
        """Would another method have won over the first? In sentences."""
        first, *others = self.rows
        compared = [(row, row.difference, row.difference_here) for row in others if row.difference is not None]
        if not compared:
            return f"There is nothing to compare {first.name} with."
        wins = [(row, d) for row, d, _ in compared if d.low > 0]
        here = [
            (row, d) for row, _, d in compared if d is not None and d.low > 0 and all(row is not r for r, _ in wins)
        ]
        losses = [(row, d) for row, d, _ in compared if d.high < 0]
        said = []
        if wins:
            said.append("Yes, beyond the interval for another domain: " + _listed(wins) + ".")
        else:
            row, d, _ = max(compared, key=lambda found: found[1].mean)
            said.append(
                f"No method beats {first.name} beyond its interval for another domain; the best mean has {row.name}, "
                f"{d}."
            )
        if here:
            said.append("On these very domains, and for another seed only: " + _listed(here) + ".")
        if losses:
            said.append("Worse beyond the interval: " + _listed(losses) + ".")
        if len(compared) > 1:
            said.append(
                f"Each interval is for one method by itself: of {len(compared)} methods that change nothing, some "
                f"interval leaves 0 outside with a probability of {1 - LEVEL ** len(compared):.0%}, if they are "
                "independent."
            )
        return " ".join(said)

    def __str__(self) -> str:
        first = self.rows[0]
        heads = [
            "method",
            "unseen",
            f"over {first.name}, for another domain",
            "for another seed",
            "won",
            "worst domain",
        ]
        cells = [[*heads, "oracle", "seconds"]]
        for row in self.rows:
            label, score = row.worst
            won = "-"
            if row is not first:
                found = differences(row, first, lambda r: r.by_domain)
                won = f"{sum(fmean(values) > 0 for values in found.values())} of {len(found)}"
            cells.append(
                [
                    row.name,
                    f"{row.mean:.3f}",
                    "-" if row.difference is None else str(row.difference),
                    "-" if row.difference_here is None else str(row.difference_here),
                    won,
                    f"{score:.3f} {label}",
                    f"{row.oracle_mean:.3f}",
                    f"{row.seconds:.1f}",
                ]
            )
        stopped = [
            f"{row.name}: {number} runs ended early, {reason}"
            for row in self.rows
            for reason, number in row.stopped.items()
        ]
        parts = [wrapped(self.setting), aligned(cells), *map(wrapped, stopped), wrapped(self.answer)]
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the curves as plain numbers and text.

        Returns:
            What ``json.dump`` takes.
        """
        rows = [
            {name: vars(value) if isinstance(value, Interval) else value for name, value in vars(row).items()}
            | {"mean": row.mean, "oracle_mean": row.oracle_mean, "worst": row.worst}
            for row in self.rows
        ]
        for row in rows:
            del row["curves"]
        return {"setting": self.setting, "answer": self.answer, "rows": rows}

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the differences to the first method, scores over training, and how well the gradients agree.

        The last is left out if it was not measured, as by another program whose runs these are.

        Args:
            path: Where to save the picture; None not to.

        Returns:
            The figure.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        measured = all(
            "cosine" in point for row in self.rows for c in row.curves.values() for run in c for point in run
        )
        figure = Figure(figsize=(13.5, 1.6 + 0.36 * len(self.rows) + 2.4), dpi=110, layout="constrained")
        forest, curves, *agreement = figure.subplots(1, 2 + measured, width_ratios=(1.5, 1, 1)[: 2 + measured])
        self._draw_differences(forest)
        self._draw_curves(curves)
        for axes in agreement:
            self._draw_agreement(axes)
        if path is not None:
            figure.savefig(path)
        return figure

    def _draw_differences(self, axes: Any) -> None:
        first, *others = self.rows
        for y, row in enumerate(others):
            found = differences(row, first, lambda r: r.by_domain)
            axes.plot(
                [fmean(v) for v in found.values()],
                [y] * len(found),
                "|",
                color="0.6",
                markersize=9,
                markeredgewidth=1.2,
            )
            d = row.difference
            if d is None:
                continue
            colour = OKABE_ITO[2] if d.low > 0 else OKABE_ITO[0] if d.high < 0 else "0.25"
            if math.isfinite(d.low):
                axes.plot([d.low, d.high], [y, y], color=colour, linewidth=2.4, solid_capstyle="butt")
            axes.plot([d.mean], [y], "o", color=colour, markersize=7)
        axes.axvline(0.0, color="0.4", linewidth=1.0)
        axes.set_yticks(range(len(others)), [row.name for row in others])
        axes.set_ylim(len(others) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.25)
        axes.set_xlabel(f"difference to {first.name} on the held-out domain")
        axes.set_title("dot: mean, bar: 95 % interval for another domain, ticks: each domain", fontsize=9)

    def _draw_curves(self, axes: Any) -> None:
        for rank, row in enumerate(self.rows):
            x, y = _mean_curve(row, lambda point: point["held_out"])
            style = "-" if rank < len(OKABE_ITO) else "--"
            axes.plot(x, y, style, color=OKABE_ITO[rank % len(OKABE_ITO)], linewidth=1.6, label=row.name)
        axes.set_xlabel("gradients of one batch")
        axes.set_title("on the held-out domain, selected settings", fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=6)

    def _draw_agreement(self, axes: Any) -> None:
        for rank, row in enumerate(self.rows):
            x, y = _mean_curve(row, lambda point: point["cosine"])
            style = "-" if rank < len(OKABE_ITO) else "--"
            axes.plot(x, y, style, color=OKABE_ITO[rank % len(OKABE_ITO)], linewidth=1.6)
        axes.axhline(0.0, color="0.6", linewidth=1.0, linestyle=":")
        axes.set_xlabel("gradients of one batch")
        axes.set_title("mean cosine of training domains' gradients", fontsize=9)
        axes.grid(alpha=0.25)


def _listed(found: Sequence[tuple[EvidenceRow, Interval]]) -> str:
    return ", ".join(f"{row.name} {d}" for row, d in found)


def _mean_curve(row: EvidenceRow, of: Callable[[Point], float]) -> tuple[list[float], list[float]]:
    """Return positions and mean over runs, as far as all of them have come."""
    curves = [curve for of_domain in row.curves.values() for curve in of_domain]
    length = min(map(len, curves))
    positions = [fmean(curve[k]["gradients"] for curve in curves) for k in range(length)]
    return positions, [fmean(of(curve[k]) for curve in curves) for k in range(length)]
