"""What a meta-iteration costs: time of every way for every network and number of domains, and peak memory.

With one thread the times are the processor's, which other work on the machine changes little. The ways take turns in
rounds, and ratios are of times of the same round: what slows the machine down for a while slows all of them. Memory is
the highest resident memory of a process of its own during one meta-iteration, above the level before it; the model, the
batches and what a first meta-iteration with S = 2 loads count as before. Every large tensor is mapped by itself: how
large the holes are that glibc's heap leaves varies from run to run and hides what is needed.

With ``CHECKED`` domains each exact way's direction is compared with the naive one first.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import ways
from benchmarks.ways import Problem, Reference, Way
from benchmarks.workers import in_processes
from torch_gradmatch.evaluation.peak_memory import peak_memory

SHORTEST_TIMING = 0.1  # seconds; faster ways run several times in a row
MAP_LARGE_TENSORS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
MEMORY_GAMMA = 1e-3
CHECKED = 5


@dataclass(frozen=True)
class Timing:
    """One way's times, or why there are none.

    Attributes:
        failure: Why a peer's way cannot be gone on this network, or None.
        seconds: Of one meta-iteration, an entry for each round.
        of_erm: The same over the ERM gradient's, in the same round.
        of_naive: The same over that of ``create_graph``.
        evaluations: How often the loss of a batch was evaluated in a meta-iteration.
        error: Distance of the direction from the naive one, over the length of the second term; None if it is not an
            exact way, or not ``CHECKED``.
    """

    network: str
    domains: int
    way: str
    failure: str | None
    seconds: list[float]
    of_erm: list[float]
    of_naive: list[float]
    evaluations: int
    error: float | None


def seconds(way: Way) -> tuple[float, int]:
    """Return the time of one run and how many it was taken from."""
    gc.collect()
    start, elapsed, times = time.process_time(), 0.0, 0
    while elapsed < SHORTEST_TIMING:
        way()
        elapsed, times = time.process_time() - start, times + 1
    return elapsed / times, times


def time_ways(network: str, domains: int, rounds: int, chosen: Sequence[str]) -> list[Timing]:
    """Time all ways for one network and number of domains, on one thread."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    problem = Problem(network, domains)
    batches = problem.batches
    problem.batches = batches if domains == CHECKED else batches[:2]
    reference = Reference(problem)
    run: dict[str, Way] = {name: problem.way(name, reference.gamma) for name in chosen}
    errors, failures = {}, {}
    for name, way in run.items():  # every way has run by then
        try:
            errors[name] = reference.error(name, way)
        except RuntimeError as error:
            if name != ways.CURVLINOPS:
                raise
            failures[name] = str(error)
    for name in ways.SMOOTH:
        # In meta-iterations number 1, 2, 4 and so on these look once more at a loss: past the first, as in training.
        for _ in range(4 if name in run else 0):
            run[name]()
    problem.batches = batches
    evaluations: dict[str, int] = {}
    measured: dict[str, list[float]] = {name: [] for name in run}
    for number in range(rounds):
        for name in [*chosen[number % len(chosen) :], *chosen[: number % len(chosen)]]:
            if name not in failures:
                problem.evaluations = 0
                elapsed, times = seconds(run[name])
                measured[name].append(elapsed)
                found = round(problem.evaluations / times)
                evaluations[name] = min(found, evaluations.get(name, found))
    return [
        Timing(
            network,
            domains,
            name,
            failures.get(name),
            times,
            *([t / r for t, r in zip(times, measured[other], strict=False)] for other in (ways.ERM, ways.NAIVE)),
            evaluations.get(name, 0),
            errors.get(name) if domains == CHECKED else None,
        )
        for name, times in measured.items()
    ]


def measure_times(
    networks: Sequence[str], domains: Sequence[int], rounds: int, chosen: list[str], processes: int
) -> list[Timing]:
    """Time everything, the largest first; each network and number of domains in one process."""
    tasks = [(network, s, rounds, chosen) for s in sorted(domains, reverse=True) for network in reversed(networks)]
    parts = in_processes(time_ways, tasks, processes, "time")
    found = [timing for part in parts for timing in part]
    order = {name: i for i, name in enumerate([*networks, *chosen])}
    return sorted(found, key=lambda t: (order[t.network], t.domains, order[t.way]))


# ------------------------------------------------------------------------------------------------------------ memory


def probe(case: tuple[str, str, int]) -> dict[str, Any]:
    """Measure one network, way and number of domains in this process, which has done nothing else."""
    network, way, domains = case
    torch.set_num_threads(1)
    problem = Problem(network, domains)
    run = problem.way(way, MEMORY_GAMMA)
    batches = problem.batches
    problem.batches = batches[:2]
    run()
    problem.batches = batches
    problem.optimizer.zero_grad()
    found = peak_memory(run, [torch.device("cpu")])
    return {"network": network, "way": way, "domains": domains, "bytes": found}


def measure_memory(cases: Sequence[tuple[str, str, int]], processes: int) -> list[dict[str, Any]]:
    """Probe every network, way and number of domains in a process of its own, forked from one that has only loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.__main__", "torch._dynamo"])  # what every child would import
    os.environ.update(MAP_LARGE_TENSORS)  # read when the server starts
    with context.Pool(processes, maxtasksperchild=1) as pool:
        found = pool.imap(probe, cases, chunksize=1)
        return list(tqdm(found, total=len(cases), desc="memory", unit="process", file=sys.stderr))
