"""The example on several processes: it learns, and killed again and again it ends where it would have."""

from __future__ import annotations

import json
import os
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
import json, os
import torch
torch.set_num_threads(1)
import torch.distributed.checkpoint as dcp
import distributed
from _killed import Killer
from torch_gradmatch import GradMatch

plan, start = json.loads(os.environ["KILLS"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank, place, times = plan[start] if start < len(plan) else (-1, "", 0)
killer = Killer(place if int(os.environ["RANK"]) == rank else "", times)
killer.around(GradMatch, "meta_step", "before a meta-iteration", "after it")
killer.around(torch.optim.SGD, "step", "before an inner step", "after an inner step")
killer.around(torch.optim.Adam, "step", "before an inner step", "after an inner step")
killer.around(dcp, "save", "before a checkpoint", "after a checkpoint")
killer.around(dcp.FileSystemWriter, "write_data", "before writing a part", "after writing a part")
distributed.main()
"""
KILLS = [  # far enough apart to get on: a checkpoint is written each 5 meta-iterations
    (0, "after writing a part", 2),
    (1, "after an inner step", 30),
    (0, "before a checkpoint", 2),
    (1, "before writing a part", 2),
    (0, "after it", 9),
    (1, "after a checkpoint", 2),
]


def torchrun(size: int, *arguments: str, kills: list[tuple[int, str, int]] | None = None) -> str:
    """Run the example on some processes and return what it prints."""
    script = ["-c", KILLED] if kills else [str(EXAMPLES / "distributed.py")]
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--max-restarts", "20"]
    if kills:
        command += ["--no-python", sys.executable]
    path = os.pathsep.join([str(EXAMPLES), str(Path(__file__).parent)])
    finished = subprocess.run(
        [sys.executable, "-m", *command, *script, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=EXAMPLES,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "KILLS": json.dumps(kills)},
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


def goes_on_alone_and_learns(parallel: str, checkpoint: Path) -> None:
    output = torchrun(1, "--parallel", parallel, "--steps", "120", "--checkpoint", str(checkpoint))
    found = re.search(rf"{parallel} on 1 processes: accuracy (0\.\d+) in the unseen domain", output)
    assert found, output
    assert float(found[1]) > 0.6  # ordinary training ends at about .57


@pytest.mark.large
def test_it_goes_on_with_another_number_of_processes_and_learns(tmp_path: Path):
    torchrun(2, "--parallel", "ddp", "--checkpoint", str(tmp_path), "--steps", "60")
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000040", "step-00000060"}
    goes_on_alone_and_learns("ddp", tmp_path)


@pytest.mark.large
@pytest.mark.parametrize("parallel", ["fsdp", "walks", "domains"])
def test_killed_again_and_again_it_ends_bit_for_bit_where_it_would_have(parallel: str, tmp_path: Path):
    settings = ("--parallel", parallel, "--steps", "60", "--save-every", "5")
    torchrun(2, *settings, "--checkpoint", str(tmp_path / "killed"), kills=KILLS)
    torchrun(2, *settings, "--checkpoint", str(tmp_path / "whole"))
    killed, whole = (weights_in(tmp_path / name / "step-00000060") for name in ("killed", "whole"))
    assert killed.keys() == whole.keys()
    assert len(whole) >= 4
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    goes_on_alone_and_learns(parallel, tmp_path / "killed")
