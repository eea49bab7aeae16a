"""What the ranks that carry out a meta-iteration together vote on: that all go on, or that all raise."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors  # what torch's own DDP uses
from torch.distributed import DistError, ProcessGroup

from torch_gradmatch.parallel.foreach import by_kind, copy_all_, local_of

__all__ = ["Ranks", "average_", "average_buffers_", "check_process_group", "is_told", "max_", "sum_"]

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
_TOLD = "_torch_gradmatch_told"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
BUCKET = 1 << 26  # bytes reduced in one collective: that much memory is taken beside the tensors


def check_process_group(value: object) -> ProcessGroup | None:
    """Return ``value`` if it is None or a process group that this process is in.

    Args:
        value: What the caller passed.

    Returns:
        The value.

    Raises:
        TypeError: If it is anything else.
    """
    if value is not None and not isinstance(value, ProcessGroup):
        raise TypeError(
            "process_group should be a torch.distributed.ProcessGroup that this process is in, such as "
            "torch.distributed.group.WORLD (after init_process_group) or mesh.get_group(), or None "
            f"(got {type(value).__name__})"
        )
    return value


class Ranks:
    """The ranks that carry out a meta-iteration together.

    Args:
        groups: Process groups that this rank is in; what goes through each of them in turn has gone to all ranks. The
            dimensions of a mesh, for instance. Groups of one rank count for nothing.
        device: Where the parameters are.
    """

    votes = 0  # and blocks of this process, so that an error that is raised twice is told twice

    def __init__(self, groups: Sequence[ProcessGroup], device: torch.device) -> None:
        self.groups = [group for group in dict.fromkeys(groups) if dist.get_world_size(group) > 1]
        self._device = device

    def __bool__(self) -> bool:
        """Whether there is more than one."""
        return bool(self.groups)

    def vote(
        self, error: BaseException | None = None, facts: Mapping[str, object] | None = None, number: int = 0
    ) -> list[int]:
        """Wait for the other ranks; raise on all of them if one brings an error or other facts.

        Takes one collective of some bytes in each group, and more only where something is wrong. It waits for the
        other ranks, for an accelerator only if no group of them can talk through the host.

        Args:
            error: What went wrong on this rank. That of a loss comes first, because it leads to others elsewhere.
            facts: What should be the same on all ranks, with the names that the message is to use.
            number: Any that the other ranks should know.

        Returns:
            The numbers of all ranks, in the same order on every rank.

        Raises:
            BaseException: This rank's own error; or one of the same kind with the message of the first rank that has
                one; or ``ValueError`` that names the first fact that differs.
        """
        if not self:
            if error is not None:
                raise error
            return [number]
        told = {name: str(value) for name, value in (facts or {}).items()}
        Ranks.votes += 1
        with _in_collective():
            rows = self._gather_numbers([error is not None, zlib.crc32(repr(sorted(told.items())).encode()), number])
            if any(row[0] for row in rows) or len({row[1] for row in rows}) > 1:
                self._raise_together(error, told)
        return [row[2] for row in rows]

    @contextmanager
    def together(self, facts: Mapping[str, object] | None = None) -> Iterator[None]:
        """Let an error that one rank raises inside the block be raised on all, each at the end of its block.

        An error that all know, or one of a collective, is passed on as it is.

        Args:
            facts: As for :meth:`vote`.

        Yields:
            Once.
        """
        Ranks.votes += 1
        try:
            yield
        except Exception as error:
            if self and not is_told(error):
                try:
                    self.vote(error)
                except Exception as told:
                    if told.__cause__ is error:  # another rank's error came first and led to this one
                        raise
            raise  # also if the others cannot be reached: the error itself says more
        self.vote(None, facts)

    def check_same(self, parameters: Sequence[Tensor], group: ProcessGroup) -> None:
        """Raise on all ranks if those of a group do not hold the same parameters, bit for bit.

        Takes one pass over the parameters and two collectives of some bytes, and waits for an accelerator: for once in
        a training run. Only ``DistributedDataParallel`` and the like send one rank's parameters to the others.

        Args:
            parameters: The optimizer's, in order. Of a ``DTensor`` the local shard is compared.
            group: Those of these ranks that should hold the same.

        Raises:
            ValueError: If they do not; the message names the first parameter that differs, and says what to do.
        """
        facts: dict[str, object] = {"number of parameters": len(parameters)}
        for index, p in enumerate(map(local_of, parameters)):
            described = f"{p.dtype} of shape {tuple(p.shape)}, checksum {_checksum(p)}"
            facts[f"parameter number {index} of the optimizer"] = described
        members = Ranks([group], self._device)
        with self.together():
            try:
                members.vote(None, facts)
            except ValueError as error:
                raise ValueError(
                    f"{error}: build the model with the same torch.manual_seed() on every rank, load the same "
                    "checkpoint, or send one rank's parameters to all, for p in model.parameters(): "
                    "torch.distributed.broadcast(p.detach(), 0)"
                ) from error

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank passes, as ``torch.distributed.all_gather_object`` does, in the order of a vote."""
        values = [value]
        for group in self.groups:
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, values, group=group)
            values = [v for part in gathered for v in part]
        return values

    def _gather_numbers(self, row: Sequence[int]) -> list[list[int]]:
        table = torch.tensor([row], dtype=torch.int64)
        for group in self.groups:
            by_host = torch.device("cpu") in getattr(group, "_device_types", ())
            mine = table.to(torch.device("cpu") if by_host else self._device)
            every = mine.new_empty((dist.get_world_size(group) * len(mine), len(row)))
            _all_gather(every, mine, group=group)
            table = every
        return table.tolist()

    def _raise_together(self, error: BaseException | None, facts: dict[str, str]) -> None:
        order = getattr(error, "happened", math.inf)
        mine = [] if error is None else [(order, dist.get_rank(), type(error).__name__, str(error))]
        everyone = self.gather((mine, dist.get_rank(), facts))
        errors = sorted(told for of_rank, _, _ in everyone for told in of_rank)
        if errors:
            first, its_rank, kind, message = errors[0]
            if error is not None and order == first:
                raise error
            kinds = {k.__name__: k for k in (ValueError, TypeError, RuntimeError)}
            shown = message if kind in kinds else f"{kind}: {message}"
            raise kinds.get(kind, RuntimeError)(f"on rank {its_rank}: {shown}") from error
        (_, first_rank, first_facts), *others = everyone
        for _, rank, its in others:
            for name in {**first_facts, **its}:
                if first_facts.get(name) != its.get(name):
                    raise ValueError(
                        f"the ranks should have the same {name}, but it is {first_facts.get(name, 'missing'):.300} on "
                        f"rank {first_rank} and {its.get(name, 'missing'):.300} on rank {rank}"
                    )


