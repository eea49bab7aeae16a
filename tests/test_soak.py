"""The soak, a little of it: each part does what it says, and finds what is planted."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soak
import torch

from torch_gradmatch import GradMatch


@pytest.mark.large
def test_each_part_carries_out_its_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The kills are below: ranks alone take longer than all this."""
    assert soak.main(["sequences", "damage", "flat", "--share", "0.0002", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "soak.md").read_text()
    assert page in capsys.readouterr().out
    assert f"torch {torch.__version__}" in page
    assert "10 x fish: a sequence of 25 steps" in page
    assert page.count(", 40 meta-iterations: ") == len(soak.cases("flat", 0.0002)) >= 10


def test_a_case_that_fails_is_named_with_its_command_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def half(case: str, seed: int) -> list[str]:
        if case.startswith("fish-reset"):
            raise KeyError("what is wrong")
        return ["good"]

    monkeypatch.setitem(soak.PARTS, "kills", half)
    assert soak.main(["kills", "--seed", "3", "--out", str(tmp_path)]) == 1
    page = (tmp_path / "soak.md").read_text()
    assert f"- {len(soak.VARIANTS) - 1} x good" in page
    assert "FAILED `PYTHONPATH=.:tests python -m soak kills --seed 3 --only 'fish-reset/5'`" in page
    assert "KeyError: 'what is wrong'" in page
    assert "--only 'fish-reset/5'" in capsys.readouterr().err
    assert soak.main(["kills", "--only", "fish-carry/2"]) == 0


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


def fails(optimizer: Any, state: Any) -> None:
    raise RuntimeError("of another kind")


def moves_a_rate(optimizer: Any, state: Any) -> None:
    optimizer.param_groups[0]["lr"] *= 2
    LOAD(optimizer, state)


def moves_what_is_in_no_state_dict(optimizer: Any, state: Any) -> None:
    optimizer.method.meta_lr = 1.0
    LOAD(optimizer, state)


def halves(optimizer: Any, state: Any) -> None:
    own = state["gradmatch"]
    LOAD(
        optimizer,
        {**state, "gradmatch": {**own, "slow_weights": {name: slow / 2 for name, slow in own["slow_weights"].items()}}},
    )


def leaves_a_trace(optimizer: Any, state: Any) -> None:
    before = optimizer.optimizer.state_dict()["state"]
    LOAD(optimizer, {**state, "state": before or state["state"]})


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (LOAD, None, ""),
        (fails, RuntimeError, "of another kind"),
        (moves_a_rate, AssertionError, r"refused .* but changed: .*'lr'"),
        (moves_what_is_in_no_state_dict, AssertionError, r"refused .* but then another training"),
        (halves, AssertionError, r"loaded, but neither as undamaged .* nor as it says"),
        (leaves_a_trace, AssertionError, r"with what there was before it trains otherwise"),
    ],
)
def test_a_load_that_goes_wrong_is_found(
    load: Callable[..., None], error: Any, message: str, monkeypatch: pytest.MonkeyPatch
):
    saved = soak.Training("fish-reset", 1)
    saved.advance(6)
    state = saved.state()
    monkeypatch.setattr(GradMatch, "load_state_dict", load)
    loaded = load in (halves, leaves_a_trace)
    own = state["optimizer"]["gradmatch"]
    damaged = {**state["optimizer"], "gradmatch": own if loaded else {**own, "shapes": {**own["shapes"], 99: [1]}}}
    if error is None:
        assert soak.judge("fish-reset", "optimizer", damaged, state, 3) == "refused"
        return
    with pytest.raises(error, match=message):
        soak.judge("fish-reset", "optimizer", damaged, state, 3)


def forgetful(*arguments: Any) -> None:
    torch.set_rng_state = lambda state: None  # so that dropout begins anew
    soak.train(*arguments)


@pytest.mark.large
def test_killed_and_resumed_it_ends_bit_for_bit_where_it_would_have():
    for name in ("fish-carry", "idgm-domains"):
        (told,) = soak.kills(f"{name}/2", 0, steps=60)
        assert told.startswith(f"{name}: 2 kills")
    with pytest.raises(AssertionError, match=r"the checkpoint of step \d+ is not that of the undisturbed run"):
        soak.kills("fish-carry/4", 0, forgetful, 60)
