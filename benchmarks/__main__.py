"""``python -m benchmarks``: measure, and write the report.

python -m benchmarks                                all of it, into benchmarks/report (make bench)
python -m benchmarks cost --networks MLP --domains 2 15 --rounds 5
python -m benchmarks scale                          several processes: scale.md, scale.json and its pictures alone
python -m benchmarks domains --root data            one domain left out in turn, on real data; options of its own
python -m benchmarks --again benchmarks/report      tables and pictures from the figures measured before
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cost, fidelity, outcome, report, scale, ways
from benchmarks._models import NETWORKS
from benchmarks.scale import report as scale_report

PARTS = ("cost", "memory", "fidelity", "outcome")
SCALE = "scale"  # has files of its own, and wants the machine for itself


def some_part(text: str) -> str:
    if text not in (*PARTS, SCALE):
        raise argparse.ArgumentTypeError(f"should be some of {', '.join((*PARTS, SCALE))} (got {text!r})")
    return text


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"should be at least {least} (got {text})")
        return int(text)

    return number


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure Fish against exact second order and write index.md, pictures and report.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    parts = f"which parts: {', '.join(PARTS)}, all these if none is named; or {SCALE}, minutes with all cores to itself"
    add("parts", nargs="*", type=some_part, default=PARTS, metavar="part", help=parts)
    add("--out", type=Path, default=Path("benchmarks/report"), help="folder for the report")
    add("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NAME")
    add("--domains", nargs="+", type=at_least(2), default=[2, 5, 15, 32], metavar="S", help="numbers of domains")
    add("--rounds", type=at_least(1), default=3, help="times each way is timed")
    add("--repeats", type=at_least(1), default=3, help="draws of network and data for the fidelity")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the runs on CdSprites")
    add("--processes", type=at_least(1), default=min(os.cpu_count() or 1, 4), help="at a time, each on one thread")
    add("--quick", action="store_true", help=f"{SCALE}: as little as shows that it works")
    add("--again", type=Path, metavar="FOLDER", help="measure nothing: write the report of the figures in this folder")
    options = parser.parse_args(arguments)
    options.domains = sorted(set(options.domains))
    for name in {"scale.json" if part == SCALE else "report.json" for part in options.parts}:
        if options.again is not None and not (options.again / name).is_file():
            parser.error(f"argument --again: {options.again} holds no {name}")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    names, networks, processes = ways.names(), options.networks, options.processes
    if ways.CURVLINOPS not in names:
        print("curvlinops is not installed: its row is left out (make bench installs it)", file=sys.stderr)
    settings = ("networks", "domains", "rounds", "repeats", "seeds", "processes")
    results: dict[str, Any] = {
        "environment": report.environment(),
        "settings": {name: getattr(options, name) for name in settings},
        "sizes": report.sizes(networks),
        "seconds": {},
    }

    def memory() -> list[dict[str, Any]]:
        measurable = [name for name in names if name != ways.CURVLINOPS]
        cases = [(network, way, s) for network in networks for way in measurable for s in options.domains]
        return cost.measure_memory(cases, processes)

    for part, key, measuring in (
        ("outcome", "outcome", lambda: outcome.measure(options.seeds, processes)),
        ("cost", "times", lambda: cost.measure_times(networks, options.domains, options.rounds, names, processes)),
        ("memory", "memory", memory),
        ("fidelity", "fidelity", lambda: fidelity.measure(networks, options.repeats, processes)),
    ):
        if part in options.parts:
            start = time.perf_counter()
            results[key] = measuring()
            results["seconds"][part] = time.perf_counter() - start
    return results


def publish(
    options: argparse.Namespace, name: str, measuring: Callable[[], dict[str, Any]], write: Callable[..., Path]
) -> None:
    """Measure, or take what was measured before, and write the report of it."""
    results = measuring() if options.again is None else json.loads((options.again / name).read_text())
    (options.out / name).write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {write(results, options.out)}")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["domains"]:
        from benchmarks.domains.cli import main as domains  # has data sets and packages of its own

        return domains(arguments[1:])
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if set(options.parts) & set(PARTS):
        publish(options, "report.json", lambda: measure(options), report.write)
    if SCALE in options.parts:
        measured = lambda: {"environment": report.environment(), **scale.measure(quick=options.quick)}  # noqa: E731
        publish(options, "scale.json", measured, scale_report.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
