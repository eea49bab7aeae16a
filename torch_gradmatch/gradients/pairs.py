"""The agreement of single pairs of domains: all S(S - 1)/2 cosines, and their picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_gradmatch.parallel.shards import Spread, sum_over_shards

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["cosines_of_pairs", "plot_matrix"]

FEW = 12  # domains whose numbers are still legible in the picture


@torch.no_grad()
def cosines_of_pairs(
    gradients: Sequence[Mapping[int, Tensor]], spread_of: Callable[[int], Spread] = lambda _: ()
) -> Tensor:
    r"""Return the cosine of each pair of gradients, :math:`G_i \cdot G_j / (|G_i| |G_j|)`.

    One parameter at a time, so that no more than S gradients of one parameter are copied.

    Args:
        gradients: Of each domain, by parameter; one that is missing counts as zero. Dense or sparse, real or complex.
        spread_of: Over which groups of ranks the elements of a parameter are spread, of which this rank's are given.

    Returns:
        Shape (S, S), in at least single precision, on the first gradient's device. Ones on the diagonal, zeros in row
        and column of a zero gradient.

    Raises:
        RuntimeError: If there is no gradient.

    Example:
        >>> import torch
        >>> cosines_of_pairs([{0: torch.tensor([1.0, 0.0])}, {0: torch.tensor([1.0, 1.0])}])
        tensor([[1.0000, 0.7071],
                [0.7071, 1.0000]])
    """
    by_spread: dict[Spread, Tensor] = {}
    for index in sorted({i for gradient in gradients for i in gradient}):
        given = [gradient.get(index) for gradient in gradients]
        like = next(g for g in given if g is not None)
        rows = [_row(torch.zeros_like(like) if g is None else g) for g in given]
        matrix = torch.stack(rows)
        matrix = matrix @ matrix.T
        spread = spread_of(index)
        by_spread[spread] = by_spread[spread] + matrix.to(by_spread[spread].device) if spread in by_spread else matrix
    if not by_spread:
        raise RuntimeError("no gradient was measured: call add() first")
    first, *others = (sum_over_shards(matrix, spread) for spread, matrix in by_spread.items())
    products = sum((matrix.to(first.device) for matrix in others), first)
    squares = products.diagonal()
    scales = torch.where(squares > 0, squares, 1.0).rsqrt()
    cosines = products * scales[:, None] * scales
    cosines.diagonal().copy_((squares > 0).to(cosines.dtype))
    return cosines


def _row(gradient: Tensor) -> Tensor:
    """View a gradient as a real vector in at least single precision."""
    dense = gradient.to_dense() if gradient.layout is not torch.strided else gradient
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return real.reshape(-1).to(torch.promote_types(real.dtype, torch.float32))


def plot_matrix(
    matrix: Sequence[Sequence[float]], names: Sequence[str], quantity: str, axes: Axes | None = None
) -> Axes:
    """Draw numbers from -1 to 1, one for each pair of domains: blue where they agree, red where they do not.

    Args:
        matrix: S rows of S numbers.
        names: Of the S domains.
        quantity: What the numbers are, for the label.
        axes: Matplotlib axes to draw on; those of a new figure if None.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the numbers of rows and names differ.
    """
    size = len(names)
    if [len(row) for row in matrix] != [size] * size:
        raise ValueError(
            f"matrix should have {size} rows of {size} numbers, one for each name (got {len(matrix)} rows)"
        )
    if axes is None:
        import matplotlib.pyplot as plt  # only where it draws

        side = 2.5 + 0.45 * size
        axes = plt.subplots(figsize=(side + 1.0, side), layout="constrained")[1]
    image = axes.imshow(matrix, vmin=-1.0, vmax=1.0, cmap="RdBu")
    axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), names)
    for i, row in enumerate(matrix if size <= FEW else ()):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
    axes.figure.colorbar(image, ax=axes, label=quantity)
    return axes
