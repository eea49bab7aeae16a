"""Comparing two runs of the benchmarks: what is matched, marked, listed and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare_runs import Row, Timing, duration, main, parse, read, report, table

ROOT = Path(__file__).parents[1]

MACHINE = {"machine": "x86_64", "cpu": {"brand_raw": "Some CPU"}, "torch": "2.13.0", "cpus": 2, "native": "loaded"}


def entry(name: str, q1: float, median: float, q3: float) -> dict[str, Any]:
    stats = {"min": q1, "max": q3, "mean": median, "stddev": 0.0, "rounds": 5, "iqr": q3 - q1, "ops": 1 / median}
    return {
        "group": None,
        "name": name,
        "fullname": f"benchmarks/test_it.py::{name}",
        "params": None,
        "param": None,
        "extra_info": {"network": "MLP"},
        "options": {"timer": "perf_counter"},
        "stats": {**stats, "q1": q1, "median": median, "q3": q3, "iterations": 1},
    }


def run_of(*entries: dict[str, Any], **machine_info: Any) -> dict[str, Any]:
    return {
        "machine_info": {**MACHINE, **machine_info},
        "commit_info": {"id": "unknown"},
        "benchmarks": list(entries),
        "datetime": "2026-01-01T00:00:00+00:00",
        "version": "5.3.1",
    }


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def rows_of(output: str) -> dict[str, list[str]]:
    """The cells of each row by the benchmark's name, in the order shown."""
    lines = [line.strip("|").split(" | ") for line in output.splitlines() if line.startswith("| benchmarks/")]
    return {cells[0].strip().split("::")[1]: [cell.strip() for cell in cells[1:]] for cells in lines}


BEFORE = run_of(
    entry("test_same", 0.9e-3, 1.0e-3, 1.1e-3),
    entry("test_slower", 1.9, 2.0, 2.1),
    entry("test_faster", 3.9e-6, 4.0e-6, 4.1e-6),
    entry("test_noisy", 1e-3, 2e-3, 4e-3),
    entry("test_little", 0.999, 1.0, 1.001),
    entry("test_removed", 1.0, 1.0, 1.0),
)
AFTER = run_of(
    entry("test_little", 1.019, 1.02, 1.021),
    entry("test_noisy", 2e-3, 3e-3, 5e-3),
    entry("test_faster", 1.9e-6, 2.0e-6, 2.05e-6),
    entry("test_slower", 2.85, 3.0, 3.15),
    entry("test_same", 0.9e-3, 1.0e-3, 1.1e-3),
    entry("test_added", 1.0, 1.0, 1.0),
)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [write(tmp_path / "before.json", BEFORE), write(tmp_path / "after.json", AFTER)]


def test_rows_are_matched_by_name_and_sorted_by_ratio(files: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(files) == 0
    output = capsys.readouterr().out
    assert rows_of(output) == {
        "test_noisy": ["2.000 ms", "3.000 ms", "1.500", "0.500 to 5.000", ""],
        "test_slower": ["2.000 s", "3.000 s", "1.500", "1.357 to 1.658", "slower"],
        "test_little": ["1.000 s", "1.020 s", "1.020", "1.018 to 1.022", ""],
        "test_same": ["1.000 ms", "1.000 ms", "1.000", "0.818 to 1.222", ""],
        "test_faster": ["4.000 us", "2.000 us", "0.500", "0.463 to 0.526", "faster"],
    }
    assert list(rows_of(output)) == ["test_noisy", "test_slower", "test_little", "test_same", "test_faster"]
    assert "5 benchmarks in both, 1 slower, 1 faster" in output


@pytest.mark.parametrize(
    ("threshold", "marked"),
    [("1.0", {"test_slower", "test_little", "test_faster"}), ("1.6", {"test_faster"}), ("2.5", set())],
)
def test_the_threshold_says_what_is_worth_marking(
    files: list[str], capsys: pytest.CaptureFixture[str], threshold: str, marked: set[str]
):
    assert main([*files, "--threshold", threshold]) == 0
    assert {name for name, cells in rows_of(capsys.readouterr().out).items() if cells[-1]} == marked


def test_swapping_the_runs_inverts_ratio_spread_and_verdict():
    for before, after in ((Timing(1.9, 2.0, 2.1), Timing(2.85, 3.0, 3.15)), (Timing(1, 2, 4), Timing(2, 3, 5))):
        row, swapped = Row("it", before, after), Row("it", after, before)
        assert row.ratio * swapped.ratio == pytest.approx(1)
        assert row.low * swapped.high == pytest.approx(1)
        assert row.high * swapped.low == pytest.approx(1)
        inverse = {"slower": "faster", "": ""}
        assert swapped.verdict(1.05) == inverse[row.verdict(1.05)]


def test_the_table_is_aligned_markdown():
    rows = [Row("a[x|y]", Timing(1, 1, 1), Timing(2, 2, 2)), Row("longer_name", Timing(1, 1, 1), Timing(1, 1, 1))]
    lines = table(rows, 1.05).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[2].startswith("| a[x\\|y]  ")  # a bar in a name ends no cell
    assert set(lines[1]) == set("|-: ")
    assert all(line.replace("\\|", "").count("|") == 7 for line in lines)


def test_benchmarks_in_one_file_only_are_listed(files: list[str], capsys: pytest.CaptureFixture[str]):
    main(files)
    output = capsys.readouterr().out
    assert "Only in before:\n\n- benchmarks/test_it.py::test_removed" in output
    assert "Only in after:\n\n- benchmarks/test_it.py::test_added" in output
    assert "Only in" not in report(parse(BEFORE), parse(BEFORE), 1.05)


def test_both_environments_are_shown_and_differences_warned_of():
    same = report(parse(BEFORE), parse(AFTER), 1.05)
    assert "- before: torch: 2.13.0, cpu: Some CPU, cpus: 2, native: loaded\n- after: torch: 2.13.0" in same
    assert "WARNING" not in same
    other = run_of(*AFTER["benchmarks"], torch="2.10.0", cpu={"brand_raw": "Another CPU"})
    different = report(parse(BEFORE), parse(other), 1.05)
    assert "- after: torch: 2.10.0, cpu: Another CPU, cpus: 2, native: loaded" in different
    assert "WARNING: the environments differ in torch, cpu:" in different


def test_an_environment_without_the_entries_is_unknown():
    content = {**BEFORE, "machine_info": {"cpu": {}}}
    assert set(parse(content).environment.values()) == {"unknown"}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (12345.6, "12350 s"),
        (1234.5, "1234 s"),
        (1.0, "1.000 s"),
        (0.99999, "1.000 s"),
        (0.12345, "123.5 ms"),
        (1e-5, "10.00 us"),
        (3.21e-9, "3.210 ns"),
        (4e-10, "0.4000 ns"),
    ],
)
def test_durations_have_four_digits_and_a_unit(seconds: float, shown: str):
    assert duration(seconds) == shown


