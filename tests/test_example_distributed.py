"""The example on several processes: it learns, and killed again and again it ends where it would have."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import load as load_checkpoint
from torch.distributed.checkpoint.filesystem import FileSystemReader

EXAMPLES = Path(__file__).parents[1] / "examples"

# Runs the example; in the n-th start of torchrun, one rank kills itself when it comes to a place for some time.
KILLED = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import torch.distributed as dist, torch.distributed.checkpoint as dcp
import distributed
from torch_gradmatch import GradMatch

plan = json.loads(os.environ["KILLS"])
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank, place, times_left = plan[start] if start < len(plan) else (-1, "", 0)

def die_at(here):
    global times_left
    if here == place and int(os.environ["RANK"]) == rank:
        times_left -= 1
        if times_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def around(owner, name, before, after):
    original = getattr(owner, name)
    def call(*arguments, **settings):
        die_at(before)
        result = original(*arguments, **settings)
        die_at(after)
        return result
    setattr(owner, name, call)

around(GradMatch, "meta_step", "before a meta-iteration", "after it")

around(torch.optim.SGD, "step", "before an inner step", "after an inner step")
around(torch.optim.Adam, "step", "before an inner step", "after an inner step")
around(dcp, "save", "before a checkpoint", "after a checkpoint")
around(dcp.FileSystemWriter, "write_data", "before writing a part", "after writing a part")
distributed.main()
"""
PLACES = {
    "before a meta-iteration": 12,
    "after it": 12,
    "before an inner step": 40,
    "after an inner step": 40,
    "before a checkpoint": 2,
    "after a checkpoint": 2,
    "before writing a part": 2,
    "after writing a part": 2,
}


def torchrun(size: int, *arguments: str, script: Path | None = None, **environment: str) -> str:
    """Run the example on some processes and return what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    launched = arguments if script is None else ("--max-restarts", "20", str(script), *arguments)
    if script is None:
        launched = (str(EXAMPLES / "distributed.py"), *arguments)
    finished = subprocess.run(
        [*command, *launched],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=EXAMPLES,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES), **environment},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


def weights_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint, in one process."""
    known = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in known.items() if hasattr(m, "size")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this is one process
        load_checkpoint(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def accuracy_in(output: str) -> float:
    found = re.search(r"accuracy (0\.\d+) in the unseen domain", output)
    assert found, output
    return float(found[1])


@pytest.mark.large
@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "domains"])
def test_it_goes_on_with_another_number_of_processes_and_learns(parallel: str, tmp_path: Path):
    common = ("--parallel", parallel, "--checkpoint", str(tmp_path))
    torchrun(2, *common, "--steps", "60")
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000040", "step-00000060"}
    output = torchrun(1, *common, "--steps", "120")
    assert f"{parallel} on 1 processes" in output
    assert accuracy_in(output) > 0.6  # ordinary training ends at about .57


@pytest.mark.large
@pytest.mark.parametrize(("parallel", "times"), [("fsdp", 5), ("walks", 10)])
def test_killed_again_and_again_it_ends_bit_for_bit_where_it_would_have(parallel: str, times: int, tmp_path: Path):
    draws = random.Random(parallel)
    kills = []
    for _ in range(times):
        place = draws.choice(list(PLACES))
        kills.append((draws.randrange(2), place, draws.randint(1, PLACES[place])))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    settings = ("--parallel", parallel, "--steps", "60", "--save-every", "5")
    torchrun(2, *settings, "--checkpoint", str(tmp_path / "killed"), script=script, KILLS=json.dumps(kills))
    torchrun(2, *settings, "--checkpoint", str(tmp_path / "whole"))
    killed, whole = (weights_in(tmp_path / name / "step-00000060") for name in ("killed", "whole"))
    assert killed.keys() == whole.keys()
    assert len(whole) >= 4
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    output = torchrun(1, "--parallel", parallel, "--steps", "120", "--checkpoint", str(tmp_path / "killed"))
    assert f"{parallel} on 1 processes" in output
    assert accuracy_in(output) > 0.6
