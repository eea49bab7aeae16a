"""What matching by itself does: methods beside ordinary training that has taken as many steps of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from torch_gradmatch import Evidence
from torch_gradmatch.evaluation.evidence import Interval, Point, interval_of

__all__ = ["REFERENCE", "SHARES", "accuracy_at", "same_steps"]

REFERENCE = "ERM, mean over domains"
# Of the reference's gradients, after which it has taken as many steps as the method at its end: a step takes S of them,
# of IDGM S and as many Hessian-vector products.
SHARES = {"SmoothFish": 1.0, "IDGM, variance": 0.5, "IDGM, inner product": 0.5, "IDGM, cosine": 0.5}


def accuracy_at(curve: Sequence[Point], gradients: float) -> float:
    """Return the accuracy on the held-out domain at some moment of a run.

    Args:
        curve: Of the run, at least one point, in the order of training.
        gradients: The moment; at most the last one's.

    Returns:
        That of the point there, or else on the line between the two points beside it.

    Raises:
        ValueError: If the run has no such moment.
    """
    for before, after in zip(curve, [*curve[1:], curve[-1]], strict=True):
        first, second = before["gradients"], after["gradients"]
        if gradients == first:
            return float(before["held_out"])
        if first < gradients < second:
            return float(
                before["held_out"] + (after["held_out"] - before["held_out"]) * (gradients - first) / (second - first)
            )
    raise ValueError(
        f"gradients should be between those of the run's first and last point, {curve[0]['gradients']} and "
        f"{curve[-1]['gradients']} (got {gradients})"
    )


def same_steps(evidence: Evidence) -> dict[str, Interval]:
    """Compare methods at their end with ordinary training on the mean over domains after as many steps.

    Runs are those with the selected hyperparameters; no moment is selected. A run that ended early, of either, counts
    as far as it came.

    Args:
        evidence: What was found.

    Returns:
        For each method that is there: its accuracy on the held-out domain minus the reference's, the mean over seeds
        of each held-out domain, and the interval over these. Empty where the reference is not there.
    """
    rows = {row.name: row for row in evidence.rows}
    if REFERENCE not in rows:
        return {}
    reference = rows[REFERENCE].curves
    budget = max(curve[-1]["gradients"] for curves in reference.values() for curve in curves)
    found = {}
    for name, share in SHARES.items():
        if name not in rows:
            continue
        differences = []
        for label, curves in rows[name].curves.items():
            ends = [float(curve[-1]["held_out"]) for curve in curves]
            beside = [accuracy_at(c, min(share * budget, c[-1]["gradients"])) for c in reference[label]]
            differences.append(fmean(ends) - fmean(beside))
        found[name] = interval_of(differences)
    return found
