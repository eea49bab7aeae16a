"""What was found of a data set as a file that a report is made of: everything but the domains' part in each curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from torch_gradmatch import Evidence
from torch_gradmatch.evaluation.evidence import EvidenceRow, Interval, Point

__all__ = ["agreement_of", "evidence_of", "to_stored"]

DIGITS = 5
KEPT = ("gradients", "validation", "held_out", "cosine")


def to_stored(evidence: Evidence) -> dict[str, Any]:
    """Turn an ``Evidence`` into plain numbers and text.

    Args:
        evidence: What was found.

    Returns:
        What ``json.dump`` takes; numbers in curves are rounded.
    """
    stored = evidence.to_dict()
    for row, plain in zip(evidence.rows, stored["rows"], strict=True):
        plain["curves"] = {
            label: [[_kept(point) for point in curve] for curve in curves] for label, curves in row.curves.items()
        }
        plain["agreement_by_domain"] = _agreement_by_domain(row)
    return stored


def _kept(point: Point) -> Point:
    return {name: round(point[name], DIGITS) for name in KEPT if name in point}


def _agreement_by_domain(row: EvidenceRow) -> dict[str, tuple[list[float], list[float]]]:
    """Return over training, for each domain, the mean over runs of how well it agrees with the rest."""
    curves = [curve for of_domain in row.curves.values() for curve in of_domain]
    found: dict[str, tuple[list[float], list[float]]] = {}
    for position in range(max(map(len, curves))):
        points = [curve[position] for curve in curves if position < len(curve)]
        measured = [point for point in points if "agreement_with_rest" in point]
        for domain in sorted({domain for point in measured for domain in point["agreement_with_rest"]}):
            values = [p["agreement_with_rest"][domain] for p in measured if domain in p["agreement_with_rest"]]
            values = [value for value in values if value == value]
            if values:
                gradients, agreements = found.setdefault(domain, ([], []))
                gradients.append(round(fmean(point["gradients"] for point in measured), 1))
                agreements.append(round(fmean(values), DIGITS))
    return found


def evidence_of(stored: Mapping[str, Any]) -> Evidence:
    """Turn what was stored into an ``Evidence`` again, as far as it was kept.

    Args:
        stored: What :func:`to_stored` returned, or a file of it.

    Returns:
        The evidence.
    """
    rows = []
    for plain in stored["rows"]:
        fields = {name: plain[name] for name in EvidenceRow.__dataclass_fields__}
        for name in ("difference", "difference_here", "oracle_difference"):
            fields[name] = None if fields[name] is None else Interval(**fields[name])
        rows.append(EvidenceRow(**fields))
    return Evidence(stored["setting"], rows)


def agreement_of(row: EvidenceRow, positions: Sequence[int]) -> list[float | None]:
    """Return the mean cosine of the training domains' gradients at some evaluations.

    Args:
        row: The method.
        positions: Of the evaluations, 0 for the beginning, -1 for the last.

    Returns:
        The mean over runs for each; None where it was not measured.
    """
    curves = [curve for of_domain in row.curves.values() for curve in of_domain]
    found: list[float | None] = []
    for position in positions:
        points = [curve[position] for curve in curves if len(curve) > max(position, 0)]
        measured = [point["cosine"] for point in points if "cosine" in point]
        found.append(fmean(measured) if measured else None)
    return found
