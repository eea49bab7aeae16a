"""Whether an inner loop of Fish has diverged: NaN or infinity where the meta-update would go."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from torch_gradmatch.slow.finite import holds_nonfinite, norms_of, read
from torch_gradmatch.wrapped.members import shown_name

__all__ = ["refuse_nonfinite"]


def refuse_nonfinite(
    weights: Sequence[Tensor],
    iterates: Sequence[Tensor],
    buffers: dict[str, tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    inner_steps: int,
) -> None:
    """Raise if a parameter, an iterate, or a buffer that was finite, holds NaN or infinity; wait once.

    Args:
        weights: The parameters in the inner loop.
        iterates: Of the optimizer.
        buffers: Slow value and buffer by name. What the slow value does not allow to interpolate is taken out.
        optimizer: The wrapped optimizer, for names.
        inner_steps: How many were taken.

    Raises:
        RuntimeError: If one does; the slow weights are intact.
    """
    slow, fast = [s for s, _ in buffers.values()], [f for _, f in buffers.values()]
    norms = iter(read(norms_of([*weights, *iterates, *slow, *fast])))
    diverged = [p for p in weights if holds_nonfinite(p, next(norms))]
    if diverged:
        first = _describe(diverged[0], optimizer)
        raise RuntimeError(
            _message(inner_steps, f"{len(diverged)} parameters hold NaN or infinity, the first is {first}")
        )
    broken = [value for value in iterates if holds_nonfinite(value, next(norms))]
    if broken:
        raise RuntimeError(_message(inner_steps, f"the state of {shown_name(optimizer)} holds NaN or infinity"))
    of_slow, of_fast = [next(norms) for _ in slow], list(norms)
    for name, slow_norm, fast_norm in zip(list(buffers), of_slow, of_fast, strict=True):
        if holds_nonfinite(buffers[name][0], slow_norm):
            del buffers[name]
        elif holds_nonfinite(buffers[name][1], fast_norm):
            raise RuntimeError(_message(inner_steps, f"the buffer {name!r} holds NaN or infinity"))


def _message(inner_steps: int, how: str) -> str:
    return (
        f"the inner loop diverged: after {inner_steps} inner steps {how}. The slow weights are intact: call rollback() "
        'to return to them; Fish(nonfinite="ignore") turns this check off'
    )


def _describe(parameter: Tensor, optimizer: Optimizer) -> str:
    """Return a parameter's name, if its group knows it, or else its number, and its shape."""
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    position = next(i for i, p in enumerate(dict.fromkeys(listed)) if p is parameter)
    shape = tuple(parameter.shape)
    return f"{names[position]!r} of shape {shape}" if names else f"number {position} of shape {shape}"
