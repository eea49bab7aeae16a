"""The soak, a little of it: each part does what it says, and finds what is planted."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from soak import __main__ as soak
from soak import damage, flat, kills, train

from torch_gradmatch import GradMatch


def lines_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.large
def test_each_part_carries_out_its_cases_and_not_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The kills are below: torchrun alone takes longer than all this."""
    arguments = ["stateful", "damage", "flat", "--share", "0.0002", "--out", str(tmp_path)]
    assert soak.main(arguments) == 0
    found = {name: lines_in(tmp_path / f"{name}.jsonl") for name in ("stateful", "damage", "flat")}
    for name, lines in found.items():
        assert sorted(line["case"] for line in lines) == sorted(soak.PARTS[name].cases(0.0002))
        assert all(line["ok"] and line["seconds"] > 0 for line in lines)
    assert all(line["steps"] >= 25 and line["sequences"] >= 1 for line in found["stateful"])
    assert all(line["iterations"] == 40 for line in found["flat"])
    verdicts = {"torch.load refused", "refused", "the same", "these values", f"taken by {damage.Training.wrapped}"}
    assert {line["verdict"] for line in found["damage"]} <= verdicts
    page = (tmp_path / "soak.md").read_text()
    assert f"torch {torch.__version__}" in page
    assert "400 meta-iterations of 10 settings" in page
    assert "4 damaged checkpoints of" in page
    assert page in capsys.readouterr().out
    assert soak.main(arguments) == 0
    assert {name: lines_in(tmp_path / f"{name}.jsonl") for name in found} == found


def half(case: str, seed: int, folder: Path) -> dict[str, Any]:
    if case == "bad":
        raise KeyError("what is wrong")
    return {"number": seed}


def test_a_case_that_fails_is_named_with_its_command_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    part = SimpleNamespace(cases=lambda share: ["bad", "good"], run=half, figures=lambda lines: [f"{len(lines)} good"])
    monkeypatch.setitem(soak.PARTS, "flat", part)
    assert soak.main(["flat", "--seed", "3", "--out", str(tmp_path)]) == 1
    assert {(line["case"], line["ok"]) for line in lines_in(tmp_path / "flat.jsonl")} == {
        ("bad", False),
        ("good", True),
    }
    page = (tmp_path / "soak.md").read_text()
    assert "1 of 2 cases went well" in page
    assert "1 good" in page
    assert "FAILED `PYTHONPATH=.:tests python -m soak flat --seed 3 --only 'bad'`" in page
    assert "KeyError: 'what is wrong'" in page
    assert "--only 'bad'" in capsys.readouterr().err
    assert soak.main(["flat", "--seed", "3", "--out", str(tmp_path), "--only", "bad"]) == 1


# ----------------------------------------------------------------------------------------------------------------- flat


def test_a_leak_is_found():
    kept: list[Any] = []
    assert flat.check(lambda: torch.ones(3) + 1, 400)["new_tensors"] == 0
    with pytest.raises(AssertionError, match="360 tensors more at the end than after a tenth"):
        flat.check(lambda: kept.append(torch.ones(3)), 400)

    def leak() -> None:  # past the heap, which may have room from what ran before in this process
        kept.append(mmap.mmap(-1, 1 << 15, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        kept[-1].write(b"\x01" * (1 << 15))

    with pytest.raises(AssertionError, match="bytes more at the end than after a tenth"):
        flat.check(leak, 400)


# --------------------------------------------------------------------------------------------------------------- damage


def judged(state: dict[str, Any] | None = None) -> str:
    """Load into Fish in the middle of training, by default what holds one parameter too many."""
    saved = damage.Training("fish-sgd", 1)
    saved.advance(6)
    undamaged = saved.save()
    if state is None:
        own = undamaged["gradmatch"]
        state = {**undamaged, "gradmatch": {**own, "shapes": {**own["shapes"], 99: [1]}}}
    live = damage.Training("fish-sgd", 2)
    live.advance(3)
    return damage.judge(live, state, undamaged, saved.model.state_dict())


def test_a_damaged_checkpoint_is_refused():
    assert judged() == "refused"


def fails(optimizer: Any, state: Any) -> None:
    raise RuntimeError("of another kind")


def moves_a_rate(optimizer: Any, state: Any) -> None:
    optimizer.param_groups[0]["lr"] *= 2
    LOAD(optimizer, state)


def moves_what_is_in_no_state_dict(optimizer: Any, state: Any) -> None:
    optimizer.method.meta_lr = 1.0
    LOAD(optimizer, state)


def halves(optimizer: Any, state: Any) -> None:
    LOAD(optimizer, state)
    for entry in optimizer.state.values():
        entry["momentum_buffer"] = entry["momentum_buffer"] / 2


LOAD = GradMatch.load_state_dict


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (fails, RuntimeError, "of another kind"),
        (moves_a_rate, AssertionError, r"refused .* but changed: .*'lr'"),
        (moves_what_is_in_no_state_dict, AssertionError, r"refused .* but then another training"),
        (halves, AssertionError, r"loaded, but neither as undamaged .* nor as it says"),
    ],
)
def test_a_load_that_goes_wrong_is_found(load: Any, error: Any, message: str, monkeypatch: pytest.MonkeyPatch):
    state = None
    if load is halves:
        saved = damage.Training("fish-sgd", 1)
        saved.advance(6)
        state = saved.save()
        state["state"][2]["momentum_buffer"].fill_(7.0)
    monkeypatch.setattr(GradMatch, "load_state_dict", load)
    with pytest.raises(error, match=message):
        judged(state)


# ---------------------------------------------------------------------------------------------------------------- kills


def forgetful(settings: dict[str, Any]) -> None:
    torch.set_rng_state = lambda state: None  # so that dropout begins anew
    train.train(settings)


@pytest.mark.large
def test_killed_and_resumed_it_ends_bit_for_bit_where_it_would_have(tmp_path: Path):
    found = kills.run("fish-carry/2", 0, tmp_path, steps=60)
    assert found["kills"] == 2
    assert len(found["resumed_at"]) == 2
    assert not (tmp_path / "fish-carry").exists()


@pytest.mark.large
def test_one_that_does_not_is_found(tmp_path: Path):
    with pytest.raises(AssertionError, match=r"the checkpoint of step \d+ is another than that of the undisturbed run"):
        kills.run("fish-carry/4", 0, tmp_path, forgetful, 60)
    assert (tmp_path / "fish-carry" / "whole").exists()
