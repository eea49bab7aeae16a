"""Miniatures of the six data sets: opened by ``wilds``, served by domain, trained, killed, resumed, evaluated."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from ast import literal_eval
from collections import Counter
from pathlib import Path

import make_miniature
import numpy as np
import pytest
import torch
import train
import wilds_data
from _same import assert_same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wilds_options import METHODS, parse
from wilds_settings import PAPER

SCRIPT = Path(train.__file__)
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
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, DistilBertTokenizerFast

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

    def make(dataset: str, method: str, *more: str, out: str = "run", workers: int = 0) -> list[str]:
        small = ["--domains-per-step", "3", "--warm-start", "2", "--iterations", "3", "--max-tokens", "16"]
        # The deep ones make single pixels of 32: BatchNorm of so few numbers has no useful second derivative.
        small += ["--batch-size", "4", "--image-size", "32" if dataset == "poverty" else "64"]
        weights = str(tiny_bert) if dataset in TEXTS else "none"
        small += ["--weights", weights, "--log-every", "1"]
        small += ["--workers", str(workers), "--out", str(tmp_path / out), "--root", str(root)]
        return ["--dataset", dataset, "--method", method, *small, *more]

    return make


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(path: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows(path)]


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


@pytest.mark.parametrize("name", PAPER)
def test_an_epoch_serves_the_domains_of_the_data_set(name, root):
    """Every batch is of one domain, every group of distinct ones, and no sample comes twice within a domain."""
    settings = PAPER[name]
    dataset = wilds_data.open_dataset(settings, root, "A", download=False)
    transform = wilds_data.image_transform(settings, 8, training=True)
    tokens = (lambda texts: torch.zeros(len(texts))) if name in TEXTS else None
    data = wilds_data.TrainingData(dataset, settings, transform, tokens, workers=0)
    subset = dataset.get_subset("train")
    expected = [domain_of(dataset, name, row) for row in subset.metadata_array]
    assert set(data.domains) == set.union(*expected)
    loader = data.by_domain(batch_size=4, domains_per_step=3, seed=0)
    served: dict[str, Counter[int]] = {label: Counter() for label in data.domains}
    group: list[set[str]] = []
    for _, labels, metadata, positions in loader:
        assert torch.equal(labels, subset.y_array[positions])
        assert torch.equal(metadata, subset.metadata_array[positions])
        candidates = set.intersection(*(expected[position] for position in positions.tolist()))
        assert data.domains_served(positions) == sorted(candidates)
        assert candidates
        group.append(candidates)
        if len(group) == 3:
            if name != "civil":  # a batch of comments may fit two identities
                assert len(set.union(*group)) == 3
            group = []
        if len(candidates) == 1:
            served[next(iter(candidates))].update(positions.tolist())
    assert not group
    assert all(count == 1 for counter in served.values() for count in counter.values())
    # The epoch ends when fewer than three domains have a batch left.
    left = [label for label, indices in data.domains.items() if len(served[label]) < len(indices)]
    assert name == "civil" or len(left) < 3


def test_a_comment_is_served_by_every_identity_it_mentions(root):
    dataset = wilds_data.open_dataset(PAPER["civil"], root, "A", download=False)
    data = wilds_data.TrainingData(dataset, PAPER["civil"], None, lambda texts: torch.zeros(len(texts)), workers=0)
    mentioned = dataset.get_subset("train").metadata_array[:, :8].sum(dim=1)
    assert (mentioned > 1).any()
    assert sum(map(len, data.domains.values())) == int(mentioned.clamp(min=1).sum())
    assert len(data.domains) == 18


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PAPER)
def test_it_trains_evaluates_and_predicts(name, method, command, root, tmp_path, monkeypatch):
    reports, meta_step = [], train.GradMatch.meta_step
    monkeypatch.setattr(train.GradMatch, "meta_step", lambda *args: reports.append(meta_step(*args)) or reports[-1])
    results = train.main(command(name, method))
    out, settings = tmp_path / "run", PAPER[name]
    log = rows(out / "log.csv")
    phases = [("train", 3)] if method == "erm" else [("warm_start", 2), ("train", 3)]
    assert [(row["phase"], int(row["iteration"])) for row in log] == [(p, i + 1) for p, n in phases for i in range(n)]
    gradients = np.diff([0, *(int(row["gradients"]) for row in log)]).tolist()
    assert gradients == ([1, 1, 1] if method == "erm" else [1, 1, 3, 3, 3])
    for row in log:
        assert all(np.isfinite(float(row[column])) for column in ("loss", "inner_product", "cosine", "grad_norm"))
        assert -1 <= float(row["cosine"]) <= 1
        assert float(row["grad_norm"]) > 0
    dataset = wilds_data.open_dataset(settings, root, "A", download=False)
    own = set.union(*(domain_of(dataset, name, m) for m in dataset.get_subset("train").metadata_array))
    for row in log:
        served = row["domains"].split("; ") if row["domains"] else []
        assert len(served) == (3 if row["phase"] == "train" and method != "erm" else 0)
        assert all(label in own for several in served for label in several.split("|"))
        assert len(set(served)) == len(served) or name == "civil"
    # What is predicted, read as WILDS's own evaluation reads it, gives the metrics that were reported.
    splits = [split for split in dataset.split_dict if split != "train"]
    assert list(results) == splits
    replicate = "fold:A" if name == "poverty" else "seed:0"
    for split in splits:
        path = out / "predictions" / f"{settings.wilds_name}_split:{split}_{replicate}_epoch:best_pred.csv"
        predicted = torch.tensor([literal_eval(line) for line in path.read_text().splitlines() if line])
        subset = dataset.get_subset(split)
        if predicted.shape != subset.y_array.shape:
            predicted = predicted.unsqueeze(-1)
        metrics, _ = dataset.eval(predicted, subset.y_array, subset.metadata_array)
        assert settings.metric in metrics
        for metric, value in metrics.items():
            assert results[split][metric] == pytest.approx(float(value), nan_ok=True, rel=1e-6, abs=1e-6), metric
    assert json.loads((out / "results.json").read_text())["options"]["method"] == method
    # The model that is kept is the one evaluated: its metric on "val" is among those logged for this phase.
    logged = [
        float(row["value"])
        for row in rows(out / "evaluations.csv")
        if row["phase"] == "train" and row["metric"] == settings.metric
    ]
    assert any(results["val"][settings.metric] == pytest.approx(value, nan_ok=True, abs=1e-6) for value in logged)
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    shown = {event.step: event.value for event in board.Scalars("train/inner_product")}
    expected = {int(row["gradients"]): float(row["inner_product"]) for row in log if row["phase"] == "train"}
    assert shown == pytest.approx(expected, rel=1e-6)
    assert f"val/{settings.metric}" in board.Tags()["scalars"]
    # And of each domain that was served what the report said of it.
    for row, report in zip([row for row in log if row["phase"] == "train"], reports, strict=False):
        scalars = report.scalars("train/") | {"train/loss": float(row["loss"])}
        # The first of a walk has no others before it to agree with; IDGM also reports its gamma.
        assert len(scalars) == (14 if method == "idgm" else 12)
        assert {name.removeprefix("train/loss/") for name in scalars if "/loss/" in name} <= own
        for name, value in scalars.items():
            assert value == pytest.approx(
                next(event.value for event in board.Scalars(name) if event.step == int(row["gradients"])), rel=1e-6
            )
    assert len(reports) == (0 if method == "erm" else 3)


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


def test_the_best_model_on_val_is_kept(command, monkeypatch, tmp_path):
    """Of five evaluations the third is best; NaN never is."""
    states = script_evaluations(monkeypatch, "train", "acc_avg", [0.1, 0.2, 0.9, float("nan"), 0.3])
    train.main(command("camelyon", "fish", "--warm-start", "0", "--iterations", "5", "--eval-every", "1"))
    assert [holds(tmp_path / "run" / "best.pt", state) for state in states] == [False, False, True, False, False]


def test_on_fmow_the_last_model_is_kept(command, monkeypatch, tmp_path):
    states = script_evaluations(monkeypatch, "train", "acc_worst_region", [0.9, 0.1])
    train.main(command("fmow", "fish", "--warm-start", "0", "--iterations", "2", "--eval-every", "1"))
    assert [holds(tmp_path / "run" / "best.pt", state) for state in states] == [False, True]


def test_fish_begins_with_the_best_model_of_the_warm_start_and_a_new_optimizer(command, monkeypatch, tmp_path):
    states = script_evaluations(monkeypatch, "warm_start", "acc_avg", [0.9, 0.1])
    meta_step = train.GradMatch.meta_step
    first = tmp_path / "first.pt"

    def noted(optimizer, loss_fn, batches):
        if not first.exists():
            assert not optimizer.optimizer.state
            torch.save(optimizer.method.model.state_dict(), first)
        return meta_step(optimizer, loss_fn, batches)

    monkeypatch.setattr(train.GradMatch, "meta_step", noted)
    train.main(command("camelyon", "fish", "--warm-start", "4", "--iterations", "1", "--eval-every", "2"))
    assert [holds(first, state) for state in states] == [True, False]


# ---------------------------------------------------------------------------------------------------- kill and resume


def assert_same_run(one: Path, other: Path) -> None:
    assert without_seconds(one / "log.csv") == without_seconds(other / "log.csv")
    assert rows(one / "evaluations.csv") == rows(other / "evaluations.csv")
    for file in ("best.pt", "checkpoint.pt"):
        a, b = (torch.load(folder / file, weights_only=True) for folder in (one, other))
        parts = ("model", "optimizer", "sampler", "phase", "iteration", "epoch", "gradients", "best")
        for part in parts if file == "checkpoint.pt" else (None,):
            assert_same(a[part] if part else a, b[part] if part else b)
    for path in (one / "predictions").iterdir():
        assert path.read_text() == (other / "predictions" / path.name).read_text()


def kill_after(rows_wanted: int, arguments: list[str], log: Path, number: int) -> int:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
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
        ("camelyon", "fish", 2, 4),
        ("amazon", "idgm", 0, 5),
        ("camelyon", "smooth_fish", 0, 1),
        ("poverty", "fish", 0, 4),
    ],
    ids=["camelyon-fish-workers", "amazon-idgm", "camelyon-in-the-warm-start", "poverty-augmented"],
)
def test_a_run_that_was_killed_resumes_bit_for_bit(name, method, workers, rows_wanted, command, tmp_path):
    often = ("--checkpoint-every", "2", "--iterations", "6", "--warm-start", "3", "--eval-every", "4")
    train.main(command(name, method, *often, out="whole", workers=workers))
    arguments = command(name, method, *often, "--resume", out="killed", workers=workers)
    log = tmp_path / "killed" / "log.csv"
    assert kill_after(rows_wanted, arguments, log, signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "results.json").exists()
    train.main(arguments)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_sigterm_saves_a_checkpoint_and_says_how_to_go_on(command, tmp_path):
    more = ("--checkpoint-every", "1000", "--iterations", "400", "--warm-start", "0")
    arguments = command("poverty", "erm", *more)
    log = tmp_path / "run" / "log.csv"
    assert kill_after(3, arguments, log, signal.SIGTERM) == 1
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["iteration"] == len(rows(log)) >= 3


def test_an_epoch_ends_and_the_next_begins_also_across_a_resume(command, root, tmp_path):
    """Two epochs of three batches, stopped by ``--epochs`` at first, then continued with more."""
    base = ("--iterations", "100000", "--batch-size", "60", "--image-size", "16", "--eval-every", "3")
    train.main(command("poverty", "erm", *base, "--epochs", "2", out="whole"))
    train.main(command("poverty", "erm", *base, "--epochs", "1", out="parts"))
    train.main(command("poverty", "erm", *base, "--epochs", "2", "--resume", out="parts"))
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


@pytest.mark.parametrize("method", METHODS)
def test_amp_runs_the_network_in_bfloat16(method, command):
    seen = set()

    def note(module, inputs, output):
        if isinstance(module, torch.nn.Linear):
            seen.add(output.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        train.main(command("civil", method, "--amp"))
    finally:
        hook.remove()
    assert seen == {torch.bfloat16}


def test_distilbert_without_pretrained_weights_learns_its_tokenizer(command, tmp_path):
    """The whole network, 66 M parameters, for one iteration."""
    train.main(command("civil", "fish", "--weights", "none", "--warm-start", "0", "--iterations", "1"))
    vocabulary = json.loads((tmp_path / "run" / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"people", "[PAD]", "[CLS]"} <= set(vocabulary)
    weights = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert sum(value.numel() for value in weights.values()) > 66e6


@pytest.mark.parametrize("old_names", [False, True], ids=["present-names", "names-before-torch-1"])
def test_densenet_begins_with_the_weights_of_a_file(old_names, tmp_path):
    from torchvision import models
    from wilds_models import make_model

    torch.manual_seed(0)
    state = models.densenet121().state_dict()
    if old_names:
        state = {
            (
                name.replace("norm1.", "norm.1.")
                .replace("norm2.", "norm.2.")
                .replace("conv1.", "conv.1.")
                .replace("conv2.", "conv.2.")
                if "denselayer" in name
                else name
            ): value
            for name, value in state.items()
            if "num_batches" not in name
        }
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "weights.pth")
    model = make_model(PAPER["fmow"], 62, str(tmp_path / "weights.pth"))
    own = model.state_dict()
    assert own["classifier.weight"].shape == (62, 1024)
    layer = "features.denseblock2.denselayer3.conv1.weight"
    assert torch.equal(own[layer], state[layer.replace("conv1.", "conv.1.") if old_names else layer])


def fails(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        train.main(arguments)
    return str(caught.value.code) if caught.value.code != 2 else capsys.readouterr().err


def test_data_that_is_missing_names_the_command_that_gets_it(command, tmp_path, capsys):
    message = fails(command("iwildcam", "fish", "--root", str(tmp_path / "nowhere")), capsys)
    assert "iwildcam is not complete in --root" in message
    assert "--download" in message
    assert "wilds.get_dataset('iwildcam'" in message
    assert "make_miniature.py" in message
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_missing_is_named(command, root, tmp_path, capsys):
    folder = tmp_path / "part" / "iwildcam_v2.0"
    folder.mkdir(parents=True)
    (folder / "RELEASE_v2.0.txt").touch()
    assert "metadata.csv" in fails(command("iwildcam", "fish", "--root", str(tmp_path / "part")), capsys)


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("iwildcam", "nowhere.pth", ["resnet50-0676ba61.pth", "--weights none"]),
        ("civil", "nowhere", ["--weights nowhere is no folder"]),
        ("amazon", "pretrained", ["hf download distilbert-base-uncased", "--weights none"]),
    ],
    ids=["file", "folder", "no-network"],
)
def test_weights_that_are_missing_name_the_command_that_gets_them(name, weights, expected, command, capsys):
    message = fails(command(name, "fish", "--weights", weights), capsys)
    for part in expected:
        assert part in message


def test_pretrained_images_without_network(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    message = fails(command("fmow", "erm", "--weights", "pretrained"), capsys)
    assert "densenet121-a639ec97.pth" in message


def test_a_run_is_not_overwritten_and_not_resumed_with_other_options(command, capsys):
    train.main(command("poverty", "erm"))
    assert "holds a run already: pass --resume" in fails(command("poverty", "erm"), capsys)
    message = fails(command("poverty", "erm", "--resume", "--batch-size", "3"), capsys)
    assert "--batch-size is 3, but the run in" in message


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--domains-per-step", "7"), "--domains-per-step is 7, but there are 6 domains"),
        (("--domains-per-step", "1"), "at least 2 to match gradients (got 1)"),
        (("--batch-size", "0"), "--batch-size should be at least 1 (got 0)"),
        (("--method", "fishy"), "invalid choice: 'fishy'"),
    ],
)
def test_options_that_make_no_sense(more, expected, command, capsys):
    assert expected in fails(command("poverty", "fish", *more), capsys)


def test_miniatures_are_not_written_among_other_files(tmp_path, capsys):
    (tmp_path / "iwildcam_v2.0").mkdir()
    with pytest.raises(SystemExit):
        make_miniature.main(["--root", str(tmp_path)])
    assert "holds other files" in capsys.readouterr().err


def test_the_mean_by_group_is_that_of_a_loop():
    from wilds.common.utils import avg_over_groups

    values, groups = torch.rand(50), torch.randint(0, 7, (50,))
    groups[groups == 3] = 4
    averages, counts = avg_over_groups(values, groups, 8)
    for group in range(8):
        chosen = values[groups == group]
        assert counts[group] == len(chosen)
        assert averages[group] == pytest.approx(float(chosen.mean()) if len(chosen) else 0.0)
