"""``python -m benchmarks domains``: files in the packages' formats, bad ones, and whole runs of small ones."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.domains import cli, heart, names, report, sentiment, simulations, vowels, watch
from benchmarks.domains.source import Loaded, MissingDataError, Source, find
from torch_gradmatch import Evidence
from torch_gradmatch.evaluation.evidence import EvidenceRow

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


def write_sentiment(root: Path, line: str = "1_1\t0.5\tgood") -> Path:
    """As vaderSentiment has it: an archive in an archive."""

    def archive(**files: bytes) -> bytes:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as file:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
        return content.getvalue()

    rows = "\n".join(["7_1\t-0.25\tso so", *(f"{1 + i // 2}_{i % 2}\t{i / 4 - 1}\ttext {i}" for i in range(8)), line])
    inner = archive(**{f"hutto_ICWSM_2014/{name}_GroundTruth.txt": rows.encode() for name in sentiment.GENRES})
    path = put(root, sentiment.TEXTS)
    path.write_bytes(archive(**{sentiment.INSIDE: inner}))
    return path


@pytest.fixture(autouse=True)
def _no_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentiment, "embedded", lambda _, texts: torch.ones(len(texts), 384))


WRITERS: dict[str, Callable[[Path], Path]] = {
    "watch": write_watch,
    "vowels": write_vowels,
    "heart": write_heart,
    "names": write_names,
    "sentiment": write_sentiment,
}
SOURCES = cli.OWN


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


def test_sentences_of_a_review_are_a_group_and_scores_are_learned(tmp_path: Path):
    write_sentiment(tmp_path)
    source = sentiment.SOURCE
    loaded = source.load(tmp_path)
    assert loaded.sizes() == dict.fromkeys(("tweet", "product", "news", "film"), 10)
    assert (loaded.groups or [])[:4] == ["tweet 7", "tweet 1", "tweet 1", "tweet 2"]
    assert (loaded.targets[:3].tolist(), loaded.classes) == ([-0.25, -1.0, -0.75], [])
    model, batch = source.make_model().eval(), [loaded.inputs, loaded.targets]
    closeness, loss = source.metric(model, batch), source.loss_fn(model, batch)
    assert closeness.shape == loaded.targets.shape
    torch.testing.assert_close(closeness.square().mean(), loss)


def test_watch_data_cannot_run_code(tmp_path: Path):
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harmed"),)

    write_watch(tmp_path, X=[Harm()])
    with pytest.raises(ValueError, match=r"mkdir has no place in a file of arrays"):
        watch.SOURCE.load(tmp_path)
    assert not (tmp_path / "harmed").exists()


def write_array(root: Path, value: Any) -> None:
    with put(root, watch.FILE).open("wb") as file:
        np.save(file, value, allow_pickle=True)


NOT_FINITE = {"X": [np.full((100, 6), np.nan)], "y": [0], "subject": [1]}
REFUSED: dict[str, tuple[Source, Callable[[Path], object], str]] = {
    "subjects": (watch.SOURCE, lambda root: write_watch(root, subject=np.zeros(2)), "is damaged"),
    "not finite": (watch.SOURCE, lambda root: write_watch(root, **NOT_FINITE), "should be finite"),
    "an array": (watch.SOURCE, lambda root: write_array(root, np.zeros(3)), r"it holds an array of shape \(3,\)"),
    "no classes": (watch.SOURCE, lambda root: write_array(root, np.array({"X": []}, dtype=object)), "it has no 'y'"),
    "sex": (heart.SOURCE, lambda root: write_heart(root, sex="M"), "sex should be among"),
    "age": (heart.SOURCE, lambda root: write_heart(root, age="old"), "line 2 "),
    "columns": (names.SOURCE, lambda root: write_names(root, "F  Anna"), r"line 3 of .* it has 7 columns"),
    "frequency": (
        names.SOURCE,
        lambda root: write_names(root, name_line("F", "Anna", {"Italy": 5}).replace("5", "?")),
        "line 3 of ",
    ),
    "tabs": (sentiment.SOURCE, lambda root: write_sentiment(root, "no tabs"), "not enough values"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_named(kind: str, tmp_path: Path):
    source, write, said = REFUSED[kind]
    write(tmp_path)
    with pytest.raises(ValueError, match=said):
        source.load(tmp_path)


def test_an_entry_for_each_sample():
    with pytest.raises(ValueError, match=r"an entry for each sample .*\(got 2, 2, 1\)"):
        Loaded(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), ["a"], ["x"])
    loaded = Loaded(torch.zeros(5, 1), torch.tensor([0, 0, 0, 1, 1]), ["a", "a", "b", "b", "b"], ["x", "y"])
    assert loaded.most_frequent() == pytest.approx((2 / 2 + 1 / 3) / 2)


def test_the_first_place_that_is_there(tmp_path: Path):
    (tmp_path / "second").touch()
    assert find(tmp_path, ["first", "second"], "") == tmp_path / "second"


# ------------------------------------------------------------------------------------------------------------ protocol


@pytest.mark.parametrize("name", list(WRITERS))
def test_models_learn_from_what_is_loaded(name: str, tmp_path: Path):
    WRITERS[name](tmp_path)
    source = cli.SOURCES[name]
    loaded = source.load(tmp_path)
    logits = source.make_model()(loaded.inputs[:3])
    assert logits.shape[0] == 3
    assert logits.shape[1] >= len(loaded.classes)
    domains = len(loaded.sizes())
    for size in cli.SIZES.values():
        assert len(cli.held_out(size[name], loaded)) == math.ceil(domains / size[name].every)
    assert cli.SIZES["default"][name].draws >= 8
    assert cli.SIZES["default"][name].seeds >= 5


def test_numbers_in_labels_count_as_numbers():
    labels = [f"person {i}" for i in (10, 9, 2, 1)]
    loaded = Loaded(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), labels, ["x"])
    assert cli.held_out(cli.Protocol(1, every=2), loaded) == ["person 1", "person 9"]


def test_the_curve_is_of_the_runs_that_came_to_their_end(tmp_path: Path):
    def line(method: str, scores: list[float], stopped: str | None) -> str:
        curve = [[100.0 * k, score] for k, score in enumerate(scores)]
        return json.dumps({"method": method, "stopped": stopped, "plain": {"curve": curve}}) + "\n"

    ended, early = line("ERM", [0.0, 0.5], None) + line("ERM", [0.2, 0.7], None), line("ERM", [0.9], "NaN")
    (tmp_path / "runs.jsonl").write_text(ended + early + line("Fish", [1.0, 1.0], None))
    assert "mean over 2 runs: 0.100 after 0, 0.600 after 100 samples" in report.curve(tmp_path, "ERM")
    (tmp_path / "runs.jsonl").write_text(early)
    assert report.curve(tmp_path, "ERM") == "All runs of ERM ended early."


def evidence_of(**rows: list[list[float]]) -> Evidence:
    """With three domains and two seeds."""
    settings = {d: {"meta_lr": 0.1 * (1 + i)} for i, d in enumerate("abc")}
    return Evidence(
        "small",
        [EvidenceRow(name, dict(zip("abc", of, strict=True)), settings, 0.0, 2.0, {}) for name, of in rows.items()],
    )


def test_differences_are_marked_where_they_are_more_than_chance(tmp_path: Path):
    erm = [[0.5, 0.52], [0.6, 0.61], [0.7, 0.73]]
    shift = lambda *by: [[value + by[i] + 0.001 * i for value in of] for i, of in enumerate(erm)]  # noqa: E731
    evidence = evidence_of(
        ERM=erm, better=shift(0.1, 0.1, 0.1), worse=shift(-0.1, -0.1, -0.1), same=shift(0.1, -0.1, 0)
    )
    loaded = Loaded(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), ["a", "b", "c"], ["x"])
    runs = [{"method": m, "stopped": None, "seconds": s} for m in ("ERM", "better") for s in (9.0, 2.0)]
    runs += [{"method": m, "stopped": None, "seconds": 5.0} for m in ("worse", "same")]
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, runs)))
    found = [report.Found(heart.SOURCE, loaded, evidence, tmp_path, 1)]
    assert found[0].line()[2:] == ["3 x 2", "yes: better"]
    near = replace(found[0], evidence=evidence_of(ERM=erm, worse=shift(-0.1, -0.1, -0.1), near=shift(0.1, 0.05, 0.02)))
    assert near.line()[3].startswith("no; least p: near, 0.1")
    lines = {name: cells for name, *cells in report.differences(found)}
    assert lines[""] == ["heart", "time"]
    assert lines["ERM"] == ["0.610", "1"]
    assert lines["better"] == ["**+10.1 ± 0.2**", "1.00"]
    assert lines["worse"] == ["*-9.9 ± 0.2*", "2.50"]
    assert lines["same"][0] == "+0.1 ± 24.7"  # Student, 3 domains: 4.303 * 0.0995 / sqrt(3)
    assert report.selected(found)[2] == ["better", "meta_lr", "0.2", "0.1 to 0.3", "3"]


def test_what_a_study_can_see_is_where_its_power_is():
    evidence = evidence_of(ERM=[[0.5, 0.52], [0.6, 0.61], [0.7, 0.73]], other=[[0.51, 0.53], [0.6, 0.63], [0.7, 0.72]])
    seen = report.smallest_seen(evidence)
    assert 0.0 < seen < 1.0
    assert evidence.power(seen) >= 0.8 > evidence.power(seen - 2e-4)
    wide = evidence_of(ERM=[[0.5, 0.52], [0.6, 0.61], [0.7, 0.73]], other=[[9.51, 9.53], [-9.6, -9.63], [0.7, 0.72]])
    assert report.hundredths(report.smallest_seen(wide)) == "?"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    few = cli.Protocol(200, 2, draws=2, seeds=2)
    monkeypatch.setitem(cli.SIZES, "quick", dict.fromkeys(cli.SOURCES, few))


def arguments(root: Path, *more: str) -> list[str]:
    return ["domains", *more, "--quick", "--root", str(root), "--out", str(root / "out"), "--processes", "1"]


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore:many samples have a near-identical twin")  # as these few rows do
def test_from_files_to_the_report_broken_off_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_heart(tmp_path)
    write_watch(tmp_path)
    assert command.main(arguments(tmp_path, "heart", "watch", "names")) == 0
    out = tmp_path / "out"
    text = (out / "index.md").read_text()
    assert "Left out: names" in text
    assert names.COMMAND.replace("ROOT", str(tmp_path)) in capsys.readouterr().err
    for picture in ("heart.png", "watch.png"):
        assert f"]({picture})" in text
        assert (out / picture).stat().st_size > 5000
    for expected in (
        "MIT (of the package",
        "IDGM, head, averaged",
        heart.COMMAND,
        "Switzerland 10",
        "groups",
        "ERM on its validation",
    ):
        assert expected in text
    found = Evidence.from_json((out / "heart.json").read_text())
    # Broken off after nine runs, and in the middle of the next line.
    runs = out / "heart" / "runs.jsonl"
    lines = runs.read_text().splitlines(keepends=True)
    runs.write_text("".join(lines[:9]) + lines[9][:30])
    assert command.main(arguments(tmp_path, "heart")) == 0
    again = Evidence.from_json((out / "heart.json").read_text())
    assert [row.by_domain for row in again.rows] == [row.by_domain for row in found.rows]


def test_the_windows_of_a_series_and_the_frames_of_an_utterance_are_groups(tmp_path: Path):
    write_watch(tmp_path)
    write_vowels(tmp_path)
    for source in (watch.SOURCE, vowels.SOURCE):
        loaded = source.load(tmp_path)
        assert loaded.groups is not None
        assert len(loaded.groups) == len(loaded.domains)
        of_group = {(group, domain) for group, domain in zip(loaded.groups, loaded.domains, strict=True)}
        assert len(of_group) == len(set(loaded.groups)) > len(loaded.sizes())


def test_nothing_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["heart", "--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert heart.COMMAND.replace("ROOT", str(tmp_path)) in capsys.readouterr().err


@pytest.mark.parametrize("bad", [["hearts"], ["heart", "--processes", "0"], ["--full"]])
def test_the_command_line_refuses(bad: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main(bad)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.large
@pytest.mark.parametrize(
    ("study", "best"), [("hospitals", "ERM"), ("permuted", "ERM"), ("shortcut", "IDGM, strength 30")]
)
def test_it_says_yes_where_there_is_something_to_find_and_else_no(study: str, best: str):
    evidence = simulations.STUDIES[study](0)
    assert evidence.best == best
    assert evidence.permuted == (study == "permuted")
    assert ("No. Use ERM" in evidence.answer) == (best == "ERM")


def test_slides_of_a_patient_are_of_one_hospital_and_of_one_class():
    dataset, patient, hospital = simulations.slides(3)
    of_patient = {(p, h, int(y)) for p, h, y in zip(patient, hospital, dataset.tensors[1], strict=True)}
    assert len(of_patient) == len(set(patient)) == 96
    assert len(set(hospital)) == 6


def test_the_command_counts_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(simulations, "BRIEF", simulations.BRIEF | {"seeds": 2, "budget": 300})
    assert simulations.main(["permuted", "--seeds", "2", "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["permuted"]
    assert (found["of"], len(found["answers"])) == (2, 2)
    assert found["yes"] == sum("Yes. Use" in answer["answer"] for answer in found["answers"])
    assert f"permuted: {found['yes']} yes of 2" in capsys.readouterr().out
