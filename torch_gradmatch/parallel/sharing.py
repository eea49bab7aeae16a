r"""How several processes share the evaluations of one meta-iteration, and where their results meet.

============= ======================================== ==============================================================
kind          each rank has                            all-reduces of P elements in a meta-iteration
============= ======================================== ==============================================================
``"walks"``   batches of its own of all domains        the direction
``"domains"`` domains of its own                       :math:`\Sigma` (cosine: and U), :math:`\sum_i H_i v_i`
``"data"``    its part of the batch of every domain    each :math:`G_i`, :math:`\sum_i H_i v_i`
``"joined"``  its part; ``fully_shard`` or DDP         none here
============= ======================================== ==============================================================

All but the last average the buffers that moved. Ranks vote at the start, on what should be the same on all of them, and
once more before the step. A rank on which something goes wrong between the two takes part in the reductions that are
left, with zeros (:meth:`Sharing.drain`), so that nobody waits for it, and says so in the second vote.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from torch_gradmatch._checks import _DOMAINS as DOMAINS
from torch_gradmatch.parallel.foreach import is_sharded, local_of
from torch_gradmatch.parallel.ranks import Ranks, average_, average_buffers_, max_, sum_
from torch_gradmatch.parallel.together import Together

__all__ = ["Sharing", "check_ddp", "share", "without_reduction"]


def check_ddp(method: Any, together: Together) -> None:
    """Raise if a model in ``DistributedDataParallel`` does not go with how the method's ranks share the work.

    Args:
        method: The settings, with the model.
        together: The ranks.

    Raises:
        ValueError: If so; the message says what does.
    """
    name, ranks_of = type(method).__name__, dist.get_process_group_ranks
    if together.given is None:
        fits = not getattr(method, "bypasses_backward", False)
    else:
        fits = method.parallel == "data" and ranks_of(together.given) == ranks_of(method.model.process_group)
    if not fits:
        raise ValueError(
            "the model is in DistributedDataParallel, which is for ranks that evaluate parts of the same batches: pass "
            f"{name}(..., process_group=torch.distributed.group.WORLD, parallel='data'), if the model's process group "
            "is another one, that; or pass and call the plain module"
        )


@contextmanager
def without_reduction(method: Any) -> Iterator[None]:
    """Let ``DistributedDataParallel`` reduce nothing where the method reduces gradients by itself."""
    ddp = isinstance(method.model, DistributedDataParallel) and method.process_group is not None
    with method.model.no_sync() if ddp else nullcontext():
        yield


def share(
    together: Together,
    method: Any,
    settings: Mapping[str, object],
    optimizer: Optimizer,
    parameters: list[Tensor],
    buffers: Iterable[Tensor],
    batches: int,
    error: Exception | None,
) -> Sharing:
    """Vote on beginning a meta-iteration and say how ranks share it.

    Args:
        together: The ranks.
        method: The settings.
        settings: The same, as text that is the same on every rank.
        optimizer: The wrapped optimizer.
        parameters: The optimizer's.
        buffers: The model's.
        batches: How many this rank has.
        error: Why this rank cannot begin, if it cannot.

    Returns:
        How they share it.

    Raises:
        ValueError: On all of them, if they have other settings, numbers of batches or parameters; nothing has begun.
    """
    kind = "joined" if together.group is None else method.parallel
    facts = together.facts(optimizer, parameters, settings)
    facts |= {"shapes of buffers": [(tuple(b.shape), str(b.dtype)) for b in buffers]}
    if together.given is None or kind != "domains":
        facts["number of batches"] = batches
    names = DOMAINS.get()
    numbers = together.ranks.vote(error, facts, 2 * batches + (names is not None))
    together.check_same(parameters)
    sharing = Sharing(kind, together)
    if kind == "domains":
        size, counts = dist.get_world_size(sharing.group), [number // 2 for number in numbers]
        if counts != counts[:size] * (len(counts) // size):
            raise ValueError(
                f"batches should be as many on all ranks that hold shards of the same parameters (got {counts})"
            )
        rank = dist.get_rank(sharing.group)
        sharing.total, sharing.first = sum(counts[:size]), sum(counts[:rank])
        if all(number % 2 for number in numbers) and sharing.group is not None:
            parts = Ranks([sharing.group], torch.device("cpu")).gather(list(names or ()))
            sharing.names = tuple(name for part in parts for name in part)
    return sharing


class Sharing:
    """How ranks share one meta-iteration.

    Args:
        kind: See the table.
        together: The ranks.

    Attributes:
        kind: As given.
        group: Those whose results meet here, if they do.
        ranks: All that raise together what one of them does.
        in_step: Whether all ranks evaluate the same at the same time, so that none may evaluate a loss by itself.
        total: With ``"domains"``, how many domains all ranks have.
        first: Number of this rank's first domain among all.
        names: Of the domains of all ranks, if the ranks have others and know them.
    """

    def __init__(self, kind: str, together: Together) -> None:
        self.kind, self.total, self.first = kind, 0, 0
        self.group, self.ranks, self.in_step = together.group, together.ranks, together.in_step
        self.names: tuple[object, ...] | None = None
        self._left: list[list[tuple[Tensor, torch.dtype]]] = []  # what is still to be reduced in this evaluation

    def domains(self, number: int) -> int:
        """Return S, where this rank has so many domains."""
        return self.total if self.kind == "domains" else number

    def expect(self, *parts: list[tuple[Tensor, torch.dtype]], numbers: int = 0) -> None:
        """Note what is to be reduced in this evaluation.

        Args:
            *parts: In order: tensors of the same shapes, and the dtypes.
            numbers: How many go in :meth:`numbers`, which comes last.
        """
        last = [(parts[0][0][0].new_zeros(numbers), torch.float64)]
        self._left = [*parts, last] if self.group is not None else []

    def drain(self) -> None:
        """Take part in the reductions that are left, with zeros, so that no rank waits for this one."""
        while self._left:
            self.reduce_([torch.zeros_like(local_of(t), dtype=dtype) for t, dtype in self._left[0]], self.kind)

    def reduce_(self, tensors: Sequence[Tensor], *kinds: str) -> None:
        """Reduce tensors to the same bits on every rank: with ``"domains"`` their sums, else their means.

        Args:
            tensors: Overwritten.
            kinds: Those that reduce them; with another one nothing happens.
        """
        if self.kind == "joined" and self.kind in kinds:
            for group in self.ranks.groups:
                average_(tensors, group)
        elif self.kind in kinds:
            assert self.group is not None
            self._left.pop(0)
            (sum_ if self.kind == "domains" else average_)(tensors, self.group)

    def reduce_direction_(self, direction: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Reduce a direction; with ``"joined"`` the part of it that ``fully_shard`` or DDP does not."""
        self.reduce_(direction, "domains", "data")
        if any(map(is_sharded, parameters)):
            plain = [d for d, p in zip(direction, parameters, strict=True) if not is_sharded(p)]
            self.reduce_(plain, "joined")

    def numbers(
        self, like: Tensor, found: Sequence[Tensor], reached: Sequence[bool]
    ) -> tuple[list[Tensor], list[bool]]:
        """Return what was found of the domains of all ranks: one small all-reduce.

        Args:
            like: Says where.
            found: Of each of this rank's domains one number, shape (n,), several times.
            reached: Whether the losses of this rank depend on each parameter.

        Returns:
            The same of all domains, shape (S,), with ``"data"`` the means over the ranks; and whether any loss does.
        """
        if self.group is None:
            return list(found), list(reached)
        flags = torch.tensor(reached, dtype=torch.float64, device=like.device)
        placed = []
        for values in found if self.kind != "walks" else ():
            after = self.domains(len(values)) - self.first - len(values)
            placed.append(functional.pad(values.double(), (self.first, after)))
        vector = torch.cat([*placed, flags])
        self.reduce_([vector], self.kind)
        *merged, flags = vector.split([len(part) for part in (*placed, flags)])
        return merged or list(found), (flags > 0).tolist()

    def average_moved_(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """Average the buffers that moved on any rank, in their own dtypes; of integers the largest.

        Args:
            before: By name, as they were on every rank.
            after: As they are now; overwritten.
        """
        if self.group is None or not after:
            return
        has_moved = [name not in before or not torch.equal(before[name], b) for name, b in after.items()]
        moved = torch.tensor(has_moved, device=next(iter(after.values())).device)
        max_([moved], self.group)
        pairs = zip(after.values(), moved.tolist(), strict=True)
        average_buffers_([b for b, has_moved_anywhere in pairs if has_moved_anywhere], self.group)
