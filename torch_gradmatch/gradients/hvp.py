r"""Hessian-vector products :math:`Hv` of one loss :math:`L(\theta)`, three ways.

``"reverse"``
    Double backward, :math:`\partial_\theta\,(G(\theta)\cdot v)`: exact; the graph of the gradient is alive. Takes every
    model whose operations have second derivatives, also with ``autograd.Function`` of the old style, checkpointing and
    recurrent layers.
``"forward"``
    Forward over reverse (Pearlmutter, 1994), the ``jvp`` of ``grad``: exact, no graph of the gradient; every operation
    needs a forward derivative. By the dual numbers that ``torch.func.jvp`` is made of and not by its wrapped tensors,
    in which dropout puts the same random numbers into other places than a plain forward pass does.
``"finite_difference"``
    :math:`(G(\theta + hv) - G(\theta - hv)) / 2h`: first derivatives only, for models that have no second one. Its
    error is of order :math:`h^2` and of order (rounding error of the gradient)/h; the step lies between the two,
    :math:`h = 0.3\,\varepsilon^{1/3} (1 + |\theta|) / |v|` with the dtype's machine epsilon :math:`\varepsilon`. With
    **ReLU** there is no such bound: the exact product leaves out the kinks and a difference crosses them, the more of
    them matter the smaller the step. Relative error of the matching term of five domains in fp32 (median of three
    seeds; MLP, small CNN, ResNet-18 with BatchNorm, Transformer): 0.03, 0.003, 0.01, 0.0009 with GELU and 0.09, 0.06,
    0.7, 0.1 with ReLU. A step three times as long has 0.3, 0.04, 0.1, 0.01 and 0.06, 0.05, 0.5, 0.08, one three times
    as short 0.003, 0.0004, 0.001, 0.0001 and 0.2, 0.08, 1, 0.2. Where autocast or a ``MixedPrecisionPolicy`` computes
    in half precision the parameters' dtype does not tell the rounding: the step is then too short (error 0.3 with a
    small smooth network in bfloat16), and ``SmoothFish(symmetric=True)``, whose step is ``inner_lr``, does better.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from torch_gradmatch._checks import check_choice
from torch_gradmatch.gradients.backward import by_autograd, by_backward, gradient_of
from torch_gradmatch.parallel.foreach import by_kind, clone_all, copy_all_
from torch_gradmatch.parallel.shards import is_sharded, total_norm

__all__ = [
    "HVPS",
    "Linearization",
    "check_hvp",
    "differentiable_attention",
    "first_order",
    "hessian_vector_product",
    "linearize",
]

Loss = Callable[[list[Tensor]], Tensor]
Vector = Sequence[Tensor | None]  # one tensor for each leaf; None where the loss does not depend on it
Check = Callable[..., None]  # (gradient, by backward, is_coarse=False)


def check_hvp(hvp: object, parameters: Iterable[Tensor]) -> str:
    """Return the kind of Hessian-vector product if it is one that there is for some parameters.

    Args:
        hvp: ``"reverse"``, ``"forward"`` or ``"finite_difference"``.
        parameters: By which a loss is differentiated.

    Returns:
        The kind.

    Raises:
        ValueError: If it is none of the three; or if a parameter is a ``DTensor``, as ``fully_shard`` makes them, and
            it is not the last.
    """
    kind: str = check_choice("hvp", hvp, HVPS)
    if kind != "finite_difference" and any(map(is_sharded, parameters)):
        raise ValueError(
            f"hvp={kind!r} takes second derivatives, and there are none through torch.distributed.fsdp.fully_shard, "
            "whose parameters are DTensors: use hvp='finite_difference', which needs first derivatives only, as do "
            "SmoothFish(symmetric=True) and Fish"
        )
    return kind


def hessian_vector_product(loss: Callable[[Any], Tensor], params: Any, vector: Any, hvp: str = "reverse") -> Any:
    r"""Return :math:`Hv`, the Hessian of a loss at some parameters times a vector.

    Args:
        loss: ``loss(params)`` returns a scalar.
        params: Tensors, or dictionaries, lists or tuples of tensors.
        vector: v, in the same structure.
        hvp: ``"reverse"``, ``"forward"`` or ``"finite_difference"``.

    Returns:
        Hv, in the same structure.

    Raises:
        RuntimeError: If the loss has an operation without the derivative that is needed.
        ValueError: If ``hvp`` is none of the three or the structures differ.

    Example:
        >>> import torch
        >>> theta, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> hessian_vector_product(lambda p: (p**3).sum() + p.prod(), theta, v)  # H = [[6 a, 1], [1, 6 b]]
        tensor([ 7., 13.])
    """
    leaves, structure = tree_flatten(params)
    parts, structure_of_vector = tree_flatten(vector)
    if structure != structure_of_vector:
        raise ValueError(f"vector should have the structure of params, {structure} (got {structure_of_vector})")
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with differentiable_attention(check_choice("hvp", hvp, HVPS)):
        products = linearize(hvp, lambda ls: loss(tree_unflatten(ls, structure)), leaves).product(parts)
    filled = [torch.zeros_like(leaf) if p is None else p for leaf, p in zip(leaves, products, strict=True)]
    return tree_unflatten(filled, structure)


def first_order(loss: Loss, leaves: list[Tensor], *, create_graph: bool = False) -> tuple[Tensor, list[Tensor | None]]:
    """Return the value and the gradient of a loss.

    Args:
        loss: Maps the leaves to a scalar.
        leaves: Tensors that require a gradient; their ``.grad`` is afterwards what it was.
        create_graph: Whether the gradient is to be differentiated again: by ``torch.autograd.grad`` then, and else by
            ``backward()``; see :func:`~torch_gradmatch.gradients.backward.gradient_of`.

    Returns:
        The loss, detached, and one dense tensor for each leaf, None where the loss does not depend on it; of a
        ``DTensor`` the local shard.
    """
    value = loss(leaves)
    return value.detach(), by_autograd(value, leaves, create_graph=True) if create_graph else gradient_of(value, leaves)


# How torch says that an operation cannot be differentiated again, or not in forward mode.
_MISSING_DERIVATIVE = re.compile(
    "is not implemented|not been implemented|once_differentiable|double backward"
    "|does not support it|must implement the jvp|different number of tensors was saved|donated buffer"
    "|incompatible with .grad",
    re.IGNORECASE,
)


class Linearization(ABC):
    """The gradient of one loss at one point, and its Hessian there as a product with vectors.

    Args:
        loss: Maps the leaves to a scalar; gives the same value each time.
        leaves: The point: tensors that require a gradient.
        check: Called once, where a gradient is differentiated again, with that one and the one by ``backward()``.
    """

    remedy = ""  # what to do if an operation lacks a derivative

    def __init__(self, loss: Loss, leaves: list[Tensor], check: Check | None = None) -> None:
        self.loss = loss
        self.leaves = leaves
        self.check = check

    def gradient(self) -> tuple[Tensor, list[Tensor | None]]:
        """Evaluate the loss and its gradient.

        Returns:
            As :func:`first_order`. The gradient may have a graph: it is to be read under ``torch.no_grad``.
        """
        return first_order(self.loss, self.leaves)

    @abstractmethod
    def product(self, vector: Vector) -> list[Tensor | None]:
        """Return the Hessian times a vector; to be called once.

        Args:
            vector: One tensor for each leaf; None counts as zero.

        Returns:
            One tensor for each leaf, None for zero.

        Raises:
            RuntimeError: If an operation lacks a derivative; the message says which and what to do.
        """

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Say what to do where torch says that an operation lacks a derivative."""
        try:
            yield
        except (RuntimeError, NotImplementedError) as error:
            if self.remedy and _MISSING_DERIVATIVE.search(str(error)):
                raise RuntimeError(f"{self.remedy} What failed: {str(error).splitlines()[0]}") from error
            raise


