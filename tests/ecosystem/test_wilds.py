"""Miniatures of the six data sets: opened by ``wilds``, served by domain, trained, killed, resumed, evaluated."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from ast import literal_eval
from collections import Counter
from pathlib import Path
from typing import Any

import make_miniature
import numpy as np
import pytest
import torch
import train
import wilds_data
from _models import assert_identical
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision import models
from transformers import DistilBertConfig, DistilBertForSequenceClassification, DistilBertTokenizerFast
from wilds.common.utils import avg_over_groups
from wilds_models import make_model
from wilds_options import parse
from wilds_settings import PAPER

TEXTS = ("amazon", "civil")
IDENTITIES = ("male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("miniatures") / "root"
    make_miniature.main(["--root", str(folder), "--samples", "180"])
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """A folder such as ``--weights PATH`` takes: a DistilBERT of two narrow layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *make_miniature.FILLER, "label", "domain"]
    words += [f"##{digit}" for digit in range(10)]
    DistilBertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=len(words), dim=24, hidden_dim=48, n_heads=2, n_layers=2)
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def command(root, tiny_bert, tmp_path):
    """Return the command line of a small run: one that the data set's own settings would make in days."""

    def make(dataset: str, method: str, more: str = "", out: str = "run") -> list[str]:
        weights = tiny_bert if dataset in TEXTS else "none"
        # The deep ones make single pixels of 32: BatchNorm of so few numbers has no useful second derivative.
        size = 32 if dataset == "poverty" else 64
        small = "--domains-per-step 3 --warm-start 2 --iterations 3 --max-tokens 16 --batch-size 4 --log-every 1"
        where = f"--workers 0 --out {tmp_path / out} --root {root} --weights {weights} --image-size {size}"
        return f"--dataset {dataset} --method {method} {small} {where} {more}".split()

    return make


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def domain_of(dataset, name: str, metadata: torch.Tensor) -> set[str]:
    """The domains of one sample, straight from its row of the metadata."""
    row = dict(zip(dataset.metadata_fields, metadata.long().tolist(), strict=True))
    if name == "civil":
        kind = "toxic" if row["y"] else "civil"
        return {f"{identity}, {kind}" for identity in IDENTITIES if row[identity]} or {f"none, {kind}"}
    names = dataset.metadata_map or {}
    field = {"camelyon": "hospital", "poverty": "country", "iwildcam": "location", "amazon": "user"}.get(name)
    if name == "fmow":
        return {f"region {names['region'][row['region']]}, year {2002 + row['year']}"}
    return {f"{field} {names[field][row[field]] if field in names else row[field]}"}


def open_miniature(name: str, root: Path) -> Any:
    return wilds_data.open_dataset(PAPER[name], root, "A", download=False)


