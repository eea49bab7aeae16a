"""``scale.md``: tables and pictures of what several processes cost, from the figures in ``scale.json``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.plots import distinct, of
from benchmarks.report import table, with_quartiles
from benchmarks.scale import plots


def write(results: Mapping[str, Any], folder: Path) -> Path:
    """Write ``scale.md`` and its pictures."""
    where = results["environment"]
    took = " + ".join(f"{seconds:.0f} s ({part})" for part, seconds in results["seconds"].items())
    parts = [
        "# Several processes",
        (
            f"`python -m benchmarks scale`, {where['date']}: torch {where['torch']}, gloo, {where['cpu']}, "
            f"{where['cpus']} CPUs, processes of one thread each. Took {took}. How each figure is taken is said in "
            "the files of `benchmarks/scale`; all of them are in `scale.json`."
        ),
        *_counts(results),
        *_wall(results),
        *_directions(results),
    ]
    plots.counts(folder / "scale_counts.png", results["counts"])
    plots.wall(folder / "scale_wall.png", results["times"])
    plots.directions(folder / "scale_direction.png", results["directions"])
    path = folder / "scale.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _counts(results: Mapping[str, Any]) -> list[str]:
    counts, domains = results["counts"], results["settings"]["domains"]
    most = max(domains)
    heads = ["way", "promised", *(f"sent, S={s}" for s in domains), *(f"collectives, S={s}" for s in domains)]
    rows = [[*heads, f"MB, S={most}", f"messages, S={most}", "bytes"]]
    for way in distinct(counts, "way"):
        by_s = {r["domains"]: r for r in of(counts, way=way)}
        last = by_s[most]
        rows.append([
            way,
            last["formula"],
            *(f"{by_s[s]['all_reduces']:.4g}" for s in domains),
            *(f"{by_s[s]['collectives']:g}" for s in domains),
            f"{last['payload'] / 1e6:.2f}",
            f"{last['messages']:g}",
            f"{last['message_bytes']:.0f}",
        ])  # fmt: skip
    first = counts[0]
    less = sorted({r["way"] for r in counts if r["all_reduces"] < 0.99 * r["promised"]})
    more = sorted({r["way"] for r in counts if r["all_reduces"] > 1.01 * r["promised"]})
    said = [f" {word}: {', '.join(found)}." for word, found in (("Less than promised", less), ("More", more)) if found]
    return [
        "## Bytes and collectives",
        "![Bytes sent by number of domains](scale_counts.png)",
        (
            f"Counted on {first['ranks']} ranks, an MLP of P = {first['parameters']:,} parameters without buffers "
            f"(a model's buffers are averaged, too: their bytes come on top), Adam, for one meta-iteration after the "
            f"first. `sent` is in all-reduces of 4 P bytes: each byte all-reduced is sent 2 (R-1)/R times by a ring, "
            f"each byte gathered or scattered half as often. MB are those of the vectors reduced or gathered. Messages "
            f"are the small ones by which ranks agree, of {first['ranks']} ranks' bytes together. With "
            f"`domains` S is each rank's own.{''.join(said)}"
        ),
        table(rows),
    ]


def _wall(results: Mapping[str, Any]) -> list[str]:
    times, cpus = results["times"], results["environment"]["cpus"]
    sizes = sorted(distinct(times, "ranks"))
    rows = [["network", "way", *(f"R={r}, ms" for r in sizes)]]
    for network, way in distinct(times, "network", "way"):
        by_r = {r["ranks"]: r["seconds"] for r in of(times, network=network, way=way)}
        rows.append([network, way, *(with_quartiles((1e3 * t for t in by_r[r]), digits=1) for r in sizes)])
    fits = [["R", "latency for each doubling, us", "bandwidth, GB/s", "fit / measured, least", "greatest"]]
    for f in results["fits"]:
        numbers = (f["bandwidth"] / 1e9, f["least_ratio"], f["greatest_ratio"])
        fits.append([str(f["ranks"]), f"{f['latency'] * 1e6:.0f}", *(f"{number:.2f}" for number in numbers)])
    crowded = [str(r) for r in sizes if r > (cpus or 1)]
    warning = (
        f"**This machine has {cpus} CPUs: with R = {', '.join(crowded)} processes share them, and what is measured "
        "there is no scaling.** "
    )
    networks = [f"{name} {number / 1e6:.2f} M" for name, number in distinct(times, "network", "parameters")]
    reduced = [r["bytes"] for r in results["all_reduces"]]
    return [
        "## Wall time here",
        "![Time of a meta-iteration by number of processes](scale_wall.png)",
        (
            f"Medians with quartiles of {results['settings']['rounds']} rounds, the slowest rank's time; parameters: "
            f"{', '.join(networks)}. Each rank has {times[0]['domains']} batches in a meta-iteration, whatever R. "
            f"`alone` sends nothing: all processes compute at the same time. {warning if crowded else ''}"
        ),
        table(rows),
        (
            f"Gloo's all-reduce of {min(reduced):,} to {max(reduced):,} bytes: seconds = latency log2(R) + 2 (R-1)/R "
            "bytes / bandwidth, by least relative squares for each R."
        ),
        table(fits),
    ]


def _directions(results: Mapping[str, Any]) -> list[str]:
    found, slopes = results["directions"], results["exponents"]
    walks = sorted(distinct(found, "walks"))
    rows = [["orders", "", *(f"R={r}" for r in walks)]]
    for kind, quantity in product(("random", "pairs"), ("cosine", "error")):
        some = [of(found, orders=kind, walks=r) for r in walks]
        rows.append([kind, quantity, *(f"{plots.middle_of(s, quantity):.4f}" if s else "-" for s in some)])
    pair = of(found, orders="one pair")
    rates = sorted(distinct(pair, "rate"))
    errors = [f"{plots.middle_of(of(pair, rate=r), 'error'):.4f}" for r in rates]
    return [
        "## Direction",
        "![Cosine and error of the mean of R walks](scale_direction.png)",
        (
            f"Fish by SGD, GELU, float64, alpha = {of(found, orders='random')[0]['rate']:g}, "
            f"{results['settings']['draws']} draws of network and data; "
            "part beyond ERM against the exact one times `fish_gamma`, cosines by median and errors by root mean "
            "square over draws. The walks are made one after the other and averaged; two ranks in opposite orders were "
            f"found {results['two_ranks_error']:.0e} from it. Fitted exponents: "
            f"{slopes['random orders, by R']:.2f} in R for random orders (theory: -1/2), "
            f"{slopes['a pair, by alpha']:.2f} in alpha for a pair (theory: 1; pairs leave nothing that more walks "
            "could average away but terms of this order)."
        ),
        table(rows),
        table([["a pair", *(f"alpha {r:g}" for r in rates)], ["error", *errors]]),
    ]
