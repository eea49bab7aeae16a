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
from typing import Any

import torch
from torch import Tensor

from torch_gradmatch._checks import check_loss

SMALL = 1 << 16  # elements; copying a larger gradient costs more than the calls it saves

__all__ = ["Alignment", "GradientAlignment", "gradient_alignment"]


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
    vector = dense.reshape(-1)
    return vector if vector.dtype == torch.float32 else vector.to(torch.promote_types(vector.dtype, torch.float32))


def _total(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the sum of some scalars, zero if there are none, on the device and in the dtype of ``like``."""
    if not parts:
        return like.new_zeros(())
    if len(parts) == 1 and parts[0].device == like.device and parts[0].dtype == like.dtype:
        return parts[0]
    return torch.stack([part.to(like.device, like.dtype) for part in parts]).sum()


def _like(vector: Tensor, gradient: Tensor) -> Tensor:
    """Give a vector of :func:`_as_vector` the shape of a gradient, and complex numbers if it has them."""
    if gradient.is_complex():
        pairs = vector.view(*gradient.shape, 2)
        return torch.complex(pairs[..., 0], pairs[..., 1])  # as a view it would have to begin at an even place
    return vector.view(gradient.shape)


class _Block:
    """The sums of one or more parameters' gradients, side by side in one vector."""

    def __init__(self, sizes: dict[int, int], like: Tensor) -> None:
        self.sizes = sizes
        self.sums = like.new_zeros(sum(sizes.values()))
        self.units = torch.zeros_like(self.sums)

    def vector(self, given: Mapping[int, Tensor]) -> Tensor | None:
        """Return a gradient's part in this block; None if it has none."""
        if len(self.sizes) == 1:
            return given.get(next(iter(self.sizes)))
        if not any(i in given for i in self.sizes):
            return None
        parts = [given[i] if i in given else self.sums.new_zeros(size) for i, size in self.sizes.items()]
        return torch.cat(parts)


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
        self._blocks: list[_Block] = []
        self._place: dict[int, tuple[_Block, slice]] = {}
        self._squares: list[Tensor] = []
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
        given = {i: _as_vector(g) for i, g in enumerate(gradients) if g is not None}
        if not given:
            raise ValueError("no parameter has a gradient: call backward() before the gradients are measured")
        if not given.keys() <= self._place.keys():
            self._make_place({i: v for i, v in given.items() if i not in self._place})
        vectors = [(block, vector) for block in self._blocks if (vector := block.vector(given)) is not None]
        like = vectors[0][1]
        squared = _total([torch.dot(v, v) for _, v in vectors], like)
        product = _total([torch.dot(v, b.sums) for b, v in vectors], like)
        cosine = _total([torch.dot(v, b.units) for b, v in vectors], like)
        scale = squared.clamp(
            min=torch.finfo(squared.dtype).tiny
        ).rsqrt()  # of a zero gradient nothing is left to scale
        self._squares.append(squared)
        self._products.append(product)
        self._cosines.append(cosine * scale)
        for block, vector in vectors:
            block.sums.add_(vector)
            block.units.addcmul_(vector, scale.to(vector.device, vector.dtype))

    def _make_place(self, vectors: Mapping[int, Tensor]) -> None:
        """Set up sums for some parameters: small ones side by side, so that many layers take few calls."""
        together: dict[tuple[torch.device, torch.dtype, int | None], list[int]] = {}
        for i, v in vectors.items():
            together.setdefault((v.device, v.dtype, i if v.numel() > SMALL else None), []).append(i)
        for indices in together.values():
            block = _Block({i: vectors[i].numel() for i in indices}, vectors[indices[0]])
            self._blocks.append(block)
            start = 0
            for i, size in block.sizes.items():
                self._place[i] = (block, slice(start, start + size))
                start += size

    def result(self) -> Alignment:
        """Return the agreement of the gradients taken in since the last reset.

        Returns:
            The means over pairs and the norms, in the precision of the gradients but at least single.

        Raises:
            RuntimeError: If no gradient was taken in.
        """
        if not self._squares:
            raise RuntimeError("no gradient was measured: call add() first")
        domains = len(self._squares)
        pairs = domains * (domains - 1) / 2 if domains > 1 else float("nan")
        return Alignment(
            inner_product=torch.stack(self._products).sum() / pairs,
            cosine=torch.stack(self._cosines).sum() / pairs,
            grad_norms=torch.stack(self._squares).sqrt(),
        )

    def total(self, index: int, like: Tensor, *, unit: bool = False) -> Tensor:
        """Return the sum over domains of one parameter's gradient, to be read: it may be the running sum itself.

        Args:
            index: Which parameter; some domain had a gradient for it.
            like: A gradient of it, for shape and kind.
            unit: Whether every domain's whole gradient counts with length one.

        Returns:
            The shape of ``like``, in at least single precision.
        """
        block, place = self._place[index]
        return _like((block.units if unit else block.sums)[place], like)

    @property
    def indices(self) -> list[int]:
        """The parameters for which some domain had a gradient, in order."""
        return sorted(self._place)

    @torch.no_grad()
    def dot_unit_total(self, gradient: Sequence[Tensor | None]) -> Tensor:
        """Return the inner product of a gradient with the sum of the unit gradients.

        Args:
            gradient: As in :meth:`add`; one that was taken in.

        Returns:
            Shape ().
        """
        given = {i: _as_vector(g) for i, g in enumerate(gradient) if g is not None}
        parts = [torch.dot(v, b.units) for b in self._blocks if (v := b.vector(given)) is not None]
        return _total(parts, self._squares[0])

    @torch.no_grad()
    def squared_distance(self, gradient: Sequence[Tensor | None], scale: float) -> Tensor:
        """Return the squared distance of a gradient from ``scale`` times the sum of those taken in.

        Args:
            gradient: As in :meth:`add`; None counts as zero.
            scale: A number.

        Returns:
            Shape ().
        """
        given = {i: _as_vector(g) for i, g in enumerate(gradient) if g is not None}
        differences = [v for i, v in given.items() if i not in self._place]
        for block in self._blocks:
            vector = block.vector(given)
            differences.append(block.sums * scale if vector is None else torch.sub(vector, block.sums, alpha=scale))
        return _total([torch.dot(d, d) for d in differences], self._squares[0])

    def __len__(self) -> int:
        return len(self._squares)

    def state_dict(self) -> dict[str, Any]:
        """Return the running sums as plain tensors and numbers.

        Returns:
            The state.
        """
        return {
            "sums": {i: block.sums[place] for i, (block, place) in self._place.items()},
            "unit_sums": {i: block.units[place] for i, (block, place) in self._place.items()},
            "squares": list(self._squares),
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
        for key in ("squares", "products", "cosines"):
            scalars = state.get(key)
            if not isinstance(scalars, list) or not all(isinstance(v, Tensor) and v.dim() == 0 for v in scalars):
                raise ValueError(f"the state dict's alignment's {key!r} is missing or malformed")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from running sums that :meth:`state_dict` returned.

        Args:
            state: The state.
        """
        self.reset()
        self._make_place(state["sums"])
        for i, (block, place) in self._place.items():
            block.sums[place], block.units[place] = state["sums"][i], state["unit_sums"][i]
        self._squares, self._products, self._cosines = (list(state[k]) for k in ("squares", "products", "cosines"))


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
