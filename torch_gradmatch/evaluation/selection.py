"""From runs to rows: which hyperparameters are selected, and what they reach on the held-out domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from torch_gradmatch.evaluation.evidence import EvidenceRow, Point, best, differences, interval_of, last
from torch_gradmatch.evaluation.journal import Journal, Key

__all__ = ["rows_of", "select"]


def select(journal: Journal, method: str, held_out: str, draws: int) -> tuple[int, int]:
    """Select hyperparameters by the runs with the first seed.

    Args:
        journal: Has those runs.
        method: The method's name.
        held_out: The label of the domain that was held out, as text.
        draws: How many there are.

    Returns:
        The draw that is best on the validation parts of the training domains, and the one that is best on the held-out
        domain; of equal ones the first.
    """
    curves = [journal[Key(method, held_out, draw, 0)]["curve"] for draw in range(draws)]

    def first_best(values: Sequence[float]) -> int:
        return max(range(draws), key=lambda draw: -float("inf") if values[draw] != values[draw] else values[draw])

    chosen = first_best([best(curve)["validation"] for curve in curves])
    return chosen, first_best([last(curve)["held_out"] for curve in curves])


def rows_of(
    journal: Journal,
    chosen: Mapping[tuple[str, str], tuple[int, int]],
    methods: Sequence[str],
    held: Sequence[str],
    seeds: int,
) -> list[EvidenceRow]:
    """Make the rows of an ``Evidence``.

    Args:
        journal: Has the runs of both selected draws with all seeds.
        chosen: What :func:`select` returned, by method and held-out domain.
        methods: In the order of the rows; the others are compared to the first.
        held: The held-out domains.
        seeds: How many; they are 0, 1, and so on.

    Returns:
        A row for each method.
    """
    rows: list[EvidenceRow] = []
    for method in methods:
        curves: dict[str, list[list[Point]]] = {}
        oracle: dict[str, list[float]] = {}
        stopped: dict[str, int] = {}
        seconds = []
        for h in held:
            selected, by_oracle = chosen[method, h]
            runs = [journal[Key(method, h, selected, seed)] for seed in range(seeds)]
            curves[h] = [run["curve"] for run in runs]
            oracle[h] = [last(journal[Key(method, h, by_oracle, s)]["curve"])["held_out"] for s in range(seeds)]
            seconds += [run["seconds"] for run in runs]
            for run in runs:
                if run["stopped"] is not None:
                    stopped[run["stopped"]] = stopped.get(run["stopped"], 0) + 1
        row = EvidenceRow(
            method,
            {h: [best(curve)["held_out"] for curve in of_domain] for h, of_domain in curves.items()},
            oracle,
            {h: journal[Key(method, h, chosen[method, h][0], 0)]["settings"] for h in held},
            fmean(seconds),
            curves,
            stopped,
        )
        rows.append(row if not rows else _with_differences(row, rows[0]))
    return rows


def _with_differences(row: EvidenceRow, first: EvidenceRow) -> EvidenceRow:
    found = differences(row, first, lambda r: r.by_domain)
    oracle = differences(row, first, lambda r: r.oracle_by_domain)
    return replace(
        row,
        difference=interval_of([fmean(values) for values in found.values()]),
        difference_here=interval_of([fmean(of_seed) for of_seed in zip(*found.values(), strict=True)]),
        oracle_difference=interval_of([fmean(values) for values in oracle.values()]),
    )
