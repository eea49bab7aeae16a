"""``python -m benchmarks domains``: leave one domain out on real data, and write the report.

    python -m benchmarks domains --root data                 all data sets whose files are under data/
    python -m benchmarks domains watch heart --quick         two of them, for a first look
    python -m benchmarks domains coloredmnist rotatedmnist --domainbed DomainBed    where torchvision is installed
    python -m benchmarks domains --again benchmarks/report/domains                  the report of what was found before

Broken off, it goes on where it was. A data set whose files or packages are missing is left out; which command gets
them is said at the end and in the report.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.domains import domainbed, idx, mnist, protocol, report, sprites
from benchmarks.domains.fishes import fish_against_fish
from benchmarks.domains.source import MissingDataError
from benchmarks.domains.stored import to_stored
from benchmarks.report import environment

__all__ = ["main"]

MNIST = {name.lower(): name for name in domainbed.DOMAINS}
NAMES = (*protocol.SOURCES, *MNIST, report.SPRITES)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks domains", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="data set", help=f"which: {', '.join(NAMES)}; all if none is named")
    add("--root", type=Path, default=Path("data"), help="folder with the files; default %(default)s")
    add("--out", type=Path, default=Path("benchmarks/report/domains"), help="default %(default)s")
    add("--domainbed", type=Path, metavar="DIR", help="a checkout of DomainBed, for the two of MNIST")
    add("--processes", type=int, default=min(os.cpu_count() or 1, 8), help="runs at a time; default %(default)s")
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--quick", action="store_true", help="at most ten minutes on 2 cores: shows that it works")
    much.add_argument(
        "--full", action="store_true", help="all domains, 20 draws, more seeds: a day, or a GPU's machine"
    )
    add("--float32", action="store_true", help="MNIST in float32, not bfloat16: for CPUs that do not multiply that")
    add("--again", type=Path, metavar="FOLDER", help="train nothing: write the report of the figures in this folder")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in NAMES:
            parser.error(f"argument data set: should be some of {', '.join(NAMES)} (got {name!r})")
    if options.processes < 1:
        parser.error(f"argument --processes: should be at least 1 (got {options.processes})")
    options.names = [name for name in NAMES if name in options.names or not options.names]
    options.size = "QUICK" if options.quick else "FULL" if options.full else "DEFAULT"
    return options


def command_of(name: str, options: argparse.Namespace) -> str:
    """Return the command that finds a data set's figures again, without the folders of this machine."""
    root = "" if name == report.SPRITES else " --root data"
    size = {"QUICK": " --quick", "FULL": " --full", "DEFAULT": ""}[options.size]
    of_mnist = f" --domainbed DomainBed{' --float32' if options.float32 else ''}" if name in MNIST else ""
    return f"python -m benchmarks domains {name}{root}{of_mnist}{size}"


def measure_source(name: str, options: argparse.Namespace) -> dict[str, Any]:
    source = protocol.SOURCES[name]
    planned = getattr(protocol, options.size)[name]
    loaded = source.load(options.root)
    evidence = protocol.measure(source, planned, loaded, options.out / name, options.processes)
    timed = options.out / name / "alone.json"
    if not timed.is_file():
        timed.write_text(json.dumps(protocol.time_alone(source, planned, loaded), indent=1) + "\n")
    every = "each domain" if planned.every == 1 else f"one of {planned.every} domains"
    return {
        "title": source.title,
        "shift": source.shift,
        "get": source.command,
        "licence": source.licence,
        "notes": source.notes,
        "sizes": loaded.sizes(),
        "chance": (
            f"{len(loaded.classes)} classes; who always says the most frequent one is right in "
            f"{loaded.most_frequent():.1%}, mean over domains."
        ),
        "cut": f"{every} held out, in the order of the labels; {planned.budget} gradients in a run",
        "seconds_of_run": json.loads(timed.read_text()),
        "evidence": to_stored(evidence),
    }


