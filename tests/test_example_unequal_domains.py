"""The example on unequal domains is killed again and again, and ends where it would have: checkpoint and logs, too."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import assert_identical

pytest.importorskip("tensorboard", reason="the example writes logs for TensorBoard")

EXAMPLES = Path(__file__).parents[1] / "examples"

# Runs the example in a new process, which kills itself at the n-th time that it comes to a place.
KILLED = """
import io, os, signal, sys, time
import torch
torch.set_num_threads(1)
import unequal_domains
from torch_gradmatch import GradMatch

place, times_left = sys.argv[1], int(sys.argv[2])

def die_at(here):
    global times_left
    if here == place:
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

around(GradMatch, "step", "before a step", "after a step")
around(torch.optim.AdamW, "step", "between Muon and AdamW", "")
around(unequal_domains.os, "replace", "after writing a checkpoint", "after replacing the last one")

whole_save = torch.save
def save_in_halves(state, path):
    whole_save(state, file := io.BytesIO())
    half = len(file.getvalue()) // 2
    with open(path, "wb") as target:
        target.write(file.getvalue()[:half])
        target.flush()
        die_at("while writing a checkpoint")
        target.write(file.getvalue()[half:])
torch.save = save_in_halves

from tensorboard.summary.writer.record_writer import RecordWriter
write_at_once = RecordWriter.write
def write_slowly(*arguments):  # so that there is something left to be flushed
    time.sleep(0.005)
    write_at_once(*arguments)
RecordWriter.write = write_slowly

unequal_domains.main(sys.argv[3:])
"""
STEPS = ("before a step", "after a step", "between Muon and AdamW")
CHECKPOINTS = ("while writing a checkpoint", "after writing a checkpoint", "after replacing the last one")
Kill = tuple[str, int]


def run(directory: Path, arguments: list[str], kill: Kill = ("nowhere", 0)) -> tuple[int, str]:
    """Run the example in a new process; return its exit status and what it printed."""
    files = ["--checkpoint", str(directory / "checkpoint.pt"), "--logs", str(directory / "logs")]
    command = [sys.executable, "-W", "error", "-c", KILLED, kill[0], str(kill[1]), *arguments, *files]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), str(EXAMPLES)])}
    done = subprocess.run(command, timeout=240, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode, done.stdout


def draw_kills(seed: int, number: int, steps: int, save_every: int) -> list[Kill]:
    """Draw where to kill: all before the end, far enough apart to get on, and every place once in each six kills."""
    drawn = random.Random(seed)
    places = [place for _ in range(1 + number // 6) for place in drawn.sample(STEPS + CHECKPOINTS, 6)][:number]
    most = (steps - 1) // number
    most_of = {place: most if place in STEPS else max(1, most // save_every) for place in places}
    return [(place, drawn.randint((1 + most_of[place]) // 2, most_of[place])) for place in places]


def logged(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows: by name, steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "logs"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def check_kills(directory: Path, arguments: list[str], steps: int, kills: list[Kill]) -> list[dict[str, Any]]:
    """Compare a run that is killed with one that is not; return what the kills found in the checkpoint."""
    whole, broken = directory / "whole", directory / "broken"
    status, printed = run(whole, arguments)
    assert status == 0
    found = []
    for kill in kills:
        assert run(broken, arguments, kill)[0] == -signal.SIGKILL, kill
        checkpoint = broken / "checkpoint.pt"
        found.append(torch.load(checkpoint, weights_only=True) if checkpoint.exists() else {"step": 0})
        if kill[0] in CHECKPOINTS:
            assert (broken / "checkpoint.unfinished").exists() is (kill[0] != CHECKPOINTS[-1])
    assert run(broken, arguments) == (0, printed)
    final, expected = (torch.load(one / "checkpoint.pt", weights_only=True) for one in (broken, whole))
    assert expected["step"] == steps
    assert_identical(final, expected)
    ours, theirs = logged(broken), logged(whole)
    assert ours["train/loss"] == theirs["train/loss"]
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():  # a meta-iteration that was resumed in the middle measures no agreement
        missing = set(theirs[name]) - set(values)
        assert set(values) <= set(theirs[name])
        assert len(missing) <= sum(saved["step"] % 3 != 0 for saved in found), name
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard, when it is imported
@pytest.mark.large
def test_killed_again_and_again_it_ends_bit_for_bit_where_it_would_have(tmp_path: Path):
    """Three epochs of 20 groups, in which the middle domain goes round after 16 and the small one each time."""
    arguments = ["--epochs", "3", "--batches-per-epoch", "60", "--save-every", "4"]
    found = check_kills(tmp_path, arguments, steps=180, kills=draw_kills(0, 10, steps=180, save_every=4))
    resumed = [saved for saved in found if saved["step"]]
    assert len({saved["sampler"]["epoch"] for saved in resumed}) >= 2
    assert {saved["optimizer"]["gradmatch"]["inner_step"] for saved in resumed} == {0, 1, 2}
    assert max(saved["sampler"]["position"] for saved in resumed) > 48  # the middle domain in its second round
    loss = dict(logged(tmp_path / "broken"))["train/loss"]
    assert [step for step, _ in loss] == list(range(3, 181, 3))


@pytest.mark.large
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_so_does_the_form_with_meta_step(tmp_path: Path):
    arguments = ["--epochs", "2", "--batches-per-epoch", "60", "--save-every", "3", "--meta-step"]
    kills = [("between Muon and AdamW", 25)]
    check_kills(tmp_path, arguments, steps=40, kills=kills)
    scalars = logged(tmp_path / "broken")
    names = ("loss", "grad_norm", "agreement_with_rest")
    per_domain = {f"train/{name}/{domain}" for name in names for domain in ("small", "medium", "large")}
    assert set(scalars) == {"train/loss", "train/grad_norm", "train/inner_product", "train/cosine"} | per_domain


def test_it_learns_what_the_domains_share(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import unequal_domains

    found = unequal_domains.main(["--epochs", "2", "--batches-per-epoch", "600"])
    assert found["large"] > 0.8
    assert found["unseen"] > 0.65
    assert f"unseen        0 training samples, accuracy {found['unseen']:.3f}" in capsys.readouterr().out
