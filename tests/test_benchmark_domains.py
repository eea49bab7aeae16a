"""``python -m benchmarks domains``: files in the packages' formats, bad ones, and whole runs of small ones."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pickle
import re
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.domains import cli, domainbed, heart, names, protocol, report, sprites, steps, stored, vowels, watch
from benchmarks.domains.source import Loaded, MissingDataError, Source, find
from torch_gradmatch import Evidence
from torch_gradmatch.evaluation.evidence import EvidenceRow, interval_of

# ------------------------------------------------------------------------------------ small files in the same formats


def put(root: Path, source_file: str) -> Path:
    path = root / source_file
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_watch(root: Path, people: int = 4, **instead: Any) -> Path:
    """As seglearn has it: one dictionary in a ``.npy`` file, of series of different lengths."""
    generator = np.random.default_rng(0)
    subjects = [person for person in range(1, people + 1) for _ in range(3)]
    exercises = [exercise for _ in range(people) for exercise in range(3)]
    series = [
        generator.normal(exercise - person / 4, 1.0, (300 + 37 * person, 6))
        for person, exercise in zip(subjects, exercises, strict=True)
    ]
    found = {
        "X": series,
        "y": np.array(exercises),
        "y_labels": ["PEN", "ABD", "FEL"],
        "subject": np.array(subjects),
        "side": np.zeros(len(subjects)),
        "X_labels": ["ax", "ay", "az", "wx", "wy", "wz"],
    }
    path = put(root, watch.FILE)
    np.save(path, np.array(found | instead, dtype=object), allow_pickle=True)
    return path


def write_vowels(root: Path) -> Path:
    generator = np.random.default_rng(0)
    rows = 24
    frame = pd.DataFrame({"V1": pd.Categorical([str(i % 4) for i in range(rows)])})
    for number in range(2, 11):
        frame[f"V{number}"] = generator.normal(size=rows)
    frame["Class"] = pd.Categorical([["hid", "hId"][i // 4 % 2] for i in range(rows)], categories=["hid", "hId"])
    path = put(root, vowels.FILE)
    rdata = pytest.importorskip("rdata")  # there is none for Python 3.10
    rdata.write_rda(path, {"Vowel": frame})
    return path


def write_heart(root: Path, rows: int = 40, **instead: str) -> Path:
    path = put(root, heart.FILE)
    columns = ["id", "age", "sex", "dataset", "cp", "trestbps", "chol", "fbs", "restecg", "thalch", "exang", "oldpeak"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, "slope", "ca", "thal", "num"])
        writer.writeheader()
        for i in range(rows):
            row = {
                "id": i, "age": 40 + i % 30, "sex": ["Male", "Female"][i % 3 == 0],
                "dataset": ["Cleveland", "Hungary", "Switzerland", "VA Long Beach"][i % 4], "cp": "asymptomatic",
                "trestbps": 120, "chol": 0 if i % 4 == 2 else 200 + i, "fbs": "TRUE", "restecg": "normal",
                "thalch": 150, "exang": "FALSE", "oldpeak": 1.5,
                "slope": "flat" if i % 4 == 0 else "", "ca": "", "thal": "normal", "num": i * 7 % 5,
            }  # fmt: skip
            writer.writerow(row | instead)
    return path


def name_line(sex: str, name: str, frequencies: dict[str, int], mark: str = " ") -> str:
    columns = "".join(f"{frequencies[c]:X}" if c in frequencies else " " for c in names.COUNTRIES)
    return f"{sex:<3}{name:<26}{mark}{columns}  $"


def write_names(root: Path, *more: str) -> Path:
    lines = ["# DO NOT CHANGE", "=  Al        Albert", *more]
    letters = "abcdefghijklmnopqrstuvwxyz"
    for country, vowel in (("Italy", "a"), ("France", "e"), ("Spain", "o")):
        for i in range(names.LEAST):
            name = letters[i // 26].upper() + letters[i % 26] + vowel
            lines.append(name_line("F" if i % 2 else "M", name, {country: 1 + i % 13}))
    path = put(root, names.FILE)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "watch": write_watch,
    "vowels": write_vowels,
    "heart": write_heart,
    "names": write_names,
}
SOURCES = list(protocol.SOURCES.values())


# ------------------------------------------------------------------------------------------------------------- reading


def test_watch_is_cut_into_windows_of_the_person(tmp_path: Path):
    path = write_watch(tmp_path)
    loaded = watch.SOURCE.load(tmp_path)
    series = np.load(path, allow_pickle=True).item()["X"]
    assert loaded.sizes() == {f"person {person}": 3 * ((300 + 37 * person) // 100) for person in range(1, 5)}
    torch.testing.assert_close(loaded.inputs[1], torch.tensor(series[0][100:200].T, dtype=torch.float32))
    assert loaded.targets[:9].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert loaded.classes == ["PEN", "ABD", "FEL"]


def test_vowels_are_rs_data_frame(tmp_path: Path):
    write_vowels(tmp_path)
    loaded = vowels.SOURCE.load(tmp_path)
    assert loaded.inputs.shape == (24, 9)
    assert loaded.sizes() == {f"speaker {i}": 6 for i in range(4)}
    assert loaded.classes == ["hid", "hId"]
    assert loaded.targets[:8].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_heart_marks_what_is_missing(tmp_path: Path):
    write_heart(tmp_path)
    loaded = heart.SOURCE.load(tmp_path)
    assert list(loaded.sizes()) == ["Cleveland", "Hungary", "Switzerland", "VA Long Beach"]
    cleveland, switzerland = loaded.inputs[0].tolist(), loaded.inputs[2].tolist()
    numbers = list(heart.NUMBERS)
    chol, ca = 2 * numbers.index("chol"), 2 * numbers.index("ca")
    assert cleveland[chol : chol + 2] == pytest.approx([(200 - 220) / 50, 0.0])
    assert switzerland[chol : chol + 2] == [0.0, 1.0], "a cholesterol of 0 is none"
    assert cleveland[ca : ca + 2] == [0.0, 1.0]
    assert sum(cleveland[12:]) == 7
    assert sum(switzerland[12:]) == 6, "no slope is known, so none is 1"
    assert loaded.targets[:5].tolist() == [0, 1, 1, 1, 1]


def test_names_stand_in_one_country_and_are_of_one_sex(tmp_path: Path):
    write_names(
        tmp_path,
        name_line("F", "Zoë", {"Italy": 5, "France": 4}),
        name_line("F", "Tied", {"Italy": 5, "France": 5}),
        name_line("M", "Both", {"Italy": 5}),
        name_line("F", "Both", {"France": 5}),
        name_line("?", "Unisex", {"Italy": 5}),
        name_line("?M", "Mostly", {"Italy": 5}),
        name_line("F", "Zoee", {"Italy": 5}, mark="+"),
        name_line("F", "Ji+Woo", {"Korea": 5}),
        name_line("F", "Lonely", {"Japan": 5}),
    )
    loaded = names.SOURCE.load(tmp_path)
    assert loaded.sizes() == {"Italy": names.LEAST + 1, "Spain": names.LEAST, "France": names.LEAST}
    place = loaded.inputs.tolist().index(names.codes("Zoë"))
    assert (loaded.domains[place], loaded.classes[int(loaded.targets[place])]) == ("Italy", "F")
    rows = {tuple(row) for row in loaded.inputs.tolist()}
    assert not rows & {tuple(names.codes(n)) for n in ("Tied", "Both", "Unisex", "Mostly", "Zoee", "JiWoo", "Lonely")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_what_is_missing_says_which_command_gets_it(source: Source, tmp_path: Path):
    with pytest.raises(MissingDataError, match="This gets it") as caught:
        source.load(tmp_path)
    assert source.command.replace("ROOT", str(tmp_path)) in str(caught.value)
    path = WRITERS[source.name](tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    os.rename(path, alone / path.name)
    assert len(source.load(alone).domains) > 0, "the file itself does, too"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_damaged_files_are_named(source: Source, damage: str, tmp_path: Path):
    path = WRITERS[source.name](tmp_path)
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": whole[: 2 * len(whole) // 3 - 5], "other": b"\x93NUMPY of another kind\n"}[damage]
    )
    with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
        source.load(tmp_path)


def test_watch_data_cannot_run_code(tmp_path: Path):
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harmed"),)

    write_watch(tmp_path, X=[Harm()])
    with pytest.raises(ValueError, match=r"mkdir has no place in a file of arrays"):
        watch.SOURCE.load(tmp_path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        ({"subject": np.zeros(2)}, "is damaged"),
        ({"X": [np.full((100, 6), np.nan)], "y": [0], "subject": [1]}, "should be finite"),
    ],
)
def test_watch_data_that_does_not_fit_is_refused(instead: dict[str, Any], said: str, tmp_path: Path):
    write_watch(tmp_path, **instead)
    with pytest.raises(ValueError, match=said):
        watch.SOURCE.load(tmp_path)


def test_watch_data_of_another_shape_is_refused(tmp_path: Path):
    np.save(put(tmp_path, watch.FILE), np.zeros(3))
    with pytest.raises(ValueError, match=r"it holds an array of shape \(3,\)"):
        watch.SOURCE.load(tmp_path)
    with put(tmp_path, watch.FILE).open("wb") as file:
        np.save(file, np.array({"X": []}, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="it has no 'y'"):
        watch.SOURCE.load(tmp_path)


@pytest.mark.parametrize(("column", "value", "said"), [("sex", "M", "sex should be among"), ("age", "old", "line 2 ")])
def test_heart_rows_that_do_not_fit_are_named(column: str, value: str, said: str, tmp_path: Path):
    write_heart(tmp_path, **{column: value})
    with pytest.raises(ValueError, match=said):
        heart.SOURCE.load(tmp_path)


def test_lines_of_names_that_do_not_fit_are_named(tmp_path: Path):
    write_names(tmp_path, "F  Anna")
    with pytest.raises(ValueError, match=r"line 3 of .* it has 7 columns"):
        names.SOURCE.load(tmp_path)
    write_names(tmp_path, name_line("F", "Anna", {"Italy": 5}).replace("5", "?"))
    with pytest.raises(ValueError, match="line 3 of "):
        names.SOURCE.load(tmp_path)


def test_an_entry_for_each_sample():
    with pytest.raises(ValueError, match=r"an entry for each sample .*\(got 2, 2, 1\)"):
        Loaded(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), ["a"], ["x"])
    loaded = Loaded(torch.zeros(5, 1), torch.tensor([0, 0, 0, 1, 1]), ["a", "a", "b", "b", "b"], ["x", "y"])
    assert loaded.most_frequent() == pytest.approx((2 / 2 + 1 / 3) / 2)


def test_the_first_place_that_is_there(tmp_path: Path):
    (tmp_path / "second").touch()
    assert find(tmp_path, ["first", "second"], "") == tmp_path / "second"


# ------------------------------------------------------------------------------------------------------------ protocol


@pytest.mark.parametrize("name", list(protocol.SOURCES))
def test_models_learn_from_what_is_loaded(name: str, tmp_path: Path):
    WRITERS[name](tmp_path)
    source = protocol.SOURCES[name]
    loaded = source.load(tmp_path)
    logits = source.make_model()(loaded.inputs[:3])
    assert logits.shape[0] == 3
    assert logits.shape[1] >= len(loaded.classes)
    domains = len(loaded.sizes())
    for size in (protocol.DEFAULT, protocol.FULL, protocol.QUICK):
        assert len(protocol.held_out(size[name], loaded)) == math.ceil(domains / size[name].every)
    assert protocol.DEFAULT[name].draws >= 8
    assert protocol.DEFAULT[name].seeds >= 5


def test_numbers_in_labels_count_as_numbers():
    labels = [f"person {i}" for i in (10, 9, 2, 1)]
    loaded = Loaded(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), labels, ["x"])
    assert protocol.held_out(protocol.Protocol(1, every=2), loaded) == ["person 1", "person 9"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    few = protocol.Protocol(12, 2, None, draws=2, seeds=2, evaluations=2, methods=("ERM", "Fish", "IDGM, cosine"))
    monkeypatch.setattr(protocol, "QUICK", dict.fromkeys(protocol.SOURCES, few))


def arguments(root: Path, *more: str) -> list[str]:
    return ["domains", *more, "--quick", "--root", str(root), "--out", str(root / "out"), "--processes", "1"]


@pytest.mark.usefixtures("small")
def test_from_files_to_the_report_broken_off_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_heart(tmp_path)
    write_watch(tmp_path)
    assert command.main(arguments(tmp_path, "heart", "watch", "names")) == 0
    out = tmp_path / "out"
    text = (out / "index.md").read_text()
    assert "Left out: names" in text
    assert names.COMMAND.replace("ROOT", str(tmp_path)) in capsys.readouterr().err
    for picture in ("would_i_have_won.png", "heart.png", "heart_agreement.png", "watch.png"):
        assert f"]({picture})" in text
        assert (out / picture).stat().st_size > 5000
    for expected in ("MIT (of the package", "| IDGM, cosine", heart.COMMAND, "Switzerland 10", "meta_lr"):
        assert expected in text
    found = json.loads((out / "heart.json").read_text())
    assert found["command"] == "python -m benchmarks domains heart --root data --quick"
    assert f"`{found['command']}`" in text
    assert str(tmp_path) not in json.dumps({k: v for k, v in found.items() if k != "environment"})
    # Broken off after nine runs, and in the middle of the next line.
    runs = out / "heart" / "runs.jsonl"
    lines = runs.read_text().splitlines(keepends=True)
    runs.write_text("".join(lines[:9]) + lines[9][:30])
    (out / "heart.json").unlink()
    assert command.main(arguments(tmp_path, "heart")) == 0
    again = json.loads((out / "heart.json").read_text())
    assert without_seconds(again["evidence"]) == without_seconds(found["evidence"])
    assert again["seconds"] > found["seconds"], "the time before counts, too"
    # A second folder: the same figures, bit for bit.
    assert command.main([*arguments(tmp_path, "heart"), "--out", str(tmp_path / "other")]) == 0
    other = json.loads((tmp_path / "other" / "heart.json").read_text())
    assert without_seconds(other["evidence"]) == without_seconds(found["evidence"])


def test_time_counts_also_where_a_call_was_killed(tmp_path: Path):
    path = tmp_path / "of" / "seconds.json"
    path.parent.mkdir()
    path.write_text("100.0")
    with cli.counted(path, every=0.01) as seconds:
        deadline = time.monotonic() + 10
        while json.loads(path.read_text()) <= 100.0 and time.monotonic() < deadline:
            time.sleep(0.01)
        kept = json.loads(path.read_text())  # what is there if it is killed now
        assert 100.0 < kept <= seconds() < 110.0
    assert json.loads(path.read_text()) >= kept


def without_seconds(evidence: dict[str, Any]) -> dict[str, Any]:
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in evidence["rows"]]
    return evidence | {"rows": rows}


@pytest.mark.usefixtures("small")
def test_the_report_again_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_vowels(tmp_path)
    assert command.main(arguments(tmp_path, "vowels")) == 0
    monkeypatch.setattr(cli, "measure", None)
    other = tmp_path / "copy"
    assert command.main(["domains", "--again", str(tmp_path / "out"), "--out", str(other)]) == 0
    assert (other / "index.md").read_text() == (tmp_path / "out" / "index.md").read_text()


def test_nothing_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["heart", "--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert heart.COMMAND.replace("ROOT", str(tmp_path)) in said
    assert "holds no figures of any data set" in said


@pytest.mark.parametrize("bad", [["hearts"], ["heart", "--processes", "0"], ["--quick", "--full"]])
def test_the_command_line_refuses(bad: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main(bad)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- report


def row_of(name: str, values: list[float], first: list[float] | None, cosine: float = 0.5) -> EvidenceRow:
    """A method that reaches these values on as many held-out domains."""
    labels = [f"d{i}" for i in range(len(values))]
    points = [{"gradients": g, "validation": 0.5, "held_out": 0.5, "cosine": cosine / (1 + g)} for g in (0, 10, 20)]
    for point in points:
        point["agreement_with_rest"] = {"d0": cosine, "d1": math.nan if point["gradients"] else -cosine}
    difference = None if first is None else interval_of([a - b for a, b in zip(values, first, strict=True)])
    return EvidenceRow(
        name,
        {label: [value, value] for label, value in zip(labels, values, strict=True)},
        {label: [value, value] for label, value in zip(labels, values, strict=True)},
        {label: {"lr": 0.01 * (1 + i), "batch_size": 32} for i, label in enumerate(labels)},
        1.5,
        {label: [points, points[:2]] for label in labels},
        {"diverged": 1} if name == "Fish" else {},
        difference,
        difference,
        difference,
    )


def evidence_with(fish: list[float], cosine: float = 0.5) -> Evidence:
    erm = [0.5, 0.6, 0.7]
    return Evidence(
        "small",
        [row_of("ERM", erm, None, cosine), row_of("ERM, domains in turn", [0.9] * 3, erm), row_of("Fish", fish, erm)],
    )


def store(folder: Path, name: str, title: str, evidence: Evidence) -> None:
    file = {
        "title": title, "shift": "a shift", "get": "get it", "licence": "MIT", "notes": ["a note"], "sizes": {"d0": 3},
        "chance": "", "cut": "half", "command": "python -m benchmarks domains", "processes": 2, "seconds": 120.0,
        "environment": {"date": "2026-01-01", "torch": "2", "python": "3", "cpu": "a CPU", "cpus": 2},
        "evidence": stored.to_stored(evidence),
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(file))


def test_what_is_stored_is_what_was_found():
    evidence = evidence_with([0.6, 0.7, 0.8])
    plain = json.loads(json.dumps(stored.to_stored(evidence)))
    again = stored.evidence_of(plain)
    assert str(again) == str(evidence)
    assert plain["rows"][0]["agreement_by_domain"] == {"d0": [[0.0, 10.0, 20.0], [0.5] * 3], "d1": [[0.0], [-0.5]]}
    # At 20 only one run of each domain has come so far.
    assert stored.agreement_of(evidence.rows[0], (0, 1, -1)) == pytest.approx(
        [0.5, 0.5 / 11, (0.5 / 21 + 0.5 / 11) / 2]
    )
    without = replace(evidence.rows[0], curves={"d0": [[{"gradients": 0, "validation": 0.1, "held_out": 0.1}]]})
    assert stored.agreement_of(without, (0, 1)) == [None, None]


def test_methods_of_the_report_have_one_name_wherever_they_ran(tmp_path: Path):
    names = ("ERM", "Fish", "IGA", "GradMatchFish")
    rows = [row_of(name, [0.6, 0.7], None if name == "ERM" else [0.6, 0.7]) for name in names]
    store(tmp_path, "coloredmnist", "By DomainBed", Evidence("small", rows))
    store(tmp_path, "heart", "By us", evidence_with([0.39, 0.5, 0.61]))
    text = report.write(tmp_path, {}).read_text()
    _, by_us, by_domainbed = re.split(r"## By us|## By DomainBed", text)
    for section in (by_us, by_domainbed):
        assert "\n| Fish  " in section
    assert "\n| Fish, DomainBed's " in by_domainbed
    assert "\n| IGA, DomainBed's " in by_domainbed
    assert "GradMatch" not in by_domainbed
    assert set(domainbed.TITLES) >= set(domainbed.METHODS) - {"ERM"}


def test_the_report_says_where_it_helped_on_sprites(tmp_path: Path):
    store(tmp_path, "heart", "Natural", evidence_with([0.39, 0.5, 0.61]))
    results = [
        asdict(sprites.Result(arrangement, method, number, seed, accuracy, 0.9, 1.0, 100, 0, 1.0))
        for arrangement in ("pairs", "random")
        for number in (2, 10)
        for method, accuracies in (("ERM", (0.5, 0.6)), ("Fish", (0.9, 0.95)))
        for seed, accuracy in enumerate(accuracies)
    ]
    about = json.loads((tmp_path / "heart.json").read_text())
    drawn = {name: about[name] for name in ("command", "processes", "seconds", "environment")}
    settings = {"gradients": 100, "images": 10, "seeds": [0, 1]}
    (tmp_path / "cdsprites.json").write_text(json.dumps(drawn | {"settings": settings, "results": results}))
    text = report.write(tmp_path, {}).read_text()
    section = text[text.index("## When it helped") : text.index("## Natural")]
    assert "Better than ERM on unseen colours, worst against best of all 2 seeds: With colours in pairs" in section
    assert "as in the demo: Fish at every N." in section


def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"gradients": gradients, "held_out": accuracy, "validation": 0.5} for gradients, accuracy in points]


def test_accuracy_between_two_evaluations():
    run = curve((0, 0.1), (40, 0.5), (100, 0.8))
    moments = (0, 10, 40, 70, 100)
    assert [steps.accuracy_at(run, at) for at in moments] == pytest.approx([0.1, 0.2, 0.5, 0.65, 0.8])
    assert steps.accuracy_at(curve((0, 0.25)), 0) == 0.25
    for outside in (-1, 101):
        with pytest.raises(ValueError, match=rf"0 and 100 \(got {outside}\)"):
            steps.accuracy_at(run, outside)


def test_methods_are_compared_after_as_many_steps():
    reference = row_of(steps.REFERENCE, [0.5, 0.5], None)
    ended_early = curve((0, 0), (60, 1.2), (80, 0.8))
    reference.curves.update(d0=[curve((0, 0.0), (100, 0.5)), curve((0, 0.0), (100, 0.7))], d1=[ended_early])
    smooth = row_of("SmoothFish", [0.5, 0.5], [0.5, 0.5])
    smooth.curves.update(d0=[curve((0, 0.0), (100, 0.8))] * 2, d1=[curve((0, 0.0), (100, 0.9))])
    exact = row_of("IDGM, variance", [0.5, 0.5], [0.5, 0.5])
    exact.curves.update(d0=[curve((0, 0.0), (100, 0.4))] * 2, d1=[curve((0, 0.9))])  # which diverged at once
    fish = row_of("Fish", [0.5, 0.5], [0.5, 0.5])
    found = steps.same_steps(Evidence("small", [reference, smooth, exact, fish]))
    expected = {"SmoothFish": interval_of([0.2, 0.1]), "IDGM, variance": interval_of([0.1, -0.1])}
    assert {name: astuple(interval) for name, interval in found.items()} == {
        name: pytest.approx(astuple(interval)) for name, interval in expected.items()
    }
    assert steps.same_steps(Evidence("small", [smooth, exact])) == {}


def test_the_report_compares_after_as_many_steps_where_it_can(tmp_path: Path):
    rows = [row_of(name, [0.6, 0.7], None) for name in ("ERM", steps.REFERENCE)]
    matching = [row_of(name, [0.6, 0.7], [0.6, 0.7]) for name in ("SmoothFish", "IDGM, cosine")]
    store(tmp_path, "watch", "Has all", Evidence("small", [*rows, *matching]))
    store(tmp_path, "heart", "Has ERM alone", evidence_with([0.39, 0.5, 0.61]))
    text = report.write(tmp_path, {}).read_text()
    section = text[text.index("### What the matching itself does") : text.index("## Has all")]
    assert re.search(r"\| Has all +\| \+0.000 \[\+0.000, \+0.000\] \| +\| +\| \+0.000 \[", section)
    assert "ERM alone" not in section


def test_the_report_says_what_the_figures_say(tmp_path: Path):
    store(tmp_path, "watch", "Won", evidence_with([0.61, 0.7, 0.79], 0.1))
    store(tmp_path, "heart", "Lost", evidence_with([0.39, 0.5, 0.61], 0.2))
    store(tmp_path, "vowels", "Open", evidence_with([0.9, 0.6, 0.3], 0.3))
    text = report.write(tmp_path, {"names": "no files"}).read_text()
    assert "beat ERM beyond the interval for another domain on: Won." in text, "the controls do not count as matching"
    assert "worse than ERM beyond the interval for another domain on: Lost." in text
    assert "Over the 3 data sets where it was measured" in text
    # Cosines .1, .3, .2 and gains +.1, 0, -.1: ranks 1 3 2 and 3 2 1.
    assert "is -0.50:" in text
    assert "Fish: 1 of the selected runs ended early (diverged)" in text
    assert "0.02 (0.01 to 0.03)" in text, "the learning rates found"
    assert "- Left out: names, no files" in text
    assert "What the matching itself does" not in text
    assert "Minutes it took: Won 2, Open 2, Lost 2; 6 in all." in text
    assert text.index("## Won") < text.index("## Open") < text.index("## Lost")


def test_pickles_of_arrays_only():
    with pytest.raises(pickle.UnpicklingError, match="has no place"):
        watch._Arrays(io.BytesIO()).find_class("builtins", "eval")
