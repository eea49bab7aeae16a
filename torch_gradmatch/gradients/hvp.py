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

First derivatives are taken by ``backward()`` into ``.grad``, as in any training loop, so that what hangs on it works.
``torch.autograd.grad`` passes by hooks that run once ``.grad`` is there, and by what accumulates into ``.grad`` itself:
reentrant checkpointing, reversible blocks. Through ``fully_shard``, whose forward passes use other tensors than the
parameters, it finds no way at all. Only a gradient that is differentiated again has to go by it, and
:func:`check_backward` tells whether it is the same one.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from torch_gradmatch._checks import check_choice
from torch_gradmatch.parallel.foreach import (
    Vector,
    add_all_,
    by_kind,
    clone_all,
    copy_all_,
    in_transform,
    is_sharded,
    precision,
    squared_norm,
)
from torch_gradmatch.parallel.shards import placed_like, sharded_like

__all__ = [
    "HVPS",
    "by_autograd",
    "check_backward",
    "check_hvp",
    "check_symmetric",
    "differentiable_attention",
    "explain",
    "gradient_of",
    "hessian_vector_product",
]

HVPS = ("reverse", "forward", "finite_difference")
Loss = Callable[[list[Tensor]], Tensor]


# ---------------------------------------------------------------------------------------------------- first derivatives


def gradient_of(loss: Tensor, leaves: Sequence[Tensor], *, retain_graph: bool = False) -> list[Tensor | None]:
    """Return the gradient of a loss, by ``backward()`` wherever that is possible.

    It is not inside a transform of ``torch.func``, and not by tensors that were computed from others. Other tensors
    that require a gradient and take part in the loss accumulate it in their ``.grad``.

    Args:
        loss: Shape ().
        leaves: Where to differentiate; their ``.grad`` is afterwards what it was.
        retain_graph: Whether to keep the graph of the loss.

    Returns:
        One dense tensor for each leaf, None where the loss does not depend on it; a ``DTensor`` has the placements of
        its leaf.
    """
    if in_transform() or not all(leaf.is_leaf and leaf.requires_grad for leaf in leaves):
        return by_autograd(loss, leaves)
    kept = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        loss.backward(retain_graph=retain_graph)
        found = [leaf.grad for leaf in leaves]
    finally:
        for leaf, gradient in zip(leaves, kept, strict=True):
            leaf.grad = gradient
    if any(map(is_sharded, leaves)):
        return [None if g is None else placed_like(g, leaf) for g, leaf in zip(found, leaves, strict=True)]
    if dist.is_available() and dist.is_initialized():
        # DistributedDataParallel(gradient_as_bucket_view=True) has the next gradient in the same memory.
        copies = iter(clone_all([g for g in found if g is not None]))
        found = [None if g is None else next(copies) for g in found]
    return [g if g is None or g.layout is torch.strided else g.to_dense() for g in found]


def by_autograd(loss: Tensor, leaves: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor | None]:
    """Return the gradient of a loss, by ``torch.autograd.grad``, which frees its graph unless one is created."""
    found = torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)
    return [g if g is None or g.layout is torch.strided else g.to_dense() for g in found]


@torch.no_grad()
def check_backward(gradient: Vector, expected: Vector, names: Sequence[str], *, is_coarse: bool = False) -> None:
    """Raise if a gradient that is differentiated again is another one than ``backward()`` leaves in ``.grad``.

    A difference counts if it is more than rounding: more than the root of the machine epsilon times the length of the
    parameter's gradient, and than 64 epsilons times the length of the whole; where it may be that of half precision, a
    sixteenth and 1/256.

    Args:
        gradient: The one that is differentiated again.
        expected: By ``backward()``.
        names: Of the parameters, for the message.
        is_coarse: Whether both were computed by other operations, which autocast may have rounded to half precision.

    Raises:
        ValueError: If one differs; the message names the parameter, what may be the cause and what to do.
    """
    given = [g for g in (*gradient, *expected) if g is not None]
    epsilon = precision(given) if given else 0.0
    lengths = [_length(g) for g in expected]
    least = (2**-8 if is_coarse else 64 * epsilon) * sum(length**2 for length in lengths) ** 0.5
    tolerance = 2**-4 if is_coarse else epsilon**0.5
    different = [
        name
        for name, g, e, length in zip(names, gradient, expected, lengths, strict=True)
        if _length(g if e is None else e if g is None else g - e) > least + tolerance * length
    ]
    if different:
        others = f" (and of {len(different) - 1} more)" if len(different) > 1 else ""
        raise ValueError(
            f"the gradient of parameter {different[0]!r}{others} by backward() is another one than by "
            "torch.autograd.grad, which IDGM with second derivatives needs. Something changes it on its way into "
            ".grad, or adds to it there: a hook (register_post_accumulate_grad_hook; with hvp='forward' register_hook, "
            "too), checkpointing with use_reentrant=True (use_reentrant=False works), a reversible block, "
            "DistributedDataParallel (process_group=..., parallel='data' do its work). hvp='finite_difference', "
            "SmoothFish and Fish go by backward()"
        )


