r"""How well the gradients of several domains agree, measured with running sums.

With gradients :math:`G_1, \ldots, G_S`, the mean inner product over pairs of domains (the GIP of Shi et al., ICLR 2022,
arXiv 2104.09937, equation 3, divided by the number of pairs) is

.. math:: \frac{1}{S(S-1)} \sum_{i \ne j} G_i \cdot G_j = \frac{2}{S(S-1)} \sum_i G_i \cdot \sum_{j<i} G_j .

The right-hand side needs one gradient and one running sum at a time: its cost is linear in S and no S gradients are
ever stored. Unlike :math:`|\sum_i G_i|^2 - \sum_i |G_i|^2` it subtracts nothing, so it does not cancel when gradients
are nearly orthogonal. The mean cosine is the same with every gradient divided by its norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_gradmatch._checks import check_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["OKABE_ITO", "Alignment", "GradientAlignment", "gradient_alignment", "plot_alignment"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
OKABE_ITO = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")


@dataclass(frozen=True)
class Alignment:
    """How well the gradients of S domains agree. Tensors on the first gradient's device: reading them waits for it.

    Attributes:
        inner_product: Mean inner product over pairs of domains, shape (); NaN for fewer than two domains.
        cosine: Mean cosine over pairs of domains, shape (); NaN for fewer than two domains. A zero gradient counts
            as orthogonal to all others.
        grad_norms: Euclidean norm of each domain's gradient, shape (S,).
    """

    inner_product: Tensor
    cosine: Tensor
    grad_norms: Tensor


def _as_vector(gradient: Tensor) -> Tensor:
    """Return a gradient as a real, dense vector in at least single precision."""
    dense = gradient.detach()
    if dense.layout != torch.strided:
        dense = dense.to_dense()
    if dense.is_complex():
        dense = torch.view_as_real(dense.resolve_conj())
    return dense.reshape(-1).to(torch.promote_types(dense.dtype, torch.float32))


def _total(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the sum of some scalars, zero if there are none, on the device and in the dtype of ``like``."""
    if not parts:
        return like.new_zeros(())
    return torch.stack([part.to(like.device, like.dtype) for part in parts]).sum()


def _like(vector: Tensor, gradient: Tensor) -> Tensor:
    """Give a vector of :func:`_as_vector` the shape of a gradient, and complex numbers if it has them."""
    if gradient.is_complex():
        return torch.view_as_complex(vector.view(*gradient.shape, 2))
    return vector.view(gradient.shape)


