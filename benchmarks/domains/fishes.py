"""``GradMatchFish`` against DomainBed's own ``Fish``: the same method, so that they should differ by chance only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from torch_gradmatch.evaluation.evidence import Evidence, Interval, differences, interval_of, last
from torch_gradmatch.evaluation.journal import Journal, Key

__all__ = ["FishAgainstFish", "fish_against_fish"]


@dataclass(frozen=True)
class FishAgainstFish:
    """``GradMatchFish`` minus DomainBed's ``Fish``, which should differ as two seeds do, by chance.

    Attributes:
        selected: Of the selected runs, paired by held-out domain and seed: mean over seeds of each domain, and the
            interval over domains.
        selected_here: The same of the mean over domains of each seed.
        same: Of all pairs of runs with the same draw and seed, at their end: the mean of each domain, and the interval
            over domains.
        pairs: How many.
        pairs_interval: Of those as if they were independent, which runs on the same domain are not: too narrow.
    """

    selected: Interval
    selected_here: Interval
    same: Interval
    pairs: int
    pairs_interval: Interval

    def __str__(self) -> str:
        inside = self.selected.low <= 0 <= self.selected.high and self.same.low <= 0 <= self.same.high
        verdict = "as two runs with other minibatches do" if inside else "by more than the interval: look why"
        if math.isinf(self.selected.low):
            verdict = "by what a single held-out domain shows, from which nothing follows"
        return (
            f"GradMatchFish minus DomainBed's Fish on the held-out domain: {self.selected} of selected runs for "
            f"another domain, {self.selected_here} for another seed; {self.same} over {self.pairs} pairs with the "
            "same hyperparameters and seed at the end of training "
            f"({self.pairs_interval} if pairs were independent). They differ {verdict}."
        )


def fish_against_fish(evidence: Evidence, folder: Path) -> FishAgainstFish:
    """Compare the two implementations of Fish.

    Args:
        evidence: What ``mnist.measure`` returned.
        folder: Where it kept the runs.

    Returns:
        The paired differences.

    Raises:
        RuntimeError: If two runs of the same draw do not have the same hyperparameters.
    """
    found = differences(evidence["GradMatchFish"], evidence["Fish"], lambda row: row.by_domain)
    journal = Journal(folder, json.loads((folder / "task.json").read_text()))
    pairs: dict[str, list[float]] = {}
    for held_out in found:
        for draw in takewhile(lambda d: Key("Fish", held_out, d, 0) in journal, count()):  # noqa: B023  used at once
            for seed in range(len(found[held_out])):
                ours, theirs = (Key(name, held_out, draw, seed) for name in ("GradMatchFish", "Fish"))
                if ours in journal and theirs in journal:
                    _check_equal(ours, journal[ours]["settings"], journal[theirs]["settings"])
                    a, b = (last(journal[key]["curve"])["held_out"] for key in (ours, theirs))
                    pairs.setdefault(held_out, []).append(a - b)
    flat = [value for of_domain in pairs.values() for value in of_domain]
    return FishAgainstFish(
        interval_of([fmean(values) for values in found.values()]),
        interval_of([fmean(of_seed) for of_seed in zip(*found.values(), strict=True)]),
        interval_of([fmean(values) for values in pairs.values()]),
        len(flat),
        interval_of(flat),
    )


def _check_equal(key: Key, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for name in ("lr", "meta_lr", "batch_size"):
        if ours[name] != theirs[name]:
            raise RuntimeError(f"{key} has {name}={ours[name]}, and DomainBed's Fish with the same draw {theirs[name]}")
