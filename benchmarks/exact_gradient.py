"""Time and memory of the exact gradient of inter-domain gradient matching, against doing it naively.

    python benchmarks/exact_gradient.py --json out/exact_gradient.json

times one meta-iteration over S domains, from no gradient to every parameter's ``.grad``:

``ERM``
    The reference cost: the gradient of the mean loss, one backward pass for each domain.
``naive``
    The objective written down: each domain's gradient with ``create_graph=True``, every graph kept, the agreement of
    the gradients, one ``backward`` through it all. The authors' code (github.com/YugeTen/fish) has Fish only; this is
    written by hand, as public code writes penalties on gradients (``IGA`` of DomainBed, for one).
the others
    ``IDGM`` of this package by ``meta_step``, without the wrapped optimizer's own step.

With one thread the times are the processor's, which other work on the machine changes little; with more they are the
wall clock's. The ways take turns in rounds, and ratios are of times of the same round: what slows the machine down for
a while slows all of them. Shown is the median over rounds, in brackets the quartiles. Before that, each direction is
compared with the naive one, at a gamma at which both terms of the objective have gradients of one length: ``error`` is
the distance over that length. ``hvp_domains=1`` is compared with the naive second term of the domain that it drew.
Finite differences are off where they step across the kinks of ReLUs.

Memory is measured in processes of their own: the highest resident memory during one meta-iteration over the level
before it. Model and batches count as before; so do the libraries that a first meta-iteration with S=2 loads. How large
the holes are that glibc's heap leaves varies from run to run and hides what is needed, so each large tensor is mapped
by itself; the row that says so has the heap as it comes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from _models import NETWORKS, Batch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from torch_gradmatch import IDGM

Gradients = Sequence[Sequence[Tensor]]
Way = Callable[[], None]

SHORTEST_TIMING = 0.1  # seconds; faster ways run several times in a row
MEMORY_NETWORK, MEMORY_BATCH, MEMORY_DOMAINS = "ResNet-18/4", 16, (2, 8, 32)
# Whether the heap is as it comes.
MEMORY_WAYS = {"ERM": False, "naive": False, "streaming": False, "keep_graphs": False, "streaming, glibc's heap": True}
MAP_LARGE_TENSORS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}


# ------------------------------------------------------------------------------------------------------------- by hand


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def inner_product(gradients: Gradients) -> Tensor:
    total = [sum(parts) for parts in zip(*gradients, strict=True)]
    domains = len(gradients)
    return (dot(total, total) - sum(dot(g, g) for g in gradients)) / (domains * (domains - 1))


def variance(gradients: Gradients) -> Tensor:
    mean = [sum(parts) / len(gradients) for parts in zip(*gradients, strict=True)]
    deviations = [[g - m for g, m in zip(gradient, mean, strict=True)] for gradient in gradients]
    return -sum(dot(d, d) for d in deviations) / len(gradients)


def cosine(gradients: Gradients) -> Tensor:
    return inner_product([[x / dot(g, g).sqrt() for x in g] for g in gradients])


BY_HAND = {"inner_product": inner_product, "variance": variance, "cosine": cosine}


class Problem:
    """One model, S batches, and the ways to get the gradient."""

    def __init__(self, network: str, domains: int, batch_size: int | None = None) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = NETWORKS[network].make().train()
        self.parameters = list(self.model.parameters())
        self.batches: list[Batch] = NETWORKS[network].batches(domains, batch_size)

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def erm(self) -> None:
        self.model.zero_grad()
        for batch in self.batches:
            (self.loss(batch) / len(self.batches)).backward()

    def naive(self, gamma: float, agreement: str = "inner_product", only: int | None = None) -> None:
        """Differentiate the objective; with ``only``, weigh one domain's part of the second term by S."""
        self.model.zero_grad()
        losses, gradients = [], []
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            for batch in self.batches:
                losses.append(self.loss(batch))
                gradients.append(torch.autograd.grad(losses[-1], self.parameters, create_graph=True))
            if only is not None:
                factor = len(self.batches)
                gradients = [g if i == only else [x.detach() for x in g] for i, g in enumerate(gradients)]
            else:
                factor = 1
            objective = torch.stack(losses).mean() - factor * gamma * BY_HAND[agreement](gradients)
            objective.backward()

    def package(self, gamma: float, **settings: Any) -> Way:
        optimizer = torch.optim.SGD(self.parameters)
        loop = IDGM(self.model, gamma, **settings).start(optimizer, {})

        def run() -> None:
            self.model.zero_grad()
            loop.meta_step(self.loss, self.batches, lambda: None)

        return run


