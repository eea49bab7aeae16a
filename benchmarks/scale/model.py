"""Predicted time of a meta-iteration: what is computed, and an alpha-beta model of what is sent.

    t = (computing of a rank) + (number of collectives) latency log2(R) + 2 (R-1)/R bytes / bandwidth

with bytes those that are all-reduced, and control messages among the collectives. ``DistributedDataParallel`` sends
while it computes: between none and all of the backward pass, two thirds of the computing, may hide what is sent. The
others have nothing to hide it behind: their only collectives come when all gradients are there.

Every figure that is assumed and not measured stands here and is written into scale.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.scale.times import COMPUTES_AS, DDP, SPREAD, WALKS

RANKS = [2**k for k in range(11)]
DDP_BUCKET = 25 * 2**20  # bytes; DDP's default, all buckets but the first
GLOO = "gloo as measured here"
EXACT_OF = "CdSprites CNN"  # whose exact meta-iteration, over Fish's, is taken for the others
BACKWARD = 2 / 3  # of the time of a gradient


@dataclass(frozen=True)
class Workload:
    """What one GPU does; a gradient takes (FLOP of a sample) (batch) / (peak utilization) seconds.

    Attributes:
        parameters: P; gradients are reduced in 4 bytes each.
        samples: In a batch: images, or tokens.
        flop: Of the gradient of one sample.
        peak: FLOP/s of the GPU.
        utilization: The part of it that training reaches.
        source: Where the figures are from.
    """

    parameters: float
    samples: int
    flop: float
    peak: float
    utilization: float
    source: str

    @property
    def seconds(self) -> float:
        """Of a gradient of one batch."""
        return self.samples * self.flop / (self.peak * self.utilization)


@dataclass(frozen=True)
class Network:
    """What joins the ranks.

    Attributes:
        latency: Seconds of a collective for each doubling of the ranks.
        node: GPUs in a node.
        within: Bytes/s of an all-reduce of the ranks of one node ("bus bandwidth").
        across: Bytes/s of an all-reduce of more.
        source: Where the figures are from.
    """

    latency: float
    node: int
    within: float
    across: float
    source: str

    def seconds(self, ranks: int, size: float, collectives: float) -> float:
        """Of some collectives with so many bytes in all."""
        bandwidth = self.within if ranks <= self.node else self.across
        return collectives * self.latency * math.log2(ranks) + 2 * (ranks - 1) / ranks * size / bandwidth


WORKLOADS = {
    "ResNet-50": Workload(
        25.6e6, 64, 3 * 8.2e9, 312e12, 0.2,
        "assumed: 64 images of 224 x 224, 8.2 GFLOP forward (He et al., 2016, two for each multiply-add), three times "
        "that for a gradient; A100's peak in bf16, of which a convolutional network reaches about a fifth",
    ),
    "Transformer, 1.3 B": Workload(
        1.3e9, 8192, 6 * 1.3e9, 312e12, 0.4,
        "assumed: 4 sequences of 2,048 tokens, 6 P FLOP for a token; A100's peak in bf16, of which large "
        "transformers reach about two fifths",
    ),
}  # fmt: skip
FABRICS = {
    "8 x 200 Gb/s InfiniBand a node": Network(
        10e-6, 8, 230e9, 190e9,
        "assumed: bus bandwidths as nccl-tests shows them on nodes of 8 A100 with NVLink and an adapter of 200 Gb/s "
        "for each GPU; some 10 microseconds for each doubling of the ranks",
    ),
    "one 100 Gb/s network card a node": Network(
        15e-6, 8, 230e9, 11e9,
        "assumed: as the other within a node; across nodes nine tenths of the 12.5 GB/s of the card that 8 GPUs share",
    ),
}  # fmt: skip


Rows = Sequence[Mapping[str, Any]]
ALL_REDUCES = {DDP: lambda s: s, WALKS: lambda _: 1, SPREAD: lambda _: 2}


def meta_iteration(
    network: Network, ranks: int, computing: float, size: float, collectives: float, overlap: float = 0.0
) -> float:
    """Predict the seconds of a meta-iteration.

    Args:
        network: What joins the ranks.
        ranks: R.
        computing: Seconds that a rank computes.
        size: Bytes that are all-reduced in all.
        collectives: In how many collectives, control messages among them.
        overlap: The part of the backward passes that hides what is sent.
    """
    if ranks == 1:
        return computing
    sending = network.seconds(ranks, size, collectives)
    return computing + sending - min(sending, overlap * BACKWARD * computing)


def at(rows: Rows, **wanted: Any) -> Mapping[str, Any]:
    """The row with these values."""
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


def of_gloo(fitted: Mapping[str, float]) -> Network:
    """Gloo on this machine."""
    return Network(fitted["latency"], 1, fitted["bandwidth"], fitted["bandwidth"], "measured here")


def beside_measured(times: Rows, fits: Rows) -> list[dict[str, Any]]:
    """Predict what was measured: from the computing alone and from gloo's latency and bandwidth, of as many ranks."""
    rows = []
    for row in times:
        if row["way"] in COMPUTES_AS and row["ranks"] > 1:
            alone = at(times, network=row["network"], ranks=row["ranks"], way=COMPUTES_AS[row["way"]])
            gloo = of_gloo(at(fits, ranks=row["ranks"]))
            size = 4 * row["parameters"] * row["all_reduces"]
            predicted = meta_iteration(
                gloo, row["ranks"], median(alone["seconds"]), size, row["collectives"] + row["messages"]
            )
            same = {key: row[key] for key in ("network", "way", "ranks")}
            rows.append({**same, "seconds": predicted, "over_measured": predicted / median(row["seconds"])})
    return rows


