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
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks._models import Network, mlp
from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish
from torch_gradmatch.methods.base import Method

LARGE = 0.01  # of the bytes of all parameters: what is smaller is a control message
COUNTED = 4  # meta-iterations
NETWORK = Network(partial(mlp, 64, 256, 256, 10), (8, 64), 10)


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


def traffic(seen: Sequence[tuple[str, int]], whole: int, meta_iterations: int) -> dict[str, float]:
    """Of one rank in a meta-iteration: collectives of the parameters' size, their bytes, what is sent, and messages.

    ``whole`` are the bytes of all parameters; by ``messages``, those of some bytes, ranks agree.
    """
    large = [(name, size) for name, size in seen if size >= LARGE * whole]
    small = [size for _, size in seen if size < LARGE * whole]
    sums = {
        "collectives": len(large),
        "payload": sum(size for _, size in large),
        "all_reduces": sum(size if "allreduce" in name else size / 2 for name, size in large) / whole,
        "messages": len(small),
        "message_bytes": sum(small),
    }
    return {name: value / meta_iterations for name, value in sums.items()}


def sharded(model: nn.Module) -> nn.Module:
    """Shard every layer, as one does."""
    for layer in model.children():
        if list(layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


smooth_fish, smooth_fish_2 = (partial(SmoothFish, gamma, 0.1) for gamma in (1.0, 2.0))
idgm = partial(IDGM, gamma=0.01, agreement="inner_product")
# What the model is in, or None where the method has the process group; the method; all-reduces as a formula in S and as
# its two coefficients.
WAYS: dict[str, tuple[Callable[..., nn.Module] | None, Callable[..., Method], str, tuple[float, float]]] = {
    "Fish over DDP": (DistributedDataParallel, Fish, "S", (1, 0)),
    "Fish over fully_shard": (sharded, Fish, "3/2 S", (1.5, 0)),
    "Fish, walks, reset": (None, partial(Fish, inner_state="reset"), "1", (0, 1)),
    "SmoothFish, walks": (None, smooth_fish, "1", (0, 1)),
    "SmoothFish, gamma=2, walks": (None, smooth_fish_2, "2", (0, 2)),
    "SmoothFish over DDP": (DistributedDataParallel, smooth_fish, "S", (1, 0)),
    "SmoothFish over fully_shard": (sharded, smooth_fish, "3/2 S", (1.5, 0)),
    "SmoothFish, data": (None, partial(smooth_fish, parallel="data"), "S", (1, 0)),
    "SmoothFish, gamma=2, data": (None, partial(smooth_fish_2, parallel="data"), "2 S - 1", (2, -1)),
    "IDGM, domains": (None, idgm, "2", (0, 2)),
    "IDGM, cosine, domains": (None, partial(idgm, agreement="cosine"), "2 + 1", (0, 3)),
    "IDGM, data": (None, partial(idgm, parallel="data"), "S + 1", (1, 1)),
}


def count(name: str, domains: int) -> dict[str, Any]:
    """What this rank sees of one way; its batches are as many as domains, also where each has its own."""
    spread, method, formula, (slope, fixed) = WAYS[name]
    torch.manual_seed(0)
    plain = NETWORK.make()
    whole = sum(p.nbytes for p in plain.parameters())
    model = plain if spread is None else spread(plain)
    group = {"process_group": dist.group.WORLD} if spread is None else {}
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=1e-3), method(model=model, **group))
    torch.manual_seed(dist.get_rank())

    def meta_step() -> None:
        optimizer.meta_step(lambda b: nn.functional.cross_entropy(model(b[0]), b[1]), NETWORK.batches(domains))

    meta_step()
    with CountingMode() as mode:
        for _ in range(COUNTED):
            meta_step()
    return {
        "way": name, "domains": domains, "parameters": whole // 4, "ranks": dist.get_world_size(),
        **traffic(mode.seen, whole, COUNTED), "promised": slope * domains + fixed, "formula": formula,
    }  # fmt: skip