SETTINGS: dict[str, dict[str, Any]] = {
    "streaming": {},
    "keep_graphs": {"keep_graphs": True},
    "forward": {"hvp": "forward"},
    "finite_difference": {"hvp": "finite_difference"},
    "hvp_domains=1": {"hvp_domains": 1},
    "hvp_domains=1, keep_graphs": {"hvp_domains": 1, "keep_graphs": True},
    "streaming, variance": {"agreement": "variance"},
    "streaming, cosine": {"agreement": "cosine"},
}


# ---------------------------------------------------------------------------------------------------------- directions


def drawn_domain(problem: Problem) -> int:
    """Seed dropout and the draw of ``hvp_domains=1``; return the domain drawn, which comes before anything else."""
    torch.manual_seed(1)
    return int(torch.randperm(len(problem.batches))[0])


def direction(problem: Problem, way: Way, *, draw: bool = False) -> Tensor:
    """Return the gradient that a way finds after seeding, and after the draw for a way that draws nothing itself."""
    if draw:
        drawn_domain(problem)
    else:
        torch.manual_seed(1)
    way()
    return torch.cat([p.grad.flatten() for p in problem.parameters if p.grad is not None]).double()


class Reference:
    """What the naive way finds for one agreement, at the gamma at which both terms have gradients of one length."""

    def __init__(self, problem: Problem, agreement: str) -> None:
        self.problem = problem
        self.agreement = agreement
        mean = direction(problem, problem.erm)
        matched = direction(problem, partial(problem.naive, 1.0, agreement))
        self.length = mean.norm()
        self.gamma = float(self.length / (matched - mean).norm())
        self.expected = mean + self.gamma * (matched - mean)

    def error(self, way: Way, *, one_domain: bool) -> float:
        """Return a way's distance from the naive direction, over the length of the second term."""
        expected = self.expected
        if one_domain:
            naive = partial(self.problem.naive, self.gamma, self.agreement, drawn_domain(self.problem))
            expected = direction(self.problem, naive, draw=True)
        return float((direction(self.problem, way) - expected).norm() / self.length)


# ---------------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Timing:
    """One way's times: seconds of one meta-iteration in each round."""

    network: str
    threads: int
    way: str
    error: float | None
    seconds: list[float]
    of_erm: list[float]
    of_naive: list[float]


def seconds(way: Way) -> float:
    # Waiting threads spin: with more than one thread the processor's time says little.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    gc.collect()
    start, elapsed, times = clock(), 0.0, 0
    while elapsed < SHORTEST_TIMING:
        way()
        elapsed, times = clock() - start, times + 1
    return elapsed / times


def time_network(network: str, domains: int, rounds: int, threads: int, progress: tqdm[Any]) -> list[Timing]:
    """Time all ways for one network."""
    torch.set_num_threads(threads)
    problem = Problem(network, domains)
    references = {agreement: Reference(problem, agreement) for agreement in BY_HAND}
    ways: dict[str, Way] = {"ERM": problem.erm, "naive": partial(problem.naive, references["inner_product"].gamma)}
    errors: dict[str, float | None] = dict.fromkeys(ways)
    for name, settings in SETTINGS.items():
        reference = references[settings.get("agreement", "inner_product")]
        ways[name] = problem.package(reference.gamma, **settings)
        errors[name] = reference.error(ways[name], one_domain="hvp_domains" in settings)
    measured: dict[str, list[float]] = {name: [] for name in ways}  # every way has run by now
    order = list(ways)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            progress.set_postfix_str(f"{network}, threads={threads}, {name}")
            measured[name].append(seconds(ways[name]))
            progress.update()
    return [
        Timing(network, threads, name, errors[name], times, *(ratios(times, measured[r]) for r in ("ERM", "naive")))
        for name, times in measured.items()
    ]


def ratios(times: list[float], reference: list[float]) -> list[float]:
    return [t / r for t, r in zip(times, reference, strict=True)]


