r"""How well the gradients of several domains agree, measured with running sums.

With gradients :math:`G_1, \ldots, G_S`, the mean inner product over pairs of domains (the GIP of Shi et al., ICLR 2022,
arXiv 2104.09937, equation 3, divided by the number of pairs) is

.. math:: \frac{1}{S(S-1)} \sum_{i \ne j} G_i \cdot G_j = \frac{|\sum_i G_i|^2 - \sum_i |G_i|^2}{S(S-1)} .

The right-hand side needs one gradient and one running sum at a time: its cost is linear in S and no S gradients are
ever stored. Squares are summed in double precision, so that of a difference the digits are lost that rounding of the
sum has lost, in single precision about :math:`10^{-7} |\sum_i G_i|^2 / \sqrt P` with P parameters. The mean cosine is
the same with every gradient divided by its norm. Only the cosines of single pairs need all S gradients at the same
time: then their Gram matrix says all that there is to say of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_gradmatch._checks import check_bool, check_loss, evaluating, named_batches, naming
from torch_gradmatch.gradients.backward import gradient_of
from torch_gradmatch.parallel.foreach import (
    WIDE,
    Vector,
    add_all_,
    by_kind,
    clone_all,
    local_of,
    over_shards,
    sharded_like,
    squared_norm,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Alignment", "GradientAlignment", "Measured", "accumulate", "gradient_alignment"]


class Measured:
    """What is measured of the gradients of S domains, and what follows from it."""

    grad_norms: Tensor | None
    cosines: Tensor | None

    @property
    def agreement_with_rest(self) -> Tensor | None:
        r"""Cosine of each domain's gradient with the sum of the others', shape (S,); None without cosines of pairs.

        :math:`r_i = G_i \cdot (\Sigma - G_i) / (|G_i|\,|\Sigma - G_i|)`, from the Gram matrix. Below zero a step that
        lowers the mean loss of the other domains raises this one's, to first order. 0 where a gradient or the sum of
        the others is zero, or that sum is rounding.
        """
        if self.cosines is None or self.grad_norms is None:
            return None
        lengths = self.grad_norms / self.grad_norms.max().clamp(min=1e-37)
        gram = self.cosines * lengths[:, None] * lengths
        others = 1 - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)  # a row for each domain's rest
        squared, size = (((others @ matrix) * others).sum(dim=1) for matrix in (gram, gram.abs()))
        squared = torch.where(squared > 4 * len(gram) * torch.finfo(gram.dtype).eps * size, squared, 0.0)
        found = (gram * others).sum(dim=1) / lengths / squared.sqrt()  # one by one, so that neither underflows
        return torch.where((lengths == 0) | (squared == 0), 0.0, found).clamp(-1.0, 1.0)


@dataclass(frozen=True)
class Alignment(Measured):
    """How well the gradients of S domains agree. Tensors on the first gradient's device: reading them waits for it.

    Attributes:
        inner_product: Mean inner product over pairs of domains, shape (); NaN for fewer than two domains.
        cosine: Mean cosine over pairs of domains, shape (); NaN for fewer than two domains. A zero gradient counts
            as orthogonal to all others. None if it was not asked for.
        grad_norms: Euclidean norm of each domain's gradient, shape (S,).
        cosines: Cosine of each pair of domains, shape (S, S), symmetric with ones on the diagonal (zeros for a zero
            gradient). None if it was not asked for.
        domains: The domains' names, if they are known.
    """

    inner_product: Tensor
    cosine: Tensor | None
    grad_norms: Tensor
    cosines: Tensor | None = None
    domains: tuple[Any, ...] | None = None

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the cosines of all pairs, with the domains' names: blue where they agree, red where they do not.

        Args:
            axes: Matplotlib axes to draw on; those of a new figure if None.

        Returns:
            The axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            RuntimeError: If the cosines of pairs were not measured.
        """
        if self.cosines is None:
            raise RuntimeError("the cosines of pairs were not measured: gradient_alignment(..., pairs=True)")
        places = range(len(self.cosines))
        names = [str(name) for name in self.domains or places]
        if axes is None:
            import matplotlib.pyplot as plt  # only where it draws

            axes = plt.subplots(layout="constrained")[1]
        image = axes.imshow(self.cosines.tolist(), vmin=-1.0, vmax=1.0, cmap="RdBu")
        axes.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(places, names)
        axes.figure.colorbar(image, ax=axes, label="cosine of gradients")
        return axes