class _Reverse(Linearization):
    remedy = (
        'hvp="reverse" differentiates every operation of the model twice, and one has no second derivative: use '
        'hvp="finite_difference", which needs first derivatives only, or another implementation of the operation '
        "(for attention the MATH kernel of scaled_dot_product_attention, or an 'eager' one)."
    )

    def __init__(self, loss: Loss, leaves: list[Tensor], check: Check | None = None) -> None:
        super().__init__(loss, leaves, check)
        self._graph: list[Tensor | None] | None = None

    def gradient(self) -> tuple[Tensor, list[Tensor | None]]:
        value = self.loss(self.leaves)
        with self.explaining():
            self._graph = by_autograd(value, self.leaves, create_graph=True)
        if self.check is not None:
            self.check(self._graph, by_backward(value, self.leaves, retain_graph=True))
        return value.detach(), self._graph

    def take_graph(self) -> list[Tensor | None]:
        """Hand over the gradient with its graph."""
        if self._graph is None:
            self._graph = first_order(self.loss, self.leaves, create_graph=True)[1]
        graph, self._graph = self._graph, None
        return graph

    def product(self, vector: Vector) -> list[Tensor | None]:
        with self.explaining():
            return _derivative_of(self.take_graph(), vector, self.leaves)


def _derivative_of(gradient: Vector, vector: Vector, leaves: list[Tensor]) -> list[Tensor | None]:
    """Return the derivative of a gradient with graph, times a vector, by the leaves."""
    # Where the gradient does not depend on the parameters the second derivative is zero.
    outputs, cotangents = [], []
    for g, v in zip(gradient, vector, strict=True):
        if g is not None and g.requires_grad and v is not None:
            outputs.append(g)
            cotangents.append(v)
    if not outputs:
        return [None] * len(leaves)
    _inspect(outputs)
    products = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    return [p if p is None or p.layout == torch.strided else p.to_dense() for p in products]


