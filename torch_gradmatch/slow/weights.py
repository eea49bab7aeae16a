r"""The slow copy :math:`\theta` that the inner loop leaves behind: snapshot, interpolate, rollback.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, Algorithm 1. The official code
deep-copies the whole model in every meta-iteration; here the model's own parameters are the fast weights
:math:`\tilde\theta` and only one copy of those that can move is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from torch_gradmatch.slow import ops

__all__ = ["SlowWeights", "refresh", "slow_dtype"]

SLOW = "slow"


def slow_dtype(fast: Tensor, meta_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which to keep the slow copy of ``fast``: never narrower than ``fast`` itself.

    Args:
        fast: A parameter or buffer.
        meta_dtype: The dtype asked for, or None for the tensor's own.

    Returns:
        The dtype.

    Example:
        >>> import torch
        >>> slow_dtype(torch.zeros(1, dtype=torch.bfloat16), torch.float32)
        torch.float32
        >>> slow_dtype(torch.zeros(1, dtype=torch.float64), torch.float32)
        torch.float64
    """
    if meta_dtype is None or not (fast.is_floating_point() or fast.is_complex()):
        return fast.dtype
    return torch.promote_types(fast.dtype, meta_dtype)


@torch.no_grad()
def refresh(slow: Tensor | None, fast: Tensor, meta_dtype: torch.dtype | None) -> Tensor:
    """Bring a slow copy up to what ``fast`` holds now, reusing its memory where it fits.

    A slow copy wider than ``fast`` keeps its extra digits wherever it still rounds to ``fast``; elsewhere somebody
    changed ``fast`` since (loaded a checkpoint, did weight surgery) and that value is taken.

    Args:
        slow: The old copy, or None.
        fast: The tensor to follow, any shape.
        meta_dtype: As in :func:`slow_dtype`.

    Returns:
        The copy: ``slow`` itself, updated in place, or a new tensor of the shape, strides and device of ``fast``.
    """
    dtype = slow_dtype(fast, meta_dtype)
    if slow is None or slow.shape != fast.shape or slow.dtype != dtype or slow.device != fast.device:
        return fast.detach().to(dtype, copy=True)
    if dtype == fast.dtype:
        slow.copy_(fast)
    else:
        slow.copy_(torch.where(slow.to(fast.dtype) == fast, slow, fast.to(dtype)))
    return slow


class SlowWeights:
    """The slow weights of one optimizer, kept in ``state[parameter]["slow"]``.

    A parameter that neither requires a gradient nor has one cannot be moved by the inner loop, so it has no copy
    until that changes: a frozen backbone costs nothing.

    Args:
        state: Where the copies live, keyed by parameter (``GradMatch.state``).
        meta_dtype: As in :func:`slow_dtype`.
    """

    def __init__(self, state: MutableMapping[Tensor, Any], meta_dtype: torch.dtype | None) -> None:
        self.state = state
        self.meta_dtype = meta_dtype
        self._held: dict[Tensor, None] = {}  # the parameters of the open inner loop, in order

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters whose slow copy belongs to the open inner loop."""
        return list(self._held)

    def copy_of(self, parameter: Tensor) -> Tensor | None:
        """Return the slow copy of a parameter.

        Args:
            parameter: One of the optimizer's.

        Returns:
            A tensor of its shape, or None if it has no copy.
        """
        entry = self.state.get(parameter)
        copy: Tensor | None = None if entry is None else entry.get(SLOW)
        return copy

    def snapshot(self, parameters: Iterable[Tensor]) -> None:
        """Hold the present value of every parameter that can move and is not held yet.

        Called before each inner step: the first call of an inner loop copies everything, later ones add what was
        unfrozen or added to the optimizer in between.

        Args:
            parameters: All the optimizer's parameters.
        """
        joining = [p for p in parameters if p not in self._held and (p.requires_grad or p.grad is not None)]
        plain = [p for p in joining if self._fits(p)]
        if plain:
            torch._foreach_copy_([self.state[p][SLOW] for p in plain], [p.detach() for p in plain])
        for p in joining:
            if not self._fits(p):
                self.state[p][SLOW] = refresh(self.copy_of(p), p, self.meta_dtype)
        self._held.update(dict.fromkeys(joining))

    def _fits(self, parameter: Tensor) -> bool:
        copy = self.copy_of(parameter)
        return (
            copy is not None
            and copy.dtype == parameter.dtype == slow_dtype(parameter, self.meta_dtype)
            and copy.shape == parameter.shape
            and copy.device == parameter.device
        )

    def interpolate(self, weight: float) -> None:
        r"""Set slow and fast weights to :math:`\theta + \epsilon(\tilde\theta - \theta)` and close the loop.

        Args:
            weight: :math:`\epsilon` in (0, 1].
        """
        ops.interpolate_([self.state[p][SLOW] for p in self._held], list(self._held), weight)
        self._held.clear()

    @torch.no_grad()
    def rollback(self) -> None:
        """Set the fast weights back to the slow ones and close the loop."""
        for p in self._held:
            p.copy_(self.state[p][SLOW])
        self._held.clear()

    def hold(self, copies: Mapping[Tensor, Tensor], held: Iterable[Tensor]) -> None:
        """Take over copies read from a checkpoint.

        Args:
            copies: Slow copy of each parameter that has one.
            held: The parameters whose copies belong to an inner loop in progress.
        """
        for entry in self.state.values():
            entry.pop(SLOW, None)
        for p, copy in copies.items():
            self.state[p][SLOW] = copy.detach().clone().to(p.device, slow_dtype(p, self.meta_dtype))
        self._held = dict.fromkeys(held)

    def nonfinite_parameters(self) -> list[Tensor]:
        """Return the held parameters whose fast weights contain NaN or infinity.

        The sum of a tensor is finite only if every element is, so one pass without temporaries settles the usual
        case; only a tensor whose sum is not finite (it may just have overflowed) is looked at element by element.
        Waits for the accelerator once.

        Returns:
            The offending parameters, in order.
        """
        with torch.no_grad():
            held = [p for p in self._held if p.numel()]
            if not held:
                return []
            device = held[0].device
            sums_finite = torch.stack([torch.isfinite(p.sum()).to(device) for p in held]).tolist()
            suspects = [p for p, finite in zip(held, sums_finite, strict=True) if not finite]
            return [p for p in suspects if not bool(torch.isfinite(p).all())]
