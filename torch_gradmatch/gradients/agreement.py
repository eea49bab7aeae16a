r"""How much the gradients of S domains agree: the function :math:`\phi(G_1, \ldots, G_S)` that matching raises.

Each agreement stands here twice. As a plain function of all gradients, which composes with ``torch.func``:
:func:`inner_product`, :func:`variance`, :func:`cosine`. And as running sums, from which the two-pass engine takes the
cotangents :math:`v_i = \partial\phi/\partial G_i` while it holds no more than one domain's gradient
(:func:`running_agreement`).

With :math:`\Sigma = \sum_j G_j`, :math:`\bar G = \Sigma / S`, :math:`u_i = G_i / |G_i|` and :math:`U = \sum_j u_j`:

============== =================================================== ==========================================
agreement      :math:`\phi`                                        :math:`v_i`
============== =================================================== ==========================================
inner product  :math:`\frac1{S(S-1)}\sum_{i\ne j} G_i\cdot G_j`    :math:`\frac2{S(S-1)}(\Sigma - G_i)`
variance       :math:`-\frac1S\sum_i|G_i-\bar G|^2`                :math:`-\frac2S(G_i-\bar G)`
cosine         :math:`\frac1{S(S-1)}\sum_{i\ne j} u_i\cdot u_j`    :math:`\frac2{S(S-1)|G_i|}(U-(u_i\cdot U)u_i)`
============== =================================================== ==========================================

The inner product is the one of Shi et al., ICLR 2022, arXiv 2104.09937, equation 3 (there summed, here averaged over
pairs). It is unbounded above, so a loss that rewards it is unbounded below; the other two are bounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from torch_gradmatch._checks import check_choice, check_int, check_number
from torch_gradmatch.gradients.alignment import GradientAlignment

__all__ = [
    "AGREEMENTS",
    "Agreement",
    "RunningAgreement",
    "cosine",
    "fish_gamma",
    "inner_product",
    "running_agreement",
    "variance",
]

Agreement = Callable[[Sequence[Any]], Tensor]
Vector = Sequence[Tensor | None]  # one tensor for each parameter; None where a loss does not depend on it


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


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the real inner product of two gradients, in at least single precision."""
    products = []
    for x, y in zip(a, b, strict=True):
        wide = torch.promote_types(x.dtype, torch.float32)
        products.append((x.to(wide) * y.to(wide).conj()).real.sum())
    return torch.stack([p.to(products[0].device, products[0].dtype) for p in products]).sum()


def _all_leaves(gradients: Sequence[Any], fewest: int) -> list[list[Tensor]]:
    leaves = [tree_leaves(g) for g in gradients]
    if len(leaves) < fewest:
        raise ValueError(f"gradients should hold the gradients of at least {fewest} domains (got {len(leaves)})")
    return leaves


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
        gradients: The gradient of each of S >= 2 domains: tensors, or dictionaries, lists or tuples of tensors.

    Returns:
        Shape (); differentiable.

    Raises:
        ValueError: If there are fewer than two gradients.

    Example:
        >>> import torch
        >>> inner_product([torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0])])
        tensor(3.)
    """
    return _pairwise(_all_leaves(gradients, 2))


def variance(gradients: Sequence[Any]) -> Tensor:
    r"""Return minus the variance over domains, :math:`-\frac1S\sum_i|G_i-\bar G|^2`: at most zero.

    Args:
        gradients: As in :func:`inner_product`, S >= 1.

    Returns:
        Shape (); differentiable.

    Raises:
        ValueError: If there is no gradient.

    Example:
        >>> import torch
        >>> variance([torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])])
        tensor(-1.)
    """
    leaves = _all_leaves(gradients, 1)
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
        ValueError: If there are fewer than two gradients.

    Example:
        >>> import torch
        >>> cosine([torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0])])
        tensor(0.7071)
    """
    units = []
    for gradient in _all_leaves(gradients, 2):
        squared = _dot(gradient, gradient)
        # Chosen twice, so that the branch not taken cannot put NaN into the derivative.
        scale = torch.where(squared > 0, torch.where(squared > 0, squared, 1.0).rsqrt(), 0.0)
        units.append([g * scale.to(g.device) for g in gradient])
    return _pairwise(units)


