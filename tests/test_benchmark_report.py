"""``python -m benchmarks`` measures and writes its report, and says what is wrong with its arguments."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import cost, fidelity, outcome, report, ways
from benchmarks.plots import of
from torch_gradmatch.evaluation.fidelity import Fidelity

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on the smallest network."""
    folder = tmp_path_factory.mktemp("report")
    arguments = ["cost", "memory", "--networks", "MLP", "--domains", "2", "5", "--rounds", "2", "--processes", "1"]
    subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments, "--out", str(folder)], check=True, cwd=ROOT, timeout=200
    )
    return folder


@pytest.mark.large
def test_times_and_directions(measured: Path):
    rows = json.loads((measured / "report.json").read_text())["times"]
    assert {(row["domains"], row["way"]) for row in rows} == {(s, way) for s in (2, 5) for way in ways.names()}
    for row in rows:
        assert len(row["seconds"]) == len(row["of_erm"]) == len(row["of_naive"]) == 2
        assert row["failure"] is None
        assert (row["error"] is not None) == (row["way"] in ways.EXACT and row["domains"] == cost.CHECKED)
        if row["error"] is not None and "finite" not in row["way"] and row["way"] != ways.SYMMETRIC:
            assert row["error"] < 1e-5  # those two cross the kinks of ReLUs
    evaluations = {row["way"]: row["evaluations"] for row in rows if row["domains"] == 5}
    assert evaluations["ERM"] == evaluations["Fish"] == evaluations["SmoothFish"] == evaluations["create_graph"] == 5
    assert evaluations["SmoothFish, gamma=2"] == evaluations["IDGM"] == 9
    assert evaluations["SmoothFish, symmetric"] == 13


@pytest.mark.large
def test_memory_grows_with_kept_graphs_alone(measured: Path):
    rows = json.loads((measured / "report.json").read_text())["memory"]
    if any(row["bytes"] is None for row in rows):
        pytest.skip("peak memory is told on Linux")
    peak = {(row["way"], row["domains"]): row["bytes"] for row in rows}
    graph = 64 * 256 * 4  # bytes of one layer's activations of one domain
    assert peak["create_graph", 5] > peak["create_graph", 2] + 3 * graph
    assert peak["ERM", 5] < peak["create_graph", 5] / 2


@pytest.mark.large
def test_the_report_has_tables_and_pictures(measured: Path, tmp_path: Path):
    text = (measured / "index.md").read_text()
    assert "## Cost: time" in text
    assert "| IDGM, keep_graphs " in text
    for name in ("cost.png", "memory.png"):
        assert (measured / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text
    assert command.main(["--again", str(measured), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "index.md").read_text() == text


@pytest.mark.large
def test_fidelity_of_one_sweep():
    rows = fidelity.sweep("CdSprites CNN", "GELU", 4, "learning rate", 0)
    by_rate = {row["at"]: row for row in of(rows, method="Fish")}
    assert list(by_rate) == fidelity.LEARNING_RATES
    assert by_rate[1e-3]["cosine"] > 0.99
    assert by_rate[1e-3]["error"] < by_rate[1e-2]["error"] < 1
    for row in of(rows, resolved=True):
        if row["method"] == "SmoothFish" and row["at"] <= 1e-2:
            assert row["error"] == pytest.approx(by_rate[row["at"]]["error"], rel=0.05)
        if row["method"] == ways.SYMMETRIC and row["at"] <= 1e-2:
            assert min(row["cosines"]) > 0.99 > min(by_rate[row["at"]]["cosines"])


def test_the_error_at_another_gamma():
    found = Fidelity(
        cosines=[0.6], cosine=0.6, gamma=3.0, relative_error=4 / 3, strength=1.0, resolved=True, agreement=""
    )
    # d = (3, 4) where e = (1, 0): its distance from 2 e is |(1, 4)|, over the length 2
    assert fidelity.error_at(found, 2.0) == pytest.approx(math.sqrt(17) / 2)


@pytest.mark.large
def test_outcomes_of_a_small_run(tmp_path: Path):
    small = {
        "domains": 3, "size": 16, "images_per_domain": 20, "eval_images": 20, "batch_size": 6, "iterations": 4,
        "smooth_iterations": 4, "exact_iterations": 4, "measurements": 2,
    }  # fmt: skip
    found = outcome.measure([1], 1, outcome.SETTINGS | small)
    assert [run["method"] for run in found] == outcome.METHODS
    assert [run["gradients"][-1] for run in found] == [12, 12, 12, 28, 12]
    assert [run["hessian_products"][-1] for run in found] == [0, 0, 0, 0, 12]
    results = {"environment": report.environment(), "settings": {"processes": 1}, "seconds": {}, "outcome": found}
    text = report.write(results, tmp_path).read_text()
    assert (tmp_path / "outcome.png").read_bytes().startswith(b"\x89PNG")
    assert [text.count(f"\n| {run['title']} ") for run in found] == [1] * len(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "should be some of cost, memory, fidelity, outcome, scale (got 'speed')"),
        (["--domains", "1", "5"], "--domains: should be at least 2 (got 1)"),
        (["--rounds", "0"], "--rounds: should be at least 1 (got 0)"),
        (["--networks", "VGG"], "invalid choice: 'VGG'"),
        (["--again", "nowhere"], "nowhere holds no report.json"),
        (["scale", "--again", "nowhere"], "nowhere holds no scale.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        command.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
