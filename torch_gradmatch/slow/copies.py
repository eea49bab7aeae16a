"""Slow copies of many tensors, brought up to date in a few operations, however many tensors there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from operator import is_
from typing import Any

import torch
from torch import Tensor

from torch_gradmatch._foreach import by_kind, is_sharded, local_of
from torch_gradmatch.parallel.shards import sharded_like

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
    if meta_dtype is None or not (fast.is_floating_point() or fast.is_complex()):
        return fast.dtype
    return _promoted(fast.dtype, meta_dtype)


@cache
def _promoted(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return torch.promote_types(one, other)  # which goes through torch's dispatcher


def check_copies(what: str, copies: Mapping[Any, Any], originals: Mapping[Any, Tensor], *needed: Any) -> None:
    """Raise if copies read from a state dict are not those of some tensors.

    Args:
        what: What each is, for the message.
        copies: By position or name.
        originals: The tensors of which they should be copies.
        needed: Positions or names for which there has to be one.

    Raises:
        ValueError: Names the first that does not fit or is missing.
    """
    for key, value in copies.items():
        if key not in originals:
            raise ValueError(f"the state dict holds the {what} {key!r}, which does not exist here")
        if not isinstance(value, Tensor):
            raise ValueError(f"the {what} {key!r} in the state dict should be a tensor (got {type(value).__name__})")
        if value.shape != originals[key].shape:
            raise ValueError(
                f"the {what} {key!r} has shape {tuple(value.shape)} in the state dict and "
                f"{tuple(originals[key].shape)} here"
            )
    for key in needed:
        if key not in copies:
            raise ValueError(f"the state dict lacks the {what} {key!r}")


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

    def __init__(
        self, fast: Sequence[Tensor], slow: Sequence[Tensor | None], meta_dtype: torch.dtype | None = None
    ) -> None:
        self.fast = list(fast)
        self.slow = [_copy_like(f, s, slow_dtype(f, meta_dtype)) for f, s in zip(fast, slow, strict=True)]
        self._meta_dtype = meta_dtype
        self._kinds = _kinds(fast)
        plain = [(f, s) if s.dtype == f.dtype else (None, None) for f, s in zip(fast, self.slow, strict=True)]
        self._plain_pairs = ([f for f, _ in plain], [s for _, s in plain])
        self._plain = [lists for _, lists in by_kind(*self._plain_pairs)]
        self._is_sharded = any(map(is_sharded, fast))
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

    def fits(self, fast: Sequence[Tensor], slow: Sequence[Tensor | None], meta_dtype: torch.dtype | None) -> bool:
        """Return whether these are copies of just these tensors, and still the ones that their owner holds.

        Args:
            fast: The tensors to copy now.
            slow: The copies that the owner holds.
            meta_dtype: As in :func:`slow_dtype`.

        Returns:
            False if the copies have to be set up anew.
        """
        return (
            len(fast) == len(self.fast)
            and all(map(is_, fast, self.fast))
            and all(map(is_, slow, self.slow))
            and meta_dtype == self._meta_dtype
            and self._kinds == _kinds(fast)
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copies up to what the tensors hold now."""
        # fully_shard may give a parameter another local tensor, in its first forward pass for instance.
        for fast, slow in [lists for _, lists in by_kind(*self._plain_pairs)] if self._is_sharded else self._plain:
            torch._foreach_copy_(slow, fast)
        for wide in self._wide:
            wide.refresh()


def _kinds(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(t.shape, t.dtype, t.device) for t in tensors]


@torch.no_grad()
def _copy_like(fast: Tensor, slow: Tensor | None, dtype: torch.dtype) -> Tensor:
    if slow is None or slow.shape != fast.shape or slow.dtype != dtype or slow.device != fast.device:
        return sharded_like(local_of(fast).detach().to(dtype, copy=True), fast)
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
        self._flat_fast: list[Tensor | None] = [None] * len(self._fast)

    def refresh(self) -> None:
        fast = torch.cat([self._flat_of(i) for i in range(len(self._fast))])
        kept = self._vector.to(fast.dtype) == fast
        self._vector.copy_(torch.where(kept, self._vector, fast))

    def _flat_of(self, index: int) -> Tensor:
        """Return a tensor's elements in the order of its copy's, as a view that is made once."""
        fast, flat = local_of(self._fast[index]), self._flat_fast[index]
        if flat is not None and flat.data_ptr() == fast.data_ptr():
            return flat
        slow = self.slow[index]
        if fast.stride() == slow.stride():
            flat = self._flat_fast[index] = _flat(fast.detach())
            return flat
        return _flat(torch.empty_like(slow, dtype=fast.dtype).copy_(fast))  # a view with gaps


def _flat(dense: Tensor) -> Tensor:
    """View a tensor without gaps as a vector, in the order of memory."""
    return dense.as_strided((dense.numel(),), (1,), dense.storage_offset())
