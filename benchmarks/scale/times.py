"""Wall time of a meta-iteration on several processes of this machine, and what gloo's all-reduce takes here.

Every rank evaluates S batches in a meta-iteration, whatever the way: of S domains that all ranks have (Fish), or of S
domains of its own (exact by domains). So the work of a rank stays the same as ranks are added. ``alone`` is the same
meta-iteration on all processes at the same time without any collective: what is left of the cores when several
processes share them is in it, and the model takes its time for the computing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks._models import Batch, Network, cdsprites
from benchmarks.scale.count import CountingMode, Traffic, world
from torch_gradmatch import IDGM, Fish, GradMatch
from torch_gradmatch.methods.base import Method

DOMAINS = 4
GAMMA = 1e-3
FISH, EXACT = "Fish", "IDGM"
DDP, WALKS, SPREAD = "Fish over DDP", "Fish, walks", "IDGM, domains"
ALONE = {FISH: "Fish, alone", EXACT: "IDGM, alone"}
COMPUTES_AS = {DDP: ALONE[FISH], WALKS: ALONE[FISH], SPREAD: ALONE[EXACT]}
SECONDS = 0.25  # that one timing of a way takes at least
SIZES = [8, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 23, 1 << 24]  # bytes of an all-reduce


def wide_mlp(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """1.1 M parameters."""
    layers = [nn.Linear(784, 1024), activation(), nn.Linear(1024, 256), activation(), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


NETWORKS = {
    "MLP": Network(wide_mlp, (16, 784), 10),
    "CdSprites CNN": Network(cdsprites, (16, 3, 32, 32), 2),
}
METHODS: dict[str, Callable[[nn.Module], Method]] = {
    ALONE[FISH]: lambda _: Fish(inner_state="reset"),
    DDP: lambda _: Fish(inner_state="reset"),
    WALKS: lambda model: Fish(inner_state="reset", model=model, process_group=world()),
    ALONE[EXACT]: lambda model: IDGM(model, GAMMA, "inner_product"),
    SPREAD: lambda model: IDGM(model, GAMMA, "inner_product", process_group=world()),
}


def way(network: str, name: str) -> Callable[[], None]:
    """One meta-iteration by a way, with this rank's batches."""
    torch.manual_seed(0)
    plain = NETWORKS[network].make()
    model = DistributedDataParallel(plain) if name == DDP else plain
    torch.manual_seed(1 + dist.get_rank())
    batches: list[Batch] = NETWORKS[network].batches(DOMAINS)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=1e-3), METHODS[name](model))

    def loss_fn(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def meta_step() -> None:
        optimizer.meta_step(loss_fn, batches)

    return meta_step


def slowest(seconds: float) -> float:
    """The longest time of any rank."""
    found = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def per_call(call: Callable[[], object], times: int) -> float:
    """Seconds of one of several calls, on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(times):
        call()
    return slowest((time.perf_counter() - start) / times)


def time_ways(rounds: int, seconds: float, told: Callable[..., object]) -> list[dict[str, Any]]:
    """Time all ways on all networks, round about, and count what they send."""
    rows = []
    for network in NETWORKS:
        whole = sum(p.numel() * p.element_size() for p in NETWORKS[network].make().parameters())
        ways, traffic, times = {}, {}, {}
        for name in METHODS:
            ways[name] = way(network, name)
            ways[name]()
            with CountingMode() as mode:
                ways[name]()
            traffic[name] = Traffic.of(mode.seen, whole, 1)
            times[name] = max(1, round(seconds / per_call(ways[name], 2)))
        found: dict[str, list[float]] = {name: [] for name in METHODS}
        for _ in range(rounds):
            for name in METHODS:
                found[name].append(per_call(ways[name], times[name]))
            if dist.get_rank() == 0:
                told()
        rows += [
            {
                "network": network, "way": name, "ranks": dist.get_world_size(), "domains": DOMAINS,
                "parameters": whole // 4, "seconds": found[name], **vars(traffic[name]),
            }
            for name in METHODS
        ]  # fmt: skip
    return rows


def time_all_reduce(rounds: int, seconds: float, told: Callable[..., object]) -> list[dict[str, Any]]:
    """Time all-reduces of several sizes, as one and the same buffer is reduced time and again."""
    rows = []
    for size in SIZES:
        buffer = torch.zeros(size // 4)
        per_call(lambda b=buffer: dist.all_reduce(b), 3)
        times = max(3, round(seconds / per_call(lambda b=buffer: dist.all_reduce(b), 3)))
        found = [per_call(lambda b=buffer: dist.all_reduce(b), times) for _ in range(rounds)]
        rows.append({"ranks": dist.get_world_size(), "bytes": size, "seconds": found})
        if dist.get_rank() == 0:
            told()
    return rows


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Fit seconds = latency log2(R) + 2 (R-1)/R bytes / bandwidth, by least relative squares, for one R."""
    ranks = rows[0]["ranks"]
    sizes, seconds = (np.array(x) for x in zip(*((r["bytes"], median(r["seconds"])) for r in rows), strict=True))
    columns = np.stack([np.full(len(sizes), np.log2(ranks)), 2 * (ranks - 1) / ranks * sizes], axis=1)
    (latency, per_byte), *_ = np.linalg.lstsq(columns / seconds[:, None], np.ones(len(sizes)), rcond=None)
    off = columns @ (latency, per_byte) / seconds
    return {
        "ranks": ranks,
        "latency": float(latency),
        "bandwidth": float(1 / per_byte),
        "least_ratio": float(off.min()),
        "greatest_ratio": float(off.max()),
    }
