"""Rows as text."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

__all__ = ["aligned", "wrapped"]


def wrapped(text: str) -> str:
    """Break a paragraph into lines of at most 110 characters."""
    return fill(text, width=110, break_on_hyphens=False)


def aligned(cells: Sequence[Sequence[str]]) -> str:
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