# ------------------------------------------------------------------------------------------------------- running sums


class RunningAgreement(ABC):
    """An agreement that takes in one domain's gradient after the other and then hands out cotangents.

    Args:
        sums: Running sums over the same gradients, kept by the caller; each gradient is added here first.
        domains: S, the number of gradients to come.
    """

    def __init__(self, sums: GradientAlignment, domains: int) -> None:
        self.sums = sums
        self.domains = domains

    def add(self, gradient: Vector) -> None:  # noqa: B027  most need nothing but the sums
        """Take in one domain's gradient, before the sums do.

        Args:
            gradient: One tensor for each parameter, or None.
        """

    def numbers(self) -> list[Tensor]:
        """Return what :meth:`merge` needs of every rank.

        Returns:
            Numbers of which the sums over the ranks are taken.
        """
        return []

    def merge(self, between: Tensor, totals: Sequence[Tensor]) -> None:  # noqa: B027  most need nothing but the sums
        """Take in what the other ranks have taken in, after the sums have.

        Args:
            between: As :meth:`~torch_gradmatch.alignment.GradientAlignment.merge` returns it.
            totals: The sums of all ranks' :meth:`numbers`.
        """

    @abstractmethod
    def value(self) -> Tensor:
        """Return phi of all the gradients taken in.

        Returns:
            Shape ().
        """

    @abstractmethod
    def cotangent(self, domain: int, gradient: Vector) -> list[Tensor | None]:
        """Return v_i, the derivative of phi by one domain's gradient.

        Args:
            domain: i, from 0.
            gradient: That domain's gradient, once more: nothing but sums is kept of it.

        Returns:
            One tensor like each of the gradient's, None where that is None.
        """


class _InnerProduct(RunningAgreement):
    def value(self) -> Tensor:
        return self.sums.result().inner_product

    def cotangent(self, domain: int, gradient: Vector) -> list[Tensor | None]:  # noqa: ARG002
        return self.sums.combined(gradient, -1, 2 / (self.domains * (self.domains - 1)))


class _Variance(RunningAgreement):
    def __init__(self, sums: GradientAlignment, domains: int) -> None:
        super().__init__(sums, domains)
        self._squares: list[Tensor] = []

    def add(self, gradient: Vector) -> None:
        # Welford, 1962: the squared distances from the mean of all, by each gradient's distance from the mean so far.
        before = len(self.sums)
        if before:
            squared = self.sums.squared_distance(gradient, scale=1 / before)
            self._squares.append(squared * (before / (before + 1)))

    def numbers(self) -> list[Tensor]:
        return [torch.stack(self._squares).sum() if self._squares else self.sums.norm(0).new_zeros(())]

    def merge(self, between: Tensor, totals: Sequence[Tensor]) -> None:
        self._squares = [between, totals[0].to(between.dtype)]

    def value(self) -> Tensor:
        return -torch.stack(self._squares).sum() / self.domains

    def cotangent(self, domain: int, gradient: Vector) -> list[Tensor | None]:  # noqa: ARG002
        return self.sums.combined(gradient, -self.domains, 2 / self.domains**2)


class _Cosine(RunningAgreement):
    def __init__(self, sums: GradientAlignment, domains: int) -> None:
        super().__init__(sums, domains)
        if not sums.cosines:
            raise ValueError(
                "agreement='cosine' needs running sums with cosines: pass GradientAlignment() (got "
                "GradientAlignment(cosines=False))"
            )

    def value(self) -> Tensor:
        cosine = self.sums.result().cosine
        assert cosine is not None
        return cosine

    def cotangent(self, domain: int, gradient: Vector) -> list[Tensor | None]:
        norm = self.sums.norm(domain)
        reciprocal = torch.where(norm > 0, torch.where(norm > 0, norm, 1.0).reciprocal(), 0.0)
        along = self.sums.dot_unit_total(gradient) * reciprocal
        scale = 2 / (self.domains * (self.domains - 1)) * reciprocal
        return self.sums.combined(gradient, -along * reciprocal, scale, unit=True)


