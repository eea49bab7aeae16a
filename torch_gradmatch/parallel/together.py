r"""The ranks that carry out the meta-iterations of one optimizer together: one object, absent on one process.

Walks on several ranks: every rank walks through the domains by itself, and the meta-update goes to their mean,

.. math:: \theta \leftarrow \theta + \epsilon\,\Bigl(\frac1R\sum_r \tilde\theta_r - \theta\Bigr).

One all-reduce of the parameters for a whole meta-iteration, where DDP has one for each of its S steps. What is reduced
is the displacement :math:`\tilde\theta_r - \theta`, in the dtype of the slow weights: it has digits that
:math:`\tilde\theta_r` rounds away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from torch_gradmatch.parallel.foreach import add_all_, copy_all_, map_kinds
from torch_gradmatch.parallel.ranks import Ranks, average_, average_buffers_, check_same_parameters
from torch_gradmatch.parallel.shards import groups_of

__all__ = ["Together", "ranks_around"]


def ranks_around(parameters: Sequence[Tensor], method: Any) -> Together | None:
    """Find out who trains the same parameters.

    A model in ``DistributedDataParallel`` is known by its type, where the method was given it as ``model``; one of
    ``fully_shard`` by its parameters.

    Args:
        parameters: The optimizer's.
        method: The settings, with ``model`` and ``process_group`` where the method has them.

    Returns:
        The ranks, or None if this process trains them alone.

    Raises:
        ValueError: If the model reduces gradients by itself where it should not, or cannot be told about shards.
    """
    model: nn.Module | None = getattr(method, "model", None)
    given: ProcessGroup | None = getattr(method, "process_group", None)
    averaged_by = model.process_group if isinstance(model, DistributedDataParallel) else None
    # In one DataParallel several devices share a process; FSDP1's parameters do not say which shards they are.
    if type(model).__name__ == "FullyShardedDataParallel" or (given is not None and isinstance(model, DataParallel)):
        raise ValueError(
            f"{type(method).__name__} does not support a model in {type(model).__name__} here: pass and call the plain "
            "module, or use torch.distributed.fsdp.fully_shard"
        )
    groups = [*groups_of(parameters), *([] if averaged_by is None else [averaged_by])]
    if given is None and not groups:
        return None
    device = next((p.device for p in parameters), torch.device("cpu"))
    found = Together(groups, given, device, averages_gradients=averaged_by is not None)
    return found if found.ranks or given is not None else None


class Together:
    """Several ranks, or the one of a process group of one.

    Args:
        joined: Groups whose ranks are joined in every forward and backward pass, by ``DistributedDataParallel`` or
            ``fully_shard``.
        given: The method's ``process_group``.
        device: Where the parameters are.
        averages_gradients: Whether ``DistributedDataParallel`` does.

    Attributes:
        given: As given.
        group: The same; None also for a group of one.
        ranks: All that raise together what one of them does.
        in_step: Whether no rank may leave out a forward or backward pass, because it is a collective.
        averages_gradients: As given.
    """

    def __init__(
        self, joined: Sequence[ProcessGroup], given: ProcessGroup | None, device: torch.device, averages_gradients: bool
    ) -> None:
        self.given = given
        self.group = given if given is not None and given.size() > 1 else None
        self.ranks = Ranks([*([] if given is None else [given]), *joined], device)  # the given one is the innermost
        self.in_step = bool(Ranks(joined, device))
        self.averages_gradients = averages_gradients
        self._same: Sequence[Tensor] = ()  # the parameters that were found the same on all ranks

    def begin(
        self, facts: Mapping[str, object], parameters: list[Tensor], number: int = 0, error: Exception | None = None
    ) -> list[int]:
        """Vote on beginning a meta-iteration.

        Args:
            facts: What should be the same on all ranks, with the names that a message is to use.
            parameters: The optimizer's, which are compared once.
            number: Any that the other ranks should know.
            error: Why this rank cannot begin, if it cannot.

        Returns:
            The numbers of all ranks.
        """
        numbers = self.ranks.vote(error, facts, number)
        self.check_same(parameters)
        return numbers

    def check_same(self, parameters: list[Tensor]) -> None:
        """Raise on all ranks if they do not hold the same parameters; look only once at the same ones."""
        same = len(self._same) == len(parameters) and all(map(is_, self._same, parameters))
        if self.group is not None and not same:
            check_same_parameters(parameters, self.group, self.ranks)
        self._same = parameters

    def has_same(self, parameters: Sequence[Tensor]) -> None:
        """Note which parameters are the same on all ranks; none if these may have gone separate ways."""
        self._same = parameters

    def facts(
        self, optimizer: Optimizer, parameters: Sequence[Tensor], settings: Mapping[str, object]
    ) -> dict[str, object]:
        """Return what should be the same on all ranks, with the words of a message."""
        groups = optimizer.param_groups
        return {
            "method": str(dict(settings)),
            "optimizer": type(optimizer).__qualname__,
            "learning rates": [group["lr"] for group in groups if isinstance(group.get("lr"), float | int)],
            "shapes of parameters": [(tuple(p.shape), p.requires_grad) for p in parameters],
        }

    @torch.no_grad()
    def average_walks(
        self,
        slow: Sequence[Tensor],
        fast: Sequence[Tensor],
        latest: Sequence[tuple[Tensor, Tensor]],
        buffers: Iterable[Tensor],
    ) -> list[Tensor]:
        """Return where the walks of all ranks have led in the mean, and let all else that they moved be their mean.

        Takes a vector of the size of the parameters.

        Args:
            slow: Where they began, the same on every rank.
            fast: Where this rank's has led.
            latest: Slow value and buffer of those that take the mean itself.
            buffers: All buffers, also those. Of integers the largest is taken.

        Returns:
            The mean of each fast tensor in the dtype of the slow one, the same bits on every rank.
        """
        group = self.group
        assert group is not None
        starts, ends = [*slow, *(start for start, _ in latest)], [*fast, *(end for _, end in latest)]
        means: Any = map_kinds(torch._foreach_sub, ends, starts)
        average_(means, group)
        add_all_(means, starts)
        copy_all_(ends[len(fast) :], means[len(fast) :])
        averaged = {id(end) for end in ends}
        average_buffers_([b for b in buffers if id(b) not in averaged], group)
        return means[: len(fast)]  # type: ignore[no-any-return]
