"""Rows as text: tables of costs and fidelities, and what failed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median, quantiles
from textwrap import fill

from torch_gradmatch.evaluation.cost import ERM
from torch_gradmatch.evaluation.rows import Row

__all__ = ["aligned", "cost_table", "failures", "fidelity_table", "megabytes", "wrapped"]


def wrapped(text: str) -> str:
    """Break a paragraph into lines.

    Args:
        text: The paragraph.

    Returns:
        Lines of at most 110 characters.
    """
    return fill(text, width=110, break_on_hyphens=False)


def aligned(cells: list[list[str]]) -> str:
    """Lay a table out.

    Args:
        cells: The heading and the rows, all of one length.

    Returns:
        The first column to the left, the others to the right, a line below the heading.

    Example:
        >>> print(aligned([["method", "ms"], ["Fish", "12.5"]]))
        method    ms
        ------------
        Fish    12.5
    """
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def megabytes(size: int | None) -> str:
    """Return a number of bytes in megabytes.

    Args:
        size: The number, or None where the system does not tell.

    Returns:
        The text.
    """
    return "-" if size is None else f"{size / 1e6:.1f}"


def _spread(values: Sequence[float]) -> str:
    """Return median and quartiles, or one number where they are the same."""
    low, middle, high = (
        f"{q:.2f}" for q in quantiles(values if len(values) > 1 else 2 * list(values), method="inclusive")
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def cost_table(rows: Sequence[Row]) -> str:
    """Lay out what was measured of time and memory.

    Args:
        rows: ERM's, and those of the methods.

    Returns:
        The table.
    """
    cells = [["method", "ms", "time / ERM", "evaluations", "per evaluation / ERM", "peak MB"]]
    of_erm = next(row.cost.evaluations for row in rows if row.name == ERM and row.cost)
    for row in rows:
        if row.cost is not None:
            cost = row.cost
            each = [ratio * of_erm / cost.evaluations for ratio in cost.of_erm]
            time, peak = f"{median(cost.seconds) * 1e3:.1f}", megabytes(cost.peak_bytes)
            cells.append([row.name, time, _spread(cost.of_erm), str(cost.evaluations), f"{median(each):.2f}", peak])
    return aligned(cells)


def fidelity_table(rows: Sequence[Row]) -> str:
    """Lay out how near the methods come to exact.

    Args:
        rows: Those of the methods.

    Returns:
        The table.
    """
    cells = [["method", "agreement", "cosine, single", "of mean", "gamma", "error", "strength"]]
    for row in rows:
        found = row.fidelity
        if found is None:
            continue
        figures = [_spread(found.cosines), f"{found.cosine:.3f}", f"{found.gamma:.3g}", f"{found.relative_error:.1g}"]
        if not found.resolved:
            figures = ["lost in rounding", "-", "-", "-"]
        cells.append([row.name, found.agreement, *figures, f"{found.strength:.2g}"])
    return aligned(cells)


def failures(rows: Sequence[Row]) -> list[str]:
    """Say what failed, and why; what failed alike in one sentence.

    Args:
        rows: Those of the methods.

    Returns:
        One paragraph for each reason.

    Example:
        >>> rows = [Row(name, name, None, None, "it is 3.5") for name in ("Fish", "IDGM")]
        >>> failures([*rows, Row("mine", "mine", None, None, None)])
        ['Fish and IDGM failed: it is 3.5']
        >>> failures(rows)
        ['Every method failed: it is 3.5']
    """
    alike: dict[str, list[Row]] = {}
    for row in rows:
        if row.error is not None:
            alike.setdefault(re.sub(r"\d[\d.e+-]*", "#", row.error), []).append(row)
    said = []
    for group in alike.values():
        names = [row.name for row in group]
        who = "; ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]
        if len(group) > 1 and len(group) == sum(row.name != ERM for row in rows):
            who = "Every method"
        same = len({row.error for row in group}) == 1
        said.append(wrapped(f"{who} failed: {group[0].error}{'' if same else ' (The others with other figures.)'}"))
    return said
