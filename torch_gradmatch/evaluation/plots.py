"""Pictures of the agreement of gradients over training. Imports matplotlib only where it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch_gradmatch.gradients.alignment import Alignment
from torch_gradmatch.gradients.report import MetaStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["OKABE_ITO", "agreement_by_domain", "plot_agreement_by_domain", "smoothed"]

NAMED = 3  # of many domains, how many at either end the legend names
# Okabe and Ito's palette, which colour-blind readers can tell apart.
OKABE_ITO = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")


def agreement_by_domain(steps: Mapping[float, MetaStep | Alignment]) -> dict[Any, tuple[list[float], list[float]]]:
    """Collect from reports over training the cosine of each domain's gradient with the others'.

    Args:
        steps: Position in training -> what a meta-iteration (or ``gradient_alignment``) reported, with
            ``agreement_with_rest`` and the domains' names. A domain need not be in every one.

    Returns:
        By the domain's name, positions and cosines.

    Raises:
        ValueError: If a report lacks either.
    """
    curves: dict[Any, tuple[list[float], list[float]]] = {}
    for position, step in steps.items():
        if step.agreement_with_rest is None or step.domains is None:
            what = "agreement_with_rest: pass the method track_alignment='pairs'"
            if step.agreement_with_rest is not None:
                what = "the domains' names: pass meta_step() a mapping, or lists by meta_batches() from a sampler"
            raise ValueError(f"the report at {position} lacks {what}")
        for name, value in zip(step.domains, step.agreement_with_rest.tolist(), strict=True):
            positions, values = curves.setdefault(name, ([], []))
            positions.append(position)
            values.append(value)
    return curves


def plot_agreement_by_domain(
    curves: Mapping[Any, tuple[Sequence[float], Sequence[float]]], axes: Axes, *, smoothing: int = 10
) -> list[Any]:
    """Draw over training which domains pull against the others: the cosine of each one's gradient with theirs.

    Args:
        curves: As :func:`agreement_by_domain` collects them.
        axes: Matplotlib axes to draw on.
        smoothing: How many of a domain's measurements before and after one count in the line.

    Returns:
        The domains' names in the order of their means, the one that agrees least last. The legend has them in this
        order; of more than eight, the first three and the last three.

    Raises:
        ValueError: If nothing was measured.
    """
    if not curves:
        raise ValueError("curves hold no measurement: with those before it, the first domain has none")
    order = sorted(curves, key=lambda name: -sum(curves[name][1]) / len(curves[name][1]))
    for rank, name in enumerate(order):
        few = len(order) <= len(OKABE_ITO)
        colour: Any = OKABE_ITO[rank] if few else (0.84 * rank / len(order), 0.4, 0.7 - 0.7 * rank / len(order))
        label = str(name) if few or rank < NAMED or len(order) - rank <= NAMED else None
        axes.plot(curves[name][0], smoothed(curves[name][1], smoothing), color=colour, linewidth=1.8, label=label)
    axes.axhline(0.0, color="0.6", linewidth=1.0, linestyle=":")
    axes.set_ylabel("cosine with the others' gradients")
    axes.legend(fontsize="small")
    return order


def smoothed(values: Sequence[float], neighbours: int) -> list[float]:
    """Return the mean of each value with so many before and after it."""
    windows = [values[max(0, i - neighbours) : i + neighbours + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
