"""``python -m benchmarks scale``: what several processes cost, and the direction of several walks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.scale import count, direction, times
from benchmarks.scale.ranks import Ranks

__all__ = ["QUICK", "Settings", "measure"]


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        ways: That are counted.
        domains: Numbers of domains with which they are.
        ranks: Numbers of processes that are timed, 2 among them.
        rounds: Times each way is timed.
        seconds: Each of them takes at least.
        draws: Of networks whose direction is compared.
    """

    ways: Sequence[str] = tuple(count.WAYS)
    domains: Sequence[int] = (2, 5, 15)
    ranks: Sequence[int] = (1, 2, 4)
    rounds: int = 7
    seconds: float = 0.25
    draws: int = 50


QUICK = Settings(
    ways=("Fish over DDP", "Fish over fully_shard", "Fish, walks, reset", "IDGM, domains"),
    domains=(2, 3),
    ranks=(1, 2),
    rounds=1,
    seconds=0.01,
    draws=2,
)  # fmt: skip


def measure(settings: Settings) -> dict[str, Any]:
    """Measure everything."""
    found: dict[str, Any] = {"settings": asdict(settings), "seconds": {}}
    start = time.perf_counter()

    def took(part: str) -> None:
        nonlocal start
        found["seconds"][part] = time.perf_counter() - start
        start = time.perf_counter()

    found["times"], found["all_reduces"], found["fits"] = [], [], []
    with ExitStack() as stack:
        pools = {size: stack.enter_context(Ranks(size)) for size in settings.ranks}  # those not at work wait
        two = pools[2]
        cases = len(settings.ways) * len(settings.domains)
        found["counts"] = two.call("count", "case", cases, count.count_all, settings.ways, settings.domains)[0]
        took("count")
        lengths = (settings.rounds, settings.seconds)
        for size, ranks in pools.items():
            total = settings.rounds * len(times.NETWORKS)
            found["times"] += ranks.call(f"time, {size} ranks", "round", total, times.time_ways, *lengths)[0]
            if size > 1:
                title, sizes = f"all-reduce, {size} ranks", len(times.SIZES)
                rows = ranks.call(title, "size", sizes, times.time_all_reduce, *lengths)[0]
                found["all_reduces"] += rows
                found["fits"].append(times.fit(rows))
        took("time")
        parts = two.call("direction", "draw", settings.draws, direction.measure, settings.draws)
        found["directions"] = sorted((row for part in parts for row in part), key=lambda row: row["draw"])
        found["exponents"] = direction.exponents(found["directions"])
        found["two_ranks_error"] = max(two.call("direction, 2 ranks", "walk", 1, direction.of_one_rank))
        took("direction")
    return found
