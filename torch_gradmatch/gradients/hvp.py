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

**Fields that are no gradient.** A difference gives :math:`Jv` with the Jacobian J of what ``backward()`` returns, and
matching needs :math:`J^\mathsf T v`: the same only where that is the gradient of something. With gradient reversal it
is not: there :math:`w \cdot Jv \ne v \cdot Jw`, which is looked for at the first meta-iteration, with :math:`w = Jv`.
**Stop-gradients** (``detach()`` of something that depends on the parameters: teachers, BYOL, ``spectral_norm``) make
the three disagree: double backward and forward mode stop there again, a difference of gradients does not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from torch_gradmatch._checks import check_choice
from torch_gradmatch.gradients.backward import by_autograd, explain, gradient_of, reverse
from torch_gradmatch.parallel.foreach import (
    Vector,
    add_all_,
    clone_all,
    copy_all_,
    is_sharded,
    map_kinds,
    precision,
    squared_norm,
)

__all__ = [
    "HVPS",
    "check_hvp",
    "check_symmetric",
    "differentiable_attention",
    "finite_difference",
    "forward",
    "hessian_vector_product",
]

HVPS = ("reverse", "forward", "finite_difference")
Loss = Callable[[list[Tensor]], Tensor]


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
        vector: v, in the same structure and of the same shapes.
        hvp: ``"reverse"``, ``"forward"`` or ``"finite_difference"``.

    Returns:
        Hv, in the same structure.

    Raises:
        RuntimeError: If the loss has an operation without the derivative that is needed.
        ValueError: If ``hvp`` is none of the three or the structures differ.

    Example:
        >>> import torch
        >>> theta, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> loss = lambda p: (p**3).sum() + p.prod()
        >>> hessian_vector_product(loss, theta, v)  # H = [[6 a, 1], [1, 6 b]]
        tensor([ 7., 13.])
    """
    shapes = [tree_map(lambda t: tuple(t.shape), tree) for tree in (params, vector)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"vector should have the structure and shapes of params, {shapes[0]} (got {shapes[1]})")
    (leaves, structure), parts = tree_flatten(params), tree_flatten(vector)[0]
    check_hvp(hvp, leaves)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def at(point: list[Tensor]) -> Tensor:
        return loss(tree_unflatten(point, structure))

    try:
        with differentiable_attention(hvp):
            if hvp == "reverse":
                product = reverse(by_autograd(at(leaves), leaves, create_graph=True), parts, leaves)
            else:
                product = forward(at, leaves, parts)[0] if hvp == "forward" else finite_difference(at, leaves, parts)
    except (RuntimeError, NotImplementedError) as error:
        explain(error, hvp)
        raise
    found = [torch.zeros_like(leaf) if p is None else p for p, leaf in zip(product, leaves, strict=True)]
    return tree_unflatten([p.detach() for p in found], structure)


@cache
def _prepare_forward_mode() -> None:
    """Let torch load its rules for forward mode, which warns of the deprecated means by which torch does so."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def forward(loss: Loss, leaves: list[Tensor], vector: Vector) -> tuple[list[Tensor | None], Vector, Tensor]:
    """Return the product in forward mode; and the gradient and the loss that were found on the way."""
    _prepare_forward_mode()
    with forward_ad.dual_level():
        duals = [
            leaf if v is None else forward_ad.make_dual(leaf.detach().requires_grad_(), v.detach())
            for leaf, v in zip(leaves, vector, strict=True)
        ]
        # With create_graph some backward passes (SiLU's) are made of operations that have forward derivatives.
        value = loss(duals)
        every = torch.autograd.grad(value, [*duals, *leaves], allow_unused=True, create_graph=True)
        gradient, past = every[: len(duals)], every[len(duals) :]
        if any(g is not None for g, d, x in zip(past, duals, leaves, strict=True) if d is not x):
            raise RuntimeError(
                'hvp="forward" puts other tensors into the model for a while, and the loss uses a parameter past '
                'the model: use hvp="reverse"'
            )
        parts = [(None, None) if g is None else forward_ad.unpack_dual(g) for g in gradient]
        primals, tangents = zip(*parts, strict=True)
    return [None if t is None else t.detach() for t in tangents], primals, value.detach()


