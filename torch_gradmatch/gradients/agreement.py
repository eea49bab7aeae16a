r"""How much the gradients of S domains agree: the function :math:`\phi(G_1, \ldots, G_S)` that matching raises.

Each agreement stands here twice. As a plain function of all gradients, which composes with ``torch.func``:
:func:`inner_product`, :func:`variance`, :func:`cosine`. And by its cotangents :math:`v_i = \partial\phi/\partial G_i`,
which for all three are of one form, :math:`v_i = s_i\,(\Sigma + r_i G_i)`, so that sums over the domains are all that
is kept (:class:`NamedAgreement`).

With :math:`\Sigma = \sum_j G_j`, :math:`\bar G = \Sigma / S`, :math:`u_i = G_i / |G_i|` and :math:`U = \sum_j u_j`:

============== =================================================== ==========================================
agreement      :math:`\phi`                                        :math:`v_i`
============== =================================================== ==========================================
inner product  :math:`\frac1{S(S-1)}\sum_{i\ne j} G_i\cdot G_j`    :math:`\frac2{S(S-1)}(\Sigma - G_i)`
variance       :math:`-\frac1S\sum_i|G_i-\bar G|^2`                :math:`\frac2{S^2}(\Sigma - S\,G_i)`
cosine         :math:`\frac1{S(S-1)}\sum_{i\ne j} u_i\cdot u_j`    :math:`\frac2{S(S-1)|G_i|}(U-(u_i\cdot U)u_i)`
============== =================================================== ==========================================

The inner product is the one of Shi et al., ICLR 2022, arXiv 2104.09937, equation 3 (there summed, here averaged over
pairs). It is unbounded above, so a loss that rewards it is unbounded below; the other two are bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from torch_gradmatch._checks import check_choice, check_int, check_number
from torch_gradmatch.gradients.alignment import Alignment, GradientAlignment, accumulate
from torch_gradmatch.parallel.foreach import WIDE, Vector, add_all_, squared_norm

__all__ = [
    "AGREEMENTS",
    "Agreement",
    "NamedAgreement",
    "OwnAgreement",
    "check_agreement",
    "cosine",
    "fish_gamma",
    "inner_product",
    "variance",
]

Agreement = Callable[[Sequence[Any]], Tensor]


def fish_gamma(lr: float, num_domains: int) -> float:
    r"""Return :math:`\gamma_\mathrm{Fish} = \alpha(S-1)/4`, the strength with which Fish matches gradients.

    For plain SGD inner steps of size :math:`\alpha`, averaged over the order of the domains, Fish follows the gradient
    of :math:`\frac1S\sum_i L_i - \gamma_\mathrm{Fish}\,\mathrm{GIP}` up to :math:`O(\alpha^2)`.

    Args:
        lr: :math:`\alpha`, the inner learning rate.
        num_domains: S.

    Returns:
        The gamma at which ``IDGM`` with the inner product does to first order what Fish does.

    Raises:
        ValueError: If ``lr`` is no positive number or ``num_domains`` no positive integer.

    Example:
        >>> fish_gamma(0.01, 5)
        0.01
    """
    return check_number("lr", lr, above=0) * (check_int("num_domains", num_domains, at_least=1) - 1) / 4


# -------------------------------------------------------------------------------------- functions of all the gradients


def _all_leaves(gradients: Sequence[Any]) -> list[list[Tensor]]:
    """Return each gradient's tensors, of one structure and of one order, in at least single precision."""
    if len(gradients) < 2:
        raise ValueError(f"gradients should hold the gradients of at least 2 domains (got {len(gradients)})")
    structure = tree_flatten(gradients[0])[1]  # by key: dictionaries need not have one order
    found = [[t.to(WIDE.get(t.dtype, t.dtype)) for t in structure.flatten_up_to(gradient)] for gradient in gradients]
    shapes = [[tuple(t.shape) for t in leaves] for leaves in found]
    if any(others != shapes[0] for others in shapes):
        raise ValueError(f"gradients should all have the shapes of the first (got {shapes!s:.200})")
    return found


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the real inner product of two gradients."""
    products = [(x * y.conj()).real.sum() for x, y in zip(a, b, strict=True)]
    return torch.stack([p.to(products[0].device, products[0].dtype) for p in products]).sum()


def _pairwise(vectors: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the mean inner product over pairs, by one running sum: linear in S, and nothing cancels."""
    total, products = list(vectors[0]), []
    for vector in vectors[1:]:
        products.append(_dot(vector, total))
        total = [t + v for t, v in zip(total, vector, strict=True)]
    return torch.stack(products).sum() * (2 / (len(vectors) * (len(vectors) - 1)))


