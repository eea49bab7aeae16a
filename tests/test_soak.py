"""The soak, a little of it: each part does what it says, and finds what is planted."""

from __future__ import annotations

import copy
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import soak
import torch

from torch_gradmatch import GradMatch


@pytest.mark.large
def test_each_part_carries_out_its_cases_and_writes_what_it_found(tmp_path: Path):
    """The kills are below: ranks alone take longer than all this."""
    tests = Path(__file__).parent
    environment = {**os.environ, "SOAK_SHARE": "0.0002", "PYTHONPATH": f"{tests.parent}:{tests}"}
    command = [sys.executable, "-m", "soak", "-k", "not kills"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    page = (tmp_path / "out/soak/soak.md").read_text()
    assert f"torch {torch.__version__}" in page
    assert "10 x sequences: fish: 1 sequences of 25 steps" in page
    assert page.count(", 40 meta-iterations: ") >= 10
    assert "- 0 x FAILED" in page


def test_a_leak_is_found():
    kept: list[Any] = []
    soak.stays_flat(lambda: torch.ones(3) + 1, 400)
    with pytest.raises(AssertionError, match="360 tensors more at the end than after a tenth"):
        soak.stays_flat(lambda: kept.append(torch.ones(3)), 400)

    def leak() -> None:  # past the heap, which may have room from what ran before in this process
        kept.append(mmap.mmap(-1, 1 << 15, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        kept[-1].write(b"\x01" * (1 << 15))

    with pytest.raises(AssertionError, match="bytes more at the end than after a tenth"):
        soak.stays_flat(leak, 400)


LOAD = GradMatch.load_state_dict


def moves_a_rate(optimizer: Any, state: Any) -> None:
    optimizer.param_groups[0]["lr"] *= 2
    LOAD(optimizer, state)


def moves_what_is_in_no_state_dict(optimizer: Any, state: Any) -> None:
    optimizer.method.meta_lr = 1.0
    LOAD(optimizer, state)


def halves(optimizer: Any, state: Any) -> None:
    state = copy.deepcopy(state)
    for slow in state["gradmatch"]["slow_weights"].values():
        slow /= 2
    LOAD(optimizer, state)


def leaves_a_trace(optimizer: Any, state: Any) -> None:
    before = optimizer.optimizer.state_dict()["state"]
    LOAD(optimizer, {**state, "state": before or state["state"]})


@pytest.mark.parametrize(
    ("load", "refused", "message"),
    [
        (LOAD, True, None),
        (moves_a_rate, True, r"refused .* but changed: .*'lr'"),
        (moves_what_is_in_no_state_dict, True, r"refused .* but then another training"),
        (halves, False, r"loaded, but neither as undamaged .* nor as it says"),
        (leaves_a_trace, False, r"with what there was before it trains otherwise"),
    ],
)
def test_a_load_that_goes_wrong_is_found(
    load: Callable[..., None], refused: bool, message: str | None, monkeypatch: pytest.MonkeyPatch
):
    saved = soak.Training("fish-reset", 1)
    saved.advance(6)
    state = saved.state()
    damaged = copy.deepcopy(state["optimizer"])
    if refused:
        damaged["gradmatch"]["shapes"][99] = [1]
    monkeypatch.setattr(GradMatch, "load_state_dict", load)
    with nullcontext() if message is None else pytest.raises(AssertionError, match=message):
        assert soak.judge("fish-reset", damaged, state, 3) == "refused"


def forgetful(*arguments: Any) -> None:
    torch.set_rng_state = lambda state: None  # so that dropout begins anew
    soak.train(*arguments)


def killed_in_a_walk(*arguments: Any) -> None:
    """In the first run, at the 17th step: the last checkpoint is of the 15th, the third of its walk."""

    def advance(training: soak.Training, undisturbed: Any = soak.Training.advance) -> None:
        undisturbed(training)
        if arguments[-1] and training.step == 17:
            os.kill(os.getpid(), signal.SIGALRM)

    soak.Training.advance = advance
    soak.train(*arguments[:-1], 1000 * arguments[-1])


def test_killed_in_an_inner_loop_and_resumed_it_ends_bit_for_bit_where_it_would_have():
    told = soak.kills("fish-carry", 1, killed_in_a_walk, 40)
    assert told == "fish-carry: 1 kills, 0 while a checkpoint was written, 1 resumed in an inner loop"


@pytest.mark.large
def test_so_it_does_killed_at_any_time_and_what_is_forgotten_shows():
    for name in ("fish-reset", "idgm-inner_product"):
        assert soak.kills(name, 2, steps=60).startswith(f"{name}: 2 kills")
    with pytest.raises(AssertionError, match=r"the checkpoint of step \d+ is not that of the undisturbed run"):
        soak.kills("fish-carry", 4, forgetful, 60)