def with_quartiles(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{median(values):.2f} ({low:.2f} to {high:.2f})"


# -------------------------------------------------------------------------------------------------------------- memory


def highest_resident() -> int:
    """Return the highest resident memory of this process in bytes, since :func:`forget_highest` where that works."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_highest() -> bool:
    """Let the record begin anew from the present level; return whether the system does that."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is no longer resident
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def probe_memory(name: str, domains: int) -> dict[str, Any]:
    """Measure one way in this process, which has done nothing else."""
    problem = Problem(MEMORY_NETWORK, domains, MEMORY_BATCH)
    gamma = 1e-3
    if name in ("ERM", "naive"):
        way = problem.erm if name == "ERM" else partial(problem.naive, gamma)
    else:
        way = problem.package(gamma, **SETTINGS[name])
    batches = problem.batches
    problem.batches = batches[:2]
    way()
    problem.batches = batches
    problem.model.zero_grad()
    resets = forget_highest()
    before = highest_resident()
    way()
    return {"bytes": highest_resident() - before, "record_reset": resets}


def measure_memory(threads: int) -> list[dict[str, Any]]:
    """Probe every way and S in a process of its own."""
    found = []
    cases = [(way, domains) for way in MEMORY_WAYS for domains in MEMORY_DOMAINS]
    for way, domains in tqdm(cases, desc="memory", file=sys.stderr):
        command = [sys.executable, __file__, "--probe", way.split(",")[0], str(domains), "--threads", str(threads)]
        variables = os.environ if MEMORY_WAYS[way] else os.environ | MAP_LARGE_TENSORS
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=variables)
        found.append({"way": way, "domains": domains, **json.loads(ran.stdout)})
    return found


# -------------------------------------------------------------------------------------------------------------- report


def environment() -> dict[str, Any]:
    model = platform.processor() or "unknown CPU"
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {"torch": torch.__version__, "python": platform.python_version(), "cpu": model, "cpus": os.cpu_count()}


def markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def heading(network: str, size: dict[str, Any], threads: int) -> str:
    parameters = f"{size['parameters'] / 1e6:.2f} M parameters in {size['tensors']} tensors"
    return f"{network}: {parameters}, batch {size['batch']}, threads: {threads}"


def time_table(timings: list[Timing]) -> str:
    rows = [["way", "ms", "of ERM", "of naive", "error"]]
    for t in timings:
        error = "-" if t.error is None else f"{t.error:.0e}"
        rows.append(
            [t.way, f"{median(t.seconds) * 1e3:.1f}", with_quartiles(t.of_erm), with_quartiles(t.of_naive), error]
        )
    return markdown(rows)


def memory_table(found: list[dict[str, Any]]) -> str:
    fewest, most = MEMORY_DOMAINS[0], MEMORY_DOMAINS[-1]
    rows = [["way", *(f"S={s}, MB" for s in MEMORY_DOMAINS), f"S={most} / S={fewest}"]]
    for way in MEMORY_WAYS:
        peak = {entry["domains"]: entry["bytes"] for entry in found if entry["way"] == way}
        rows.append([way, *(f"{peak[s] / 1e6:.0f}" for s in MEMORY_DOMAINS), f"{peak[most] / peak[fewest]:.2f}"])
    return markdown(rows)


def sizes(networks: Sequence[str]) -> dict[str, dict[str, Any]]:
    made = {name: list(NETWORKS[name].make().parameters()) for name in networks}
    return {
        name: {"parameters": sum(p.numel() for p in ps), "tensors": len(ps), "batch": NETWORKS[name].shape}
        for name, ps in made.items()
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=NETWORKS, default=list(NETWORKS), help="networks to time")
    parser.add_argument("--domains", type=int, default=15, help="S for the times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="memory is measured with the first")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory, too")
    parser.add_argument("--json", type=Path, help="file for the numbers and the environment")
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)  # what the script calls itself with
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads[0])
    if options.probe:
        print(json.dumps(probe_memory(options.probe[0], int(options.probe[1]))))
        return
    where, shapes = environment(), sizes(options.models)
    print(f"torch {where['torch']}, {where['cpu']}, {where['cpus']} CPUs")
    print(f"Times: one meta-iteration, S={options.domains}, {options.rounds} rounds.")
    steps = len(options.models) * len(options.threads) * options.rounds * (2 + len(SETTINGS))
    timings: list[Timing] = []
    with tqdm(total=steps, desc="time", file=sys.stderr) as progress:
        for threads in options.threads:
            for network in options.models:
                found = time_network(network, options.domains, options.rounds, threads, progress)
                timings += found
                progress.clear()
                print(f"\n{heading(network, shapes[network], threads)}\n\n{time_table(found)}", flush=True)
    peaks = measure_memory(options.threads[0]) if options.memory else []
    if peaks:
        print(f"\nPeak memory over model and batches: {MEMORY_NETWORK}, batch {MEMORY_BATCH}.\n")
        print(memory_table(peaks))
        if not all(entry["record_reset"] for entry in peaks):
            print("\nThis system cannot reset the record of memory: a peak may be that of the warm-up.")
    if options.json is not None:
        settings = {"domains": options.domains, "rounds": options.rounds, "threads": options.threads}
        results = {
            "environment": where, "settings": settings, "sizes": shapes, "times": [asdict(t) for t in timings],
            "memory": {"network": MEMORY_NETWORK, "batch": MEMORY_BATCH, "peaks": peaks},
        }  # fmt: skip
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
