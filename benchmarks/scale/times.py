"""Wall time of a meta-iteration on several processes of this machine, and what gloo's all-reduce takes here.

Every rank evaluates S batches in a meta-iteration, whatever the way: of S domains that all ranks have (Fish), or of S
domains of its own (exact by domains). So the work of a rank stays the same as ranks are added. ``alone`` is the same
meta-iteration on all processes at the same time without any collective: what is left of the cores when several
processes share them is in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks._models import Network, cdsprites, mlp
from benchmarks.scale.ranks import bar
from torch_gradmatch import IDGM, Fish, GradMatch
from torch_gradmatch.methods.base import Method

DOMAINS = 4
GAMMA = 1e-3
DDP, WALKS, SPREAD = "Fish over DDP", "Fish, walks", "IDGM, domains"
SIZES = [8, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 23, 1 << 24]  # bytes of an all-reduce
NETWORKS = {
    "MLP": Network(partial(mlp, 784, 1024, 256, 10), (16, 784), 10),
    "CdSprites CNN": Network(cdsprites, (16, 3, 32, 32), 2),
}
METHODS: dict[str, Callable[[nn.Module], Method]] = {
    "Fish, alone": lambda _: Fish(inner_state="reset"),
    DDP: lambda _: Fish(inner_state="reset"),
    WALKS: lambda model: Fish(inner_state="reset", model=model, process_group=dist.group.WORLD),
    "IDGM, alone": lambda model: IDGM(model, GAMMA, "inner_product"),
    SPREAD: lambda model: IDGM(model, GAMMA, "inner_product", process_group=dist.group.WORLD),
}


def way(network: str, name: str) -> Callable[[], object]:
    """One meta-iteration by a way, with this rank's batches."""
    torch.manual_seed(0)
    plain = NETWORKS[network].make()
    model = DistributedDataParallel(plain) if name == DDP else plain
    torch.manual_seed(1 + dist.get_rank())
    batches = NETWORKS[network].batches(DOMAINS)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=1e-3), METHODS[name](model))

    return lambda: optimizer.meta_step(lambda b: nn.functional.cross_entropy(model(b[0]), b[1]), batches)


def per_call(call: Callable[[], object], times: int) -> float:
    """Seconds of one of several calls, on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(times):
        call()
    slowest = torch.tensor((time.perf_counter() - start) / times, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def time_ways(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Time all ways on all networks, round about; each for ``seconds`` at least."""
    rows = []
    for name, network in NETWORKS.items():
        ways = {way_name: way(name, way_name) for way_name in METHODS}
        for run in ways.values():
            run()
        times = {run: max(1, round(seconds / per_call(run, 2))) for run in ways.values()}
        found: list[list[float]] = [
            [per_call(run, times[run]) for run in ways.values()] for _ in bar(range(rounds), f"time, {name}")
        ]
        parameters = sum(p.numel() for p in network.make().parameters())
        shared = {"network": name, "ranks": dist.get_world_size(), "domains": DOMAINS, "parameters": parameters}
        rows += [{**shared, "way": w, "seconds": of_way} for w, *of_way in zip(ways, *found, strict=True)]
    return rows


def time_all_reduce(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Time all-reduces of several sizes, as one and the same buffer is reduced time and again."""
    rows = []
    for size in bar(SIZES, "all-reduce"):
        reduce = partial(dist.all_reduce, torch.zeros(size // 4))
        per_call(reduce, 3)
        times = max(3, round(seconds / per_call(reduce, 3)))
        found = [per_call(reduce, times) for _ in range(rounds)]
        rows.append({"ranks": dist.get_world_size(), "bytes": size, "seconds": found})
    return rows


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Fit seconds = latency log2(R) + 2 (R-1)/R bytes / bandwidth, by least relative squares, for one R."""
    ranks = rows[0]["ranks"]
    sizes, seconds = (np.array(x) for x in zip(*((r["bytes"], median(r["seconds"])) for r in rows), strict=True))
    columns = np.stack([np.full(len(sizes), np.log2(ranks)), 2 * (ranks - 1) / ranks * sizes], axis=1)
    (latency, per_byte), *_ = np.linalg.lstsq(columns / seconds[:, None], np.ones(len(sizes)), rcond=None)
    off = columns @ (latency, per_byte) / seconds
    extremes = {"least_ratio": float(off.min()), "greatest_ratio": float(off.max())}
    return {"ranks": ranks, "latency": float(latency), "bandwidth": float(1 / per_byte), **extremes}