class _Held(RunningAgreement):
    """Any differentiable function of the gradients: all of them are held, and its derivative is autograd's."""

    def __init__(self, sums: GradientAlignment, domains: int, function: Agreement, like: Any) -> None:
        super().__init__(sums, domains)
        self._function = function
        self._zeros, self._structure = tree_flatten(like)
        self._gradients: list[list[Tensor]] = []
        self._differentiated: tuple[Tensor, list[Tensor]] | None = None

    def add(self, gradient: Vector) -> None:
        held = [torch.zeros_like(z) if g is None else g.detach() for g, z in zip(gradient, self._zeros, strict=True)]
        self._gradients.append(held)

    def _differentiate(self) -> tuple[Tensor, list[Tensor]]:
        """Return phi and its derivative by every tensor of every gradient, one after the other."""
        if self._differentiated is None:
            with torch.enable_grad():
                leaves = [[t.requires_grad_() for t in gradient] for gradient in self._gradients]
                value = self._function([tree_unflatten(gradient, self._structure) for gradient in leaves])
                self._check(value)
                every = [t for gradient in leaves for t in gradient]
                derivative = torch.autograd.grad(value.reshape(()), every, allow_unused=True, materialize_grads=True)
            self._differentiated = (value.detach().reshape(()), list(derivative))
            self._gradients = []
        return self._differentiated

    def _check(self, value: Any) -> None:
        name = getattr(self._function, "__name__", repr(self._function))
        if not isinstance(value, Tensor):
            raise TypeError(f"agreement {name} should return a scalar tensor (got {type(value).__name__})")
        if value.numel() != 1 or value.is_complex() or not value.is_floating_point():
            raise ValueError(
                f"agreement {name} should return a real scalar tensor (got shape {tuple(value.shape)}, {value.dtype})"
            )
        if not value.requires_grad:
            raise ValueError(
                f"agreement {name} returned a value that does not depend on the gradients in a differentiable way: "
                "was it detached or turned into a number?"
            )

    def value(self) -> Tensor:
        return self._differentiate()[0]

    def cotangent(self, domain: int, gradient: Vector) -> list[Tensor | None]:
        derivative = self._differentiate()[1]
        own = derivative[domain * len(self._zeros) : (domain + 1) * len(self._zeros)]
        return [None if g is None else v for g, v in zip(gradient, own, strict=True)]


AGREEMENTS: dict[str, Agreement] = {"inner_product": inner_product, "variance": variance, "cosine": cosine}
_RUNNING: list[tuple[Agreement, type[RunningAgreement]]] = [
    (inner_product, _InnerProduct),
    (variance, _Variance),
    (cosine, _Cosine),
]


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
    try:
        return AGREEMENTS[check_choice("agreement", agreement, AGREEMENTS)]
    except ValueError as error:
        raise ValueError(f"{error}, or a function of the list of gradients") from None


def running_agreement(agreement: str | Agreement, sums: GradientAlignment, domains: int, like: Any) -> RunningAgreement:
    """Make the running form of an agreement; that of the three named ones holds no gradients.

    Args:
        agreement: The name of one, or a function of the gradients.
        sums: Running sums, to which the caller adds each gradient after adding it here; for the cosine with cosines.
        domains: S.
        like: The parameters: a function gets the gradients in the same structure.

    Returns:
        The running form.

    Raises:
        ValueError: If the agreement is unknown, or is the cosine and the sums are without.
    """
    function = check_agreement(agreement)
    for named, running in _RUNNING:
        if function is named:
            return running(sums, domains)
    return _Held(sums, domains, function, like)
