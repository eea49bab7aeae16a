"""How much is trained for each data set, and the calls of ``leave_one_domain_out`` that do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.domains import heart, names, vowels, watch
from benchmarks.domains.source import Loaded, Source, accuracy, cross_entropy
from torch_gradmatch import Evidence, leave_one_domain_out
from torch_gradmatch.evaluation.recipes import LogUniform, default_recipes

__all__ = ["DEFAULT", "FULL", "METHODS", "QUICK", "SEARCH", "SOURCES", "Protocol", "held_out", "measure", "time_alone"]

SOURCES: dict[str, Source] = {module.SOURCE.name: module.SOURCE for module in (watch, vowels, heart, names)}
# Without "SmoothFish, symmetric", whose three passes over a domain leave it a third of the steps; --full has it.
METHODS = tuple(name for name in default_recipes() if name != "SmoothFish, symmetric")
# Wider and higher than the default: runs are short, and methods with one step for S gradients need a longer step.
SEARCH = {"lr": LogUniform(1e-3, 3e-2, 5e-3)}


@dataclass(frozen=True)
class Protocol:
    """How much is trained for a data set.

    Attributes:
        budget: Gradients of one batch in a run.
        every: 2 to hold out every second domain, in the order of the labels; the others are trained on always.
        domains_per_step: S; None for all that are trained on.
        draws: Of hyperparameters.
        seeds: How many.
        evaluations: In a run, beside its beginning.
        methods: Names of :func:`~torch_gradmatch.evaluation.recipes.default_recipes`.
    """

    budget: int
    every: int = 1
    domains_per_step: int | None = 4
    draws: int = 8
    seeds: int = 5
    evaluations: int = 5
    methods: tuple[str, ...] = METHODS


DEFAULT = {
    "watch": Protocol(800, every=2),
    "vowels": Protocol(1000, every=3),
    "heart": Protocol(600, domains_per_step=None),
    "names": Protocol(600, every=6),
}
_FEW = ("ERM", "ERM, domains in turn", "Fish", "SmoothFish", "IDGM, cosine")
QUICK = {
    name: replace(protocol, budget=protocol.budget // 2, draws=2, seeds=2, methods=_FEW)
    for name, protocol in DEFAULT.items()
}
FULL = {
    name: replace(
        protocol,
        budget=5 * protocol.budget,
        every=1,
        draws=20,
        seeds=10,
        evaluations=10,
        methods=tuple(default_recipes()),
    )
    for name, protocol in DEFAULT.items()
}


def held_out(protocol: Protocol, loaded: Loaded) -> list[str]:
    """Return which domains are held out: a rule that does not know what comes of it.

    Args:
        protocol: How much is trained.
        loaded: The samples.

    Returns:
        The labels, numbers in them in the order of numbers.
    """
    return sorted(loaded.sizes(), key=_natural)[:: protocol.every]


def _natural(label: str) -> tuple[str, int]:
    """Sort "person 10" after "person 9"."""
    word, _, number = label.rpartition(" ")
    return (word, int(number)) if number.isdigit() else (label, 0)


def measure(
    source: Source,
    protocol: Protocol,
    loaded: Loaded,
    folder: Path | None,
    processes: int,
    methods: Sequence[str] | None = None,
    *,
    show: bool = True,
    **instead: Any,
) -> Evidence:
    """Train and compare on one data set, or go on where it was broken off.

    Args:
        source: The data set.
        protocol: How much is trained.
        loaded: Its samples.
        folder: Keeps every run, a line of JSON each; None to keep nothing.
        processes: How many runs at a time.
        methods: Instead of the protocol's.
        show: Whether to show the progress.
        instead: Arguments of ``leave_one_domain_out`` instead of the protocol's.

    Returns:
        What was found.
    """
    arguments: dict[str, Any] = {
        "seeds": protocol.seeds,
        "budget": protocol.budget,
        "draws": protocol.draws,
        "search": SEARCH,
        "domains_per_step": protocol.domains_per_step,
        "held_out": held_out(protocol, loaded),
        "evaluations": protocol.evaluations,
        "folder": folder,
        "processes": processes,
        "show": show,
    }
    return leave_one_domain_out(
        source.make_model,
        loaded.dataset(),
        loaded.domains,
        cross_entropy,
        accuracy,
        protocol.methods if methods is None else methods,
        **arguments | instead,
    )


def time_alone(source: Source, protocol: Protocol, loaded: Loaded, repeats: int = 3) -> dict[str, float]:
    """Time one run by each method with the default settings, one after the other, with nothing beside it.

    Args:
        source: The data set.
        protocol: How much is trained.
        loaded: Its samples.
        repeats: How often; methods take turns.

    Returns:
        Median seconds of training by the method's name, on one thread, without measuring.
    """
    only = {"draws": 1, "seeds": 1, "held_out": held_out(protocol, loaded)[:1], "evaluations": 1}
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for row in measure(source, protocol, loaded, None, 1, show=False, **only).rows:
            found.setdefault(row.name, []).append(row.seconds)
    return {name: median(seconds) for name, seconds in found.items()}
