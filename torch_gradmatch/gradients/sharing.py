"""Who shares the evaluations of a meta-iteration, and what is refused before one begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from torch_gradmatch._checks import _DOMAINS as DOMAINS
from torch_gradmatch.gradients.over_ranks import Alone, Domains, Samples, Walks
from torch_gradmatch.parallel.ranks import Ranks
from torch_gradmatch.parallel.together import Together

__all__ = ["check_ddp", "over_ranks", "without_reduction"]


def check_ddp(method: Any, together: Together) -> None:
    """Raise if a model in ``DistributedDataParallel`` does not go with how the method's ranks share the work.

    Args:
        method: The settings, with the model.
        together: The ranks.

    Raises:
        ValueError: If so; the message says what does.
    """
    name, ddp = type(method).__name__, method.model
    if together.given is None:
        if getattr(method, "bypasses_backward", False):
            raise ValueError(
                f"the model is in DistributedDataParallel, but the gradients that {name} differentiates again are not "
                "averaged by it, and every rank would train a model of its own: pass "
                f"{name}(..., process_group=torch.distributed.group.WORLD, parallel='data')"
            )
        return
    if method.parallel != "data":
        raise ValueError(
            "the model is in DistributedDataParallel, which is for ranks that evaluate parts of the same batches; with "
            f"parallel={method.parallel!r} each evaluates others: pass and call the plain module, or parallel='data'"
        )
    mine, its = (dist.get_process_group_ranks(group) for group in (together.given, ddp.process_group))
    if mine != its:
        raise ValueError(
            f"process_group should hold the ranks of the model's DistributedDataParallel, {its} (got {mine})"
        )


@contextmanager
def without_reduction(method: Any) -> Iterator[None]:
    """Let ``DistributedDataParallel`` reduce nothing where the method reduces gradients by itself.

    Args:
        method: The settings.

    Yields:
        Once.
    """
    ddp = isinstance(method.model, DistributedDataParallel) and method.process_group is not None
    with method.model.no_sync() if ddp else nullcontext():
        yield


ALONE = Alone(Ranks([], torch.device("cpu")))


def over_ranks(
    together: Together | None,
    method: Any,
    settings: Mapping[str, object],
    optimizer: Optimizer,
    parameters: list[Tensor],
    buffers: Iterable[Tensor],
    batches: int,
    error: Exception | None,
) -> Alone:
    """Agree to begin a meta-iteration and say how ranks share it.

    Args:
        together: The ranks, None for one process.
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
    if together is None:
        return ALONE
    group, ranks = together.group, together.ranks
    facts = together.facts(optimizer, parameters, settings)
    facts |= {"shapes of buffers": [(tuple(b.shape), str(b.dtype)) for b in buffers]}
    if together.given is None or method.parallel != "domains":
        facts["number of batches"] = batches
    names = DOMAINS.get()
    numbers = together.begin(facts, parameters, 2 * batches + (names is not None), error)
    if group is None:
        alone = Alone(ranks)
        alone.in_step = together.in_step
        return alone
    if method.parallel == "data":
        return Samples(ranks, group)
    if method.parallel == "walks":
        return Walks(ranks, group, in_step=together.in_step)
    size, counts = group.size(), [number // 2 for number in numbers]
    if counts != counts[:size] * (len(counts) // size):
        raise ValueError(
            f"batches should be as many on all ranks that hold shards of the same parameters (got {counts})"
        )
    every = None
    if all(number % 2 for number in numbers):
        every = [name for part in Ranks([group], torch.device("cpu")).gather(list(names or ())) for name in part]
    return Domains(ranks, group, counts[:size], dist.get_rank(group), names=every, in_step=together.in_step)
