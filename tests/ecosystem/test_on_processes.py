"""The frameworks on two processes, which end, to rounding, where one process ends on the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
SCRIPT = str(HERE / "_on_processes.py")


def run(name: str, size: int, directory: Path) -> tuple[dict[str, Any], str]:
    """Return what a framework ends with on some processes, and what it prints."""
    directory.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--"] if size > 1 else []
    paths = [str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
    finished = subprocess.run(
        [sys.executable, *launch, SCRIPT, name, str(directory)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "ACCELERATE_USE_CPU": "true"},
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    return torch.load(directory / f"{name}.pt", weights_only=True), finished.stdout


def assert_close(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_close(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{where}: {text}")
    else:
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-11), where


def both(name: str, directory: Path) -> dict[str, Any]:
    """Compare two processes with one.

    Returns:
        What two end with.
    """
    one, _ = run(name, 1, directory / "one")
    two, printed = run(name, 2, directory / "two")
    for case, expected in one.items():
        assert_close(two[case], expected, case)
    assert two["fish"]["inner_step"] == 3
    assert two["fish"]["steps"] == 39
    assert_exactly(two["resumed"], two["fish"])
    assert printed.count("Fish  accuracy on the held-out domain") == 1
    return two


def assert_exactly(found: Any, expected: Any) -> None:
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_exactly(found[key], value)
        else:
            assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value


def assert_says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message


def test_accelerate(tmp_path: Path) -> None:
    """By DDP, by FSDP2, which replaces the parameters under the GradMatch, and with a sampler that splits by itself."""
    two = both("accelerate", tmp_path)
    assert {f"loss/domain {domain}" for domain in range(4)} <= two["exact"]["measured"].keys()
    assert_close(two["sharded"], two["fish"], "sharded")
    assert_exactly(two["sharded, resumed"], two["sharded"])
    assert_says(two["sharded, in mid-loop"], "KeyError", "save between two inner loops (optimizer.inner_step is 0)")
    for case in ("apart", "twice"):
        assert_says(two[case], "as you made it", "leave it out of what the framework prepares")


def test_lightning(tmp_path: Path) -> None:
    two = both("lightning", tmp_path)
    assert_says(two["apart"], "num_replicas=1, rank=0", "needs split='batch'", "of 2: pass them to the sampler")
    assert two["bare"] == "nothing"
    assert_says(two["twice"], "TypeError", "DistributedSampler")  # Lightning's replacement for our sampler's domains


def test_the_trainer(tmp_path: Path) -> None:
    two = both("trainer", tmp_path)
    for case in ("apart", "twice"):
        assert_says(two[case], "as you made it", "leave it out of what the framework prepares")
