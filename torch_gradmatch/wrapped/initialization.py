"""The step by which ``torch.distributed.checkpoint`` lets a new optimizer make its state, to load into that."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from torch_gradmatch.wrapped.members import members

__all__ = ["is_initialization"]


def is_initialization(optimizer: Optimizer, closure: Any) -> bool:
    """Return whether a step about to be taken is that one: it sets every lr and every gradient to zero before.

    A step of a new optimizer that is to move nothing, on gradients that are exactly zero: whoever takes it wants its
    state. A warm-up that begins with lr 0 has gradients.

    Args:
        optimizer: The wrapped optimizer.
        closure: What was passed to ``step``.

    Returns:
        Whether it is.
    """
    groups = optimizer.param_groups
    if closure is not None or any(member.state for member in members(optimizer).values()):
        return False
    if any(float(group.get("lr", 0.0)) != 0.0 for group in groups):
        return False
    trained = [p for group in groups for p in group["params"] if p.requires_grad]
    if not trained or any(p.grad is None or p.grad.is_sparse for p in trained):
        return False
    found = (p.grad.any() for p in trained)  # of a DTensor the answer is the same on every rank
    return not any(bool(a.full_tensor() if hasattr(a, "full_tensor") else a) for a in found)