class GradientAlignment:
    """Running sums over the gradients of one group of domains.

    Memory: two vectors of the size of the parameters, whatever the number of domains.

    Example:
        >>> import torch
        >>> alignment = GradientAlignment()
        >>> for gradient in torch.tensor([[3.0, 0.0], [1.0, 1.0]]):
        ...     alignment.add([gradient])
        >>> measured = alignment.result()
        >>> measured.inner_product, measured.cosine, measured.grad_norms
        (tensor(3.), tensor(0.7071), tensor([3.0000, 1.4142]))
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all gradients: a new group of domains begins."""
        self._sums: dict[int, Tensor] = {}
        self._unit_sums: dict[int, Tensor] = {}
        self._norms: list[Tensor] = []
        self._products: list[Tensor] = []
        self._cosines: list[Tensor] = []

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Take in one domain's gradient.

        Args:
            gradients: One tensor for each parameter, always in the same order; None counts as zero. Any shape, dense
                or sparse, real or complex.

        Raises:
            ValueError: If every gradient is None.
        """
        vectors = {i: _as_vector(g) for i, g in enumerate(gradients) if g is not None}
        if not vectors:
            raise ValueError("no parameter has a gradient: call backward() before the gradients are measured")
        first = next(iter(vectors.values()))
        seen = [i for i in vectors if i in self._sums]
        norm = _total([torch.dot(v, v) for v in vectors.values()], first).sqrt()
        product = _total([torch.dot(vectors[i], self._sums[i]) for i in seen], first)
        cosine = _total([torch.dot(vectors[i], self._unit_sums[i]) for i in seen], first)
        scale = torch.where(norm > 0, norm, 1.0).reciprocal()
        self._norms.append(norm)
        self._products.append(product)
        self._cosines.append(cosine * scale)
        for i, v in vectors.items():
            unit_scale = scale.to(v.device, v.dtype)
            if i in self._sums:
                self._sums[i].add_(v)
                self._unit_sums[i].addcmul_(v, unit_scale)
            else:
                self._sums[i] = v.clone()
                self._unit_sums[i] = v * unit_scale

    def result(self) -> Alignment:
        """Return the agreement of the gradients taken in since the last reset.

        Returns:
            The means over pairs and the norms, in the precision of the gradients but at least single.

        Raises:
            RuntimeError: If no gradient was taken in.
        """
        if not self._norms:
            raise RuntimeError("no gradient was measured: call add() first")
        domains = len(self._norms)
        pairs = domains * (domains - 1) / 2 if domains > 1 else float("nan")
        return Alignment(
            inner_product=torch.stack(self._products).sum() / pairs,
            cosine=torch.stack(self._cosines).sum() / pairs,
            grad_norms=torch.stack(self._norms),
        )

    def total(self, index: int, like: Tensor, *, unit: bool = False) -> Tensor:
        """Return the sum over domains of one parameter's gradient: the running sum itself, not a copy.

        Args:
            index: Which parameter; some domain had a gradient for it.
            like: A gradient of it, for shape and kind.
            unit: Whether every domain's whole gradient counts with length one.

        Returns:
            The shape of ``like``, in at least single precision.
        """
        return _like((self._unit_sums if unit else self._sums)[index], like)

    @property
    def indices(self) -> list[int]:
        """The parameters for which some domain had a gradient, in order."""
        return sorted(self._sums)

    @torch.no_grad()
    def dot_unit_total(self, gradient: Sequence[Tensor | None]) -> Tensor:
        """Return the inner product of a gradient with the sum of the unit gradients.

        Args:
            gradient: As in :meth:`add`; one that was taken in.

        Returns:
            Shape ().
        """
        vectors = {i: _as_vector(g) for i, g in enumerate(gradient) if g is not None}
        return _total([torch.dot(v, self._unit_sums[i]) for i, v in vectors.items()], self._norms[0])

    @torch.no_grad()
    def squared_distance(self, gradient: Sequence[Tensor | None], scale: float) -> Tensor:
        """Return the squared distance of a gradient from ``scale`` times the sum of those taken in.

        Args:
            gradient: As in :meth:`add`; None counts as zero.
            scale: A number.

        Returns:
            Shape ().
        """
        parts = []
        for index in {*self._sums, *(i for i, g in enumerate(gradient) if g is not None)}:
            g, total = gradient[index], self._sums.get(index)
            if g is None or total is None:
                difference = _as_vector(g) if g is not None else self._sums[index] * scale
            else:
                difference = torch.sub(_as_vector(g), total, alpha=scale)
            parts.append(torch.dot(difference, difference))
        return _total(parts, self._norms[0])

    def __len__(self) -> int:
        return len(self._norms)

    def state_dict(self) -> dict[str, Any]:
        """Return the running sums as plain tensors and numbers.

        Returns:
            The state.
        """
        return {
            "sums": dict(self._sums),
            "unit_sums": dict(self._unit_sums),
            "norms": list(self._norms),
            "products": list(self._products),
            "cosines": list(self._cosines),
        }

    @staticmethod
    def check_state_dict(state: Mapping[str, Any], sizes: Sequence[int]) -> None:
        """Raise if :meth:`load_state_dict` could not use a state.

        Args:
            state: What :meth:`state_dict` once returned.
            sizes: Number of (real) elements of each parameter's gradient, in order.

        Raises:
            ValueError: Names the entry that is missing or does not fit.
        """
        for key in ("sums", "unit_sums"):
            vectors = state.get(key)
            if not isinstance(vectors, dict) or not all(isinstance(v, Tensor) for v in vectors.values()):
                raise ValueError(f"the state dict's alignment's {key!r} is missing or malformed")
            if any(i not in range(len(sizes)) or v.shape != (sizes[i],) for i, v in vectors.items()):
                raise ValueError(f"the state dict's alignment's {key!r} does not fit this optimizer's parameters")
        for key in ("norms", "products", "cosines"):
            scalars = state.get(key)
            if not isinstance(scalars, list) or not all(isinstance(v, Tensor) and v.dim() == 0 for v in scalars):
                raise ValueError(f"the state dict's alignment's {key!r} is missing or malformed")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from running sums that :meth:`state_dict` returned.

        Args:
            state: The state.
        """
        self._sums = {i: t.clone() for i, t in state["sums"].items()}
        self._unit_sums = {i: t.clone() for i, t in state["unit_sums"].items()}
        self._norms, self._products, self._cosines = (list(state[k]) for k in ("norms", "products", "cosines"))


def gradient_alignment(
    parameters: Iterable[Tensor], loss_fn: Callable[[Any], Tensor], batches: Iterable[Any]
) -> Alignment:
    """Measure how well the gradients of several domains agree at the present parameters.

    Touches no ``.grad``. The model runs as ``loss_fn`` runs it: in training mode BatchNorm statistics move and dropout
    draws random numbers.

    Args:
        parameters: The parameters to differentiate by; those that need no gradient are left out.
        loss_fn: ``loss_fn(batch)`` returns a scalar.
        batches: One batch of each domain.

    Returns:
        The agreement.

    Raises:
        ValueError: If there are no batches, or a loss is not a scalar or depends on no parameter.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> domains = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])]
        >>> gradient_alignment([w], lambda x: (w * x).sum(), domains).inner_product
        tensor(1.)
    """
    wanted = [p for p in parameters if p.requires_grad]
    if not wanted:
        raise ValueError("parameters holds no tensor that requires a gradient")
    alignment = GradientAlignment()
    for index, batch in enumerate(batches):
        loss = check_loss(loss_fn(batch), index)
        alignment.add(torch.autograd.grad(loss, wanted, allow_unused=True))
    if not len(alignment):
        raise ValueError("batches is empty: one batch of each domain is needed")
    return alignment.result()


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
