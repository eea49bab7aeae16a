"""``scale.md``: tables and pictures of what several processes cost, from the figures in ``scale.json``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.report import table
from benchmarks.scale import plots

MICRO = 1e6


def write(results: Mapping[str, Any], folder: Path) -> None:
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
    (folder / "scale.md").write_text("\n\n".join(parts) + "\n")
    plots.counts(folder / "scale_counts.png", results["counts"])
    plots.wall(folder / "scale_wall.png", results["times"])
    plots.directions(folder / "scale_direction.png", results["directions"])


def _counts(results: Mapping[str, Any]) -> list[str]:
    counts = results["counts"]
    domains = results["settings"]["domains"]
    heads = ["way", "promised", *(f"sent, S={s}" for s in domains), *(f"collectives, S={s}" for s in domains)]
    heads += [f"MB, S={max(domains)}", f"messages, S={max(domains)}", "bytes"]
    rows = [heads]
    for way in dict.fromkeys(r["way"] for r in counts):
        of = {r["domains"]: r for r in counts if r["way"] == way}
        last = of[max(domains)]
        rows.append(
            [
                way,
                last["formula"],
                *(f"{of[s]['all_reduces']:.4g}" for s in domains),
                *(f"{of[s]['collectives']:g}" for s in domains),
                f"{last['payload'] / 1e6:.2f}",
                f"{last['messages']:g}",
                f"{last['message_bytes']:.0f}",
            ]
        )
    first = counts[0]
    less = sorted({r["way"] for r in counts if r["all_reduces"] < 0.99 * r["promised"]})
    more = sorted({r["way"] for r in counts if r["all_reduces"] > 1.01 * r["promised"]})
    said = [f"Less than promised: {', '.join(less)}." if less else "", f"More: {', '.join(more)}." if more else ""]
    return [
        "## Bytes and collectives",
        "![Bytes sent by number of domains](scale_counts.png)",
        (
            f"Counted on {first['ranks']} ranks, an MLP of P = {first['parameters']:,} parameters without buffers "
            f"(a model's buffers are averaged, too: their bytes come on top), Adam, for one meta-iteration after the "
            f"first. `sent` is in all-reduces of 4 P bytes: each byte all-reduced is sent 2 (R-1)/R times by a ring, "
            f"each byte gathered or scattered half as often. MB are those of the vectors reduced or gathered. Messages "
            f"are the small ones by which ranks agree, of {first['ranks']} ranks' bytes together. With "
            f"`domains` S is each rank's own. {' '.join(s for s in said if s)}"
        ).strip(),
        table(rows),
    ]


def _wall(results: Mapping[str, Any]) -> list[str]:
    times = results["times"]
    sizes = sorted({r["ranks"] for r in times})
    rows = [["network", "way", *(f"R={r}, ms" for r in sizes)]]
    for network, way in dict.fromkeys((r["network"], r["way"]) for r in times):
        of = {r["ranks"]: r for r in times if (r["network"], r["way"]) == (network, way)}
        shown = []
        for r in sizes:
            low, middle, high = (1e3 * v for v in plots.spread(of[r]["seconds"]))
            shown.append(f"{middle:.1f} ({low:.1f} to {high:.1f})")
        rows.append([network, way, *shown])
    fits = [["R", "latency for each doubling, us", "bandwidth, GB/s", "fit / measured, least", "greatest"]]
    fits += [
        [
            str(f["ranks"]),
            f"{f['latency'] * MICRO:.0f}",
            f"{f['bandwidth'] / 1e9:.2f}",
            f"{f['least_ratio']:.2f}",
            f"{f['greatest_ratio']:.2f}",
        ]
        for f in results["fits"]
    ]
    cpus, domains = results["environment"]["cpus"], times[0]["domains"]
    crowded = [str(r) for r in sizes if r > (cpus or 1)]
    networks = ", ".join(
        f"{n} {size / 1e6:.2f} M" for n, size in dict.fromkeys((r["network"], r["parameters"]) for r in times)
    )
    return [
        "## Wall time here",
        "![Time of a meta-iteration by number of processes](scale_wall.png)",
        (
            f"Medians with quartiles of {results['settings']['rounds']} rounds, the slowest rank's time; parameters: "
            f"{networks}. Each rank has {domains} batches in a meta-iteration, whatever R. `alone` sends nothing: all "
            f"processes compute at the same time. "
            + (
                f"**This machine has {cpus} CPUs: with R = {', '.join(crowded)} processes share them, and what is "
                "measured there is no scaling.** "
                if crowded
                else ""
            )
        ),
        table(rows),
        (
            "Gloo's all-reduce of "
            f"{min(r['bytes'] for r in results['all_reduces']):,} to "
            f"{max(r['bytes'] for r in results['all_reduces']):,} bytes: seconds = latency log2(R) + 2 (R-1)/R bytes / "
            "bandwidth, by least relative squares for each R."
        ),
        table(fits),
    ]


def _directions(results: Mapping[str, Any]) -> list[str]:
    found = results["directions"]
    walks = sorted({r["walks"] for r in found})
    rate = next(r["rate"] for r in found if r["orders"] == "random")
    rows = [["orders", "", *(f"R={r}" for r in walks)]]
    for kind, quantity in product(("random", "pairs"), ("cosine", "error")):
        shown = []
        for r in walks:
            some = [row for row in found if (row["orders"], row["walks"]) == (kind, r)]
            shown.append(f"{plots.middle_of(some, quantity):.4f}" if some else "-")
        rows.append([kind, quantity, *shown])
    pair = [row for row in found if row["orders"] == "one pair"]
    rates = sorted({row["rate"] for row in pair})
    by_rate = [["a pair", *(f"alpha {r:g}" for r in rates)]]
    by_rate.append(
        ["error", *(f"{plots.middle_of([row for row in pair if row['rate'] == r], 'error'):.4f}" for r in rates)]
    )
    slopes = results["exponents"]
    return [
        "## Direction",
        "![Cosine and error of the mean of R walks](scale_direction.png)",
        (
            f"Fish by SGD, GELU, float64, alpha = {rate:g}, {results['settings']['draws']} draws of network and data; "
            "part beyond ERM against the exact one times `fish_gamma`, cosines by median and errors by root mean "
            "square over draws. The walks are made one after the other and averaged; two ranks in opposite orders were "
            f"found {results['two_ranks_error']:.0e} from it. Fitted exponents: "
            f"{slopes['random orders, by R']:.2f} in R for random orders (theory: -1/2), "
            f"{slopes['a pair, by alpha']:.2f} in alpha for a pair (theory: 1; pairs leave nothing that more walks "
            "could average away but terms of this order)."
        ),
        table(rows),
        table(by_rate),
    ]
