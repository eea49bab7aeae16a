"""``python -m benchmarks domains``: leave one domain out on real data, and write the report.

    python -m benchmarks domains --root data                 all data sets whose files are under data/
    python -m benchmarks domains watch heart --quick         two of them, for a first look

Broken off, it goes on where it was. A data set whose files or packages are missing is left out; which command gets
them is said at the end and in the report.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.domains import emoji, heart, names, report, sentiment, vowels, watch
from benchmarks.domains.source import Loaded, MissingDataError, Source
from benchmarks.report import environment
from torch_gradmatch import Choice, Evidence, LogUniform, leave_one_domain_out

__all__ = ["SIZES", "SOURCES", "Protocol", "held_out", "main", "measure"]

KEPT, FIRST = Path("benchmarks/results/domains"), Path("benchmarks/report/domains")
OWN = [module.SOURCE for module in (sentiment, watch, vowels, heart, names)]
SOURCES: dict[str, Source] = {source.name: source for source in (emoji.MAPS, emoji.FEATURES, *emoji.TINTS, *OWN)}
MANY = ("ERM", "ERM, balanced", "Fish", "SmoothFish", "IDGM, head", "IDGM", "Fishr", "VREx", "GroupDRO")
FEW = ("ERM", "ERM, balanced", "Fish", "IDGM, head", "Fishr", "ERM, cosine decay")
SHORT = {"lr": LogUniform(1e-3, 3e-2, 5e-3)}  # higher than the default: runs are short
FROZEN = {"lr": LogUniform(1e-4, 1e-2, 1e-3), "weight_decay": LogUniform(1e-5, 1e-1, 1e-5)}
FINE_TUNING = {"lr": LogUniform(1e-4, 1.6e-3, 4e-4), "batch_size": Choice((36,))}


@dataclass(frozen=True)
class Protocol:
    """How much is trained for a data set.

    Attributes:
        budget: Samples that are differentiated in a run.
        every: 2 to hold out every second domain, in the order of the labels; the others are trained on always.
        draws: Of hyperparameters.
        seeds: How many.
        permuted, validation, evaluations, domains_per_step, methods, search, optimizer: As for
            ``leave_one_domain_out``.
    """

    budget: int
    every: int = 1
    draws: int = 8
    seeds: int = 5
    permuted: int = 0
    validation: float = 0.2
    evaluations: int = 10
    domains_per_step: int | None = None
    methods: tuple[str, ...] | None = None
    search: Mapping[str, LogUniform | Choice] = field(default_factory=lambda: SHORT)
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam


TINTED = Protocol(20_000, draws=6, evaluations=5, methods=MANY, search=FROZEN)
SIZES = {
    "default": {
        "watch": Protocol(125_000, every=2, domains_per_step=4),
        "vowels": Protocol(32_000, every=3),
        "heart": Protocol(100_000),
        "names": Protocol(20_000, every=6, domains_per_step=8),
        "sentiment": Protocol(60_000),
        "emoji-features": Protocol(40_000, validation=0.25, draws=12, evaluations=5, methods=MANY, search=FROZEN),
        "emoji": Protocol(10_800, draws=4, evaluations=4, methods=FEW, search=FINE_TUNING, optimizer=torch.optim.AdamW),
        "tints-4": TINTED,
        "tints-8": replace(TINTED, every=2),
        "tints-20": replace(TINTED, every=4, domains_per_step=8),
    }
}
SIZES["quick"] = {
    name: replace(p, budget=p.budget // 10, every=4 * p.every, draws=2, seeds=2, evaluations=1)
    for name, p in SIZES["default"].items()
}


def held_out(protocol: Protocol, loaded: Loaded) -> list[str]:
    """Return which domains are held out: a rule that does not know what comes of it."""

    def natural(label: str) -> tuple[str, int]:  # "person 10" after "person 9"
        word, _, number = label.rpartition(" ")
        return (word, int(number)) if number.isdigit() else (label, 0)

    return sorted(loaded.sizes(), key=natural)[:: protocol.every]


def measure(source: Source, protocol: Protocol, loaded: Loaded, folder: Path | None, **others: Any) -> Evidence:
    """Train and compare on one data set, or go on where it was broken off; ``others`` are of the call."""
    own: dict[str, Any] = {name: value for name, value in vars(protocol).items() if name not in ("every", "methods")}
    arguments = own | {"groups": loaded.groups, "held_out": held_out(protocol, loaded), "folder": folder}
    return leave_one_domain_out(
        source.make_model,
        loaded.dataset(),
        loaded.domains,
        source.loss_fn,
        source.metric,
        protocol.methods,
        **arguments | others,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks domains", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="data set", help=f"which: {', '.join(SOURCES)}; all if none is named")
    add("--root", type=Path, default=Path("data"), help="folder with the files; default %(default)s")
    add(
        "--out", type=Path, help=f"default {KEPT}, whose runs are in the repository; with --quick or --permuted {FIRST}"
    )
    add("--processes", type=int, default=min(os.cpu_count() or 1, 8), help="runs at a time; default %(default)s")
    add("--permuted", type=int, default=0, help="the control: domains permuted with this seed")
    add("--quick", action="store_const", const="quick", default="default", dest="size", help="shows that it works")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in SOURCES:
            parser.error(f"argument data set: should be some of {', '.join(SOURCES)} (got {name!r})")
    if options.processes < 1:
        parser.error(f"argument --processes: should be at least 1 (got {options.processes})")
    if options.out is None:
        options.out = KEPT if options.size == "default" and not options.permuted else FIRST
    options.names = [name for name in SOURCES if name in options.names or not options.names]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    found, missing = [], []
    for name in options.names:
        source, protocol = SOURCES[name], replace(SIZES[options.size][name], permuted=options.permuted)
        folder = options.out / name
        try:
            loaded = source.load(options.root)
            evidence = measure(source, protocol, loaded, folder, processes=options.processes)
        except MissingDataError as error:
            missing.append(f"- Left out: {name}, {error}")
        except ModuleNotFoundError as error:
            missing.append(f"- Left out: {name}, a package is missing: {error}")
        except ValueError as error:  # a damaged file, or a folder of other runs
            print(f"python -m benchmarks domains: error: {name}: {error}", file=sys.stderr)
            return 2
        else:
            evidence.to_json(options.out / f"{name}.json")
            evidence.plot(options.out / f"{name}.png")
            found.append(report.Found(source, loaded, evidence, folder, protocol.every))
    print("\n".join(missing), file=sys.stderr)
    if not found:
        return 1
    called = " ".join(["python -m benchmarks domains", *options.names, *(["--quick"] * (options.size == "quick"))])
    path = options.out / "index.md"
    report.write(found, called, environment(), missing, path)
    print(f"wrote {path}")
    return 0