def _inspect(outputs: Sequence[Tensor]) -> None:
    """Raise if a backward pass marked as once differentiable took part in a gradient; warn where torch errs itself.

    torch puts an error into the graph there, but one that leads to no leaf: a derivative by the leaves would not meet
    it and miss that part of the Hessian in silence.

    Args:
        outputs: The gradient, with its graph.

    Raises:
        RuntimeError: If there is one.
    """
    waiting = [output.grad_fn for output in outputs]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
        if node.name().startswith("WeightNormInterface"):
            _warn_of_weight_norm(outputs[0].device)
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)


def _warn_of_weight_norm(device: torch.device) -> None:
    if _weight_norm_is_wrong(device):
        warnings.warn(
            f"the model has weight_norm, whose second derivative torch {torch.__version__} takes wrongly on "
            f"{device.type!r}: the Hessian-vector products of its parameters are wrong. Use hvp='finite_difference' or "
            "SmoothFish(symmetric=True), which need first derivatives only, or write it out as g * v / v.norm()",
            stacklevel=2,
        )


@cache
def _weight_norm_is_wrong(device: torch.device) -> bool:
    """Try torch's second derivative of ``weight_norm`` on a matrix of four numbers (2.13 fails on a CPU)."""
    found = []
    with torch.enable_grad():
        for written_out in (True, False):
            v = torch.tensor([[1.0, 2.0], [3.0, 1.0]], device=device, requires_grad=True)
            g = torch.ones(2, 1, device=device)
            w = g * v / v.norm(dim=1, keepdim=True) if written_out else torch._weight_norm(v, g, 0)
            (gradient,) = torch.autograd.grad(w[:, 0].square().sum(), v, create_graph=True)
            found.append(torch.autograd.grad(gradient[:, 1].sum(), v)[0])
    return not torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-5)


