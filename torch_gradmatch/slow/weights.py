r"""The slow copy :math:`\theta` of the parameters that the inner loop leaves behind.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, Algorithm 1. The official code
deep-copies the whole model in every meta-iteration; here the model's own parameters are the fast weights
:math:`\tilde\theta` and only one copy of those that can move is kept.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from torch_gradmatch._checks import check_entry
from torch_gradmatch._foreach import copy_all_, local_of
from torch_gradmatch.parallel.shards import sharded_like
from torch_gradmatch.slow.copies import SlowCopies, check_copies, slow_dtype
from torch_gradmatch.slow.layout import SLOW

__all__ = ["SlowWeights"]


class SlowWeights:
    """The slow weights of one optimizer, kept in ``state[parameter]["slow"]``.

    A parameter that neither requires a gradient nor has one cannot be moved by the inner loop, so it has no copy
    until that changes: a frozen backbone costs nothing.

    Args:
        state: Where the copies live, keyed by parameter (``GradMatch.state``).

    Attributes:
        fast: The parameters of the open inner loop, in the order in which they joined it.
    """

    def __init__(self, state: MutableMapping[Tensor, Any]) -> None:
        self.state = state
        self.fast: list[Tensor] = []
        self._considered: list[Tensor] | None = None  # the optimizer's parameters at the last snapshot
        self._outside: list[Tensor] = []  # those that the inner loop cannot move so far
        self._copies: SlowCopies | None = None  # of the parameters that were there when the inner loop began

    def __getstate__(self) -> dict[str, Any]:
        # How the copies lie in memory is found out again; copied or unpickled, they would be others than the state's.
        return {**vars(self), "_copies": None}

    @property
    def slow(self) -> list[Tensor]:
        """The slow weights of the open inner loop, in the order of :attr:`fast`."""
        return [self.state[p][SLOW] for p in self.fast]

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

    def snapshot(self, parameters: list[Tensor], meta_dtype: torch.dtype | None) -> None:
        """Copy the present value of every parameter that can move and has not joined the inner loop yet.

        Called before each inner step: the first call of an inner loop copies everything, later ones what was unfrozen
        or added to the optimizer in between.

        Args:
            parameters: All the optimizer's parameters; the same list as before if they are the same.
            meta_dtype: As in :func:`torch_gradmatch.slow.copies.slow_dtype`.
        """
        if parameters is not self._considered:
            joined = set(self.fast)
            self._considered, self._outside = parameters, [p for p in parameters if p not in joined]
        if not self._outside:
            return
        joining = [p for p in self._outside if p.requires_grad or p.grad is not None]
        if not joining:
            return
        if len(joining) == len(self._outside):
            self._outside = []
        else:
            joined = set(joining)
            self._outside = [p for p in self._outside if p not in joined]
        old = [self.copy_of(p) for p in joining]
        copies = self._copies
        if copies is None or not copies.fits(joining, old, meta_dtype):
            copies = SlowCopies(joining, old, meta_dtype)
            for p, slow in zip(joining, copies.slow, strict=True):
                self.state[p][SLOW] = slow
        copies.refresh()
        if not self.fast:
            self._copies = copies  # most often the next inner loop begins with the same parameters
        self.fast += joining

    def close(self) -> None:
        """End the inner loop: the next snapshot copies everything anew."""
        self.fast = []
        self._considered = None

    @torch.no_grad()
    def rollback(self) -> None:
        """Set the fast weights back to the slow ones and end the inner loop."""
        copy_all_(self.fast, self.slow)
        self.close()

    @torch.no_grad()
    def complete(self, parameters: list[Tensor], meta_dtype: torch.dtype | None) -> None:
        """Let every parameter that can move have a copy, also where no inner loop holds one: its present value.

        Args:
            parameters: The optimizer's.
            meta_dtype: As in :func:`torch_gradmatch.slow.copies.slow_dtype`.
        """
        for p in parameters:
            if p.requires_grad and self.copy_of(p) is None:
                copy = local_of(p).detach().to(slow_dtype(p, meta_dtype), copy=True)
                self.state[p][SLOW] = sharded_like(copy, p)

    def state_dict(self, parameters: list[Tensor]) -> dict[str, Any]:
        """Return the slow weights by position.

        Args:
            parameters: Whose slow weights to save.

        Returns:
            ``"slow_weights"``, tensors that are not copied, and ``"held"``, the positions of those that belong to an
            inner loop in progress.
        """
        in_loop = set(self.fast)
        copies = {i: self.copy_of(p) for i, p in enumerate(parameters)}
        return {
            "slow_weights": {i: c for i, c in copies.items() if c is not None},
            "held": [i for i, p in enumerate(parameters) if p in in_loop],
        }

    @staticmethod
    def check_state_dict(state: dict[str, Any], parameters: list[Tensor]) -> None:
        """Check all that :meth:`load_state_dict` will read.

        Args:
            state: What :meth:`state_dict` once returned.
            parameters: Those to load it for.

        Raises:
            ValueError: If it cannot be loaded; the message names the first entry.
        """
        check_entry(state, "slow_weights", dict)
        check_entry(state, "held", list)
        if len(set(state["held"])) < len(state["held"]):
            raise ValueError(f"the state dict's 'held' should have each parameter once (got {state['held']!r:.80})")
        originals = dict(enumerate(parameters))
        check_copies("slow weights of parameter", state["slow_weights"], originals, *state["held"])

    def load_state_dict(self, state: dict[str, Any], parameters: list[Tensor], meta_dtype: torch.dtype | None) -> None:
        """Continue from a state that :meth:`check_state_dict` found good. Its tensors are copied.

        Args:
            state: What :meth:`state_dict` once returned.
            parameters: Those to load it for.
            meta_dtype: As in :func:`torch_gradmatch.slow.copies.slow_dtype`.
        """
        for entry in self.state.values():
            entry.pop(SLOW, None)
        for i, copy in state["slow_weights"].items():
            p = parameters[i]
            self.state[p][SLOW] = copy.detach().clone().to(p.device, slow_dtype(p, meta_dtype))
        self.close()
        self.fast = [parameters[i] for i in state["held"]]
