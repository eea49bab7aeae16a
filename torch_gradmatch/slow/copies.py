"""Slow copies of many tensors, brought up to date in a few operations, however many tensors there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import is_
from typing import Any

import torch
from torch import Tensor

from torch_gradmatch.parallel.foreach import copy_all_, local_of, sharded_like

__all__ = ["SlowCopies", "check_copies", "slow_dtype"]

BUCKET = 1 << 25  # elements in a vector of wide copies; to compare it takes nine bytes more for each, for a moment


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
    if meta_dtype is None or meta_dtype == fast.dtype or not (fast.is_floating_point() or fast.is_complex()):
        return fast.dtype
    return torch.promote_types(fast.dtype, meta_dtype)


def check_copies(what: str, copies: object, originals: Mapping[Any, Tensor]) -> None:
    """Raise if copies read from a state dict are not those of some tensors.

    Args:
        what: What each is, for the message.
        copies: By position or name.
        originals: The tensors of which they should be copies.

    Raises:
        ValueError: Names the first that does not fit.
    """
    if not isinstance(copies, Mapping):
        raise ValueError(f"the state dict's {what}s are missing or malformed (got {copies!r:.80})")
    for key, value in copies.items():
        if key not in originals:
            raise ValueError(f"the state dict holds the {what} {key!r}, which does not exist here")
        like = originals[key]
        if not isinstance(value, Tensor) or _kind(value) != _kind(like):
            raise ValueError(f"the {what} {key!r} in the state dict should be a tensor like it (got {value!r:.80})")
        if value.shape != like.shape:
            shapes = f"shape {tuple(value.shape)} in the state dict and {tuple(like.shape)} here"
            raise ValueError(f"the {what} {key!r} has {shapes}")


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.layout, tensor.is_meta, tensor.is_floating_point(), tensor.is_complex()


class SlowCopies:
    """Slow copies of some tensors.

    A copy wider than its tensor keeps its extra digits wherever it still rounds to the tensor; elsewhere somebody
    changed the tensor since (loaded a checkpoint, did weight surgery) and that value is taken.

    Args:
        fast: The tensors to copy, any shapes, strides, dtypes and devices; of a ``DTensor`` each rank copies its shard.
        slow: For each an older copy, or None. Its value and, where it fits, its memory are used again.
        meta_dtype: As in :func:`slow_dtype`.

    Attributes:
        fast: The tensors.
        slow: The copies, up to date after :meth:`refresh`: each of the shape and device of its tensor, and with the
            placements of one that is sharded.
    """

    @torch.inference_mode(False)  # a copy made in inference mode could not be written to outside
    @torch.no_grad()
    def __init__(
        self, fast: Sequence[Tensor], slow: Sequence[Tensor | None], meta_dtype: torch.dtype | None = None
    ) -> None:
        self.fast = list(fast)
        self.slow = [_copy_like(f, s, slow_dtype(f, meta_dtype)) for f, s in zip(fast, slow, strict=True)]
        self._meta_dtype = meta_dtype
        self._kinds = [(t.shape, t.stride(), t.dtype, t.device) for t in fast]
        pairs = list(zip(self.fast, self.slow, strict=True))
        self._plain = [(f, s) for f, s in pairs if s.dtype == f.dtype]
        self._wide: list[_WideCopies] = []
        for indices in self._buckets():
            wide = _WideCopies([self.fast[i] for i in indices], [self.slow[i] for i in indices])
            self._wide.append(wide)
            for i, view in zip(indices, wide.slow, strict=True):
                self.slow[i] = sharded_like(view, self.fast[i])

    def _buckets(self) -> list[list[int]]:
        """Return which wide copies to put side by side: of one kind, and not too many elements."""
        buckets: dict[tuple[object, ...], list[int]] = {}
        elements: dict[tuple[object, ...], int] = {}
        for i, (f, s) in enumerate(zip(self.fast, self.slow, strict=True)):
            if s.dtype != f.dtype:
                kind = (f.device, f.dtype, s.dtype)
                elements[kind] = elements.get(kind, 0) + local_of(f).numel()
                buckets.setdefault((*kind, elements[kind] // BUCKET), []).append(i)
        return list(buckets.values())

    def fits(self, fast: Sequence[Tensor], meta_dtype: torch.dtype | None) -> bool:
        """Return whether these are copies of just these tensors, with the memory that they have now.

        Args:
            fast: The tensors to copy now.
            meta_dtype: As in :func:`slow_dtype`.

        Returns:
            False if the copies have to be set up anew.
        """
        return (
            len(fast) == len(self.fast)
            and all(map(is_, fast, self.fast))
            and meta_dtype == self._meta_dtype
            and self._kinds == [(t.shape, t.stride(), t.dtype, t.device) for t in fast]
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copies up to what the tensors hold now."""
        copy_all_([s for _, s in self._plain], [f for f, _ in self._plain])
        for wide in self._wide:
            wide.refresh()


def _copy_like(fast: Tensor, slow: Tensor | None, dtype: torch.dtype) -> Tensor:
    if slow is None or slow.shape != fast.shape or slow.dtype != dtype or slow.device != fast.device:
        return sharded_like(local_of(fast).detach().to(dtype, copy=True), fast)
    if slow.stride() != fast.stride():  # the kernel takes pairs of the same strides
        return sharded_like(torch.empty_like(local_of(fast), dtype=dtype).copy_(local_of(slow)), fast)
    return slow


class _WideCopies:
    """Copies of tensors of one dtype in another and wider one, side by side in one vector.

    To compare and to choose element by element takes several operations, which torch does not have for lists.
    """

    def __init__(self, fast: Sequence[Tensor], slow: Sequence[Tensor]) -> None:
        self._fast = list(fast)
        slow = [local_of(s) for s in slow]
        self._vector = torch.cat([_flat(s) for s in slow])
        begins = accumulate((s.numel() for s in slow), initial=0)
        self.slow = [
            self._vector.as_strided(s.shape, s.stride(), begin) for s, begin in zip(slow, begins, strict=False)
        ]
        self._views: dict[int, Tensor] = {}  # of tensors without gaps, as vectors; made once

    def refresh(self) -> None:
        fast = torch.cat([self._flat_of(i) for i in range(len(self._fast))])
        kept = self._vector.to(fast.dtype) == fast
        self._vector.copy_(torch.where(kept, self._vector, fast))

    def _flat_of(self, index: int) -> Tensor:
        """Return a tensor's elements in the order of its copy's."""
        fast, slow = local_of(self._fast[index]), self.slow[index]
        view = self._views.get(index)
        if view is not None and view.data_ptr() == fast.data_ptr():
            return view
        if fast.stride() == slow.stride():
            view = self._views[index] = _flat(fast.detach())
            return view
        return _flat(torch.empty_like(slow, dtype=fast.dtype).copy_(fast))


def _flat(dense: Tensor) -> Tensor:
    """View a tensor without gaps as a vector, in the order of memory."""
    return dense.as_strided((dense.numel(),), (1,), dense.storage_offset())
