"""Whether all ranks begin with the same parameters."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from torch_gradmatch.parallel.foreach import local_of
from torch_gradmatch.parallel.ranks import Ranks

__all__ = ["check_same_parameters"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def check_same_parameters(parameters: Sequence[Tensor], group: ProcessGroup, ranks: Ranks) -> None:
    """Raise on all ranks if those of a group do not hold the same parameters, bit for bit.

    Takes one pass over the parameters and two collectives of some bytes, and waits for an accelerator: for once in a
    training run. Only ``DistributedDataParallel`` and the like send one rank's parameters to the others.

    Args:
        parameters: The optimizer's, in order. Of a ``DTensor`` the local shard is compared.
        group: The ranks that should hold the same.
        ranks: All that are to raise together, those of the group among them.

    Raises:
        ValueError: If they do not; the message names the first parameter that differs, and says what to do.
    """
    sums = [_checksum(local_of(p).detach()) for p in parameters]
    members, error = Ranks([group], parameters[0].device if parameters else torch.device("cpu")), None
    if len(set(members.vote(number=zlib.crc32(repr(sums).encode())))) > 1:
        error = ValueError(_difference(members.gather(sums)))
    ranks.vote(error)


@torch.no_grad()
def _checksum(tensor: Tensor) -> tuple[str, tuple[int, ...], int]:
    """Return dtype, shape and the sum of the bits, read as integers and times odd numbers that tell their places."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    bits = real.reshape(-1).view(_INTEGERS[real.element_size()])
    places = 2 * torch.arange(bits.numel(), device=bits.device) + 1
    return str(tensor.dtype), tuple(tensor.shape), int((bits.long() * places).sum())


def _difference(everyone: Sequence[Sequence[tuple[str, tuple[int, ...], int]]]) -> str:
    first = everyone[0]
    others = next(found for found in everyone if found != first)
    if len(others) != len(first):
        return f"the ranks should hold the same parameters, but one has {len(first)} of them and one {len(others)}"
    pairs = enumerate(zip(first, others, strict=True))
    position, mine, theirs = next((i, mine, theirs) for i, (mine, theirs) in pairs if mine != theirs)
    if mine[:2] != theirs[:2]:
        return (
            f"the ranks should hold the same parameters, but number {position} is {mine[0]} of shape {mine[1]} "
            f"on one and {theirs[0]} of shape {theirs[1]} on another"
        )
    return (
        f"the ranks should begin with the same parameters, but number {position} of the optimizer, of shape {mine[1]}, "
        "holds other values on some ranks than on the first: build the model with the same torch.manual_seed() on "
        "every rank, load the same checkpoint, or send one rank's parameters to all, for p in model.parameters(): "
        "torch.distributed.broadcast(p.detach(), 0)"
    )
