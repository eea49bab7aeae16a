"""First derivatives by ``backward()``, and double backward of those that are differentiated again.

First derivatives are taken by ``backward()`` into ``.grad``, as in any training loop, so that what hangs on it works.
``torch.autograd.grad`` passes by hooks that run once ``.grad`` is there, and by what accumulates into ``.grad`` itself:
reentrant checkpointing, reversible blocks. Through ``fully_shard``, whose forward passes use other tensors than the
parameters, it finds no way at all. Only a gradient that is differentiated again has to go by it, and
:func:`check_backward` tells whether it is the same one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_gradmatch.parallel.foreach import Vector, clone_all, in_transform, is_sharded, precision, squared_norm

__all__ = ["by_autograd", "check_backward", "check_differentiable", "explain", "gradient_of", "reverse"]


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
        pairs: Any = zip(found, leaves, strict=True)
        return [g.redistribute(p.device_mesh, p.placements) if g is not None and is_sharded(g) else g for g, p in pairs]
    if dist.is_available() and dist.is_initialized():
        # DistributedDataParallel(gradient_as_bucket_view=True) has the next gradient in the same memory.
        found = clone_all(found)
    return [g if g is None or g.layout is torch.strided else g.to_dense() for g in found]


def by_autograd(
    loss: Tensor, leaves: Sequence[Tensor], *, create_graph: bool = False, retain_graph: bool = False
) -> list[Tensor | None]:
    """Return the gradient of a loss, by ``torch.autograd.grad``, which frees its graph unless one is created."""
    keeps = create_graph or retain_graph
    found = torch.autograd.grad(loss, leaves, retain_graph=keeps, create_graph=create_graph, allow_unused=True)
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
    epsilon = precision([g for g in (*gradient, *expected) if g is not None] or [torch.zeros(())])
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


REMEDIES = {
    "reverse": 'hvp="reverse" differentiates every operation of the model twice, and one has no second derivative: use '
    'hvp="finite_difference", which needs first derivatives only, or another implementation of the operation '
    "(for attention the MATH kernel of scaled_dot_product_attention, or an 'eager' one).",
    "forward": 'hvp="forward" takes forward derivatives of every operation of the model and of its backward pass, and '
    'one has none: use hvp="reverse", which asks less, or hvp="finite_difference", which needs first derivatives only.',
    "matched": "matched=... differentiates twice what lies above the matched parameters, and an operation there has no "
    "second derivative, or is compiled: match parameters above it, the last layer for instance. If all is compiled "
    "below it, leave out keep_graphs=True and one_pass=True or pass gamma=, so that no compiled graph is traversed "
    "twice.",
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
    """Return the derivative of a gradient with graph, times a vector, by the leaves; also of several in a row.

    Args:
        gradient: G, with its graph.
        vector: v.
        leaves: Where to differentiate.

    Returns:
        One dense tensor for each leaf, None where G does not depend on it.

    Raises:
        RuntimeError: If a function whose second derivative is missing, or wrong, took part in the gradient.
    """
    pairs = [
        (g, v) for g, v in zip(gradient, vector, strict=True) if g is not None and g.requires_grad and v is not None
    ]
    if not pairs:
        return [None] * len(leaves)  # the gradient depends on no parameter
    outputs, cotangents = zip(*pairs, strict=True)
    check_differentiable(outputs)
    products = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    return [p if p is None or p.layout is torch.strided else p.to_dense() for p in products]


def check_differentiable(outputs: Sequence[Tensor], matched: Sequence[Tensor] | None = None) -> None:
    """Raise if a gradient cannot be differentiated again, of which torch would say nothing.

    Where a function is marked as once differentiable torch puts an error into the graph, but one that leads to no leaf:
    a derivative by the leaves would not meet it and miss that part of the Hessian in silence.

    Args:
        outputs: Gradients with graph, or made of them.
        matched: The parameters by which they were taken; None for all.

    Raises:
        RuntimeError: If so.
    """
    seen: set[Any] = {None}
    waiting: set[Any] = {output.grad_fn for output in outputs}
    while waiting := waiting - seen:
        seen |= waiting
        if "torch::autograd::Error" in {node.name() for node in waiting}:
            raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
        following = {node: [after for after, _ in node.next_functions] for node in waiting}
        for node, others in following.items():
            held = [getattr(after, "variable", None) for after in others]
            twice = matched is None or any(v is p for v in held if v is not None for p in matched)
            if twice and node.name().startswith("WeightNormInterface"):
                raise RuntimeError(
                    "weight_norm, whose double backward torch takes wrongly (2.13, on a CPU): written out as "
                    "g * v / v.norm() it has the right one"
                )
        waiting = {after for others in following.values() for after in others}