@dataclass
class GradientAlignment:
    """Running sums over the gradients of one group of domains.

    Memory: a vector of the size of the parameters, the sum; another one for cosines, and one more while a gradient is
    taken in. In single precision for parameters in half. A gradient is taken in by few operations, whatever the number
    of parameters.

    Args:
        cosines: Whether to measure the mean cosine, too.
        pairs: Whether to measure the cosine of each pair of domains by itself. That takes a copy of every gradient:
            memory of S times the parameters.

    Attributes:
        total: The sum of the gradients, for each parameter; None where no domain had one.
        units: The sum of the gradients divided by their lengths, if cosines are measured.
        squares: Squared length of each gradient.
        of_sum: Squared length of the sum of the gradients, when :meth:`result` was called.

    Example:
        >>> import torch
        >>> alignment = GradientAlignment()
        >>> for gradient in torch.tensor([[3.0, 0.0], [1.0, 1.0]]):
        ...     alignment.add([gradient])
        >>> measured = alignment.result()
        >>> measured.inner_product, measured.cosine, measured.grad_norms
        (tensor(3.0000), tensor(0.7071), tensor([3.0000, 1.4142]))
    """

    cosines: bool = True
    pairs: bool = False
    total: list[Tensor | None] = field(default_factory=list, init=False)
    units: list[Tensor | None] = field(default_factory=list, init=False)
    squares: list[Tensor] = field(default_factory=list, init=False)
    of_sum: Tensor | None = field(default=None, init=False)
    _gradients: list[Vector] = field(default_factory=list, init=False)

    @torch.no_grad()
    def add(self, gradients: Vector) -> None:
        """Take in one domain's gradient.

        Args:
            gradients: One tensor for each parameter, always in the same order; None counts as zero. Any shape, dense
                or sparse, real or complex, also a ``DTensor``.

        Raises:
            ValueError: If every gradient is None, or one has another shape than in the domains before.
        """
        gradients = [g if g is None or g.layout is torch.strided else g.to_dense() for g in gradients]
        present = [g for g in gradients if g is not None]
        if not present:
            raise ValueError("no parameter has a gradient: call backward() before the gradients are measured")
        for index, (g, total) in enumerate(zip(gradients, self.total, strict=False)):
            if g is not None and total is not None and g.numel() != total.numel():  # as it would be broadcast
                raise ValueError(
                    f"the gradient of parameter {index} has shape {tuple(g.shape)}, but one taken in before it had "
                    f"{tuple(total.shape)}"
                )
        square = squared_norm(present)
        accumulate(self.total, gradients)
        if self.cosines:
            accumulate(self.units, gradients, square.clamp(min=1e-60).rsqrt())
        self.squares.append(square)
        if self.pairs:
            self._gradients.append(clone_all(gradients))

    @torch.no_grad()
    def result(self, scale: float = 1.0) -> Alignment:
        """Return the agreement of the gradients taken in.

        Args:
            scale: What their losses were multiplied by: the result is that of the losses themselves.

        Returns:
            The means over pairs and the norms, in the precision of the gradients but at least single.

        Raises:
            RuntimeError: If no gradient was taken in.
        """
        if not self.squares:
            raise RuntimeError("no gradient was measured: call add() first")
        present, units = ([t for t in vector if t is not None] for vector in (self.total, self.units))
        squares, size, of_sum = torch.stack(self.squares), len(self.squares), squared_norm(present)
        pairs = size * (size - 1) or math.nan
        dtype = max((t.dtype.to_real() for t in present), key=lambda dtype: dtype.itemsize)
        self.of_sum = of_sum
        cosine = (squared_norm(units) - (squares > 0).sum()) / pairs if self.cosines else None
        return Alignment(
            inner_product=((of_sum - squares.sum()) / (pairs * scale**2)).to(dtype),
            cosine=None if cosine is None else cosine.to(dtype),
            grad_norms=(squares.sqrt() if scale == 1.0 else squares.sqrt() / scale).to(dtype),
            cosines=self._cosines_of_pairs(dtype) if self.pairs else None,
        )

    def _cosines_of_pairs(self, dtype: torch.dtype) -> Tensor:
        """Return the Gram matrix of the unit gradients; one parameter at a time, so that few copies are alive."""
        totals = [(index, total) for index, total in enumerate(self.total) if total is not None]

        def gram(positions: list[int]) -> Tensor:
            found: Any = 0
            for index, total in (totals[position] for position in positions):
                zero, every = torch.zeros_like(local_of(total)), [gradient[index] for gradient in self._gradients]
                rows = torch.stack([(zero if g is None else local_of(g).to(zero.dtype)).reshape(-1) for g in every])
                found = found + (rows @ rows.mH).real.to(dtype)
            return found  # type: ignore[no-any-return]

        products = over_shards([total for _, total in totals], gram)
        squares = products.diagonal()
        scales = torch.where(squares > 0, squares, 1.0).rsqrt()
        return (products * scales[:, None] * scales).fill_diagonal_(1.0) * (squares > 0)

    def __len__(self) -> int:
        return len(self.squares)


