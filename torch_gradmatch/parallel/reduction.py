"""Sums and means over the ranks of a process group, of many tensors in few collectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from torch_gradmatch._foreach import by_kind, copy_all_, local_of

__all__ = ["average_", "sum_"]

BUCKET = 1 << 26  # bytes reduced in one collective: that much memory is taken beside the tensors


@torch.no_grad()
def sum_(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Replace tensors by their sums over the ranks of a group, the same bits on every rank.

    Args:
        tensors: As many, of the same shapes and dtypes, on every rank. Of a ``DTensor``, the local shard.
        group: The ranks.
    """
    for bucket in _buckets([local_of(t) for t in tensors]):
        parts = [torch.view_as_real(t) if t.is_complex() else t for t in bucket]
        if len(parts) == 1 and parts[0].is_contiguous():
            dist.all_reduce(parts[0], group=group)
            continue
        vector = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(vector, group=group)
        pieces = vector.split([part.numel() for part in parts])
        copy_all_(parts, [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)])


@torch.no_grad()
def average_(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Replace floating-point tensors by their means over the ranks of a group, the same bits on every rank.

    Args:
        tensors: As for :func:`sum_`.
        group: The ranks.
    """
    sum_(tensors, group)
    size = dist.get_world_size(group)
    for _, (same,) in by_kind(tensors):
        torch._foreach_div_(same, size)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Part tensors into those that go together: of one device and dtype, and not too many bytes."""
    for _, (same,) in by_kind(tensors):
        bucket: list[Tensor] = []
        size = 0
        for t in same:
            if bucket and size + t.nbytes > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(t)
            size += t.nbytes
        if size:
            yield bucket
