"""First derivatives by ``backward()`` into ``.grad``, as in any training loop, so that what hangs on it works.

``torch.autograd.grad`` passes by hooks that run once ``.grad`` is there, and by what accumulates into ``.grad`` itself:
reentrant checkpointing, reversible blocks. Through ``fully_shard``, whose forward passes use other tensors than the
parameters, it finds no way at all. Only a gradient that is differentiated again has to go by it, and
:func:`check_backward` tells whether it is the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from torch_gradmatch.gradients.repeats import precision
from torch_gradmatch.parallel.foreach import clone_all, in_transform, is_sharded, local_of
from torch_gradmatch.parallel.shards import placed_like

__all__ = ["by_autograd", "by_backward", "check_backward", "gradient_of"]

Vector = Sequence[Tensor | None]  # one tensor for each leaf; None where the loss does not depend on it


def gradient_of(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradient of a loss, by ``backward()`` wherever that is possible.

    It is not inside a transform of ``torch.func``, and not by tensors that were computed from others.

    Args:
        loss: Shape (); its graph is freed.
        leaves: Where to differentiate.

    Returns:
        As :func:`by_backward`.
    """
    if in_transform() or not all(leaf.is_leaf and leaf.requires_grad for leaf in leaves):
        return by_autograd(loss, leaves)
    return by_backward(loss, leaves)


def by_backward(loss: Tensor, leaves: Sequence[Tensor], *, retain_graph: bool = False) -> list[Tensor | None]:
    """Return the gradient of a loss, by ``backward()``.

    Other tensors that require a gradient and take part in the loss accumulate it in their ``.grad``.

    Args:
        loss: Shape ().
        leaves: Where to differentiate; their ``.grad`` is afterwards what it was.
        retain_graph: Whether to keep the graph of the loss.

    Returns:
        One dense tensor for each leaf, None where the loss does not depend on it; of a ``DTensor`` the local shard.
    """
    kept = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        loss.backward(retain_graph=retain_graph)
        found = [leaf.grad for leaf in leaves]
    finally:
        for leaf, gradient in zip(leaves, kept, strict=True):
            leaf.grad = gradient
    found = [None if g is None else local_of(placed_like(g, leaf)) for g, leaf in zip(found, leaves, strict=True)]
    if dist.is_available() and dist.is_initialized() and not any(map(is_sharded, leaves)):
        # DistributedDataParallel(gradient_as_bucket_view=True) has the next gradient in the same memory.
        copies = iter(clone_all([g for g in found if g is not None]))
        found = [None if g is None else next(copies) for g in found]
    return list(map(_dense, found))


def by_autograd(loss: Tensor, leaves: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor | None]:
    """Return the gradient of a loss, by ``torch.autograd.grad``.

    Args:
        loss: Shape (); its graph is freed unless that of the gradient is created.
        leaves: Where to differentiate.
        create_graph: Whether the gradient is to be differentiated again.

    Returns:
        One dense tensor for each leaf, None where the loss does not depend on it.
    """
    return list(map(_dense, torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)))


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
        if _length(g if e is None else e if g is None else g.detach() - e) > least + tolerance * length
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


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or gradient.layout == torch.strided else gradient.to_dense()


@torch.no_grad()
def _length(gradient: Tensor | None) -> float:
    if gradient is None:
        return 0.0
    return float(torch.linalg.vector_norm(gradient.to(torch.promote_types(gradient.dtype, torch.float32))))
