"""The frameworks on two processes, which end, to rounding, where one process ends on the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import assert_identical

assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"


def run(name: str, size: int, directory: Path) -> tuple[dict[str, Any], str]:
    """Return what a framework ends with on some processes, and what it prints."""
    directory.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--"] if size > 1 else []
    paths = [str(HERE.parent), str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
    finished = subprocess.run(
        [sys.executable, *launch, str(HERE / "_on_processes.py"), name, str(directory)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "ACCELERATE_USE_CPU": "true"},
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    return torch.load(directory / f"{name}.pt", weights_only=True), finished.stdout


@pytest.mark.parametrize("name", ["accelerate", "lightning", "trainer"])
def test_two_processes_end_where_one_does(name: str, tmp_path: Path):
    """In Accelerate by DDP and by FSDP2, which replaces the parameters under the GradMatch."""
    one, _ = run(name, 1, tmp_path / "one")
    two, printed = run(name, 2, tmp_path / "two")
    assert_close({case: two[case] for case in one}, one)
    assert (two["fish"]["inner_step"], two["fish"]["steps"]) == (3, 39)
    assert_identical(two["resumed"], two["fish"])
    assert printed.count("Fish  accuracy on the held-out domain") == 1
    if name == "accelerate":
        assert {f"loss/domain {domain}" for domain in range(4)} <= two["exact"]["measured"].keys()
        assert_close(two["sharded"], two["fish"])
        assert_identical(two["sharded, resumed"], two["sharded"])
        assert "save between two inner loops (optimizer.inner_step is 0)" in two["said in mid-loop"]