def inner_product(gradients: Sequence[Any]) -> Tensor:
    r"""Return the mean inner product over pairs of domains (the GIP), :math:`\frac1{S(S-1)}\sum_{i\ne j}G_i\cdot G_j`.

    Args:
        gradients: The gradient of each of S >= 2 domains: tensors, or dictionaries, lists or tuples of tensors, of the
            same keys and shapes.

    Returns:
        Shape (); differentiable.

    Raises:
        ValueError: If there are fewer than two gradients, or they have other shapes.

    Example:
        >>> import torch
        >>> inner_product([torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0])])
        tensor(3.)
    """
    return _pairwise(_all_leaves(gradients))


def variance(gradients: Sequence[Any]) -> Tensor:
    r"""Return minus the variance over domains, :math:`-\frac1S\sum_i|G_i-\bar G|^2`: at most zero.

    Args:
        gradients: As in :func:`inner_product`.

    Returns:
        Shape (); differentiable.

    Raises:
        ValueError: If there are fewer than two gradients, or they have other shapes.

    Example:
        >>> import torch
        >>> variance([torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])])
        tensor(-1.)
    """
    leaves = _all_leaves(gradients)
    mean = [sum(parts) / len(leaves) for parts in zip(*leaves, strict=True)]
    deviations = [[g - m for g, m in zip(gradient, mean, strict=True)] for gradient in leaves]
    return -torch.stack([_dot(d, d) for d in deviations]).mean()


def cosine(gradients: Sequence[Any]) -> Tensor:
    r"""Return the mean cosine over pairs of domains, :math:`\frac1{S(S-1)}\sum_{i\ne j}u_i\cdot u_j`, in [-1, 1].

    Args:
        gradients: As in :func:`inner_product`. A zero gradient counts as orthogonal to all others.

    Returns:
        Shape (); differentiable where no gradient is zero.

    Raises:
        ValueError: If there are fewer than two gradients, or they have other shapes.

    Example:
        >>> import torch
        >>> cosine([torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0])])
        tensor(0.7071)
    """
    units = []
    for gradient in _all_leaves(gradients):
        squared = _dot(gradient, gradient)
        # Chosen twice, so that the branch not taken cannot put NaN into the derivative.
        scale = torch.where(squared > 0, torch.where(squared > 0, squared, 1.0).rsqrt(), 0.0)
        units.append([g * scale.to(g.device) for g in gradient])
    return _pairwise(units)


AGREEMENTS: dict[str, Agreement] = {"inner_product": inner_product, "variance": variance, "cosine": cosine}


def check_agreement(agreement: str | Agreement) -> Agreement:
    """Return the function that an agreement's name stands for, or the function itself.

    Args:
        agreement: ``"inner_product"``, ``"variance"``, ``"cosine"``, or a function of the gradients.

    Returns:
        The function.

    Raises:
        ValueError: If it is neither.
    """
    if callable(agreement):
        return agreement
    return AGREEMENTS[check_choice("agreement", agreement, AGREEMENTS, ", or a function of the list of gradients")]


# ---------------------------------------------------------------------------------------------------------- cotangents


