"""The runs of ``leave_one_domain_out``: which there are, carrying them out, and the rows that they make."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from joblib import Parallel, delayed
from torch import nn
from tqdm import tqdm

from torch_gradmatch.evaluation.evidence import AVERAGED as SUFFIX
from torch_gradmatch.evaluation.evidence import EvidenceRow
from torch_gradmatch.evaluation.journal import Journal, Key
from torch_gradmatch.evaluation.recipes import Choice, LogUniform, Recipe, Settings, draw_settings
from torch_gradmatch.evaluation.task import Task
from torch_gradmatch.evaluation.training import AVERAGED, PLAIN, Run, train

__all__ = ["Study", "comparable"]


@dataclass
class Study:
    """Runs by key, the draw of hyperparameters with the first seed and the draws selected with all seeds.

    Attributes:
        task: What is to be learned.
        recipes: By name.
        ranges: Of each recipe's hyperparameters.
        described: What each recipe is, for the journal.
        journal: Has the runs.
        held: The domains to hold out, by their labels as text.
        draws: How many draws.
        seeds: How many seeds.
        processes: How many runs at a time.
        show: Whether to show a bar.
    """

    task: Task
    recipes: Mapping[str, Recipe]
    ranges: Mapping[str, Mapping[str, LogUniform | Choice]]
    described: Mapping[str, str]
    journal: Journal
    held: Mapping[str, Any]
    draws: int
    seeds: int
    processes: int
    show: bool

    def run(self) -> list[EvidenceRow]:
        """Carry out what the journal does not have.

        Returns:
            The rows.

        Raises:
            KeyboardInterrupt: If it was broken off; it says what is kept and how to go on.
        """
        first = [Key(m, h, d, 0) for h in self.held for d in range(self.draws) for m in self.recipes]
        again = len(self.held) * len(self.recipes) * (self.seeds - 1)  # if weights and average select alike
        bar = tqdm(
            total=len(first) + again, unit="run", disable=not self.show, mininterval=0.1 if sys.stderr.isatty() else 30
        )
        try:
            with bar:
                self._carry_out(first, bar)
                chosen = {(m, k, h): self.select(m, k, h) for m, k in self.kinds().values() for h in self.held}
                later = dict.fromkeys(
                    Key(m, h, draw, seed) for (m, _, h), draw in chosen.items() for seed in range(1, self.seeds)
                )
                bar.total = len(first) + len(later)
                self._carry_out(list(later), bar)
        except KeyboardInterrupt:
            number = "1 run is" if len(self.journal) == 1 else f"{len(self.journal)} runs are"
            kept = f"{number} kept in the folder: the same call goes on from there"
            lost = "nothing is kept: pass folder= to go on from where it was"
            raise KeyboardInterrupt(lost if self.journal.path is None else kept) from None
        return [self._row(name, method, kind, chosen) for name, (method, kind) in self.kinds().items()]

    def kinds(self) -> dict[str, tuple[str, str]]:
        """Return the rows: by name the recipe, and whether its weights or their average."""
        found = {}
        for m in self.recipes:
            found[m] = (m, PLAIN)
            if any(self.journal[Key(m, h, d, 0)][AVERAGED] for h in self.held for d in range(self.draws)):
                found[m + SUFFIX] = (m, AVERAGED)
        return found

    def select(self, method: str, kind: str, held_out: str) -> int:
        """Return the draw that is best on the validation parts of the training domains; of equal ones the first."""
        validation = [score["validation"] for score in self._scores(method, kind, held_out)]
        return validation.index(max(validation))

    def refit(self, name: str) -> tuple[nn.Module, Settings]:
        """Carry out ``Evidence.refit``.

        Args:
            name: Of the row.

        Returns:
            Model and settings.

        Raises:
            RuntimeError: If the run diverged.
        """
        method, kind = self.kinds()[name]
        by_fold = [[score["validation"] for score in self._scores(method, kind, h)] for h in self.held]
        means = [fmean(of_draw) for of_draw in zip(*by_fold, strict=True)]
        settings = draw_settings(self.ranges[method], means.index(max(means)), 0)
        run, training = train(self.task, self.recipes[method], settings, None, 0)
        if run["stopped"] is not None:
            raise RuntimeError(f"training on all domains diverged: {run['stopped']}")
        return training.load(kind if run[kind] else PLAIN).eval(), settings

    def _carry_out(self, keys: Sequence[Key], bar: Any) -> None:
        settings = {key: draw_settings(self.ranges[key.method], key.draw, 0) for key in keys}
        expected = {k: {"settings": settings[k], "by": self.described[k.method]} for k in keys}
        missing = [key for key in keys if not self.journal.has(key, expected[key])]
        bar.update(len(keys) - len(missing))
        parallel = Parallel(max(1, min(self.processes, len(missing))), return_as="generator_unordered")
        for key, run in parallel(
            delayed(_run)(key, self.task, self.recipes[key.method], settings[key], self.held[key.held_out])
            for key in missing
        ):
            self.journal.add(key, expected[key] | run)
            spent = run["measuring"] / max(run["measuring"] + run["seconds"], 1e-9)
            bar.set_postfix_str(f"{key.method}, held out: {key.held_out}, {spent:.0%} measuring", refresh=False)
            bar.update()

    def _row(self, name: str, method: str, kind: str, chosen: Mapping[tuple[str, str, str], int]) -> EvidenceRow:
        runs = {
            h: [self.journal[Key(method, h, chosen[method, kind, h], seed)] for seed in range(self.seeds)]
            for h in self.held
        }
        scores = {h: [_of(run, kind) for run in of_domain] for h, of_domain in runs.items()}
        every = [run for of_domain in runs.values() for run in of_domain]
        kept = {h: [score.get("predictions") for score in of_domain] for h, of_domain in scores.items()}
        return EvidenceRow(
            name,
            {h: [score["held_out"] for score in of_domain] for h, of_domain in scores.items()},
            {h: of_domain[0]["settings"] for h, of_domain in runs.items()},
            fmean(max(score["held_out"] for score in self._scores(method, kind, h)) for h in self.held),
            median(run["seconds"] for run in every),
            dict(Counter(run["stopped"] for run in every if run["stopped"] is not None)),
            kept if self.task.predictions else {},
        )

    def _scores(self, method: str, kind: str, held_out: str) -> list[Run]:
        """Return the scores of every draw with the first seed."""
        return [_of(self.journal[Key(method, held_out, draw, 0)], kind) for draw in range(self.draws)]


def comparable(rows: Sequence[EvidenceRow]) -> tuple[list[EvidenceRow], dict[str, str]]:
    """Leave out the rows whose metric is not finite somewhere.

    Args:
        rows: All rows.

    Returns:
        The others; and by name, why some are left out.

    Raises:
        ValueError: If the first is such a row, with which all are compared.
    """
    left_out = {}
    for row in rows:
        where = [label for label, values in row.by_domain.items() if not all(map(math.isfinite, values))]
        if where:
            left_out[row.name] = f"its metric is not finite on {' and '.join(map(repr, where))}"
    if rows[0].name in left_out:
        raise ValueError(
            f"{rows[0].name} cannot be compared with: {left_out[rows[0].name]}. Pass a metric that is finite whatever "
            "the outputs are, or leave that domain out by held_out="
        )
    return [row for row in rows if row.name not in left_out], left_out


def _run(key: Key, task: Task, recipe: Recipe, settings: Settings, held_out: Any) -> tuple[Key, Run]:
    return key, train(task, recipe, settings, held_out, key.seed)[0]


def _of(run: Run, kind: str) -> Run:
    """Return a run's scores; one that diverged before its weights were averaged counts with these."""
    found: Run = run[kind] or run[PLAIN]
    return found