BAD_STATS = {**entry("test_bad", 1.0, 1.0, 1.0), "stats": {"q1": 1.0, "median": float("nan"), "q3": 1.0}}
BAD_FILES = {
    "not JSON": ("{", "is not JSON"),
    "empty": ("", "is not JSON"),
    "a list": ([], "no list 'benchmarks'"),
    "something else": ({"benchmarks": {}}, "no list 'benchmarks'"),
    "no environment": ({"benchmarks": []}, "no dictionary 'machine_info'"),
    "no name": (run_of({"stats": {}}), "benchmark number 0 has no 'fullname'"),
    "no stats": (run_of({"fullname": "it"}), "it should have a positive time as stats['q1'] (got None)"),
    "no number": (run_of(BAD_STATS), "stats['median'] (got nan)"),
    "no time": (run_of(entry("test_it", 0, 1, 1)), "stats['q1'] (got 0)"),
    "twice the same": (run_of(entry("test_it", 1, 1, 1), entry("test_it", 1, 1, 1)), "::test_it is in it twice"),
}


@pytest.mark.parametrize("position", [0, 1], ids=["before", "after"])
@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_is_refused_by_name(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str, position: int
):
    content, message = BAD_FILES[bad]
    files[position] = write(tmp_path / "bad.json", content)
    assert main(files) == 2
    output = capsys.readouterr()
    assert not output.out
    assert output.err.count("\n") == 1
    assert str(tmp_path / "bad.json") in output.err
    assert message in output.err


def test_a_file_that_cannot_be_read_is_refused(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for path, reason in ((tmp_path / "none.json", "No such file"), (tmp_path, "directory"), ("binary.json", "decode")):
        assert main([files[0], str(tmp_path / path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(tmp_path / path) in error
        assert reason in error


def test_runs_with_no_benchmark_in_common_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = write(tmp_path / "before.json", run_of(entry("test_one", 1, 1, 1)))
    after = write(tmp_path / "after.json", run_of(entry("test_other", 1, 1, 1), entry("test_third", 1, 1, 1)))
    assert main([before, after]) == 2
    output = capsys.readouterr()
    assert not output.out
    assert "no benchmark is in both files (1 before, 2 after): pass two runs of the same benchmarks" in output.err


@pytest.mark.parametrize("threshold", ["0.9", "nan", "inf", "a lot"])
def test_a_threshold_that_is_no_ratio_is_refused(files: list[str], capsys: pytest.CaptureFixture[str], threshold: str):
    with pytest.raises(SystemExit) as raised:
        main([*files, "--threshold", threshold])
    assert raised.value.code == 2
    assert f"should be a ratio of at least 1, such as 1.05 (got {threshold!r})" in capsys.readouterr().err


BENCHMARK = '''
import os

import pytest

now = 0.0


def clock():
    """Ticks once when it is read: a round takes one tick."""
    global now
    now += float(os.environ["TICK"])
    return now


@pytest.mark.parametrize("argument", ["a", "b|c"])
def test_it(benchmark, argument):
    benchmark.pedantic(lambda: None, rounds=4)
'''


def test_it_compares_what_pytest_benchmark_writes(tmp_path: Path):
    (tmp_path / "test_generated.py").write_text(BENCHMARK)
    for tick in ("0.002", "0.003"):
        pytest_again = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_generated.py"]
        options = [f"--benchmark-json={tick}.json", "--benchmark-timer=test_generated.clock"]
        done = subprocess.run(
            [*pytest_again, *options],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")} | {"TICK": tick},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    before = read(tmp_path / "0.002.json")
    assert {name.split("::")[1] for name in before.timings} == {"test_it[a]", "test_it[b|c]"}

    results = [str(tmp_path / f"{tick}.json") for tick in ("0.002", "0.003")]
    command = [sys.executable, "-m", "benchmarks.compare_runs", *results]
    compared = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert compared.returncode == 0, compared.stderr
    assert not compared.stderr
    lines = [line.split(" | ") for line in compared.stdout.splitlines() if "::test_it" in line]
    assert [[cell.strip(" |") for cell in cells[1:]] for cells in lines] == [
        ["2.000 ms", "3.000 ms", "1.500", "1.500 to 1.500", "slower"]
    ] * 2
    assert "2 benchmarks in both, 2 slower, 0 faster" in compared.stdout
