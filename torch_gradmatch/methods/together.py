"""Who carries out the meta-iterations of a method without inner loop, and what they agree on before one begins."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from torch_gradmatch._checks import _DOMAINS as DOMAINS
from torch_gradmatch.gradients.over_ranks import Alone, Domains, Samples, Walks
from torch_gradmatch.parallel.agreement import check_same_parameters
from torch_gradmatch.parallel.ranks import Ranks
from torch_gradmatch.parallel.reduction import sums_of_numbers
from torch_gradmatch.parallel.shards import groups_of
from torch_gradmatch.parallel.wrappers import find_wrappers, is_distributed
from torch_gradmatch.wrapped.members import class_name, members

__all__ = ["SharedSettings", "Together", "facts_of", "mean_over", "shown_settings"]


class SharedSettings(Protocol):
    """A method's settings, as far as they say how ranks share its work."""

    @property
    def model(self) -> nn.Module | None:
        """The model, if it is known."""

    @property
    def process_group(self) -> ProcessGroup | None:
        """Those that share it."""

    @property
    def parallel(self) -> str:
        """How."""


def shown_settings(method: Any) -> dict[str, object]:
    """Return a method's settings by name, as a message or ``repr`` shows them.

    Args:
        method: A dataclass of settings, with a model and a process group.

    Returns:
        The model's class, and of a group how many ranks it has; without one nothing of it.
    """
    shown = {field.name: getattr(method, field.name) for field in fields(method)}
    shown["model"] = None if method.model is None else type(method.model).__name__
    if method.process_group is None:
        del shown["process_group"], shown["parallel"]
    else:
        shown["process_group"] = f"{method.process_group.size()} ranks"
    return shown


