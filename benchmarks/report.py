"""The report: ``index.md`` with tables and pictures, from the figures in ``report.json``."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import fidelity, plots
from benchmarks._models import NETWORKS
from benchmarks.plots import Rows, distinct, of
from benchmarks.ways import SYMMETRIC
from torch_gradmatch import native_status

SHOWN_RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
REACHED = 0.95


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor() or "unknown CPU"
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": model,
        "cpus": os.cpu_count(),
        "native": str(native_status()),
    }


def sizes(networks: Iterable[str]) -> dict[str, dict[str, Any]]:
    made = {name: list(NETWORKS[name].make().parameters()) for name in networks}
    return {
        name: {"parameters": sum(p.numel() for p in ps), "tensors": len(ps), "batch": list(NETWORKS[name].shape)}
        for name, ps in made.items()
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "-" * (widths[0] + 2) + "|" + "|".join("-" * (w + 1) + ":" for w in widths[1:]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def with_quartiles(values: Iterable[float], digits: int = 2) -> str:
    low, middle, high = plots.spread(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def write(results: Mapping[str, Any], folder: Path) -> Path:
    """Write ``index.md`` and the pictures of whatever parts the results have."""
    where = results["environment"]
    took = " + ".join(f"{seconds:.0f} s ({part})" for part, seconds in results["seconds"].items())
    parts = [
        "# Fish against exact second order",
        (
            f"`python -m benchmarks`, {where['date']}: torch {where['torch']}, Python {where['python']}, "
            f"{where['cpu']}, {where['cpus']} CPUs, {results['settings']['processes']} processes at a time of one "
            f"thread each; interpolation by {where['native']}. Took {took}."
        ),
        (
            "`ERM` is the reference cost: the gradient of the mean loss over S domains, and a step. `create_graph` is "
            "the exact objective written down naively, `curvlinops` its two passes with that package's Hessian "
            "products, everything else `meta_step` of this package; `IDGM` alone streams, by double backward. How each "
            "figure is taken is said in `benchmarks/ways.py`, `cost.py`, `fidelity.py` and `outcome.py`."
        ),
    ]
    if "times" in results:
        title = "Time of a meta-iteration over that of the ERM gradient and a step"
        plots.grow(folder / "cost.png", results["times"], "of_erm", 1, title, "time / ERM")
        parts += _cost(results)
    if "memory" in results:
        title = "Peak memory of a meta-iteration above model and batches"
        plots.grow(folder / "memory.png", results["memory"], "bytes", 1e6, title, "MB")
        parts += _memory(results)
    if "fidelity" in results:
        plots.fidelity_by_rate(folder / "fidelity.png", results["fidelity"])
        plots.fidelity_by_batch(folder / "fidelity_batch.png", results["fidelity"], fidelity.RATE_OF_BATCHES)
        parts += _fidelity(results)
    if "outcome" in results:
        plots.outcome(folder / "outcome.png", results["outcome"])
        parts += _outcome(results["outcome"])
    path = folder / "index.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _cost(results: Mapping[str, Any]) -> list[str]:
    domains = results["settings"]["domains"]
    middle = 15 if 15 in domains else max(domains)
    parts = [
        "## Cost: time",
        "![Time against the number of domains](cost.png)",
        (
            f"Medians of {results['settings']['rounds']} rounds with quartiles; ratios are of times of one round. Per "
            "evaluation: time over ERM's, for each time that the loss of a batch is evaluated. Error: distance of the "
            "direction from `create_graph`'s over the length of the second term, with S = 5; finite differences are "
            "off where they step across the kinks of ReLUs, curvlinops on the Transformer, whose dropout it draws anew "
            "(and of whose LayerNorm torch 2.13 takes the derivative wrongly that way: `benchmarks/test_hvp.py`)."
        ),
    ]
    for network in results["settings"]["networks"]:
        size = results["sizes"][network]
        shape = " x ".join(map(str, size["batch"]))
        parts.append(
            f"**{network}**: {size['parameters'] / 1e6:.2f} M parameters in {size['tensors']} tensors, batch {shape}"
        )
        of_network = of(results["times"], network=network)
        heads = ["way", *(f"S={s}, / ERM" for s in domains), f"/ create_graph, S={middle}"]
        rows = [[*heads, f"ms, S={middle}", "evaluations", "per evaluation", "error"]]
        for way in distinct([row for row in of_network if row["seconds"]], "way"):
            by_s = {row["domains"]: row for row in of(of_network, way=way)}
            at = by_s[middle]
            error = next((row["error"] for row in by_s.values() if row["error"] is not None), None)
            rows.append([
                way,
                *(with_quartiles(by_s[s]["of_erm"]) for s in domains),
                with_quartiles(at["of_naive"]),
                f"{median(at['seconds']) * 1e3:.1f}",
                str(at["evaluations"]),
                f"{median(at['of_erm']) * middle / at['evaluations']:.2f}",
                "-" if error is None else f"{error:.0e}",
            ])  # fmt: skip
        parts.append(table(rows))
        failures = {row["way"]: row["failure"] for row in of_network if row["failure"]}
        parts += [f"{way} cannot be timed here: {' '.join(why.split())[:160]} ..." for way, why in failures.items()]
    return parts


def _memory(results: Mapping[str, Any]) -> list[str]:
    domains = results["settings"]["domains"]
    rows = [["network", "way", *(f"S={s}, MB" for s in domains), f"S={max(domains)} / S={min(domains)}"]]
    for network, way in distinct(results["memory"], "network", "way"):
        peaks = {row["domains"]: row["bytes"] for row in of(results["memory"], network=network, way=way)}
        least, most = peaks.get(min(domains)), peaks.get(max(domains))
        shown = [f"{peaks[s] / 1e6:.1f}" if peaks.get(s) else "-" for s in domains]
        rows.append([network, way, *shown, f"{most / least:.2f}" if least and most else "-"])
    return ["## Cost: memory", "![Peak memory against the number of domains](memory.png)", table(rows)]


def _fidelity(results: Mapping[str, Any]) -> list[str]:
    lost = "lost in rounding"
    rates = fidelity.SMOOTH_FISH_RATES
    rows = [["network", "activation", "", *(f"lr {rate:g}" for rate in SHOWN_RATES)]]
    orders = [["network", "activation", "method", *(f"lr {rate:g}" for rate in rates)]]
    measured = of(results["fidelity"], against="learning rate")
    for network, activation in product(results["settings"]["networks"], fidelity.ACTIVATIONS):
        some = of(measured, network=network, activation=activation)
        for quantity, digits in (("cosine", ".3f"), ("error", ".1g")):
            x, _, middle, _ = plots.over_repeats(of(some, method="Fish"), quantity)
            by_rate = dict(zip(x, middle, strict=True))
            shown = [f"{by_rate[rate]:{digits}}" if rate in by_rate else lost for rate in SHOWN_RATES]
            rows.append([network, activation, quantity, *shown])
        for method in ("Fish", SYMMETRIC):
            cosines = [[c for r in of(some, method=method, at=at, resolved=True) for c in r["cosines"]] for at in rates]
            orders.append([network, activation, method, *(f"{median(c):.3f}" if c else lost for c in cosines)])
    return [
        "## Fidelity",
        "![Cosine and relative error against the inner learning rate](fidelity.png)",
        (
            "Fish by SGD, medians over repeats; rings in the picture are SmoothFish, hexagons its symmetric form. The "
            "relative error is that of the mean over two orders of the domains and their reverses from the exact "
            "direction with gamma = `fish_gamma(lr, 5)`."
        ),
        table(rows),
        (
            "In a single meta-iteration, in any order of the domains: median cosine with the exact direction over "
            "orders and repeats. That of `IDGM` is 1."
        ),
        table(orders),
        "![Relative error against the batch size](fidelity_batch.png)",
    ]


def _outcome(outcomes: Rows) -> list[str]:
    heads = ["method", "seed", "accuracy at the end", "gradients", "Hessian products", "seconds"]
    rows = [[*heads, f"{REACHED} after gradients and products", "seconds until then"]]
    for run in outcomes:
        first = next((i for i, accuracy in enumerate(run["accuracy"]) if accuracy >= REACHED), None)
        gradients, products, seconds = run["gradients"], run["hessian_products"], run["seconds"]
        row = [run["title"], run["seed"], f"{run['accuracy'][-1]:.3f}", gradients[-1], products[-1]]
        reached = ["-", "-"] if first is None else [gradients[first] + products[first], f"{seconds[first]:.0f}"]
        rows.append([str(cell) for cell in (*row, f"{seconds[-1]:.0f}", *reached)])
    return [
        "## Outcome",
        "![Accuracy on unseen colours against time and gradients](outcome.png)",
        (
            "CdSprites-15 at 24 pixels, batch 32 of each domain; Fish by SGD (0.2) with meta_lr 0.5, SmoothFish with "
            "inner_lr 0.2 and gamma 1 (symmetric: the exact gamma that this corresponds to), exact by variance with "
            "gamma 0.3 and kept graphs, these and ERM by Adam (amsgrad, 2e-3). "
            "As many runs at a time as processes, so the seconds are those of a busy machine."
        ),
        table(rows),
    ]
