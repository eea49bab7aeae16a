r"""The slow copy :math:`\theta` of what an inner loop moves: parameters, and the model's buffers if they are followed.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, Algorithm 1. The official code
deep-copies the whole model in every meta-iteration; here the model's own parameters are the fast weights
:math:`\tilde\theta` and only one copy of those that can move is kept.

A forward pass moves buffers (BatchNorm's statistics) and may write to parameters (``max_norm``) before any optimizer is
called. So both are copied by ``zero_grad()`` and ``meta_step()`` while no inner loop is open, and buffers also when the
optimizer is wrapped and at the end of an inner loop. The last copy before the first step is the slow one; for a
BatchNorm that moved before ``zero_grad()`` and not since, because the forward pass came first, it is the one before.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_gradmatch.parallel.foreach import clone_all, copy_all_, find_nonfinite
from torch_gradmatch.parallel.shards import reshard
from torch_gradmatch.slow.buffers import Buffers
from torch_gradmatch.slow.copies import SlowCopies, check_copies, slow_dtype

__all__ = ["Slow"]

_OPEN: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Slow]] = weakref.WeakKeyDictionary()
"""Whose inner loop moves the buffers of a model."""


@dataclass
class _Kept:
    """Copies that stay for their memory, and for the digits that tensors round away."""

    of: dict[Tensor, Tensor] = field(default_factory=dict)
    copies: SlowCopies | None = None

    def take(self, tensors: Sequence[Tensor], meta_dtype: torch.dtype | None) -> None:
        """Copy what the tensors hold now."""
        if self.copies is None or not self.copies.fits(tensors, meta_dtype):
            self.copies = SlowCopies(tensors, [self.of.get(t) for t in tensors], meta_dtype)
            self.of = dict(zip(tensors, self.copies.slow, strict=True))
        self.copies.refresh()

    def follow(self, last: _Kept) -> None:
        """Take over the digits of other copies, for :meth:`take` to keep."""
        if self.of.keys() == last.of.keys() and all(s.shape == last.of[t].shape for t, s in self.of.items()):
            copy_all_(list(self.of.values()), [last.of[t] for t in self.of])
        else:
            self.of, self.copies = {t: s.clone() for t, s in last.of.items()}, None

    def load(self, pairs: Sequence[tuple[Tensor, Tensor]], meta_dtype: torch.dtype | None) -> None:
        """Take over copies from a checkpoint, given with their tensors."""
        self.of = {t: s.detach().to(t.device, slow_dtype(t, meta_dtype), copy=True) for t, s in pairs}
        self.copies = None

    def __getstate__(self) -> dict[str, Any]:
        return {"of": self.of, "copies": None}  # how they lie in memory is found out again


class Slow:
    """The slow weights and slow buffers of one optimizer.

    A parameter that neither requires a gradient nor has one cannot be moved by the inner loop, so it has no copy
    until that changes: a frozen backbone costs nothing.

    Args:
        model: The model whose buffers to follow, those that it has now; None for none.

    Attributes:
        model: As given.
        places: Where its buffers are.
        fast: The parameters of which there are copies, in the order in which they joined.
        is_open: Whether an inner loop is: from its first step until it is closed.
        is_shown: Whether we are inside :meth:`shown`.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.places = None if model is None else Buffers(model)
        self.fast: list[Tensor] = []
        self.is_open = self.is_shown = False
        self._weights, self._buffers, self._spare = _Kept(), _Kept(), _Kept()
        self._saved: list[tuple[Tensor | None, Tensor | None]] = []  # of each place the buffer and its slow value
        self._zeroed: tuple[list[tuple[Tensor | None, Tensor | None]], list[int | None]] | None = None
        self._constant: set[str] | None = None  # those that held infinity or NaN: there is nothing to interpolate
        self._marks: list[tuple[Tensor, int, int]] = []  # of the parameters when the buffers were copied

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_marks": [], "_zeroed": None}  # a copied tensor has another version

    @property
    def weights(self) -> list[Tensor]:
        """The slow weights, in the order of :attr:`fast`."""
        return [self._weights.of[p] for p in self.fast]

    @property
    def copies(self) -> Mapping[Tensor, Tensor]:
        """The slow weights by parameter, as the last inner loop left them if none is open."""
        return self._weights.of

    # ----------------------------------------------------------------------------------------------- how it begins

    def rest(self, parameters: Sequence[Tensor], meta_dtype: torch.dtype | None) -> None:
        """Copy the buffers, and note the parameters, where no inner loop is open.

        Args:
            parameters: All the optimizer's.
            meta_dtype: As in :func:`torch_gradmatch.slow.copies.slow_dtype`.
        """
        made = [p for p in parameters if not is_lazy(p)]
        self._marks = [(p, p._version, p.data_ptr() if type(p) is nn.Parameter else 0) for p in made]
        if self.places is None:
            return
        tensors = self.places.tensors()
        self._buffers.take([b for b in tensors if b is not None], meta_dtype)
        self._saved, self._zeroed = [(b, None if b is None else self._buffers.of[b]) for b in tensors], None
        if self._constant is None:
            floating = {n: b for n, b in self.places.named().items() if _is_floating(b) and not b.is_meta}
            self._constant = {list(floating)[i] for i in find_nonfinite(list(floating.values()))}

    def take(self, parameters: Sequence[Tensor], meta_dtype: torch.dtype | None, *, by_zero_grad: bool = False) -> None:
        """Copy everything: an inner loop may begin.

        Args:
            parameters: As for :meth:`rest`.
            meta_dtype: As for :meth:`rest`.
            by_zero_grad: Whether its first forward pass may have come before.
        """
        self.fast = [p for p in parameters if (p.requires_grad or p.grad is not None) and not is_lazy(p)]
        self._weights.take(self.fast, meta_dtype)
        before = self._saved
        if by_zero_grad:  # and not into the memory of the copy before
            self._buffers, self._spare = self._spare, self._buffers
            if meta_dtype is not None:
                self._buffers.follow(self._spare)
        self.rest(parameters, meta_dtype)
        if by_zero_grad and self.places is not None:
            self._zeroed = before, self.places.norms()

    def open(self, parameters: Sequence[Tensor], meta_dtype: torch.dtype | None) -> None:
        """Begin an inner loop with the step about to be taken, at the copies made before its first forward pass.

        If every single parameter was written to since, a checkpoint was loaded, and all is copied anew: a forward pass
        writes to a few at most.

        Args:
            parameters: As for :meth:`rest`.
            meta_dtype: As for :meth:`rest`.

        Raises:
            RuntimeError: If another optimizer is in an inner loop that moves the same buffers.
        """
        written = (p._version != v or (at and p.data_ptr() != at) for p, v, at in self._marks)
        if self._marks and all(written):
            self.take(parameters, meta_dtype)
        self.join(parameters, meta_dtype)
        if self._zeroed is not None and self.places is not None:
            saved, norms = self._zeroed
            came_first = [n is not None and n == now for n, now in zip(norms, self.places.norms(), strict=True)]
            pairs = zip(came_first, saved, self._saved, strict=True)
            self._saved, self._zeroed = [before if first else last for first, before, last in pairs], None
        if self.model is not None:
            others = _OPEN.get(self.model, lambda: None)
            if others() not in (None, self):
                gc.collect()  # one that is used no more may still be in a cycle
            if others() not in (None, self):
                raise RuntimeError(
                    "another GradMatch with the same model= is in an inner loop, and the buffers of that model can be "
                    "interpolated by one of them only: wrap both optimizers as one, GradMatch([first, second], "
                    "Fish(model=model)), or call interpolate() or rollback() of the other"
                )
            _OPEN[self.model] = weakref.ref(self)
        self.is_open = True

    def join(self, parameters: Sequence[Tensor], meta_dtype: torch.dtype | None) -> None:
        """Copy what has no copy yet: everything, or parameters that were unfrozen or added in the inner loop.

        Args:
            parameters: As for :meth:`rest`.
            meta_dtype: As for :meth:`rest`.
        """
        known = self._weights.of if self.fast else {}
        new = [p for p in parameters if p not in known]
        joining = [p for p in new if (p.requires_grad or p.grad is not None) and not is_lazy(p)]
        if not self.fast:
            self.fast = joining
            self._weights.take(joining, meta_dtype)
        elif joining:
            copies = SlowCopies(joining, [None] * len(joining), meta_dtype)
            self._weights.of.update(zip(joining, copies.slow, strict=True))
            self.fast += joining

    # ------------------------------------------------------------------------------------------------- how it ends

    def moving_buffers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the floating-point buffers that an interpolation is to move.

        Returns:
            Slow value and buffer by name. Left out is what keeps its latest value: a buffer whose shape changed, and
            one that held infinity or NaN (a mask, an observer's initial range), between which there is no way half.
        """
        assert self.places is not None
        now, slow = self.places.named(), self._slow_buffers()
        return {
            name: (slow[name], b)
            for name, b in now.items()
            if name in slow and b.shape == slow[name].shape and _is_floating(b) and name not in (self._constant or ())
        }

    def _slow_buffers(self) -> dict[str, Tensor]:
        names = () if self.places is None else self.places.names
        return {name: slow for name, (_, slow) in zip(names, self._saved, strict=True) if slow is not None}

    @torch.no_grad()
    def restore(self) -> None:
        """Set parameters back to the slow weights, also those whose shape was changed, and buffers to the slow ones."""
        self._write(self.weights)
        if self.places is not None:
            self.places.restore(self._saved)

    def _write(self, values: Sequence[Tensor]) -> None:
        """Let the parameters hold some values, also where their shape was changed, they are sharded or cast."""
        reshard(self.model, self.fast)
        for p, value in zip(self.fast, values, strict=True):
            if p.shape != value.shape:
                p.data = value.to(p.dtype, copy=True)
        copy_all_(self.fast, values)
        torch.clear_autocast_cache()

    def close(self) -> None:
        """End the inner loop; everything stays as it is."""
        self.fast, self.is_open = [], False
        if self.model is not None:
            _OPEN.pop(self.model, None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let parameters and buffers hold the slow values inside the block, if an inner loop is open."""
        if self.is_shown or not self.is_open:
            yield
            return
        reshard(self.model, self.fast, "slow_weights()")
        values, buffers = clone_all(self.fast), None if self.places is None else self.places.save()
        self.is_shown = True
        try:
            self.restore()
            yield
        finally:
            with torch.no_grad():
                self._write(values)
            if self.places is not None and buffers is not None:
                self.places.restore(buffers)
            self.is_shown = False

    # ------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self, parameters: Mapping[Any, Tensor]) -> dict[str, Any]:
        """Return what a checkpoint has to hold: all of it in an inner loop, else copies wider than their tensors.

        Args:
            parameters: All the optimizer's, by name.

        Returns:
            The copies themselves.
        """
        weights, buffers = self._weights.of, {} if self.places is None else self.places.named()
        shown = {n: (weights[p], p) for n, p in parameters.items() if p in weights}
        slow = {n: (s, buffers.get(n, s)) for n, s in self._slow_buffers().items()}
        kept = [{n: s for n, (s, t) in d.items() if self.is_open or s.dtype != t.dtype} for d in (shown, slow)]
        return {"is_open": self.is_open, "slow_weights": kept[0], "slow_buffers": kept[1]}

    def check_state_dict(self, state: Mapping[str, Any], parameters: Mapping[Any, Tensor]) -> None:
        """Raise if :meth:`load_state_dict` could not use a state.

        Args:
            state: What :meth:`state_dict` once returned.
            parameters: As for it.

        Raises:
            ValueError: Names the first entry that does not fit.
        """
        check_copies("slow weights of parameter", state.get("slow_weights"), parameters)
        buffers = {} if self.places is None else self.places.named()
        check_copies("slow value of buffer", state.get("slow_buffers"), buffers)
        missing = set(buffers) - set(state["slow_buffers"])
        if state["is_open"] and missing:
            raise ValueError(f"the state dict lacks the slow value of buffer {min(missing)!r}")

    def load_state_dict(
        self, state: Mapping[str, Any], parameters: Mapping[Any, Tensor], meta_dtype: torch.dtype | None
    ) -> None:
        """Continue from a state that :meth:`check_state_dict` found good. Its tensors are copied.

        Args:
            state: What :meth:`state_dict` once returned; empty if there is nothing of ours.
            parameters: As for it.
            meta_dtype: As for :meth:`rest`.
        """
        self.close()
        self._weights.load([(parameters[n], s) for n, s in state.get("slow_weights", {}).items()], meta_dtype)
        if self.places is not None:
            now = self.places.named()
            self._buffers.load([(now[n], s) for n, s in state.get("slow_buffers", {}).items()], meta_dtype)
        if state.get("is_open"):
            tensors = [] if self.places is None else self.places.tensors()
            self._saved = [(b, None if b is None else self._buffers.of.get(b)) for b in tensors]
            self.fast, self._marks = list(self._weights.of), []
            self.open((), meta_dtype)
        else:
            self.rest(list(parameters.values()), meta_dtype)


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