STEP = 0.3  # shorter is better for smooth networks, longer for those with kinks; see above


def finite_difference(loss: Loss, leaves: list[Tensor], vector: Vector, factor: float = STEP) -> list[Tensor | None]:
    """Return the product by a central difference of gradients. Synchronizes once.

    The leaves are moved in place and set back, so that everything that uses them sees it: a penalty on them past the
    model, and what checkpointing computes again in the backward pass.
    """
    given = [v for v in vector if v is not None]
    length = float(squared_norm(given)) ** 0.5 if given else 0.0
    if not 1e-15 < length < 1e15:  # then squares of its elements may leave the range of a dtype
        parts = [_whole(v.abs().max()) for v in given if v.numel()]
        largest = float(torch.stack([part.to(parts[0]) for part in parts]).max()) if parts else 0.0
        if largest == 0.0 or not math.isfinite(largest):
            return [None if v is None else v * (largest and math.nan) for v in vector]
        shorter = finite_difference(loss, leaves, [None if v is None else v / largest for v in vector], factor)
        return [None if p is None else p * largest for p in shorter]
    step = factor * precision(leaves) ** (1 / 3) * (1 + float(squared_norm(leaves)) ** 0.5) / length
    moved = [leaf for leaf, v in zip(leaves, vector, strict=True) if v is not None]
    values, found = clone_all(moved), []
    try:
        for sign in (1, -1):
            copy_all_(moved, values)
            add_all_(leaves, vector, sign * step)
            torch.clear_autocast_cache()
            found.append(gradient_of(loss(leaves), leaves))
    finally:
        copy_all_(moved, values)
        torch.clear_autocast_cache()
    with torch.no_grad():
        return map_kinds(lambda plus, minus: torch._foreach_mul(torch._foreach_sub(plus, minus), 0.5 / step), *found)


def check_symmetric(loss: Loss, leaves: list[Tensor], vector: Vector, product: Vector) -> None:
    r"""Raise if the field that is differentiated is no gradient: if :math:`w \cdot Jv \ne v \cdot Jw`, at w = Jv.

    Kinks (ReLU) make a product depend on its step; they are told apart by a step twice as long, and may hide it: with
    a gradient reversal of weight 1 all of eight small tanh networks were refused, of eight with ReLU one.

    Args:
        loss: As for :func:`finite_difference`.
        leaves: As there.
        vector: v.
        product: Jv.

    Raises:
        ValueError: If they differ by more than the error of differences may be.
    """
    longer = finite_difference(loss, leaves, vector, 2 * STEP)
    changes = [None if p is None or q is None else p - q for p, q in zip(product, longer, strict=True)]
    expected, found = _dot(product, product), _dot(vector, finite_difference(loss, leaves, product))
    allowed = 0.05 * expected + 8 * _dot(changes, changes)
    if abs(found - expected) > allowed:
        allowed += 8 * abs(found - _dot(vector, finite_difference(loss, leaves, product, 2 * STEP)))
    if abs(found - expected) > allowed:
        raise ValueError(
            "hvp='finite_difference' takes what backward() returns for the gradient of a function, and it is not: "
            f"w.Hv is {expected:.3g} and v.Hw is {found:.3g}. Something changes gradients on their way: a gradient "
            "reversal layer, a hook, a detach(). hvp='reverse', Fish and SmoothFish do not rest on it"
        )


def _dot(a: Vector, b: Vector) -> float:
    """Return the real inner product of two vectors; synchronizes."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return sum(float(_whole((x * y.conj()).sum()).real) for x, y in pairs)


def _whole(value: Any) -> Tensor:
    found: Tensor = value.full_tensor() if is_sharded(value) else value
    return found


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