@cache
def _prepare_forward_mode() -> None:
    """Let torch load its rules for forward mode, which warns of the deprecated means by which torch does so."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


class _Forward(Linearization):
    remedy = (
        'hvp="forward" takes forward derivatives of every operation of the model and of its backward pass, and one '
        'has none: use hvp="reverse", which asks less, or hvp="finite_difference", which needs first derivatives only.'
    )

    def __init__(self, loss: Loss, leaves: list[Tensor], check: Check | None = None) -> None:
        super().__init__(loss, leaves, check)
        self._by_backward: list[Tensor | None] | None = None
        self._value = torch.zeros(())

    def gradient(self) -> tuple[Tensor, list[Tensor | None]]:
        value, gradient = super().gradient()
        if self.check is not None:
            self._by_backward, self._value = gradient, value
        return value, gradient

    def product(self, vector: Vector) -> list[Tensor | None]:
        _prepare_forward_mode()
        with self.explaining(), forward_ad.dual_level():
            duals = [
                leaf if v is None else forward_ad.make_dual(leaf.detach().requires_grad_(), v.detach())
                for leaf, v in zip(self.leaves, vector, strict=True)
            ]
            # With create_graph some backward passes (SiLU's) are made of operations that have forward derivatives.
            both = [*duals, *self.leaves]
            loss = self.loss(duals)
            every = torch.autograd.grad(loss, both, allow_unused=True, create_graph=True)
            gradient, past = every[: len(duals)], every[len(duals) :]
            if any(g is not None for g, d, x in zip(past, duals, self.leaves, strict=True) if d is not x):
                raise RuntimeError(
                    'hvp="forward" puts other tensors into the model for a while, and the loss uses a parameter past '
                    'the model: use hvp="reverse"'
                )
            parts = [(None, None) if g is None else forward_ad.unpack_dual(g) for g in gradient]
            primals, tangents = zip(*parts, strict=True)
        # A loss that is not the same twice has another gradient, and is refused for that.
        same = torch.isclose(loss.detach(), self._value, rtol=2**-4) if self._by_backward is not None else False
        if self.check is not None and self._by_backward is not None and same:
            # Dual leaves are new tensors, without the parameters' hooks.
            self.check(primals, self._by_backward, is_coarse=True)
        return [None if t is None else t.detach() for t in tangents]


STEP = 0.3  # shorter is better for smooth networks, longer for those with kinks; see above


class _FiniteDifference(Linearization):
    def product(self, vector: Vector) -> list[Tensor | None]:
        step, reciprocal = self._step(vector)
        plus, minus = (self._gradient_at(vector, sign * step) for sign in (1, -1))
        product: list[Tensor | None] = [None] * len(self.leaves)
        for positions, (a, b) in by_kind(plus, minus):
            differences = torch._foreach_sub(a, b)
            torch._foreach_mul_(differences, reciprocal.to(a[0].device, a[0].dtype.to_real()))
            for position, difference in zip(positions, differences, strict=True):
                product[position] = difference
        return product

    def _gradient_at(self, vector: Vector, step: Tensor) -> list[Tensor | None]:
        """Return the gradient at the displaced leaves.

        They are moved in place and set back, so that everything that uses them sees it: a penalty on them past the
        model, and what checkpointing computes again in the backward pass.
        """
        moving = [x for x, v in zip(self.leaves, vector, strict=True) if v is not None]
        values = clone_all(moving)
        try:
            with torch.no_grad():
                for _, (xs, vs) in by_kind(self.leaves, vector):
                    moves = torch._foreach_mul(vs, step.to(xs[0].device, vs[0].dtype.to_real()))
                    torch._foreach_add_(xs, moves)
            torch.clear_autocast_cache()
            return first_order(self.loss, self.leaves)[1]
        finally:
            copy_all_(moving, values)
            torch.clear_autocast_cache()

    def _step(self, vector: Vector) -> tuple[Tensor, Tensor]:
        """Return h and 1/2h; both zero for a zero vector. Waits for no accelerator."""
        epsilon = max(torch.finfo(leaf.dtype).eps for leaf in self.leaves)
        size, length = _norm(self.leaves, self.leaves), _norm(vector, self.leaves)
        step = STEP * epsilon ** (1 / 3) * (1 + size) / torch.where(length > 0, length, 1.0)
        zero = torch.zeros_like(step)
        return torch.where(length > 0, step, zero), torch.where(length > 0, 0.5 / step, zero)


@torch.no_grad()
def _norm(vector: Vector, leaves: Sequence[Tensor]) -> Tensor:
    if any(map(is_sharded, leaves)):
        given = [(v, leaf) for v, leaf in zip(vector, leaves, strict=True) if v is not None]
        return total_norm([v for v, _ in given], [leaf for _, leaf in given])
    norms = [torch.stack(torch._foreach_norm(group)) for _, (group,) in by_kind(vector)]
    if not norms:
        return torch.zeros(())
    wide = torch.promote_types(norms[0].dtype, torch.float32)
    return torch.stack([n.to(norms[0].device, wide).square().sum() for n in norms]).sum().sqrt()


HVPS: dict[str, type[Linearization]] = {
    "reverse": _Reverse,
    "forward": _Forward,
    "finite_difference": _FiniteDifference,
}


def sum_of_products(linearizations: list[Linearization], vectors: list[list[Tensor | None]]) -> list[Tensor | None]:
    r"""Return :math:`\sum_i H_i v_i`, by double backward in one traversal of all graphs.

    Args:
        linearizations: Of several losses by the same leaves, emptied in the course.
        vectors: As many.

    Returns:
        As :meth:`Linearization.product`.
    """
    first = linearizations[0]
    if isinstance(first, _Reverse):
        graphs = [linearization.take_graph() for linearization in linearizations if isinstance(linearization, _Reverse)]
        linearizations.clear()
        with first.explaining():
            gradients, cotangents = ([part for parts in lists for part in parts] for lists in (graphs, vectors))
            return _derivative_of(gradients, cotangents, first.leaves)
    total: list[Tensor | None] = [None] * len(first.leaves)
    while linearizations:
        product = linearizations.pop().product(vectors.pop())
        both = by_kind(total, product)
        total = [b if a is None else a for a, b in zip(total, product, strict=True)]
        for positions, (a, b) in both:
            for position, part in zip(positions, torch._foreach_add(a, b), strict=True):
                total[position] = part
    return total


def linearize(hvp: str, loss: Loss, leaves: list[Tensor], check: Check | None = None) -> Linearization:
    """Make what gives a loss's gradient and Hessian-vector products at one point. Evaluates nothing yet.

    Args:
        hvp: ``"reverse"``, ``"forward"`` or ``"finite_difference"``.
        loss: Maps the leaves to a scalar.
        leaves: Tensors that require a gradient.
        check: As for :class:`Linearization`.

    Returns:
        The linearization.

    Raises:
        ValueError: If ``hvp`` is none of the three.
    """
    return HVPS[check_choice("hvp", hvp, HVPS)](loss, leaves, check)


def differentiable_attention(hvp: str) -> AbstractContextManager[Any]:
    """Choose the kernel of scaled dot product attention that has the derivatives needed.

    The default kernels have no second derivative; the MATH kernel has, at the price of holding the matrix of attention
    weights. It serves for first derivatives, too, where they must match: other kernels draw dropout in another order.

    Args:
        hvp: The kind of Hessian-vector product; finite differences need no second derivative and leave the choice be.

    Returns:
        A context manager.
    """
    return nullcontext() if hvp == "finite_difference" else sdpa_kernel(SDPBackend.MATH)
