"""What ``compare`` notes of each method."""

from __future__ import annotations

from dataclasses import dataclass

from torch_gradmatch.evaluation.cost import Cost
from torch_gradmatch.evaluation.fidelity import Fidelity

__all__ = ["OTHER_RATES", "Row", "at_other_rate"]

OTHER_RATES = (0.1, 10.0)  # of the inner learning rate, at which Fish's fidelity is measured, too


@dataclass(frozen=True)
class Row:
    """What was measured of one method.

    Attributes:
        name: What it is called in the table.
        method: The method with its settings, or ``"ERM"``.
        cost: Its cost, or None if it failed.
        fidelity: How near it comes to the exact objective; None if it failed or there is nothing to compare.
        error: Why it failed, or None.
    """

    name: str
    method: str
    cost: Cost | None
    fidelity: Fidelity | None
    error: str | None


def at_other_rate(name: str, factor: float) -> str:
    """Name the row of a method at another inner learning rate.

    Args:
        name: Of the method.
        factor: Multiplies the rate.

    Returns:
        The name.

    Example:
        >>> at_other_rate("Fish", 0.1)
        'Fish, lr x 0.1'
    """
    return f"{name}, lr x {factor:g}"