class Together:
    """The ranks that carry out the meta-iterations of one optimizer.

    Args:
        optimizer: The wrapped optimizer.
        method: The settings.
    """

    def __init__(self, optimizer: Optimizer, method: SharedSettings) -> None:
        self._optimizer = optimizer
        self._method = method
        self._looked_at: list[Tensor] | None = None  # the parameters for which wrappers were looked for
        self._wrappers: list[weakref.ref[nn.Module]] = []
        self._same: list[Tensor] | None = None  # the parameters that were found the same on all ranks

    def __getstate__(self) -> dict[str, Any]:
        return {"_optimizer": self._optimizer, "_method": self._method}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_optimizer"], state["_method"])  # type: ignore[misc]

    def forget(self) -> None:
        """Compare the parameters once more before the next meta-iteration: ranks may have gone separate ways."""
        self._same = None

    def ranks(self, parameters: Sequence[Tensor]) -> Ranks:
        """Return all ranks that raise together what one of them does.

        Args:
            parameters: The optimizer's.

        Returns:
            Those of the process group, and those that hold the other shards.
        """
        group = self._method.process_group
        groups = [*([] if group is None else [group]), *groups_of(parameters)]
        return Ranks(groups, parameters[0].device if parameters else torch.device("cpu"))

    def begin(self, parameters: list[Tensor], buffers: Sequence[Tensor], batches: int, scale: float) -> Alone:
        """Agree to begin a meta-iteration.

        Args:
            parameters: The optimizer's; the same list as long as they are the same.
            buffers: The model's, as far as it is known.
            batches: How many this rank has.
            scale: What the losses are multiplied by.

        Returns:
            How the ranks share it.

        Raises:
            ValueError: If the model reduces gradients by itself where it should not; if the ranks have other settings,
                numbers of batches or parameters. On all of them, and nothing has begun.
        """
        group, parallel = self._method.process_group, self._method.parallel
        ranks = self.ranks(parameters)
        with ranks.together():
            self._refuse_wrappers(parameters)
        if ranks:
            facts = self._facts(parameters, buffers, scale)
            if group is None or parallel != "domains":
                facts["number of batches"] = batches
            names = DOMAINS.get()
            numbers = ranks.agree(None, facts, number=2 * batches + (names is not None))
        if group is None:
            return Alone(ranks)
        if parameters is not self._same:
            check_same_parameters(parameters, group, ranks)
            self._same = parameters
        if parallel == "data":
            return Samples(ranks, group)
        in_step = bool(Ranks(groups_of(parameters), torch.device("cpu")))
        if parallel == "walks":
            return Walks(ranks, group, in_step=in_step)
        return self._domains(ranks, group, numbers if ranks else [2 * batches], in_step=in_step)

    def _domains(self, ranks: Ranks, group: ProcessGroup, numbers: Sequence[int], *, in_step: bool) -> Domains:
        size = group.size()
        counts = [number // 2 for number in numbers]
        if counts != counts[:size] * (len(counts) // size):
            raise ValueError(
                f"batches should be as many on all ranks that hold shards of the same parameters (got {counts})"
            )
        names: list[object] | None = None
        if all(number % 2 for number in numbers):
            told = DOMAINS.get()
            names = [name for part in Ranks([group], torch.device("cpu")).gather(list(told or ())) for name in part]
        return Domains(ranks, group, counts[:size], dist.get_rank(group), names=names, in_step=in_step)

    def _facts(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor], scale: float) -> dict[str, object]:
        """Return what should be the same on all ranks, with the words of a message."""
        settings = {name: getattr(value, "__qualname__", value) for name, value in shown_settings(self._method).items()}
        return {
            "method": f"{type(self._method).__name__} {settings}",
            **facts_of(self._optimizer, parameters),
            "shapes of buffers": [(tuple(b.shape), str(b.dtype)) for b in buffers],
            "scale of the losses": scale,
        }

    # ------------------------------------------------------------------- modules that reduce gradients by themselves

    @contextmanager
    def without_reduction(self) -> Iterator[None]:
        """Let ``DistributedDataParallel`` prepare for no backward pass, since it sees none, and send no buffers."""
        with ExitStack() as stack:
            for reference in self._wrappers:
                wrapper = reference()
                if isinstance(wrapper, DistributedDataParallel):
                    stack.enter_context(wrapper.no_sync())
            yield

    def _refuse_wrappers(self, parameters: list[Tensor]) -> None:
        if not is_distributed():
            return
        if parameters is not self._looked_at:
            self._wrappers = [weakref.ref(wrapper) for wrapper in find_wrappers(parameters)]
            self._looked_at = parameters
        for reference in self._wrappers:
            wrapper = reference()
            if isinstance(wrapper, DistributedDataParallel):
                self._check_ddp(wrapper)
            elif isinstance(wrapper, DataParallel):
                raise ValueError(
                    f"the model is in a DataParallel, which {self._name} does not support on several processes: pass "
                    "and call the plain module"
                )
            elif wrapper is not None:
                raise ValueError(
                    f"the model is in a {type(wrapper).__name__} (FSDP1), whose parameters do not say which shards "
                    "they are: use torch.distributed.fsdp.fully_shard, with SmoothFish or "
                    "IDGM(hvp='finite_difference')"
                )

    def _check_ddp(self, wrapper: DistributedDataParallel) -> None:
        group, parallel = self._method.process_group, self._method.parallel
        if group is None:
            raise ValueError(
                f"the model is in DistributedDataParallel, but the gradients that {self._name} takes by itself are not "
                "averaged by it, and every rank would train a model of its own: pass "
                f"{self._name}(..., process_group=torch.distributed.group.WORLD, parallel='data')"
            )
        if parallel != "data":
            raise ValueError(
                f"the model is in DistributedDataParallel, which is for ranks that evaluate parts of the same batches; "
                f"with parallel={parallel!r} each evaluates others: pass and call the plain module without it, or "
                "parallel='data'"
            )
        mine, its = dist.get_process_group_ranks(group), dist.get_process_group_ranks(wrapper.process_group)
        if mine != its:
            raise ValueError(
                f"process_group should hold the ranks of the model's DistributedDataParallel, {its} (got {mine})"
            )

    @property
    def _name(self) -> str:
        return type(self._method).__name__


def facts_of(optimizer: Optimizer, parameters: Sequence[Tensor]) -> dict[str, object]:
    """Return what should be the same of an optimizer on all ranks, with the words of a message.

    Args:
        optimizer: The wrapped optimizer.
        parameters: Its parameters.

    Returns:
        The facts by name.
    """
    groups = optimizer.param_groups
    return {
        "optimizer": [class_name(member) for member in members(optimizer).values()],
        "learning rates": [group["lr"] for group in groups if isinstance(group.get("lr"), float | int)],
        "shapes of parameters": [(tuple(p.shape), p.requires_grad) for p in parameters],
    }


def mean_over(value: Tensor, ranks: Ranks) -> Tensor:
    """Return the mean of a number over all ranks, the same bits on each.

    Args:
        value: Shape ().
        ranks: The ranks.

    Returns:
        Shape ().
    """
    found = value.detach()
    for group in ranks.groups:
        found = sums_of_numbers([found], group)[0] / group.size()
    return found.to(value.dtype)