@pytest.mark.parametrize("name", PAPER)
def test_an_epoch_serves_the_domains_of_the_data_set(name, root):
    """Batches are of one domain, groups of distinct ones, and no sample comes twice within a domain."""
    dataset = open_miniature(name, root)
    transform = wilds_data.image_transform(PAPER[name], 8, training=True)
    tokens = (lambda texts: torch.zeros(len(texts))) if name in TEXTS else None
    data = wilds_data.TrainingData(dataset, PAPER[name], transform, tokens, workers=0)
    subset = dataset.get_subset("train")
    expected = [domain_of(dataset, name, row) for row in subset.metadata_array]
    assert {domain: len(indices) for domain, indices in data.domains.items()} == Counter(itertools.chain(*expected))
    assert any(len(domains) > 1 for domains in expected) == (name == "civil")  # every identity that is mentioned
    served: dict[str, Counter[int]] = {label: Counter() for label in data.domains}
    candidates: list[set[str]] = []  # of every batch: two identities may fit one of comments
    for _, labels, metadata, positions in data.by_domain(batch_size=4, domains_per_step=3, seed=0):
        assert torch.equal(labels, subset.y_array[positions])
        assert torch.equal(metadata, subset.metadata_array[positions])
        candidates.append(set.intersection(*(expected[position] for position in positions.tolist())))
        assert data.domains_served(positions) == sorted(candidates[-1]) != []
        if len(candidates[-1]) == 1:
            served[next(iter(candidates[-1]))].update(positions.tolist())
    assert len(candidates) % 3 == 0
    assert all(count == 1 for counter in served.values() for count in counter.values())
    if name != "civil":
        assert all(len(set.union(*candidates[i : i + 3])) == 3 for i in range(0, len(candidates), 3))
        # The epoch ends when fewer than three domains have a batch left.
        assert sum(len(served[label]) < len(indices) for label, indices in data.domains.items()) < 3


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "fish") for name in PAPER),
        *((name, "idgm") for name in ("camelyon", "poverty", "iwildcam", "amazon")),  # once for each network
        ("poverty", "smooth_fish"),
        ("iwildcam", "erm"),
    ],
)
def test_it_trains_evaluates_and_predicts(name, method, command, root, tmp_path, monkeypatch):
    reports, meta_step = [], train.GradMatch.meta_step
    monkeypatch.setattr(train.GradMatch, "meta_step", lambda *args: reports.append(meta_step(*args)) or reports[-1])
    results = train.main(command(name, method))
    out, settings, dataset, erm = tmp_path / "run", PAPER[name], open_miniature(name, root), method == "erm"
    assert json.loads((out / "results.json").read_text())["options"]["method"] == method
    log = rows(out / "log.csv")
    phases = [("train", 3)] if erm else [("warm_start", 2), ("train", 3)]
    assert [(row["phase"], int(row["iteration"])) for row in log] == [(p, i + 1) for p, n in phases for i in range(n)]
    assert [int(row["gradients"]) for row in log] == ([1, 2, 3] if erm else [1, 2, 5, 8, 11])
    for row in log:
        assert np.isfinite([float(row[column]) for column in ("loss", "inner_product", "grad_norm")]).all()
        assert -1 <= float(row["cosine"]) <= 1
        assert row["domains"].count("; ") == (2 if row["phase"] == "train" and not erm else 0)

    # What is predicted, read as WILDS's own evaluation reads it, gives the metrics that were reported.
    assert list(results) == [split for split in dataset.split_dict if split != "train"]
    replicate = "fold:A" if name == "poverty" else "seed:0"
    for split, found in results.items():
        path = out / "predictions" / f"{settings.wilds_name}_split:{split}_{replicate}_epoch:best_pred.csv"
        predicted = torch.tensor([literal_eval(line) for line in path.read_text().splitlines() if line])
        subset = dataset.get_subset(split)
        metrics, _ = dataset.eval(predicted.view_as(subset.y_array), subset.y_array, subset.metadata_array)
        assert settings.metric in metrics
        for metric, value in metrics.items():
            assert found[metric] == pytest.approx(float(value), nan_ok=True, rel=1e-6, abs=1e-6), metric
    # The model that is kept is the one evaluated: its metric on "val" is among those logged for this phase.
    evaluated = [row for row in rows(out / "evaluations.csv") if row["phase"] == "train"]
    logged = [float(row["value"]) for row in evaluated if row["metric"] == settings.metric]
    assert any(results["val"][settings.metric] == pytest.approx(value, nan_ok=True, abs=1e-6) for value in logged)

    # The board has the numbers of the log, and of each domain that was served what the report said of it.
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    shown = {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}
    assert f"val/{settings.metric}" in shown
    trained = [row for row in log if row["phase"] == "train"]
    expected = {int(row["gradients"]): float(row["inner_product"]) for row in trained}
    assert shown["train/inner_product"] == pytest.approx(expected, rel=1e-6)
    assert len(reports) == (0 if erm else 3)
    for row, report in zip(trained, reports, strict=not erm):
        scalars = report.scalars("train/") | {"train/loss": float(row["loss"])}
        means = {"loss", "grad_norm", "inner_product", "cosine", *(["gamma"] if method == "idgm" else [])}
        of_domains = {f"{mean}/{domain}" for mean in ("loss", "grad_norm") for domain in report.domains}
        assert scalars.keys() == {f"train/{each}" for each in means | of_domains}
        assert {each: shown[each][int(row["gradients"])] for each in scalars} == pytest.approx(scalars, rel=1e-6)


def script_evaluations(monkeypatch, phase: str, metric: str, values: list[float]) -> list[dict[str, torch.Tensor]]:
    """Let the evaluations of a phase find these values, and return the model's state at each."""
    states: list[dict[str, torch.Tensor]] = []
    predict = train.Run.predict

    def scripted(run, split):
        predicted, metrics, text = predict(run, split)
        if run.phase == phase and len(states) < len(values):
            metrics[metric] = values[len(states)]
            states.append({name: value.clone() for name, value in run.model.state_dict().items()})
        return predicted, metrics, text

    monkeypatch.setattr(train.Run, "predict", scripted)
    return states


def holds(path: Path, state: dict[str, torch.Tensor]) -> bool:
    found = torch.load(path, weights_only=True)
    return all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("name", "metric", "values", "kept"),
    [
        ("poverty", "r_wg", [0.1, 0.2, 0.9, float("nan"), 0.3], 2),  # NaN never is best
        ("fmow", "acc_worst_region", [0.9, 0.1], 1),  # the last
    ],
    ids=["the best on val", "on fmow the last"],
)
def test_one_model_is_kept(name, metric, values, kept, command, monkeypatch, tmp_path):
    states = script_evaluations(monkeypatch, "train", metric, values)
    train.main(command(name, "fish", f"--warm-start 0 --iterations {len(values)} --eval-every 1"))
    found = [holds(tmp_path / "run" / "best.pt", state) for state in states]
    assert found == [index == kept for index in range(len(values))]


