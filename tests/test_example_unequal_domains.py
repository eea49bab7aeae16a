"""The example on unequal domains is killed again and again, and ends where it would have: checkpoint and logs, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import unequal_domains
from _models import assert_identical
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Runs the example in a new process, which kills itself at the n-th time that it comes to a place.
KILLED = """
import io, sys, time
import torch
torch.set_num_threads(1)
import unequal_domains
from _killed import Killer
from tensorboard.summary.writer.record_writer import RecordWriter
from torch_gradmatch import GradMatch

killer = Killer(sys.argv[1], int(sys.argv[2]))
killer.around(GradMatch, "step", "before a step", "after a step")
killer.around(torch.optim.AdamW, "step", "between Muon and AdamW", "")
killer.around(unequal_domains.os, "replace", "after writing a checkpoint", "after replacing the last one")

whole_save, write_at_once = torch.save, RecordWriter.write
def save_in_halves(state, path):
    whole_save(state, file := io.BytesIO())
    half = len(file.getvalue()) // 2
    with open(path, "wb") as target:
        target.write(file.getvalue()[:half])
        target.flush()
        killer.at("while writing a checkpoint")
        target.write(file.getvalue()[half:])
def write_slowly(*arguments):  # so that there is something left to be flushed
    time.sleep(0.005)
    write_at_once(*arguments)
torch.save, RecordWriter.write = save_in_halves, write_slowly
unequal_domains.main(sys.argv[3:])
"""
Kill = tuple[str, int]
KILLS = [  # far enough apart to get on: a checkpoint is written each 4 steps
    ("after a step", 17),
    ("while writing a checkpoint", 3),
    ("between Muon and AdamW", 16),
    ("after writing a checkpoint", 4),
    ("before a step", 42),
    ("after replacing the last one", 8),
]


def run(directory: Path, arguments: list[str], kill: Kill = ("nowhere", 0)) -> tuple[int, str]:
    """Run the example in a new process; return its exit status and what it printed."""
    files = ["--checkpoint", str(directory / "checkpoint.pt"), "--logs", str(directory / "logs")]
    command = [sys.executable, "-W", "error", "-c", KILLED, kill[0], str(kill[1]), *arguments, *files]
    tests = Path(__file__).parent
    path = os.pathsep.join(map(str, [tests.parent, tests.parent / "examples", tests]))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, timeout=240, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode, done.stdout


def logged(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows: by name, steps and values."""
    events = EventAccumulator(str(directory / "logs"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.large
@pytest.mark.parametrize(
    ("arguments", "kills", "steps"),
    [("--epochs 3 --save-every 4", KILLS, 180), ("--epochs 2 --save-every 3 --meta-step", KILLS[2:3], 40)],
    ids=["loop", "meta_step"],
)
def test_killed_again_and_again_it_ends_bit_for_bit_where_it_would_have(
    arguments: str, kills: list[Kill], steps: int, tmp_path: Path
):
    settings = [*arguments.split(), "--batches-per-epoch", "60"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    status, printed = run(whole, settings)
    assert status == 0
    resumed_in_a_walk = 0
    for kill in kills:
        assert run(broken, settings, kill)[0] == -signal.SIGKILL, kill
        saved = torch.load(broken / "checkpoint.pt", weights_only=True)
        resumed_in_a_walk += saved["optimizer"]["gradmatch"]["inner_step"] > 0
        if "checkpoint" in kill[0]:
            assert (broken / "checkpoint.unfinished").exists()
    assert run(broken, settings) == (0, printed)
    assert resumed_in_a_walk >= (len(kills) > 1)
    final, expected = (torch.load(one / "checkpoint.pt", weights_only=True) for one in (broken, whole))
    assert expected["step"] == steps
    assert_identical(final, expected)
    ours, theirs = logged(broken), logged(whole)
    assert ours["train/loss"] == theirs["train/loss"]
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():  # a meta-iteration that was resumed in the middle measures no agreement
        assert set(values) <= set(theirs[name])
        assert len(set(theirs[name]) - set(values)) <= resumed_in_a_walk, name
    if "--meta-step" in settings:
        names = ["loss", "grad_norm", "inner_product", "cosine"]
        names += [f"{name}/{d}" for name in (*names[:2], "agreement_with_rest") for d in ("small", "medium", "large")]
        assert ours.keys() == {f"train/{name}" for name in names}


def test_it_learns_what_the_domains_share(capsys: pytest.CaptureFixture[str]):
    found = unequal_domains.main(["--epochs", "2", "--batches-per-epoch", "600"])
    assert found["large"] > 0.8
    assert found["unseen"] > 0.65
    assert f"unseen        0 training samples, accuracy {found['unseen']:.3f}" in capsys.readouterr().out
