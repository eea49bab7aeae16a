r"""Inner products of vectors in parts, whose elements may be spread over ranks; and what merges the sums of ranks.

With :math:`\Sigma_r` the sum of the :math:`n_r` gradients of rank r, :math:`\Sigma` that of all S and M the sum of the
squared distances from the mean (Chan, Golub and LeVeque, 1983),

.. math::

    \sum_{i \ne j} G_i \cdot G_j = \sum_r \Bigl(\sum_{i \ne j \in r} G_i \cdot G_j
        + \Sigma_r \cdot (\Sigma - \Sigma_r)\Bigr),
    \qquad M = \sum_r \Bigl(M_r + n_r\,\Bigl|\frac{\Sigma_r}{n_r} - \frac{\Sigma}{S}\Bigr|^2\Bigr),

in which nothing cancels that does not cancel in the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torch_gradmatch.parallel.shards import Spread, sum_over_shards

__all__ = ["dot", "dots", "products_with_other_ranks", "products_with_rest"]

CHUNK = 1 << 18  # elements multiplied in one call on the CPU, where the error of a product grows with its length
LARGE_CHUNK = 1 << 24  # elsewhere, where work in a chunk takes as much memory beside the vectors

Parts = Sequence[Tensor]


def dot(a: Parts, b: Parts) -> Tensor:
    """Return the inner product of two vectors.

    Args:
        a: The parts of one.
        b: The parts of the other.

    Returns:
        Shape (), on the first part's device.
    """
    products: list[Tensor] = []
    for x, y in zip(a, b, strict=True):
        if x.device.type == "cpu" and x.numel() > CHUNK:
            products += map(torch.dot, x.split(CHUNK), y.split(CHUNK))
        else:
            products.append(torch.dot(x, y))
    return _total(products)


def dots(pairs: Sequence[tuple[Parts, Parts]], spreads: Sequence[Spread]) -> list[Tensor]:
    """Return the inner products of several pairs of vectors, each with all its elements, on whatever rank they are.

    Args:
        pairs: Vectors in parts.
        spreads: Of each part.

    Returns:
        One for each pair, shape (), on the first part's device.
    """
    if not any(spreads):
        return [dot(a, b) for a, b in pairs]

    def products(positions: Sequence[int]) -> list[Tensor]:
        return [dot([a[k] for k in positions], [b[k] for k in positions]) for a, b in pairs]

    return _over_shards(products, spreads)


def products_with_other_ranks(
    own: Parts, total: Parts, spreads: Sequence[Spread], number: int, domains: int
) -> list[Tensor]:
    r"""Return what merges this rank's running sums with those of the others.

    Args:
        own: :math:`\Sigma_r`.
        total: :math:`\Sigma`.
        spreads: Of each part.
        number: n_r, at least one.
        domains: S.

    Returns:
        :math:`\Sigma_r \cdot (\Sigma - \Sigma_r)` and :math:`n_r |\Sigma_r / n_r - \Sigma / S|^2`.
    """

    def products(positions: Sequence[int]) -> list[Tensor]:
        across, between = [], []
        for x, y in _in_chunks(own, total, positions):
            across.append(torch.dot(x, y - x))
            distance = (x / number).sub_(y, alpha=1 / domains)
            between.append(torch.dot(distance, distance) * number)
        return [_total(across), _total(between)]

    return _over_shards(products, spreads)


def products_with_rest(own: Parts, total: Parts, spreads: Sequence[Spread]) -> list[Tensor]:
    r"""Return what the cosine of a vector with the rest of a sum is made of, by one pass over both.

    The rest is subtracted element by element: what it loses is what the sum has lost of it by rounding.

    Args:
        own: :math:`G_i`.
        total: :math:`\Sigma`, the sum that it is in.
        spreads: Of each part.

    Returns:
        :math:`G_i \cdot (\Sigma - G_i)` and :math:`|\Sigma - G_i|^2`.
    """

    def products(positions: Sequence[int]) -> list[Tensor]:
        across, squares = [], []
        for x, y in _in_chunks(own, total, positions):
            rest = y - x
            across.append(torch.dot(x, rest))
            squares.append(torch.dot(rest, rest))
        return [_total(across), _total(squares)]

    return _over_shards(products, spreads)


def _in_chunks(own: Parts, total: Parts, positions: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    for k in positions:
        length = CHUNK if own[k].device.type == "cpu" else LARGE_CHUNK
        yield from zip(own[k].split(length), total[k].split(length), strict=True)


def _over_shards(products: Callable[[Sequence[int]], list[Tensor]], spreads: Sequence[Spread]) -> list[Tensor]:
    """Take products of the parts that are spread over the same ranks, and sum over these."""
    alike: dict[Spread, list[int]] = {}
    for k, spread in enumerate(spreads):
        alike.setdefault(spread, []).append(k)
    found = [sum_over_shards(torch.stack(products(positions)), spread) for spread, positions in alike.items()]
    return list(_total(found))


def _total(products: Sequence[Tensor]) -> Tensor:
    if len(products) == 1:
        return products[0]
    device, dtype = products[0].device, max((p.dtype for p in products), key=lambda dtype: dtype.itemsize)
    return torch.stack([p.to(device, dtype) for p in products]).sum(dim=0)