def test_fish_begins_with_the_best_model_of_the_warm_start_and_a_new_optimizer(command, monkeypatch, tmp_path):
    states = script_evaluations(monkeypatch, "warm_start", "r_wg", [0.9, 0.1])
    meta_step, first = train.GradMatch.meta_step, tmp_path / "first.pt"

    def noted(optimizer, loss_fn, batches):
        if not first.exists():
            assert not optimizer.optimizer.state
            torch.save(optimizer.method.model.state_dict(), first)
        return meta_step(optimizer, loss_fn, batches)

    monkeypatch.setattr(train.GradMatch, "meta_step", noted)
    train.main(command("poverty", "fish", "--warm-start 4 --iterations 1 --eval-every 2"))
    assert [holds(first, state) for state in states] == [True, False]


# ---------------------------------------------------------------------------------------------------- kill and resume


def assert_same_run(one: Path, other: Path) -> None:
    logs = [[row | {"seconds": ""} for row in rows(folder / "log.csv")] for folder in (one, other)]
    assert logs[0] == logs[1]
    assert rows(one / "evaluations.csv") == rows(other / "evaluations.csv")
    for file in ("best.pt", "checkpoint.pt"):
        a, b = (torch.load(folder / file, weights_only=True) for folder in (one, other))
        for state in (a, b):
            for free in ("options", "log", "random"):
                state.pop(free, None)
        assert_identical(a, b, file)
    for path in (one / "predictions").iterdir():
        assert path.read_text() == (other / "predictions" / path.name).read_text()


def kill_after(rows_wanted: int, arguments: list[str], log: Path, number: int) -> int:
    process = subprocess.Popen([sys.executable, train.__file__, *arguments], stdout=subprocess.DEVNULL, stderr=-1)
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") > rows_wanted):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode


@pytest.mark.parametrize(
    ("name", "method", "workers", "rows_wanted"),
    [
        pytest.param("camelyon", "fish", 2, 6, id="camelyon-fish-workers"),
        pytest.param("amazon", "idgm", 0, 6, id="amazon-idgm"),
        pytest.param("poverty", "smooth_fish", 0, 3, id="poverty-in-the-warm-start"),
        pytest.param("poverty", "fish", 0, 6, id="poverty-augmented"),
    ],
)
def test_a_run_that_was_killed_resumes_bit_for_bit(name, method, workers, rows_wanted, command, tmp_path):
    often = f"--checkpoint-every 2 --iterations 6 --warm-start 3 --eval-every 4 --workers {workers}"
    train.main(command(name, method, often, out="whole"))
    arguments = command(name, method, f"{often} --resume", out="killed")
    assert kill_after(rows_wanted, arguments, tmp_path / "killed" / "log.csv", signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "results.json").exists()
    train.main(arguments)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_sigterm_saves_a_checkpoint(command, tmp_path):
    arguments = command("poverty", "erm", "--checkpoint-every 1000 --iterations 400")
    log = tmp_path / "run" / "log.csv"
    assert kill_after(3, arguments, log, signal.SIGTERM) == 1
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["iteration"] == len(rows(log)) >= 3


def test_an_epoch_ends_and_the_next_begins_also_across_a_resume(command, tmp_path):
    """Two epochs of three batches, stopped by ``--epochs`` at first, then continued with more."""
    base = "--iterations 100000 --batch-size 60 --image-size 16 --eval-every 3"
    for out, more in ("whole", "--epochs 2"), ("parts", "--epochs 1"), ("parts", "--epochs 2 --resume"):
        train.main(command("poverty", "erm", f"{base} {more}", out))
    assert [row["epoch"] for row in rows(tmp_path / "parts" / "log.csv")] == ["0"] * 3 + ["1"] * 3
    evaluated = [row["iteration"] for row in rows(tmp_path / "parts" / "evaluations.csv") if row["metric"] == "r_wg"]
    assert evaluated == ["3", "6"]  # once, although --eval-every and the end of the epoch both ask for it
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# -------------------------------------------------------------------------------------------- settings, models, errors


def test_the_command_line_gives_fish_the_authors_step():
    options, _ = parse("", ["--dataset", "iwildcam", "--root", "data", "--method", "fish"])
    assert options.meta_lr == pytest.approx(0.01 / 10)
    assert (options.lr, options.batch_size, options.domains_per_step, options.warm_start) == (1e-4, 16, 10, 24_000)
    assert str(options.out) == os.path.join("runs", "iwildcam-fish-seed0")


