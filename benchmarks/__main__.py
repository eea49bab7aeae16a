"""``python -m benchmarks``: measure, and write the report.

    python -m benchmarks                                all of it, into benchmarks/report (make bench)
    python -m benchmarks cost --networks MLP --domains 2 15 --rounds 5
    python -m benchmarks scale                          several processes: scale.md, scale.json and its pictures alone
    python -m benchmarks domains --root data            one domain left out in turn, on real data; options of its own
    python -m benchmarks --again benchmarks/report      tables and pictures from the figures measured before

Ways that a peer package is needed for are left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import cost, fidelity, outcome, report, scale, ways
from benchmarks._models import NETWORKS
from benchmarks.scale.report import write as write_scale

PARTS = ("cost", "memory", "fidelity", "outcome")
DOMAINS = "domains"
SCALE = "scale"  # has files of its own, and wants the machine for itself


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure Fish against exact second order and write index.md, pictures and report.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    parts = f"which parts: {', '.join(PARTS)}, all these if none is named; or {SCALE}, minutes with all cores to itself"
    add("parts", nargs="*", metavar="part", help=parts)
    add("--out", type=Path, default=Path("benchmarks/report"), help="folder for the report")
    add("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NAME")
    add("--domains", nargs="+", type=int, default=[2, 5, 15, 32], metavar="S", help="numbers of domains")
    add("--rounds", type=int, default=3, help="times each way is timed")
    add("--repeats", type=int, default=fidelity.REPEATS, help="draws of network and data for the fidelity")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the runs on CdSprites")
    add("--processes", type=int, default=min(os.cpu_count() or 1, 4), help="at a time, each on one thread")
    add("--quick", action="store_true", help=f"{SCALE}: as little as shows that it works")
    add("--again", type=Path, metavar="FOLDER", help="measure nothing: write the report of the figures in this folder")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in (*PARTS, SCALE)]
    if unknown:
        parser.error(f"argument part: should be some of {', '.join((*PARTS, SCALE))} (got {unknown[0]!r})")
    options.scale = SCALE in options.parts
    options.parts = [part for part in PARTS if part in options.parts or not options.parts]
    options.networks = [network for network in NETWORKS if network in options.networks]
    options.domains = sorted(set(options.domains))
    if options.domains[0] < 2:
        parser.error(f"argument --domains: should be at least 2 (got {options.domains[0]})")
    for name in ("rounds", "repeats", "processes"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: should be at least 1 (got {getattr(options, name)})")
    for wanted, name in ((options.parts, "report.json"), (options.scale, "scale.json")):
        if options.again is not None and wanted and not (options.again / name).is_file():
            parser.error(f"argument --again: {options.again} holds no {name}")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    names, processes = ways.names(), options.processes
    if ways.CURVLINOPS not in names:
        print("curvlinops is not installed: its row is left out (make bench installs it)", file=sys.stderr)
    results: dict[str, Any] = {
        "environment": report.environment(),
        "settings": {k: v for k, v in vars(options).items() if k not in ("out", "again", "quick", "scale")},
        "sizes": report.sizes(options.networks),
        "seconds": {},
    }

    def timed(part: str, measuring: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = measuring()
        results["seconds"][part] = time.perf_counter() - start
        return found

    refused: set[tuple[str, str]] = set()
    if "outcome" in options.parts:
        found = timed("outcome", lambda: outcome.measure(options.seeds, processes))
        results["outcome"] = [asdict(run) for run in found]
    if "cost" in options.parts:
        found = timed(
            "cost", lambda: cost.measure_times(options.networks, options.domains, options.rounds, names, processes)
        )
        refused = {(timing.network, timing.way) for timing in found if timing.failure}
        results["times"] = [asdict(timing) for timing in found]
    if "memory" in options.parts:
        cases = [
            (network, way, s)
            for network in options.networks
            for way in names
            for s in options.domains
            if (network, way) not in refused and way != ways.CURVLINOPS
        ]
        results["memory"] = timed("memory", lambda: cost.measure_memory(cases, processes))
    if "fidelity" in options.parts:
        found = timed("fidelity", lambda: fidelity.measure(options.networks, options.repeats, processes))
        results["fidelity"] = [asdict(measured) for measured in found]
        results["rate_of_batches"] = fidelity.RATE_OF_BATCHES
    return results


def measure_scale(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what several processes cost."""
    settings = scale.QUICK if options.quick else scale.Settings()
    return {"environment": report.environment(), **scale.measure(settings)}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == [DOMAINS]:
        from benchmarks.domains.cli import main as domains  # has data sets and packages of its own

        return domains(arguments[1:])
    options = parse(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"python -m benchmarks: error: argument --out: {error}", file=sys.stderr)
        return 2
    if options.parts:
        publish(options, "report.json", lambda: measure(options), report.write, "index.md")
    if options.scale:
        publish(options, "scale.json", lambda: measure_scale(options), write_scale, "scale.md")
    return 0


def publish(
    options: argparse.Namespace,
    name: str,
    measuring: Callable[[], dict[str, Any]],
    write: Callable[[dict[str, Any], Path], None],
    text: str,
) -> None:
    """Measure, or copy what was measured before, and write the report of it."""
    path = options.out / name
    if options.again is None:
        path.write_text(json.dumps(measuring(), indent=1) + "\n")
    elif options.again.resolve() != options.out.resolve():
        shutil.copyfile(options.again / name, path)
    write(json.loads(path.read_text()), options.out)
    print(f"wrote {options.out / text}")


if __name__ == "__main__":
    sys.exit(main())