def measure_mnist(name: str, options: argparse.Namespace) -> dict[str, Any]:
    theirs = MNIST[name]
    settings = getattr(mnist, options.size)[theirs]
    if options.float32:
        settings = replace(settings, bfloat16=False)
    if options.domainbed is None:
        raise MissingDataError(f"--domainbed is not given. This gets a checkout: {domainbed.CLONE}")
    folder = options.out / name
    evidence = mnist.measure(theirs, options.root, options.domainbed, folder, settings, options.processes)
    number = len(domainbed.DOMAINS[theirs])
    return {
        "title": f"{theirs}, by DomainBed",
        "shift": mnist.SHIFTS[theirs],
        "get": f"{idx.COMMAND} && {domainbed.CLONE}",
        "licence": idx.LICENCE,
        "notes": mnist.NOTES,
        "sizes": dict(zip(domainbed.DOMAINS[theirs], map(sum, domainbed.sizes(settings.images, number)), strict=True)),
        "chance": mnist.CHANCE[theirs],
        "cut": (
            f"{settings.images} of 70,000 images, minibatches of {settings.batch_size}, {settings.gradients} gradients "
            f"in a run, {'convolutions in bfloat16' if settings.bfloat16 else 'all in float32'}, {settings.seeds} "
            f"seeds; {len(settings.held_out)} of {number} domains held out. DomainBed's own "
            "protocol is 5,001 steps of 64 images of each domain"
        ),
        "evidence": to_stored(evidence),
        "more": [str(fish_against_fish(evidence, folder))],
    }


def measure_sprites(name: str, options: argparse.Namespace) -> dict[str, Any]:
    settings = getattr(sprites, options.size)
    results = sprites.measure(options.out / name, settings, options.processes)
    return {"settings": asdict(settings), "results": [asdict(result) for result in results]}


@contextmanager
def counted(path: Path, every: float = 5.0) -> Iterator[Callable[[], float]]:
    """Count the time, with that of calls before, and keep it every few seconds: a call that is killed counts, too.

    Args:
        path: Where to keep it, in a folder that may not be there yet.
        every: Seconds.

    Yields:
        A function that returns the seconds so far.
    """
    before = json.loads(path.read_text()) if path.is_file() else 0.0
    start = time.perf_counter()
    done = threading.Event()

    def spent() -> float:
        return before + time.perf_counter() - start

    def keep() -> None:
        if path.parent.is_dir():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(spent()))
            partial.replace(path)

    def watch() -> None:
        while not done.wait(every):
            keep()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield spent
    finally:
        done.set()
        thread.join()
        keep()


def measure(name: str, options: argparse.Namespace) -> None:
    """Measure one data set and store what was found.

    Args:
        name: Which.
        options: The command line.

    Raises:
        FileNotFoundError: If its files are not there.
        ModuleNotFoundError: If a package that reads them is not installed.
    """
    kind: Callable[[str, argparse.Namespace], dict[str, Any]] = (
        measure_mnist if name in MNIST else measure_sprites if name == report.SPRITES else measure_source
    )
    with counted(options.out / name / "seconds.json") as seconds:
        found = kind(name, options)
        found |= {
            "command": command_of(name, options),
            "environment": environment(),
            "processes": options.processes,
            "seconds": seconds(),
        }
    (options.out / f"{name}.json").write_text(json.dumps(found) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"python -m benchmarks domains: error: argument --out: {error}", file=sys.stderr)
        return 2
    missing: dict[str, str] = {}
    if options.again is not None:
        if options.again.resolve() != options.out.resolve():
            for path in options.again.glob("*.json"):
                shutil.copyfile(path, options.out / path.name)
    else:
        for name in options.names:
            print(f"{name} ...", file=sys.stderr)
            try:
                measure(name, options)
            except MissingDataError as error:
                missing[name] = str(error)
            except ModuleNotFoundError as error:
                missing[name] = f"a package is missing: {error}"
            except ValueError as error:  # a damaged file, or a folder of other runs
                print(f"python -m benchmarks domains: error: {name}: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print("interrupted: the same command goes on from here", file=sys.stderr)
                return 130
    for name, reason in missing.items():
        print(f"left out: {name}, {reason}", file=sys.stderr)
    try:
        print(f"wrote {report.write(options.out, missing)}")
    except ValueError as error:
        print(f"python -m benchmarks domains: error: {error}", file=sys.stderr)
        return 1
    return 0