@pytest.mark.parametrize("method", ["fish", "idgm"])
def test_amp_runs_the_network_in_bfloat16(method, command, monkeypatch):
    forward, seen = torch.nn.Linear.forward, set()

    def noting(layer, x):
        output = forward(layer, x)
        seen.add(output.dtype)
        return output

    monkeypatch.setattr(torch.nn.Linear, "forward", noting)
    train.main(command("civil", method, "--amp"))
    assert seen == {torch.bfloat16}


def test_distilbert_without_pretrained_weights_learns_its_tokenizer(command, tmp_path):
    """The whole network, 66 M parameters, for one iteration."""
    train.main(command("civil", "fish", "--weights none --warm-start 0 --iterations 1"))
    vocabulary = json.loads((tmp_path / "run" / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"people", "[PAD]", "[CLS]"} <= set(vocabulary)
    weights = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert sum(value.numel() for value in weights.values()) > 66e6


@pytest.mark.parametrize("old_names", [False, True], ids=["present-names", "names-before-torch-1"])
def test_densenet_begins_with_the_weights_of_a_file(old_names, tmp_path):
    torch.manual_seed(0)
    state = models.densenet121().state_dict()
    layer = "features.denseblock2.denselayer3.conv1.weight"
    expected = state[layer]
    if old_names:
        old = {name: re.sub(r"(denselayer.*(?:norm|conv))(\d)", r"\1.\2", name) for name in state}
        state = {old[name]: value for name, value in state.items() if "num_batches" not in name}
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "weights.pth")
    own = make_model(PAPER["fmow"], 62, str(tmp_path / "weights.pth")).state_dict()
    assert own["classifier.weight"].shape == (62, 1024)
    assert torch.equal(own[layer], expected)


def fails(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        train.main(arguments)
    return str(caught.value.code) if caught.value.code != 2 else capsys.readouterr().err


CANNOT = {
    "no data": (
        "iwildcam",
        "--root nowhere",
        r"not complete in --root.*--download.*get_dataset\('iwild.*make_miniature.py",
    ),
    "a file of the data": ("iwildcam", "--root part", "metadata.csv"),
    "no such weights": ("iwildcam", "--weights nowhere.pth", "resnet50-0676ba61.pth.*--weights none"),
    "no such folder of weights": ("civil", "--weights nowhere", "--weights nowhere is no folder"),
    "a text model offline": ("amazon", "--weights pretrained", "hf download distilbert-base-uncased.*--weights none"),
    "an image model offline": ("fmow", "--weights pretrained", "densenet121-a639ec97.pth"),
    "too many domains": ("poverty", "--domains-per-step 7", "--domains-per-step is 7, but there are 6 domains"),
    "one domain": ("poverty", "--domains-per-step 1", r"at least 2 to match gradients \(got 1\)"),
    "empty batches": ("poverty", "--batch-size 0", r"--batch-size should be at least 1 \(got 0\)"),
    "no such method": ("poverty", "--method fishy", "invalid choice: 'fishy'"),
}


@pytest.mark.parametrize(("name", "more", "words"), CANNOT.values(), ids=CANNOT)
def test_what_cannot_be_says_what_to_do(name, more, words, command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    (tmp_path / "part" / "iwildcam_v2.0").mkdir(parents=True)
    (tmp_path / "part" / "iwildcam_v2.0" / "RELEASE_v2.0.txt").touch()
    assert re.search(words, fails(command(name, "fish", more), capsys), flags=re.DOTALL)
    if more == "--root nowhere":
        assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_and_not_resumed_with_other_options(command, capsys):
    train.main(command("poverty", "erm"))
    assert "holds a run already: pass --resume" in fails(command("poverty", "erm"), capsys)
    message = fails(command("poverty", "erm", "--resume --batch-size 3"), capsys)
    assert "--batch-size is 3, but the run in" in message


def test_miniatures_are_not_written_among_other_files(tmp_path, capsys):
    (tmp_path / "iwildcam_v2.0").mkdir()
    with pytest.raises(SystemExit):
        make_miniature.main(["--root", str(tmp_path)])
    assert "holds other files" in capsys.readouterr().err


def test_the_mean_by_group_is_that_of_a_loop():
    values, groups = torch.rand(50), torch.randint(0, 7, (50,))
    groups[groups == 3] = 4
    averages, counts = avg_over_groups(values, groups, 8)
    for group in range(8):
        chosen = values[groups == group]
        assert counts[group] == len(chosen)
        assert averages[group] == pytest.approx(float(chosen.mean()) if len(chosen) else 0.0)
