r"""Which domain pulls against the others: the cosine of each gradient with the sum of the others'.

With :math:`\Sigma = \sum_j G_j` that is

.. math:: r_i = \frac{G_i \cdot (\Sigma - G_i)}{|G_i|\,|\Sigma - G_i|} .

Below zero, a step that lowers the mean loss of the other domains raises this one's, to first order.

Where all gradients are known only one after the other, :math:`\Sigma` is not there in time, and the sum
:math:`\Sigma_{<i}` of those before takes the place of :math:`\Sigma - G_i`. Its inner product with :math:`G_i` is one
of those that are taken anyway, and its length follows from them:
:math:`|\Sigma_{<i+1}|^2 = |\Sigma_{<i}|^2 + 2\,G_i \cdot \Sigma_{<i} + |G_i|^2`. So it costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["WithRest", "cosine_of", "with_others", "with_those_before"]


class WithRest:
    """Base of what reports the agreement of gradients: that of each with the rest, worked out when it is read.

    Until then it costs nothing: on an accelerator these few numbers would be a dozen launches in each meta-iteration.

    Attributes:
        grad_norms: Length of each gradient, shape (S,).
        cosines: Of each pair, shape (S, S), or None.
    """

    grad_norms: Tensor | None
    cosines: Tensor | None
    _with_rest: tuple[Tensor, ...] | None  # squares and products with those before; or what with_rest() has found

    @property
    def agreement_with_rest(self) -> Tensor | None:
        """Cosine of each domain's gradient with the sum of the others', shape (S,); None if no cosine was asked for.

        Below zero for a domain that pulls against the others. Exact with the cosines of pairs, and for
        :class:`~torch_gradmatch.IDGM` also without, of those domains whose Hessian-vector product was taken: NaN for
        the others (all at gamma 0). For :class:`~torch_gradmatch.Fish` and :class:`~torch_gradmatch.SmoothFish` else
        with the sum of the gradients *before* it in the same meta-iteration: NaN for the first.
        """
        if self.cosines is not None and self.grad_norms is not None:
            return with_others(self.cosines, self.grad_norms)
        if self._with_rest is None:
            return None
        if len(self._with_rest) == 2:
            return with_those_before(*self._with_rest)
        product, *squares = self._with_rest[0].unbind(dim=1)
        return cosine_of(product, squares)


def cosine_of(product: Tensor, squares: Sequence[Tensor]) -> Tensor:
    """Return inner products divided by two lengths, one factor after the other, so that neither underflows.

    Args:
        product: Any shape.
        squares: The two squared lengths, of the same shape.

    Returns:
        Of that shape, in [-1, 1]; 0 where a length is 0, NaN where one is NaN.
    """
    for squared in squares:
        product = torch.where(squared == 0, 0.0, product * torch.where(squared == 0, 1.0, squared).rsqrt())
    return product.clamp(-1.0, 1.0)


def with_those_before(squares: Tensor, products: Tensor) -> Tensor:
    """Return the cosine of each gradient with the sum of those before it.

    Args:
        squares: Squared length of each gradient, shape (S,).
        products: Inner product of each with the sum of those before, shape (S,).

    Returns:
        Shape (S,). NaN for the first, before which there is none; 0 where a gradient or the sum is zero, or those
        before cancel so far that the square of their sum is rounding: in single precision, to about a thousandth.

    Example:
        >>> import torch
        >>> squares, products = torch.tensor([9.0, 2.0]), torch.tensor([0.0, 3.0])  # (3, 0) and (1, 1)
        >>> with_those_before(squares, products)
        tensor([   nan, 0.7071])
    """
    growth = torch.stack([2 * products + squares, 2 * products.abs() + squares]).cumsum(dim=1)
    before, size = torch.nn.functional.pad(growth[:, :-1], (1, 0))
    rounding = 4 * len(squares) * torch.finfo(squares.dtype).eps
    found = cosine_of(products, [squares, torch.where(before > rounding * size, before, 0.0)])
    found[0] = torch.nan
    return found


def with_others(cosines: Tensor, norms: Tensor) -> Tensor:
    """Return the cosine of each gradient with the sum of the others, from the cosines of all pairs.

    Args:
        cosines: Of each pair, shape (S, S).
        norms: Length of each gradient, shape (S,).

    Returns:
        Shape (S,). 0 where a gradient or the sum is zero.

    Example:
        >>> import torch
        >>> with_others(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 2.0]))
        tensor([0., 0.])
    """
    lengths = torch.where(norms.max() > 0, norms / torch.where(norms.max() > 0, norms.max(), 1.0), 0.0)
    others = ~torch.eye(len(norms), dtype=torch.bool, device=norms.device)
    products = cosines * lengths[:, None] * lengths  # of each pair
    # One row for each domain: 1 for the others. Then |sum of the others|^2 is a quadratic form in it.
    weights = others.to(products.dtype)
    squared = ((weights @ products) * weights).sum(dim=1)
    size = ((weights @ products.abs()) * weights).sum(dim=1)
    rounding = 4 * len(norms) * torch.finfo(products.dtype).eps
    return cosine_of(
        (products * weights).sum(dim=1), [lengths.square(), torch.where(squared > rounding * size, squared, 0.0)]
    )