@torch.no_grad()
def accumulate(totals: list[Tensor | None], gradients: Vector, factor: float | Tensor = 1.0) -> None:
    """Add a multiple of a vector to a sum in at least single precision, which is made as its parts come.

    Args:
        totals: The sum; None where there was nothing yet, empty to begin with.
        gradients: The vector.
        factor: A number, or a tensor of shape ().
    """
    totals += [None] * (len(gradients) - len(totals))
    new = [g if total is None else None for g, total in zip(gradients, totals, strict=True)]
    add_all_(totals, gradients, factor)
    for positions, (group,) in by_kind(new) if any(g is not None for g in new) else ():
        wide = WIDE.get(group[0].dtype, group[0].dtype)
        by = factor.to(group[0].device, wide.to_real()) if isinstance(factor, Tensor) else factor
        made = torch._foreach_mul(group if group[0].dtype == wide else [g.to(wide) for g in group], by)
        for position, part in zip(positions, made, strict=True):
            totals[position] = sharded_like(part, new[position])


def gradient_alignment(
    parameters: Iterable[Tensor],
    loss_fn: Callable[[Any], Tensor],
    batches: Iterable[Any] | Mapping[Any, Any],
    pairs: bool = False,
) -> Alignment:
    """Measure how well the gradients of several domains agree at the present parameters.

    The gradients are taken by ``backward()``, as in training. The ``.grad`` of the parameters given is afterwards what
    it was; other parameters that require a gradient and take part in a loss accumulate it. The model runs as
    ``loss_fn`` runs it: in training mode BatchNorm statistics move and dropout draws random numbers.

    Args:
        parameters: The parameters to differentiate by; those that need no gradient are left out.
        loss_fn: ``loss_fn(batch)`` returns a scalar.
        batches: One batch of each domain; a mapping names the domains.
        pairs: Whether to measure the cosine of each pair of domains, too, which takes memory for S gradients.

    Returns:
        The agreement; ``.plot()`` draws that of pairs.

    Raises:
        ValueError: If there are no batches, or a loss is not a scalar or depends on no parameter.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> domains = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])]
        >>> loss = lambda x: (w * x).sum()
        >>> gradient_alignment([w], loss, domains).inner_product
        tensor(1.0000)
        >>> north_and_south = dict(zip(["north", "south"], domains))
        >>> gradient_alignment([w], loss, north_and_south, pairs=True).cosines
        tensor([[1.0000, 0.4472],
                [0.4472, 1.0000]])
    """
    domains, batches = named_batches(batches)
    wanted = [p for p in parameters if p.requires_grad]
    if not wanted:
        raise ValueError("parameters holds no tensor that requires a gradient: pass those that are to be trained")
    alignment = GradientAlignment(pairs=check_bool("pairs", pairs))
    with naming(domains):
        for index, batch in enumerate(batches):
            with evaluating(index):
                loss = loss_fn(batch)
            alignment.add(gradient_of(check_loss(loss, index), wanted))
    if not len(alignment):
        raise ValueError("batches is empty: one batch of each domain is needed")
    return replace(alignment.result(), domains=domains)