@dataclass
class NamedAgreement:
    """One of the three named agreements, of which sums over the domains are kept.

    Args:
        function: :func:`inner_product`, :func:`variance` or :func:`cosine`.
        sums: Running sums over the same gradients, kept by the caller; for the cosine with those of unit gradients.
        domains: S.
    """

    function: Agreement
    sums: GradientAlignment
    domains: int

    def value(self, measured: Alignment) -> Tensor | None:
        """Return phi of all the gradients taken in, from what the sums measure."""
        if self.function is variance and self.sums.of_sum is not None:
            spread = self.sums.of_sum / self.domains**2 - torch.stack(self.sums.squares).mean()
            return spread.clamp(max=0.0).to(measured.inner_product.dtype)
        return measured.cosine if self.function is cosine else measured.inner_product

    @torch.no_grad()
    def cotangent(self, domain: int, gradient: Vector, *, one_pass: bool = False) -> list[Tensor | None]:
        r"""Return :math:`v_i = s_i\,(\Sigma + r_i G_i)`, the derivative of phi by one domain's gradient.

        In one pass only the gradients before it are known, and it itself. With twice the sum of those before in the
        place of the sum of the others, so that :math:`2\Sigma_{\le i} - G_i` is in that of :math:`\Sigma`, an order and
        its reverse together give :math:`2 v_i`.

        Args:
            domain: i, from 0, in the order in which the sums took the gradients in.
            gradient: That domain's gradient, once more: nothing but sums is kept of it.
            one_pass: Whether those of later domains are not in the sums yet.

        Returns:
            One tensor like each of the gradient's, None where that is None.
        """
        total, size, weight = self.sums.total, self.domains, 2 if one_pass else 1
        pairs = size * (size - 1)
        scale: float | Tensor = 2 / pairs
        ratio: float | Tensor = -weight
        if self.function is variance:
            scale, ratio = 2 / size**2, -(size + weight - 1)
        elif self.function is cosine:
            total, square = self.sums.units, self.sums.squares[domain]
            reciprocal = square.clamp(min=1e-60).rsqrt() * (square > 0)
            scale, ratio = scale * reciprocal, -weight * reciprocal * _along(gradient, total, reciprocal)
        found: list[Tensor | None] = []
        accumulate(found, gradient, scale * ratio)
        add_all_(found, total, scale * weight)
        return [v if v is None or g is None else v.to(g.dtype) for v, g in zip(found, gradient, strict=True)]


def _along(gradient: Vector, total: Vector, reciprocal: Tensor) -> Tensor:
    r"""Return :math:`u_i \cdot U`, by :math:`(|U + u_i|^2 - |U - u_i|^2) / 4`: few operations for all parameters."""
    moved: list[Tensor | None] = []
    accumulate(moved, gradient, reciprocal)
    squares = []
    for step in (1.0, -2.0):  # u + U, and from there u - U
        add_all_(moved, total, step)
        squares.append(squared_norm([part for part in moved if part is not None]))
    return (squares[0] - squares[1]) / 4


class OwnAgreement:
    """Any differentiable function of the gradients: all of them are held, and its derivative is autograd's.

    Args:
        function: Takes the list of the domains' gradients.
        like: The parameters, in whose structure the function gets each gradient.
    """

    def __init__(self, function: Agreement, like: Any) -> None:
        self.function = function
        self._like, self._structure = tree_flatten(like)
        self._gradients: list[list[Tensor]] = []

    def add(self, gradient: Vector) -> None:
        """Take in one domain's gradient, which is held."""
        pairs = zip(gradient, self._like, strict=True)
        self._gradients.append([torch.zeros_like(z) if g is None else g.detach() for g, z in pairs])

    @cached_property
    def _differentiated(self) -> tuple[Tensor, Sequence[Tensor]]:
        """Phi and its derivative by every tensor of every gradient, one after the other."""
        with torch.enable_grad():
            leaves = [[t.requires_grad_() for t in gradient] for gradient in self._gradients]
            value = self.function([tree_unflatten(gradient, self._structure) for gradient in leaves])
            name = getattr(self.function, "__name__", repr(self.function))
            if not isinstance(value, Tensor):
                raise TypeError(f"agreement {name} should return a scalar tensor (got {type(value).__name__})")
            if value.numel() != 1 or not value.is_floating_point() or not value.requires_grad:
                raise ValueError(
                    f"agreement {name} should return a real scalar tensor that depends on the gradients in a "
                    f"differentiable way (got shape {tuple(value.shape)}, {value.dtype}, "
                    f"requires_grad={value.requires_grad})"
                )
            every = [t for gradient in leaves for t in gradient]
            derivative = torch.autograd.grad(value.reshape(()), every, allow_unused=True, materialize_grads=True)
        self._gradients = []
        return value.detach().reshape(()), derivative

    def value(self, measured: Alignment) -> Tensor:  # noqa: ARG002
        """Return phi of all the gradients taken in. See :meth:`NamedAgreement.value`."""
        return self._differentiated[0]

    def cotangent(self, domain: int, gradient: Vector, *, one_pass: bool = False) -> list[Tensor | None]:
        """Return the derivative of phi by one domain's gradient. See :meth:`NamedAgreement.cotangent`."""
        assert not one_pass
        own = self._differentiated[1][domain * len(self._like) : (domain + 1) * len(self._like)]
        return [None if g is None else v for g, v in zip(gradient, own, strict=True)]
