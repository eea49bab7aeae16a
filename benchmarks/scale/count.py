"""What goes over the wire in a meta-iteration, counted, beside what section 2b of the design promises.

A ``TorchDispatchMode`` sees every collective that this process takes part in: those of Python, those that the reducer
of ``DistributedDataParallel`` begins in C++ during the backward pass, and those of ``fully_shard``. The first
meta-iteration is not counted: in it ranks compare their parameters and DDP rearranges its buckets.

A rank sends, by the usual ring algorithms, 2 (R-1)/R bytes for each byte of an all-reduce, and (R-1)/R for each byte of
the whole vector of an all-gather or a reduce-scatter. ``all_reduces`` are the bytes sent in units of one all-reduce of
all P parameters, so that the three can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish
from torch_gradmatch.methods.base import Method

Batch = tuple[Tensor, Tensor]
LARGE = 0.01  # of the bytes of all parameters: what is smaller is a control message
COUNTED = 4  # meta-iterations
LAYERS = (64, 256, 256, 10)


class CountingMode(TorchDispatchMode):
    """Notes name and bytes of every collective: of the whole vector, where ranks have parts of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.seen.append((func.__name__, max((t.nbytes for t in tensors), default=0)))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Traffic:
    """Of one rank in one meta-iteration, the mean over those counted.

    Attributes:
        collectives: Those of the parameters' size.
        payload: Their bytes: what is reduced, or gathered.
        all_reduces: What is sent for them, in all-reduces of all parameters.
        messages: Those of some bytes, by which ranks agree.
        message_bytes: Their bytes.
    """

    collectives: float
    payload: float
    all_reduces: float
    messages: float
    message_bytes: float

    @staticmethod
    def of(seen: Sequence[tuple[str, int]], whole: int, meta_iterations: int) -> Traffic:
        """Sum up what was seen in some meta-iterations, with ``whole`` the bytes of all parameters."""
        large = [(name, size) for name, size in seen if size >= LARGE * whole]
        small = [size for _, size in seen if size < LARGE * whole]
        sent = sum(size if "allreduce" in name else size / 2 for name, size in large)
        numbers = (len(large), sum(size for _, size in large), sent / whole, len(small), sum(small))
        return Traffic(*(number / meta_iterations for number in numbers))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(LAYERS):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def sharded(model: nn.Module) -> nn.Module:
    """Shard every layer, as one does."""
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


def world() -> Any:
    return dist.group.WORLD


Spread = Callable[[nn.Module], nn.Module]
Ways = dict[str, tuple[Spread, Callable[[nn.Module], Method], Callable[[int], float], str]]
PLAIN: Spread = lambda model: model  # noqa: E731
WAYS: Ways = {
    "Fish over DDP": (DistributedDataParallel, lambda model: Fish(model=model), lambda s: s, "S"),
    "Fish over fully_shard": (sharded, lambda model: Fish(model=model), lambda s: 1.5 * s, "3/2 S"),
    "Fish, walks, reset": (
        PLAIN, lambda model: Fish(inner_state="reset", model=model, process_group=world()), lambda _: 1, "1"
    ),
    "SmoothFish, walks": (
        PLAIN, lambda model: SmoothFish(1.0, 0.1, model, process_group=world()), lambda _: 1, "1"
    ),
    "SmoothFish, gamma=2, walks": (
        PLAIN, lambda model: SmoothFish(2.0, 0.1, model, process_group=world()), lambda _: 2, "2"
    ),
    "SmoothFish over DDP": (DistributedDataParallel, lambda model: SmoothFish(1.0, 0.1, model), lambda s: s, "S"),
    "SmoothFish over fully_shard": (sharded, lambda model: SmoothFish(1.0, 0.1, model), lambda s: 1.5 * s, "3/2 S"),
    "SmoothFish, data": (
        PLAIN, lambda model: SmoothFish(1.0, 0.1, model, process_group=world(), parallel="data"), lambda s: s, "S"
    ),
    "SmoothFish, gamma=2, data": (
        PLAIN,
        lambda model: SmoothFish(2.0, 0.1, model, process_group=world(), parallel="data"),
        lambda s: 2 * s - 1,
        "2 S - 1",
    ),
    "IDGM, domains": (PLAIN, lambda model: IDGM(model, 0.01, "inner_product", process_group=world()), lambda _: 2, "2"),
    "IDGM, cosine, domains": (
        PLAIN, lambda model: IDGM(model, 0.01, "cosine", process_group=world()), lambda _: 3, "2 + 1"
    ),
    "IDGM, data": (
        PLAIN,
        lambda model: IDGM(model, 0.01, "inner_product", process_group=world(), parallel="data"),
        lambda s: s + 1,
        "S + 1",
    ),
}  # fmt: skip


def count(name: str, domains: int) -> dict[str, Any]:
    """Count one way; a rank's batches are as many as there are domains, also where each has domains of its own."""
    spread, method, promised, formula = WAYS[name]
    model = spread(mlp())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=1e-3), method(model))
    generator = torch.Generator().manual_seed(dist.get_rank())

    def loss_fn(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def meta_step() -> None:
        x = torch.randn(domains, 8, LAYERS[0], generator=generator)
        y = torch.randint(LAYERS[-1], (domains, 8), generator=generator)
        optimizer.meta_step(loss_fn, list(zip(x, y, strict=True)))

    meta_step()
    with CountingMode() as mode:
        for _ in range(COUNTED):
            meta_step()
    return {
        "way": name,
        "domains": domains,
        "parameters": whole // 4,
        "ranks": dist.get_world_size(),
        **vars(Traffic.of(mode.seen, whole, COUNTED)),
        "promised": float(promised(domains)),
        "formula": formula,
    }


def count_all(ways: Sequence[str], domains: Sequence[int], told: Callable[..., object]) -> list[dict[str, Any]]:
    """Count some ways with every number of domains, on all ranks; returns what this one has seen."""
    found = []
    for name in ways:
        for s in domains:
            found.append(count(name, s))
            if dist.get_rank() == 0:
                told()
    return found
