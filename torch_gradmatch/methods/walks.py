r"""Walks on several ranks: every rank walks through the domains by itself, and the meta-update goes to their mean.

.. math:: \theta \leftarrow \theta + \epsilon\,\Bigl(\frac1R\sum_r \tilde\theta_r - \theta\Bigr)

One all-reduce of the parameters for a whole meta-iteration, where DDP has one for each of its S steps. What is reduced
is the displacement :math:`\tilde\theta_r - \theta`, in the dtype of the slow weights: it has digits that
:math:`\tilde\theta_r` rounds away.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from torch_gradmatch._foreach import by_kind, copy_all_, local_of
from torch_gradmatch.methods.together import facts_of
from torch_gradmatch.parallel.agreement import check_same_parameters
from torch_gradmatch.parallel.around import ranks_around
from torch_gradmatch.parallel.ranks import Ranks
from torch_gradmatch.parallel.reduction import average_, max_
from torch_gradmatch.parallel.shards import sharded_like
from torch_gradmatch.parallel.wrappers import buffers_around
from torch_gradmatch.slow import ops
from torch_gradmatch.wrapped.members import members, shown_name

__all__ = ["CarriedState", "Walks", "average_buffers", "mean_of_walks"]


class Walks:
    """Who else carries out the meta-iterations of one Fish, what they agree on and what is averaged.

    Args:
        optimizer: The wrapped optimizer.
        given: The ranks that walk by themselves, or None.

    Attributes:
        given: As given.
        group: The same; None also for a group of one.
        ranks: All that train these parameters together; nobody without :meth:`begin`.
        lockstep: Whether a forward and backward pass is a collective, which no rank may leave out.
    """

    def __init__(self, optimizer: Optimizer, given: ProcessGroup | None) -> None:
        self.given = given
        self.group = given if given is not None and given.size() > 1 else None
        self.ranks = Ranks([], torch.device("cpu"))
        self.lockstep = False
        self._optimizer = optimizer
        self._parameters: list[Tensor] | None = None  # those that were looked at
        self._told = False  # whether the others know how the meta-iteration in progress ended
        self._carried: CarriedState | None = None
        self._watched: dict[str, tuple[Tensor, Tensor]] = {}  # buffers that nobody follows, with their first values

    def __deepcopy__(self, memo: dict[int, Any]) -> Walks:
        return Walks(copy.deepcopy(self._optimizer, memo), self.given)

    def begin(self, parameters: list[Tensor], *, follows_buffers: bool) -> None:
        """Find out who takes part, if these are other parameters than the last time.

        Args:
            parameters: The optimizer's; the same list as long as they are the same.
            follows_buffers: Whether somebody follows the model's buffers.

        Raises:
            ValueError: If the model reduces gradients by itself where it should not, or the ranks start from different
                parameters.
        """
        self._told, self._carried = False, None
        if parameters is self._parameters:
            return
        self.ranks, self.lockstep = ranks_around(parameters, self.group)
        if self.group is not None:
            check_same_parameters(parameters, self.group, self.ranks)
            if not follows_buffers:
                self._watched = {name: (b, b.clone()) for name, b in buffers_around(parameters).items()}
        self._parameters = parameters

    @contextmanager
    def agreeing(self, settings: str, inner_steps: int, *, looks: bool) -> Iterator[None]:
        """Raise on all ranks what the block raises on one.

        Args:
            settings: Of the method.
            inner_steps: How many were taken.
            looks: Whether to do so also where ranks do not walk by themselves: it waits for the others.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # noqa: BLE001  whichever it is, the others wait for it
            error = raised
        if self.group is None and not looks:
            if error is not None:
                raise error
            return
        self._told = True
        self.ranks.agree(error, {"method": settings, "number of inner steps": inner_steps, **self._facts()})

    def tell(self, error: BaseException) -> None:
        """Raise on the other ranks what has ended the meta-iteration on this one before its end.

        Where a forward pass is a collective they wait in that, and no message reaches them.

        Args:
            error: The reason.
        """
        if self.group is not None and not self.lockstep and not self._told and isinstance(error, Exception):
            self._told = True
            self.ranks.agree(error)

    def _facts(self) -> dict[str, object]:
        carried = None if self._carried is None else self._carried.layout
        return {**facts_of(self._optimizer, self._parameters or ()), "state to carry": carried}

    def check_buffers(self) -> None:
        """Raise if an inner loop has moved buffers of which nobody knows the slow values.

        Raises:
            RuntimeError: If one was moved.
        """
        # In the first inner loop only: those that are not moved by then are constants.
        moved = [name for name, (buffer, before) in self._watched.items() if not torch.equal(buffer, before)]
        if moved:
            raise RuntimeError(
                f"the walks have moved buffers, the first is {moved[0]}, which Fish(process_group=...) has to average "
                "over the ranks: pass the model, Fish(process_group=..., model=model). Nothing was averaged yet; "
                "rollback() returns to the slow weights"
            )
        self._watched = {}

    def check_state(self, counters: Collection[str], iterates: Sequence[Tensor], attributes: Mapping[str, Any]) -> None:
        """Look at what the optimizer carries to the next inner loop.

        Args:
            counters: Names of the entries of its groups that count.
            iterates: Tensors that are interpolated.
            attributes: What it counts elsewhere.

        Raises:
            ValueError: If there is something of which there is no mean.
        """
        if attributes:
            raise ValueError(
                f"Fish(process_group=...) cannot carry the state of {shown_name(self._optimizer)} from one walk to the "
                f"next: it counts in attributes, {attributes!r:.80}, which are not averaged over ranks. Pass "
                'Fish(inner_state="reset")'
            )
        self._carried = CarriedState.of(self._optimizer, counters, iterates)

    def interpolate_(
        self,
        slow: Sequence[Tensor],
        fast: Sequence[Tensor],
        weight: float,
        latest: Sequence[tuple[Tensor, Tensor]],
        others: Iterable[Tensor],
    ) -> None:
        """Interpolate towards the mean of the walks, and let everything else that they moved be their mean.

        Args:
            slow: As in ``ops.interpolate_``.
            fast: As in ``ops.interpolate_``.
            weight: As in ``ops.interpolate_``.
            latest: Slow value and buffer of those that take the mean itself.
            others: All buffers, also those.
        """
        assert self.group is not None
        if self._carried is not None:
            self._carried.average(self.ranks, self.group)
        starts, ends = [*slow, *(s for s, _ in latest)], [*fast, *(f for _, f in latest)]
        means = mean_of_walks(starts, ends, self.group)
        ops.interpolate_(slow, means[: len(slow)], weight)
        narrow = [(end, mean) for end, mean in zip(ends, means, strict=True) if end is not mean]
        with torch.no_grad():
            copy_all_([end for end, _ in narrow], [mean for _, mean in narrow])
        average_buffers(list(others), {id(end) for end in ends}, self.group)


