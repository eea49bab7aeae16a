"""``python -m benchmarks scale``: what several processes cost and what they are good for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.scale import count, direction, model, outcome, times
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
        seeds: Of the runs on CdSprites.
        outcome: Their settings.
    """

    ways: Sequence[str] = tuple(count.WAYS)
    domains: Sequence[int] = (2, 5, 15)
    ranks: Sequence[int] = (1, 2, 4)
    rounds: int = 7
    seconds: float = 0.25
    draws: int = 50
    seeds: Sequence[int] = (0, 1, 2)
    outcome: Any = None


QUICK = Settings(
    ways=("Fish over DDP", "Fish over fully_shard", "Fish, walks, reset", "IDGM, domains"),
    domains=(2, 3),
    ranks=(1, 2),
    rounds=1,
    seconds=0.01,
    draws=2,
    seeds=(1,),
    outcome={
        "domains": 3, "size": 16, "images_per_domain": 40, "eval_images": 20, "batch_size": 6, "iterations": 4,
    },
)  # fmt: skip


def measure(settings: Settings) -> dict[str, Any]:
    """Measure everything; only the runs on CdSprites use both of two cores for all of their time."""
    of_outcome = outcome.settings_for(settings.outcome or {})
    found: dict[str, Any] = {"settings": asdict(settings) | {"outcome": of_outcome}, "seconds": {}}
    start = time.perf_counter()

    def took(part: str) -> None:
        nonlocal start
        found["seconds"][part] = time.perf_counter() - start
        start = time.perf_counter()

    found["settings"] |= {"every": outcome.EVERY, "reached": outcome.REACHED}
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
        total = of_outcome["iterations"] * len(settings.seeds) * 2
        parts = two.call("CdSprites", "meta-it", total, outcome.train_all, settings.seeds, of_outcome)
        found["outcomes"] = sorted((run for part in parts for run in part), key=lambda r: (r["seed"], r["walks"]))
        took("CdSprites")
    found["predicted_here"] = model.beside_measured(found["times"], found["fits"])
    found["predicted"] = model.predict(found["times"], found["fits"])
    return found