@torch.no_grad()
def _checksum(tensor: Tensor) -> int:
    """Return the sum of the bits, read as integers and times odd numbers that tell their places."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    bits = real.detach().reshape(-1).view(_INTEGERS[real.element_size()])
    return int((bits.long() * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum())


def is_told(error: BaseException) -> bool:
    """Return whether an error is no news for the other ranks, or telling them would wait for ever.

    Args:
        error: What was raised.

    Returns:
        True for one that the latest vote raised, for one of a collective after it, and for what looks as if a backend
        raised it elsewhere.
    """
    if vars(error).get(_TOLD) == Ranks.votes or isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo/", "NCCL"))


@contextmanager
def _in_collective() -> Iterator[None]:
    """Mark the errors of a collective, after which no other may be tried: the other ranks know, or are out of reach."""
    try:
        yield
    except BaseException as error:
        vars(error)[_TOLD] = Ranks.votes
        raise


# ------------------------------------------------------------------------------------------------- sums over the ranks


@torch.no_grad()
def sum_(tensors: Sequence[Tensor], group: ProcessGroup, operation: Any = dist.ReduceOp.SUM) -> None:
    """Replace tensors by their sums over the ranks of a group, the same bits on every rank, in few collectives.

    Args:
        tensors: As many, of the same shapes and dtypes, on every rank. Of a ``DTensor``, the local shard.
        group: The ranks.
        operation: Another one than the sum.
    """
    for _, (same,) in by_kind([torch.view_as_real(t) if t.is_complex() else t for t in map(local_of, tensors)]):
        for parts in _take_tensors(same, BUCKET):
            alone = len(parts) == 1 and parts[0].is_contiguous()
            vector = parts[0] if alone else _flatten_dense_tensors(parts)
            if vector.numel():
                with _in_collective():
                    dist.all_reduce(vector, operation, group=group)
            if not alone:
                copy_all_(parts, _unflatten_dense_tensors(vector, parts))


def max_(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Replace real tensors by their largest values over the ranks of a group; booleans are true if one is."""
    wider = {torch.bool: torch.uint8, torch.int16: torch.int32}  # of which not every backend knows
    numbers = [t.to(wider.get(t.dtype, t.dtype)) for t in tensors]
    sum_(numbers, group, dist.ReduceOp.MAX)
    copy_all_(tensors, numbers)


@torch.no_grad()
def average_(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    """Replace floating-point tensors by their means over the ranks of a group, the same bits on every rank."""
    sum_(tensors, group)
    for _, (same,) in by_kind(tensors):
        torch._foreach_div_(same, group.size())


def average_buffers_(buffers: Sequence[Tensor], group: ProcessGroup) -> None:
    """Let buffers hold their means over the ranks of a group, each in its dtype; of integers the largest."""
    average_([b for b in buffers if b.is_floating_point() or b.is_complex()], group)
    max_([b for b in buffers if not (b.is_floating_point() or b.is_complex())], group)
