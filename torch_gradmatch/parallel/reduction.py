"""Sums and means over the ranks of a process group, of many tensors in few collectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from torch_gradmatch.parallel.collective import in_collective
from torch_gradmatch.parallel.foreach import by_kind, copy_all_, local_of

__all__ = ["average_", "max_", "sum_", "sums_of_numbers"]

BUCKET = 1 << 26  # bytes reduced in one collective: that much memory is taken beside the tensors


@torch.no_grad()
def sum_(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Replace tensors by their sums over the ranks of a group, the same bits on every rank.

    Args:
        tensors: As many, of the same shapes and dtypes, on every rank. Of a ``DTensor``, the local shard.
        group: The ranks.
    """
    _reduce_(tensors, group, dist.ReduceOp.SUM)


def max_(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Replace real tensors by their largest values over the ranks of a group.

    Args:
        tensors: As for :func:`sum_`; also booleans.
        group: The ranks.
    """
    flags = [t for t in tensors if t.dtype is torch.bool]
    _reduce_([t for t in tensors if t.dtype is not torch.bool], group, dist.ReduceOp.MAX)
    if flags:
        numbers = [t.to(torch.uint8) for t in flags]
        _reduce_(numbers, group, dist.ReduceOp.MAX)
        copy_all_(flags, numbers)


@torch.no_grad()
def _reduce_(tensors: Sequence[Tensor], group: ProcessGroup, operation: dist.ReduceOp.RedOpType) -> None:
    for bucket in _buckets([local_of(t) for t in tensors]):
        parts = [torch.view_as_real(t) if t.is_complex() else t for t in bucket]
        alone = len(parts) == 1 and parts[0].is_contiguous()
        vector = parts[0] if alone else torch.cat([part.reshape(-1) for part in parts])
        with in_collective():
            dist.all_reduce(vector, operation, group=group)
        if alone:
            continue
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


@torch.no_grad()
def sums_of_numbers(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Return the sums of some numbers over the ranks of a group, in one collective, in double precision.

    So wide that the mean of equal numbers in single precision is that number again, whatever the number of ranks.

    Args:
        tensors: Real ones of any dtypes and devices; as many, of the same shapes, on every rank.
        group: The ranks.

    Returns:
        New tensors on the first one's device.
    """
    if not tensors:
        return []
    vector = torch.cat([t.detach().to(tensors[0].device, torch.float64).reshape(-1) for t in tensors])
    if vector.numel():
        with in_collective():
            dist.all_reduce(vector, group=group)
    pieces = vector.split([t.numel() for t in tensors])
    return [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]


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
