"""``python -m benchmarks scale`` counts what ranks send, and writes its own report."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import __main__ as command
from benchmarks import scale
from benchmarks.scale import direction, times
from benchmarks.scale.count import CountingMode, traffic

pytestmark = pytest.mark.large

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("scale")
    subprocess.run(
        [sys.executable, "-m", "benchmarks", "scale", "--quick", "--out", str(found)], check=True, cwd=ROOT, timeout=200
    )
    return found


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scale.json").read_text())


def test_bytes_are_those_of_the_formulas(measured: dict[str, Any]):
    counted = [(row["way"], row["domains"]) for row in measured["counts"]]
    assert counted == list(product(scale.QUICK["ways"], scale.QUICK["domains"]))
    for row in measured["counts"]:
        way, whole = row["way"], 4 * row["parameters"]
        assert row["all_reduces"] == pytest.approx(row["promised"], rel=0.02 if "shard" in way else 1e-12)
        assert 0 < row["message_bytes"] < 0.01 * whole
        if way in ("Fish, walks, reset", "IDGM, domains"):
            assert row["payload"] == row["promised"] * whole
            assert row["collectives"] == row["promised"]
        if way == "Fish, walks, reset":
            assert row["messages"] == 2  # ranks agree to begin, and before they reduce


def test_every_way_is_timed(measured: dict[str, Any]):
    cases = [(row["ranks"], row["network"], row["way"]) for row in measured["times"]]
    assert cases == list(product(scale.QUICK["ranks"], times.NETWORKS, times.METHODS))
    assert [fit["ranks"] for fit in measured["fits"]] == [2]


def test_more_walks_are_nearer_and_pairs_nearest(measured: dict[str, Any]):
    slopes = measured["exponents"]
    assert -0.8 < slopes["random orders, by R"] < -0.3
    assert 0.8 < slopes["a pair, by alpha"] < 1.1
    assert measured["two_ranks_error"] < 1e-10
    errors = {(r["draw"], r["orders"], r["walks"]): r["error"] for r in measured["directions"]}
    for draw in range(scale.QUICK["draws"]):
        assert errors[draw, "pairs", 2] < 0.1 * errors[draw, "random", 2]


def test_the_report_is_its_own(folder: Path, tmp_path: Path):
    text = (folder / "scale.md").read_text()
    pictures = {"counts", "wall", "direction"}
    assert {p.name for p in folder.iterdir()} == {"scale.md", "scale.json", *(f"scale_{p}.png" for p in pictures)}
    for picture in pictures:
        assert f"(scale_{picture}.png)" in text
    assert command.main(["scale", "--again", str(folder), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "scale.md").read_text() == text


# ---------------------------------------------------------------------------------------------------------- by hand


def counted_twice() -> tuple[dict[str, float], int, int]:
    """What the mode has seen of one backward pass of DDP, and what a communication hook was handed."""
    network = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 3))
    wrapped = DistributedDataParallel(network)
    handed: list[int] = []

    def hook(_, bucket):  # which DDP wants without annotations, or with types in them and not strings
        handed.append(bucket.buffer().nbytes)
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    whole = sum(p.nbytes for p in network.parameters())
    wrapped(torch.ones(1, 600)).sum().backward()
    with CountingMode() as without_hook:
        wrapped(torch.ones(1, 600)).sum().backward()
    wrapped.register_comm_hook(None, hook)
    wrapped(torch.ones(1, 600)).sum().backward()
    return traffic(without_hook.seen, whole, 1), sum(handed), whole


def test_the_reducer_of_ddp_is_counted():
    for counted, handed, whole in on_ranks(2, counted_twice):
        assert counted["payload"] == handed == whole
        assert counted["all_reduces"] == 1


def test_gathered_bytes_count_half():
    counted = traffic([("allreduce_", 800), ("_allgather_base_", 800), ("_allgather_base_", 4)], 800, 2)
    assert list(counted.values()) == [1.0, 800.0, 0.75, 0.5, 2.0]


def test_the_fit_finds_latency_and_bandwidth():
    rows = [{"ranks": 4, "bytes": n, "seconds": [2 * 3e-5 + 1.5 * n / 2e9]} for n in times.SIZES]
    found = times.fit(rows)
    assert found["latency"] == pytest.approx(3e-5)
    assert found["bandwidth"] == pytest.approx(2e9)
    assert found["least_ratio"] == pytest.approx(1)


def test_every_second_order_is_reversed():
    orders = direction.orders_of(3)["pairs"]
    assert all(one == other[::-1] for one, other in zip(orders[::2], orders[1::2], strict=True))
