"""``python -m benchmarks scale``: what several processes cost, and the direction of several walks."""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import torch.distributed as dist

from benchmarks.scale import count, direction, times
from benchmarks.scale.ranks import bar, on_ranks

SETTINGS: dict[str, Any] = {
    "ways": list(count.WAYS),  # that are counted
    "domains": [2, 5, 15],  # with which they are
    "ranks": [1, 2, 4],  # how many processes are timed, 2 among them
    "rounds": 7,  # times each way is timed
    "seconds": 0.25,  # each of them takes at least
    "draws": 50,  # of networks whose direction is compared
}
QUICK = SETTINGS | {
    "ways": ["Fish over DDP", "Fish over fully_shard", "Fish, walks, reset", "IDGM, domains"],
    "domains": [2, 3], "ranks": [1, 2], "rounds": 1, "seconds": 0.01, "draws": 2,
}  # fmt: skip


def _on_each(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure with as many ranks as there are; what is not timed, with two."""
    found: dict[str, Any] = {"seconds": {}}
    start = time.perf_counter()

    def took(part: str) -> None:
        nonlocal start
        start, before = time.perf_counter(), start
        found["seconds"][part] = start - before

    lengths = (settings["rounds"], settings["seconds"])
    found["times"] = times.time_ways(*lengths)
    found["all_reduces"] = times.time_all_reduce(*lengths) if dist.get_world_size() > 1 else []
    took("time")
    if dist.get_world_size() == 2:
        cases = product(settings["ways"], settings["domains"])
        found["counts"] = [count.count(*case) for case in bar(cases, "count")]
        took("count")
        found["directions"] = direction.measure(settings["draws"])
        found["two_ranks_error"] = direction.of_two_ranks()
        took("direction")
    return found


def measure(quick: bool) -> dict[str, Any]:
    """Measure everything."""
    settings = QUICK if quick else SETTINGS
    parts = {size: on_ranks(size, _on_each, settings) for size in settings["ranks"]}
    seconds = {**parts[2]["seconds"], "time": sum(part["seconds"]["time"] for part in parts.values())}
    return {
        **parts[2],
        "settings": settings,
        "seconds": seconds,
        "times": [row for part in parts.values() for row in part["times"]],
        "all_reduces": [row for part in parts.values() for row in part["all_reduces"]],
        "fits": [times.fit(part["all_reduces"]) for part in parts.values() if part["all_reduces"]],
        "exponents": direction.exponents(parts[2]["directions"]),
    }
