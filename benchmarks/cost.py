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
from typing import Any

import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from benchmarks import ways
from benchmarks.ways import Problem, Reference, Way
from torch_gradmatch.evaluation.peak_memory import peak_memory

SHORTEST_TIMING = 0.1  # seconds; faster ways run several times in a row
MAP_LARGE_TENSORS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
MEMORY_GAMMA = 1e-3
CHECKED = 5


def seconds(way: Way) -> tuple[float, int]:
    """Return the time of one run and how many it was taken from."""
    gc.collect()
    start, elapsed, times = time.process_time(), 0.0, 0
    while elapsed < SHORTEST_TIMING:
        way()
        elapsed, times = time.process_time() - start, times + 1
    return elapsed / times, times


def time_ways(network: str, domains: int, rounds: int, chosen: Sequence[str]) -> list[dict[str, Any]]:
    """Time all ways for one network and number of domains, on one thread.

    In a row ``seconds`` has an entry for each round, ``of_erm`` and ``of_naive`` the same over those ways' in the same
    round; ``failure`` says why a peer's way cannot be gone, and ``error`` is the distance of an exact way's direction.
    """
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
        for _ in range(4):
            run[name]()
    problem.batches = batches
    evaluations: dict[str, int] = {}
    measured: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(rounds):
        for name in [*chosen[number % len(chosen) :], *chosen[: number % len(chosen)]]:
            if name not in failures:
                problem.evaluations = 0
                elapsed, times = seconds(run[name])
                measured[name].append(elapsed)
                found = round(problem.evaluations / times)
                evaluations[name] = min(found, evaluations.get(name, found))
    return [
        {
            "network": network, "domains": domains, "way": name, "failure": failures.get(name), "seconds": times,
            "of_erm": [t / r for t, r in zip(times, measured[ways.ERM], strict=False)],
            "of_naive": [t / r for t, r in zip(times, measured[ways.NAIVE], strict=False)],
            "evaluations": evaluations.get(name, 0),
            "error": errors.get(name) if domains == CHECKED else None,
        }
        for name, times in measured.items()
    ]  # fmt: skip


def measure_times(
    networks: Sequence[str], domains: Sequence[int], rounds: int, chosen: list[str], processes: int
) -> list[dict[str, Any]]:
    """Time everything, the largest first; each network and number of domains in one process."""
    tasks = [(network, s, rounds, chosen) for s in sorted(domains, reverse=True) for network in reversed(networks)]
    parts = Parallel(processes, batch_size=1, verbose=5)(delayed(time_ways)(*task) for task in tasks)
    return [row for part in reversed(parts) for row in part]


def probe(case: tuple[str, str, int]) -> dict[str, Any]:
    """Measure memory for one network, way and number of domains in this process, which has done nothing else."""
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
