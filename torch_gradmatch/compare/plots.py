"""Pictures of what was measured over training. Imports matplotlib only where it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["OKABE_ITO", "plot_alignment"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
OKABE_ITO = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")


def plot_alignment(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    axes: Axes,
    *,
    quantity: str = "inner product",
    colours: Sequence[str] = OKABE_ITO,
    smoothing: int = 2,
) -> None:
    """Draw the agreement of gradients over training, as in the tracking figure of the paper.

    One batch of each domain makes a noisy measurement: a thin line shows every one, a thick line the mean of each with
    its neighbours.

    Args:
        curves: Name of each method -> (positions in training, measured agreement), two sequences of equal length.
        axes: Matplotlib axes to draw on.
        quantity: What was measured, for the label.
        colours: One for each method.
        smoothing: How many measurements before and after count in a thick line.

    Raises:
        ValueError: If there is no curve or more than there are colours, or the two sequences of one differ in length.
    """
    if not 0 < len(curves) <= len(colours):
        raise ValueError(f"curves should hold from 1 to {len(colours)} curves, one for each colour (got {len(curves)})")
    for (name, (positions, values)), colour in zip(curves.items(), colours, strict=False):
        if len(positions) != len(values):
            raise ValueError(f"curve {name!r} has {len(positions)} positions and {len(values)} values")
        windows = [values[max(0, i - smoothing) : i + smoothing + 1] for i in range(len(values))]
        axes.plot(positions, values, color=colour, linewidth=1.0, alpha=0.4)
        axes.plot(positions, [sum(w) / len(w) for w in windows], color=colour, linewidth=2.2, label=name)
    axes.axhline(0.0, color="0.6", linewidth=1.0, linestyle=":")
    axes.set_ylabel(quantity)
    axes.legend()