def predict(times: Rows, fits: Rows) -> dict[str, Any]:
    """Predict every way to 1,024 ranks: GPUs by assumed figures, and processes like those measured here.

    Args:
        times: Of meta-iterations, as measured here.
        fits: Of gloo's all-reduces.
    """
    counted = {row["way"]: row for row in times if row["ranks"] == 2 and row["network"] == EXACT_OF}
    first = min(row["ranks"] for row in times)
    domains = counted[DDP]["domains"]
    computing = {
        (network, way): median(at(times, network=network, way=alone, ranks=first)["seconds"])
        for network in dict.fromkeys(row["network"] for row in times)
        for way, alone in COMPUTES_AS.items()
    }
    exact = computing[EXACT_OF, SPREAD] / computing[EXACT_OF, DDP]
    rows = []

    def add(workload: str, fabric: str, way: str, network: Network, **load: float) -> None:
        for ranks in RANKS:
            for overlap in (0.0, 1.0) if way == DDP else (0.0,):
                seconds = meta_iteration(network, ranks, overlap=overlap, **load)
                rows.append(
                    {"workload": workload, "fabric": fabric, "ranks": ranks, "way": way, "overlap": overlap,
                     "seconds": seconds}
                )  # fmt: skip

    for (name, work), (fabric, network) in ((w, f) for w in WORKLOADS.items() for f in FABRICS.items()):
        size = 4 * work.parameters
        for way, times_of in ALL_REDUCES.items():
            collectives = domains * math.ceil(size / DDP_BUCKET) if way == DDP else times_of(domains)
            add(
                name, fabric, way, network,
                computing=domains * work.seconds * (exact if way == SPREAD else 1),
                size=times_of(domains) * size,
                collectives=collectives + counted[way]["messages"],
            )  # fmt: skip
    gloo = of_gloo(at(fits, ranks=2))
    for name in dict.fromkeys(row["network"] for row in times):
        for way in COMPUTES_AS:
            row = at(times, network=name, way=way, ranks=2)
            add(
                name, GLOO, way, gloo,
                computing=computing[name, way],
                size=4 * row["parameters"] * row["all_reduces"],
                collectives=row["collectives"] + row["messages"],
            )  # fmt: skip
    return {
        "domains": domains,
        "exact_over_fish": exact,
        "exact_of": EXACT_OF,
        "ddp_bucket": DDP_BUCKET,
        "backward": BACKWARD,
        "messages": {way: row["messages"] for way, row in counted.items() if way in COMPUTES_AS},
        "workloads": {name: {**asdict(work), "seconds": work.seconds} for name, work in WORKLOADS.items()},
        "fabrics": {name: asdict(network) for name, network in FABRICS.items()},
        "rows": rows,
    }
