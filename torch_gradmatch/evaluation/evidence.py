"""What ``leave_one_domain_out`` found: rows, an answer in words, tables for other programs, a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from torch import nn

from torch_gradmatch.evaluation.statistics import LEVEL, Interval, holm, interval_of, power
from torch_gradmatch.evaluation.tables import aligned, wrapped

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Difference", "Evidence", "EvidenceRow", "difference"]

AVERAGED = ", averaged"  # after a recipe's name
POOLED, BALANCED = "ERM", "ERM, balanced"
POINTS = (0.01, 0.03)
GREEN = "#009E73"  # Okabe and Ito's, which colour-blind readers can tell from the others'


@dataclass(frozen=True)
class EvidenceRow:
    """What was found of one recipe, by its weights or by their average.

    Attributes:
        name: Its name; with ``", averaged"`` for averaged weights.
        by_domain: Of each held-out domain, by its label as text: the metric there for each seed. Hyperparameters and
            moment of training are those that are best on the validation parts of the training domains.
        settings: Of each held-out domain: the hyperparameters selected.
        oracle: Mean over held-out domains with the first seed, if the hyperparameters were those that are best on the
            held-out domain itself: what nobody can have who does not know it.
        seconds: Of training, median over runs, without measuring and averaging.
        stopped: What ended selected runs early, and how often.
        predictions: Of each held-out domain and seed, outputs and targets as lists, if they were asked for.
    """

    name: str
    by_domain: dict[str, list[float]]
    settings: dict[str, dict[str, Any]]
    oracle: float
    seconds: float
    stopped: dict[str, int]
    predictions: dict[str, list[Any]] = field(default_factory=dict, repr=False)

    @property
    def mean(self) -> float:
        """Mean of the metric over held-out domains and seeds."""
        return fmean(fmean(values) for values in self.by_domain.values())

    @property
    def worst(self) -> tuple[str, float]:
        """The held-out domain where the mean over seeds is least, and that mean."""
        return min(((label, fmean(values)) for label, values in self.by_domain.items()), key=lambda pair: pair[1])


@dataclass(frozen=True)
class Difference:
    """Paired differences of one row to another.

    Attributes:
        by_domain: Mean over seeds, by held-out domain.
        domains: Of these: the interval is for another domain like these.
        seeds: Of the mean over domains of each seed: the interval is for these domains and another seed.
        p: The larger of both p-values.
        corrected: It, corrected for the number of rows by Holm's method.
    """

    by_domain: dict[str, float]
    domains: Interval
    seeds: Interval
    p: float
    corrected: float

    @property
    def is_better(self) -> bool:
        """Whether it is more than chance, for another domain and for another seed, after the correction."""
        return self.domains.mean > 0 and self.corrected < LEVEL

    def lacks(self) -> str:
        """Say why it is not better."""
        both = {"domain": self.domains, "seed": self.seeds}
        failed = [f"for another {what} its interval {d} includes 0" for what, d in both.items() if not d.low > 0]
        return " and ".join(failed) or f"p = {self.p:.2g} alone, {self.corrected:.2g} after Holm's correction"


def difference(row: EvidenceRow, other: EvidenceRow) -> Difference:
    """Return the paired difference of two rows, without a correction."""
    paired = {d: [a - b for a, b in zip(v, other.by_domain[d], strict=True)] for d, v in row.by_domain.items()}
    by_domain = {label: fmean(values) for label, values in paired.items()}
    domains = interval_of(list(by_domain.values()))
    seeds = interval_of([fmean(of_seed) for of_seed in zip(*paired.values(), strict=True)])
    p = max(domains.p, seeds.p)
    return Difference(by_domain, domains, seeds, p, p)


@dataclass(frozen=True)
class Evidence:
    """What :func:`~torch_gradmatch.leave_one_domain_out` found. Prints as a table and an answer.

    Attributes:
        setting: Data and protocol in words.
        rows: Two for each recipe that was averaged, or one; the others are compared to the first.
        left_out: By name, why a recipe could not be tried or a row not be compared.
        permuted: Whether the domains were permuted: a control, where there is nothing to find.
    """

    setting: str
    rows: list[EvidenceRow]
    left_out: dict[str, str] = field(default_factory=dict)
    permuted: bool = False
    _refit: Callable[[str], tuple[nn.Module, dict[str, Any]]] | None = field(default=None, repr=False, compare=False)

    def __getitem__(self, name: str) -> EvidenceRow:
        """Return the row of that name.

        Raises:
            KeyError: If there is none.
        """
        return {row.name: row for row in self.rows}[name]

    @property
    def differences(self) -> dict[str, Difference]:
        """Of all rows but the first to the first, by name."""
        first, *others = self.rows
        found = {row.name: difference(row, first) for row in others}
        corrected = holm([d.p for d in found.values()])
        return {name: replace(d, corrected=p) for (name, d), p in zip(found.items(), corrected, strict=True)}

    @property
    def best(self) -> str:
        """Name of the row to use, the best mean of those that are better than the first, or else the first."""
        better = [name for name, d in self.differences.items() if d.is_better]
        return max(better, key=lambda name: self[name].mean) if better else self.rows[0].name

    def power(self, difference: float) -> float:
        """Return how likely this study tells a true difference from 0: the median over its rows.

        Args:
            difference: In the metric's units.

        Returns:
            The probability that both intervals leave 0 out, taken as the smaller of the two, at the level of Holm's
            first step.
        """
        found = self.differences
        return median(min(power(difference, i, len(found)) for i in (d.domains, d.seeds)) for d in found.values())

    @property
    def answer(self) -> str:
        """What to use, what it costs, and how far this study could see. In sentences."""
        first, found, name = self.rows[0], self.differences, self.best
        left = [f"{name} was left out: {reason}." for name, reason in self.left_out.items()]
        if not found:
            return " ".join([f"There is nothing to compare {first.name} with.", *left])
        many = f"after Holm's correction for {len(found)} comparisons" if len(found) > 1 else "in one comparison"
        nearest = max(found, key=lambda n: found[n].domains.mean)
        if name != first.name:
            d = found[name]
            times = self[name].seconds / max(first.seconds, 1e-9)
            copy = ", averaging aside, and a copy of the parameters" if name.endswith(AVERAGED) else ""
            said = [f"Yes. Use {name}: {d.domains.mean:+.3f} over {first.name}, {d.domains.ends} for another domain,"]
            said += [f"{d.seeds.ends} for another seed, p = {d.corrected:.2g} {many}."]
            said += [f"It takes {times:.1f} times the seconds of {first.name} for as many samples{copy}."]
            said += _listed("Also better", {n: d for n, d in found.items() if d.is_better and n != name})
        else:
            said = [f"No. Use {first.name}: nothing is better than it for another domain and for another seed, {many}."]
            if found[nearest].domains.mean > 0:
                said += [f"The best mean has {nearest}, {found[nearest].domains.mean:+.3f}; {found[nearest].lacks()}."]
            else:
                said += ["No other has a better mean."]
        if first.name == POOLED and BALANCED in found:
            said += [f"The sampler alone ({BALANCED}): {found[BALANCED].domains}."]
        said += _listed("Worse", {n: d for n, d in found.items() if d.domains.mean < 0 and d.corrected < LEVEL})
        seen = " and ".join(f"of {points:g} in {self.power(points):.0%}" for points in POINTS)
        said += [f"With the spread found, such a study sees a true difference {seen} of cases.", *left]
        if self.permuted:
            said = ["Control: the domains are permuted, so that there is nothing to find.", *said]
        return " ".join(said)

    def __str__(self) -> str:
        first, found = self.rows[0], self.differences
        cells = [["method", "unseen", f"over {first.name}, for another domain", "for another seed", "p (Holm)"]]
        cells[0] += ["worst domain", "oracle", "seconds"]
        for row in self.rows:
            d = found.get(row.name)
            compared = ["-"] * 3 if d is None else [str(d.domains), str(d.seeds), f"{d.corrected:.2g}"]
            label, score = row.worst
            figures = [f"{score:.3f} {label}", f"{row.oracle:.3f}", f"{row.seconds:.1f}"]
            cells.append([row.name, f"{row.mean:.3f}", *compared, *figures])
        stopped = [f"{r.name}: {n} runs ended early, {why}" for r in self.rows for why, n in r.stopped.items()]
        return "\n\n".join([wrapped(self.setting), aligned(cells), *map(wrapped, stopped), wrapped(self.answer)])

    def refit(self, name: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
        """Train on all domains with the settings found.

        The settings are the draw whose validation is best in the mean over all folds. A part of every domain is kept
        to select the moment by, as in the study.

        Args:
            name: Of a row; :attr:`best` if left out.

        Returns:
            The model, with averaged weights if it is a row of such, in evaluation mode; and the settings.

        Raises:
            KeyError: If there is no such row.
            RuntimeError: If the evidence was read from a file and knows neither model nor samples, or the run diverged.
        """
        if self._refit is None:
            raise RuntimeError("evidence from a file knows neither model nor samples: call leave_one_domain_out again")
        return self._refit(self[self.best if name is None else name].name)

    def to_frame(self) -> pd.DataFrame:
        """Return a table with a line for each row, held-out domain and seed.

        Returns:
            A ``pandas.DataFrame``: ``method``, ``domain``, ``seed``, ``score``, and a column for each setting.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        import pandas as pd

        return pd.DataFrame([
            {"method": row.name, "domain": label, "seed": seed, "score": score, **row.settings[label]}
            for row in self.rows
            for label, scores in row.by_domain.items()
            for seed, score in enumerate(scores)
        ])  # fmt: skip

    def to_json(self, path: str | Path | None = None) -> str:
        """Return everything as JSON, with the differences and the answer for other programs.

        Args:
            path: Where to write it, too; None not to.

        Returns:
            The text.
        """
        names = ("setting", "rows", "left_out", "permuted", "differences", "answer")
        text = json.dumps({name: getattr(self, name) for name in names}, indent=1, default=asdict) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, text: str) -> Evidence:
        """Return evidence from what :meth:`to_json` returned; it cannot be refitted."""
        content = json.loads(text)
        rows = [EvidenceRow(**row) for row in content["rows"]]
        return cls(content["setting"], rows, content["left_out"], content["permuted"])

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the differences to the first row, for the width of a page.

        Args:
            path: Where to save the picture; None not to.

        Returns:
            The figure, with a dot for the mean, a thick bar for another domain, a thin one for another seed and a tick
            for each held-out domain. Intervals are before the correction; green is what is better after it.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        found = self.differences
        figure = Figure(figsize=(7, 1.3 + 0.34 * max(1, len(found))), dpi=150, layout="constrained")
        axes = figure.subplots()
        for y, d in enumerate(found.values()):
            colour = GREEN if d.is_better else "0.25"
            axes.plot(list(d.by_domain.values()), [y] * len(d.by_domain), "|", color="0.6", markersize=8)
            for interval, shift, width in ((d.domains, 0.0, 2.6), (d.seeds, 0.22, 1.1)):
                if math.isfinite(interval.low):
                    axes.plot([interval.low, interval.high], [y + shift] * 2, color=colour, linewidth=width)
            axes.plot([d.domains.mean], [y], "o", color=colour, markersize=6)
        axes.axvline(0.0, color="0.4", linewidth=1.0)
        axes.set_yticks(range(len(found)), list(found))
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.25)
        figure.supxlabel(f"difference to {self.rows[0].name} on the held-out domain", fontsize=10)
        figure.suptitle("thick: 95 % for another domain, thin: for another seed, ticks: domains", fontsize=9)
        if path is not None:
            figure.savefig(path)
        return figure


def _listed(what: str, found: Mapping[str, Difference]) -> list[str]:
    shown = ", ".join(f"{name} {d.domains.mean:+.3f}" for name, d in found.items())
    return [f"{what}: {shown}."] if found else []