def _length(vector: Tensor | None) -> float:
    return 0.0 if vector is None else float(squared_norm([vector]) ** 0.5)


# --------------------------------------------------------------------------------------------------- second derivatives


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
        >>> hessian_vector_product(lambda p: (p**3).sum() + p.prod(), theta, v)  # H = [[6 a, 1], [1, 6 b]]
        tensor([ 7., 13.])
    """
    leaves, structure = tree_flatten(params)
    parts, structure_of_vector = tree_flatten(vector)
    shapes, given = ([tuple(t.shape) for t in tensors] for tensors in (leaves, parts))
    if structure != structure_of_vector or shapes != given:
        raise ValueError(
            f"vector should have the structure and shapes of params, {structure} {shapes} (got {structure_of_vector} "
            f"{given})"
        )
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


REMEDIES = {
    "reverse": 'hvp="reverse" differentiates every operation of the model twice, and one has no second derivative: use '
    'hvp="finite_difference", which needs first derivatives only, or another implementation of the operation '
    "(for attention the MATH kernel of scaled_dot_product_attention, or an 'eager' one).",
    "forward": 'hvp="forward" takes forward derivatives of every operation of the model and of its backward pass, and '
    'one has none: use hvp="reverse", which asks less, or hvp="finite_difference", which needs first derivatives only.',
}
# How torch says that an operation cannot be differentiated again, or not in forward mode.
MISSING = re.compile(
    "is not implemented|not been implemented|once_differentiable|double backward"
    "|does not support it|must implement the jvp|different number of tensors was saved|donated buffer"
    "|incompatible with .grad",
    re.IGNORECASE,
)


def explain(error: Exception, hvp: str) -> None:
    """Raise a ``RuntimeError`` that says what to do where torch says that an operation lacks a derivative."""
    if hvp in REMEDIES and MISSING.search(str(error)):
        raise RuntimeError(f"{REMEDIES[hvp]} What failed: {str(error).splitlines()[0]}") from error


def reverse(gradient: Vector, vector: Vector, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the derivative of a gradient with graph, times a vector, by the leaves; also of several in a row."""
    pairs = [
        (g, v) for g, v in zip(gradient, vector, strict=True) if g is not None and g.requires_grad and v is not None
    ]
    if not pairs:
        return [None] * len(leaves)  # the gradient depends on no parameter
    outputs, cotangents = zip(*pairs, strict=True)
    _inspect(outputs)
    products = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    return [p if p is None or p.layout is torch.strided else p.to_dense() for p in products]


def _inspect(outputs: Sequence[Tensor]) -> None:
    """Raise if a backward pass marked as once differentiable took part in a gradient; warn where torch errs itself.

    torch puts an error into the graph there, but one that leads to no leaf: a derivative by the leaves would not meet
    it and miss that part of the Hessian in silence.

    Raises:
        RuntimeError: If there is one.
    """
    waiting = [output.grad_fn for output in outputs]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        name = node.name()
        if name == "torch::autograd::Error":
            raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
        if name.startswith("WeightNormInterface") and _weight_norm_is_wrong(device := outputs[0].device):
            warnings.warn(
                f"the model has weight_norm, whose second derivative torch {torch.__version__} takes wrongly on "
                f"{device.type!r}: the Hessian-vector products of its parameters are wrong. Use "
                "hvp='finite_difference' or SmoothFish(symmetric=True), which need first derivatives only, or write it "
                "out as g * v / v.norm()",
                stacklevel=2,
            )
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        waiting.extend(new)


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
    values, found = clone_all([leaf for leaf, v in zip(leaves, vector, strict=True) if v is not None]), []
    try:
        for sign in (1, -1):
            with torch.no_grad():
                copy_all_([leaf for leaf, v in zip(leaves, vector, strict=True) if v is not None], values)
                add_all_(leaves, vector, sign * step)
            torch.clear_autocast_cache()
            found.append(gradient_of(loss(leaves), leaves))
    finally:
        with torch.no_grad():
            copy_all_([leaf for leaf, v in zip(leaves, vector, strict=True) if v is not None], values)
        torch.clear_autocast_cache()
    product: list[Tensor | None] = [None if plus is None else minus for plus, minus in zip(*found, strict=True)]
    with torch.no_grad():
        for positions, (plus, minus) in by_kind(*found):
            differences = torch._foreach_sub(plus, minus)
            torch._foreach_mul_(differences, 0.5 / step)
            for position, part in zip(positions, differences, strict=True):
                product[position] = sharded_like(part, leaves[position])
    return product


def check_symmetric(loss: Loss, leaves: list[Tensor], vector: Vector, product: Vector) -> None:
    r"""Raise if the field that is differentiated is no gradient: if :math:`w \cdot Jv \ne v \cdot Jw`, at w = Jv.

    Kinks (ReLU) make a product depend on its step; they are told apart by a step twice as long, and may hide it: with
    a gradient reversal of weight 1 all of eight small tanh networks were refused, of eight with ReLU two.

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
    if abs(found - expected) > 0.05 * expected + 8 * _dot(changes, changes):
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
