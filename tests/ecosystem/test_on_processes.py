"""The frameworks on two processes, which end, to rounding, where one process ends on the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _training import assert_same

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
AS_YOU_MADE_IT = ("as you made it", "leave it out of what the framework prepares")


def run(name: str, size: int, directory: Path) -> tuple[dict[str, Any], str]:
    """Return what a framework ends with on some processes, and what it prints."""
    directory.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--"] if size > 1 else []
    paths = [str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
    finished = subprocess.run(
        [sys.executable, *launch, str(HERE / "_on_processes.py"), name, str(directory)],
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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("accelerate", {"apart": AS_YOU_MADE_IT, "twice": AS_YOU_MADE_IT}),
        (
            "lightning",
            {
                "apart": ("num_replicas=1, rank=0", "needs split='batch'", "of 2: pass them to the sampler"),
                "bare": ("nothing",),
                "twice": ("TypeError", "DistributedSampler"),  # Lightning's replacement for our sampler's domains
            },
        ),
        ("trainer", {"apart": AS_YOU_MADE_IT, "twice": AS_YOU_MADE_IT}),
    ],
    ids=["accelerate", "lightning", "trainer"],
)
def test_two_processes_end_where_one_does(name: str, said: dict[str, tuple[str, ...]], tmp_path: Path):
    """In Accelerate by DDP and by FSDP2, which replaces the parameters under the GradMatch."""
    one, _ = run(name, 1, tmp_path / "one")
    two, printed = run(name, 2, tmp_path / "two")
    for case, expected in one.items():
        assert_close(two[case], expected, case)
    assert (two["fish"]["inner_step"], two["fish"]["steps"]) == (3, 39)
    assert_same(two["resumed"], two["fish"])
    assert printed.count("Fish  accuracy on the held-out domain") == 1
    for case, words in said.items():
        assert all(word in two[case] for word in words), two[case]
    if name == "accelerate":
        assert {f"loss/domain {domain}" for domain in range(4)} <= two["exact"]["measured"].keys()
        assert_close(two["sharded"], two["fish"], "sharded")
        assert_same(two["sharded, resumed"], two["sharded"])
        for words in ("KeyError", "save between two inner loops (optimizer.inner_step is 0)"):
            assert words in two["sharded, in mid-loop"]
