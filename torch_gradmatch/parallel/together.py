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
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from torch_gradmatch.parallel.foreach import add_all_, is_sharded, map_kinds
from torch_gradmatch.parallel.ranks import Ranks, average_, average_buffers_

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
    found = Together(parameters, method)
    return found if found.ranks or found.given is not None else None


class Together:
    """Several ranks, or the one of a process group of one.

    Args:
        parameters: As for :func:`ranks_around`.
        method: As there.

    Attributes:
        given: The method's ``process_group``.
        group: The same; None also for a group of one.
        ranks: All that raise together what one of them does.
        in_step: Whether no rank may leave out a forward or backward pass, because it is a collective of
            ``DistributedDataParallel`` or ``fully_shard``.
        averages_gradients: Whether ``DistributedDataParallel`` does.
    """

    def __init__(self, parameters: Sequence[Tensor], method: Any) -> None:
        model = getattr(method, "model", None)
        self.given: ProcessGroup | None = getattr(method, "process_group", None)
        self.group = self.given if self.given is not None and self.given.size() > 1 else None
        # In DataParallel several devices share a process; FSDP1's parameters do not say which shards they are.
        shares = self.given is not None and isinstance(model, DataParallel)
        if shares or type(model).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{type(method).__name__} does not support a model in {type(model).__name__} here: pass and call the "
                "plain module, or use torch.distributed.fsdp.fully_shard"
            )
        self.averages_gradients = isinstance(model, DistributedDataParallel)
        meshes: dict[Any, None] = dict.fromkeys(getattr(p, "device_mesh", None) for p in parameters if is_sharded(p))
        joined = [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]
        joined += [model.process_group] if isinstance(model, DistributedDataParallel) else []
        device = next((p.device for p in parameters), torch.device("cpu"))
        innermost = [] if self.given is None else [self.given]
        self.ranks, self.in_step = Ranks([*innermost, *joined], device), bool(Ranks(joined, device))
        self._same: Sequence[Tensor] = ()  # the parameters that were found the same on all ranks

    def check_same(self, parameters: list[Tensor]) -> None:
        """Raise on all ranks if they do not hold the same parameters; look only once at the same ones."""
        same = len(self._same) == len(parameters) and all(map(is_, self._same, parameters))
        if self.group is not None and not same:
            self.ranks.check_same(parameters, self.group)
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
    def average_walks(self, slow: Sequence[Tensor], fast: Sequence[Tensor], buffers: Iterable[Tensor]) -> list[Tensor]:
        """Return where the walks of all ranks have led in the mean, and let all else that they moved be their mean.

        Takes a vector of the size of the parameters.

        Args:
            slow: Where they began, the same on every rank.
            fast: Where this rank's has led.
            buffers: All, of which those that are not fast become their mean; of integers the largest.

        Returns:
            The mean of each fast tensor in the dtype of the slow one, the same bits on every rank.
        """
        assert self.group is not None
        means: Any = map_kinds(torch._foreach_sub, fast, slow)
        average_(means, self.group)
        add_all_(means, slow)
        interpolated = set(map(id, fast))
        average_buffers_([b for b in buffers if id(b) not in interpolated], self.group)
        return means  # type: ignore[no-any-return]