@torch.no_grad()
def mean_of_walks(slow: Sequence[Tensor], fast: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Return where the walks of all ranks have led in the mean, the same bits on every rank.

    Args:
        slow: Where they began, the same on every rank.
        fast: Where this rank's has led; tensors of the slow ones' dtypes are overwritten.
        group: The ranks.

    Returns:
        The means: the fast tensors themselves; new ones for those that are narrower than the slow ones, and for those
        that share memory.
    """
    storages = Counter(local_of(f).untyped_storage().data_ptr() for f in fast)
    ends = []
    for s, f in zip(slow, fast, strict=True):
        shard = local_of(f)
        if f.dtype != s.dtype:
            ends.append(sharded_like(shard.to(s.dtype), f))
        elif storages[shard.untyped_storage().data_ptr()] > 1:  # weights tied by their storage: not twice in place
            ends.append(sharded_like(shard.clone(), f))
        else:
            ends.append(f)
    pairs = [lists for _, lists in by_kind(ends, slow)]
    for at_end, at_start in pairs:
        torch._foreach_sub_(at_end, at_start)
    average_(ends, group)
    for at_end, at_start in pairs:
        torch._foreach_add_(at_end, at_start)
    return ends


@torch.no_grad()
def average_buffers(buffers: Sequence[Tensor], interpolated: Collection[int], group: ProcessGroup) -> None:
    """Let buffers be the same on every rank: the mean of floating-point ones, the largest of integers.

    Args:
        buffers: Those of the model.
        interpolated: Identities of those whose mean is found otherwise.
        group: The ranks.
    """
    left = [b for b in buffers if id(b) not in interpolated]
    average_([b for b in left if b.is_floating_point() or b.is_complex()], group)
    max_([b for b in left if not (b.is_floating_point() or b.is_complex())], group)


@dataclass
class CarriedState:
    """What an optimizer carries from one inner loop to the next, to be averaged over the ranks.

    Attributes:
        tensors: Those with the shape of a vector.
        numbers: Where single numbers are: a dictionary and a key.
        layout: What should be the same on all ranks.
    """

    tensors: list[Tensor] = field(default_factory=list)
    numbers: list[tuple[Any, Any]] = field(default_factory=list)
    layout: list[str] = field(default_factory=list)

    @staticmethod
    def of(optimizer: Optimizer, counters: Collection[str], iterates: Sequence[Tensor]) -> CarriedState:
        """Find all that an optimizer carries.

        Args:
            optimizer: The optimizer.
            counters: Names of the entries of its groups that count.
            iterates: Tensors that are interpolated, whose mean is found otherwise.

        Returns:
            The state.

        Raises:
            ValueError: If there is something of which there is no mean.
        """
        found = CarriedState()
        seen = {id(iterate) for iterate in iterates}
        for path, member in members(optimizer).items():
            parameters = dict.fromkeys(p for group in member.param_groups for p in group["params"])
            for index, p in enumerate(parameters):
                entry = member.state.get(p)
                if entry is None or id(entry) in seen:
                    continue
                seen.add(id(entry))
                for name in entry:
                    found._add(f"{path}[{index}].{name}", entry, name, seen, optimizer)
            for index, group in enumerate(member.param_groups):
                if id(group) not in seen:
                    seen.add(id(group))
                    for name in sorted(counters & group.keys()):
                        found._add(f"{path}.group {index}.{name}", group, name, seen, optimizer)
        return found

    def _add(self, where: str, holder: Any, key: Any, seen: set[int], optimizer: Optimizer) -> None:
        value = holder[key]
        if value is None or isinstance(value, bool | str) or (isinstance(value, Tensor) and id(value) in seen):
            return
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1 and value.dim() == 0):
            self.numbers.append((holder, key))
            self.layout.append(where)
        elif isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            self.tensors.append(value)
            self.layout.append(f"{where} {tuple(value.shape)} {value.dtype}")
        else:
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"Fish(process_group=...) cannot carry the state of {shown_name(optimizer)} from one walk to the next: "
                f'it keeps {key!r}, a {kind}, of which there is no mean over ranks. Pass Fish(inner_state="reset")'
            )

    @torch.no_grad()
    def average(self, ranks: Ranks, group: ProcessGroup) -> None:
        """Replace everything by its mean over the ranks, integers and the counts of steps by the largest.

        Args:
            ranks: All that have to be the same afterwards.
            group: Those that walk by themselves.
        """
        average_(self.tensors, group)
        if not self.numbers:
            return
        mine = [float(holder[key]) for holder, key in self.numbers]
        every = ranks.gather(mine)
        for (holder, key), values in zip(self.numbers, zip(*every, strict=True), strict=True):
            value = holder[key]
            counts = key == "step" or not (
                isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())
            )
            joint = max(values) if counts else sum(values) / len(values)
            if isinstance(value, Tensor):
                value.fill_(joint)
            else:
                holder[key] = type(value)(joint)
