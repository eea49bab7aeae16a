"""Leave one domain out: selection without peeking, killed and resumed, on one process and on two."""

from __future__ import annotations

import copy
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from _study import DOMAINS, data, found, lines, loss_fn, metric, net
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from torch_gradmatch import IDGM, Choice, Fish, GradMatch, LogUniform, Recipe
from torch_gradmatch.evaluation.recipes import DEFAULT
from torch_gradmatch.evaluation.training import AVERAGED, PLAIN

ROOT = Path(__file__).parents[2]


def test_the_held_out_domain_has_no_say(tmp_path: Path):
    """With other labels there, every run is the same but for its score there, and the same settings are selected."""
    dataset, domains = data()
    x, y = dataset.tensors
    flipped = TensorDataset(x, torch.where(torch.tensor([d == "east" for d in domains]), 1 - y, y))
    both = [found(dataset=d, held_out=["east"], folder=tmp_path / str(i)) for i, d in enumerate((dataset, flipped))]
    one, other = (lines(tmp_path / str(i)) for i in range(2))
    assert one.keys() == other.keys()
    for key in one:
        for kind in (PLAIN, AVERAGED):
            assert other[key][kind].pop("held_out") == pytest.approx(1 - one[key][kind].pop("held_out"))
        assert one[key] == other[key]
    for row, again in zip(both[0].rows, both[1].rows, strict=True):
        assert row.settings == again.settings
        assert again.by_domain["east"] == pytest.approx([1 - value for value in row.by_domain["east"]])


def test_rows_are_what_the_protocol_says(tmp_path: Path):
    """Worked out once more from the lines in the folder."""
    evidence, runs = found(folder=tmp_path, draws=3), lines(tmp_path)
    assert [row.name for row in evidence.rows] == ["ERM", "ERM, averaged", "Fish", "Fish, averaged"]
    for row in evidence.rows:
        name, kind = row.name.removesuffix(", averaged"), AVERAGED if row.name.endswith("averaged") else PLAIN
        for held_out in DOMAINS:
            validations = [runs[name, held_out, d, 0][kind]["validation"] for d in range(3)]
            chosen = validations.index(max(validations))
            assert row.settings[held_out] == runs[name, held_out, chosen, 0]["settings"]
            assert row.by_domain[held_out] == [runs[name, held_out, chosen, seed][kind]["held_out"] for seed in (0, 1)]
        best = [max(runs[name, h, d, 0][kind]["held_out"] for d in range(3)) for h in DOMAINS]
        assert row.oracle == pytest.approx(fmean(best))
    first = evidence["ERM"].by_domain
    for row in evidence.rows[1:]:
        difference = evidence.differences[row.name]
        assert difference.by_domain == pytest.approx({h: fmean(row.by_domain[h]) - fmean(first[h]) for h in DOMAINS})
        assert difference.seeds.mean == pytest.approx(fmean(fmean(row.by_domain[h]) - fmean(first[h]) for h in DOMAINS))
        assert row.worst[1] == min(fmean(values) for values in row.by_domain.values())
    assert evidence["ERM"].seconds > 0


def test_refit_trains_on_all_domains_with_the_settings_that_are_best_over_all_folds(tmp_path: Path):
    evidence = found(folder=tmp_path, draws=3, budget=3000, search={"lr": LogUniform(0.01, 0.1, 0.03)})
    runs = lines(tmp_path)
    for name, kind in (("Fish", PLAIN), ("Fish, averaged", AVERAGED)):
        (model, settings), (again, _) = evidence.refit(name), evidence.refit(name)
        means = [fmean(runs["Fish", h, d, 0][kind]["validation"] for h in DOMAINS) for d in range(3)]
        assert settings == runs["Fish", "west", means.index(max(means)), 0]["settings"]
        assert not model.training
        assert metric(model, data()[0][:]).mean() > 0.6
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    model, _ = evidence.refit()
    assert isinstance(copy.deepcopy(model), nn.Sequential)
    assert not model._forward_hooks


def test_two_processes_find_what_one_finds(tmp_path: Path):
    one, two = (found(folder=tmp_path / str(n), processes=n, held_out=["south", "east"]) for n in (1, 2))
    assert lines(tmp_path / "1") == lines(tmp_path / "2")
    assert [row.by_domain for row in one.rows] == [row.by_domain for row in two.rows]


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from _study import found
from pathlib import Path
found(folder=Path({folder!r}), processes={processes}, **{settings!r})
"""


@pytest.mark.parametrize(("processes", "kills"), [(1, 1), pytest.param(2, 3, marks=pytest.mark.large)])
def test_killed_and_called_again_it_ends_where_it_would_have(tmp_path: Path, processes: int, kills: int):
    settings = {"budget": 1200, "held_out": ["south", "east"]}
    expected = found(folder=tmp_path / "whole", **settings)
    folder = tmp_path / "killed"
    here = str(Path(__file__).parent)
    code = SCRIPT.format(tests=here, folder=str(folder), processes=processes, settings=settings)
    generator, written = random.Random(0), folder / "runs.jsonl"
    for _ in range(kills):
        before = written.read_text().count("\n") if written.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        while process.poll() is None and (not written.exists() or written.read_text().count("\n") == before):
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 0 < len(lines(folder)) < len(lines(tmp_path / "whole"))
    again = found(folder=folder, processes=processes, **settings)
    assert lines(folder) == lines(tmp_path / "whole")
    assert [row.by_domain for row in again.rows] == [row.by_domain for row in expected.rows]


class Interrupts:
    """A training that is broken off in the second run, once; what it knows is on the disk."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    def __call__(self, model: nn.Module, training: Any, settings: Any) -> None:
        with self.runs.open("a") as file:
            file.write("x")
        if self.runs.stat().st_size == 3:  # the first is a trial
            raise KeyboardInterrupt
        optimizer = training.optimizer(model, settings)
        for batch in training.pooled(8):
            training.step(optimizer, model, batch)


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(tmp_path: Path):
    brief: dict[str, Any] = {"methods": {"own": Recipe(train=Interrupts(tmp_path / "begun"))}, "held_out": ["east"]}
    with pytest.raises(KeyboardInterrupt, match="nothing is kept: pass folder="):
        found(**brief)
    (tmp_path / "begun").unlink()
    with pytest.raises(KeyboardInterrupt, match="1 run is kept in the folder: the same call goes on"):
        found(**brief, folder=tmp_path)
    assert len(lines(tmp_path)) == 1
    found(**brief, folder=tmp_path)
    assert len(lines(tmp_path)) >= 3


def test_more_seeds_draws_domains_and_methods_only_add(tmp_path: Path):
    found(folder=tmp_path, held_out=["west"])
    first = (tmp_path / "runs.jsonl").read_text()
    more: dict[str, Any] = {"draws": 3, "seeds": 3, "held_out": ["west", "east"]}
    evidence = found(["ERM", "Fish", "SmoothFish"], folder=tmp_path, **more)
    assert (tmp_path / "runs.jsonl").read_text().startswith(first)
    fresh = found(["ERM", "Fish", "SmoothFish"], **more)
    assert [row.by_domain for row in evidence.rows] == [row.by_domain for row in fresh.rows]


def test_a_line_that_was_being_written_is_written_again_and_what_is_no_folder_of_runs_is_refused(tmp_path: Path):
    found(folder=tmp_path)
    whole, runs = lines(tmp_path), tmp_path / "runs.jsonl"
    text = runs.read_text()
    runs.write_text(text[:-30])
    found(folder=tmp_path)
    assert lines(tmp_path) == whole
    runs.write_text("{}\n" + text)
    with pytest.raises(ValueError, match=r"line 1 of .*runs.jsonl is no run: remove it to go on"):
        found(folder=tmp_path)
    (tmp_path / "task.json").unlink()
    with pytest.raises(ValueError, match=r"has runs\.jsonl but no task\.json"):
        found(folder=tmp_path)


def with_another_label() -> TensorDataset:
    x, y = data()[0].tensors
    return TensorDataset(x, torch.where(torch.arange(96) == 77, 1 - y, y))


def adam(**changed: Any) -> Any:
    return lambda p, lr, weight_decay: torch.optim.Adam(p, lr, **changed)


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "metric": ({"metric": lambda m, b: metric(m, b) * 0.5}, "metric"),
    "loss": ({"loss_fn": lambda m, b: 2 * loss_fn(m, b)}, "loss_fn"),
    "one label": ({"dataset": with_another_label()}, "data"),
    "learning rate": ({"search": {"lr": LogUniform(1e-3, 1.0, 0.1)}}, "settings"),
    "weight decay": ({"optimizer": adam(weight_decay=0.1)}, "optimizer"),
    "augmentation": ({"collate_fn": lambda s: torch.utils.data.default_collate(s)}, "collate_fn"),
    "model": ({"make_model": lambda: nn.Linear(5, 2)}, "model"),
    "domains": ({"domains": data()[1][::-1]}, "domains"),
    "groups": ({"groups": [f"{i % 4} {i // 8}" for i in range(96)]}, "groups"),
    "control": ({"permuted": 1}, "domains"),
    "budget": ({"budget": 320}, "budget"),
    "method": ({"methods": {"ERM": "ERM", "Fish": Recipe(lambda m, s: Fish(0.3), {"meta_lr": Choice((0.5,))})}}, "by"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, kind: str):
    own: dict[str, Any] = {"folder": tmp_path, "held_out": ["east"], "seeds": 1, "draws": 1, "optimizer": adam()}
    found(**own)
    changed, differs = OTHER[kind]
    with pytest.raises(ValueError, match=rf"(holds runs|has a run of '\w+') with {differs}="):
        found(**(own | changed))


def test_what_cannot_be_hashed_asks_for_a_name(tmp_path: Path):
    stream = (i for i in range(3))

    def with_a_generator(model: nn.Module, batch: Any) -> Tensor:
        assert stream is not None
        return loss_fn(model, batch)

    brief: dict[str, Any] = {"seeds": 1, "draws": 1, "held_out": ["east"], "loss_fn": with_a_generator}
    with pytest.raises(ValueError, match=r"same loss_fn, and something in it cannot be .*generator.*: pass name="):
        found(folder=tmp_path, **brief)
    found(folder=tmp_path, name="first", **brief)
    found(folder=tmp_path, name="first", **brief)
    with pytest.raises(ValueError, match="holds runs with loss_fn='name=first', and here it is 'name=second'"):
        found(folder=tmp_path, name="second", **brief)
    found(**brief)  # without a folder nothing is hashed


def test_it_leaves_random_state_and_threads_alone(tmp_path: Path):
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.get_num_threads()
    found(["ERM"], folder=tmp_path, seeds=1, draws=1, held_out=["east"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]


class Words(Dataset[Any]):
    """Samples that are dictionaries, of one kind that only a collate function can put together."""

    rows = data()[0]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.rows[index]
        return {"x": x.tolist(), "y": int(y)}


def collate(samples: list[dict[str, Any]]) -> list[Tensor]:
    return [torch.tensor([s["x"] for s in samples]), torch.tensor([s["y"] for s in samples])]


def test_any_dataset_and_any_labels_give_what_tensors_give(tmp_path: Path):
    brief: dict[str, Any] = {"methods": ["Fish"], "seeds": 1, "draws": 1}
    expected = found(**brief).rows[0].by_domain
    assert found(dataset=Words(), collate_fn=collate, folder=tmp_path, **brief).rows[0].by_domain == expected
    assert found(dataset=list(data()[0]), **brief).rows[0].by_domain == expected
    numbers = found(domains=torch.tensor([DOMAINS.index(d) for d in data()[1]]), **brief)
    assert sorted(numbers.rows[0].by_domain) == ["0", "1", "2", "3"]
    some = {label: [i for i, d in enumerate(data()[1]) if d == label][:12] for label in DOMAINS}
    fewer = found(domains=some, **brief)
    assert sorted(fewer.rows[0].by_domain) == sorted(DOMAINS)
    assert "4 domains, 48 samples" in fewer.setting


def test_a_model_with_buffers_and_dropout_trains_by_every_default_method():
    make = lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))  # noqa: E731
    own: dict[str, Any] = {"draws": 1, "held_out": ["east"], "make_model": make}
    one, two = (found(None, **own) for _ in range(2))
    assert [row.name for row in one.rows] == [name + kind for name in DEFAULT for kind in ("", ", averaged")]
    assert not any(row.stopped for row in one.rows)
    assert [row.by_domain for row in one.rows] == [row.by_domain for row in two.rows]


def test_method_objects_and_names_stand_side_by_side():
    model = net()
    evidence = found({"ERM": "ERM", "mine": IDGM(model, 0.1, matched=model[2]), "other": Fish(0.25)}, seeds=1, draws=1)
    assert [row.name for row in evidence.rows[::2]] == ["ERM", "mine", "other"]
    assert not any(row.stopped for row in evidence.rows)


def test_regression_and_a_metric_of_a_whole_domain_with_predictions(tmp_path: Path):
    x, _ = data()[0].tensors

    def r_squared(outputs: Tensor, targets: Tensor) -> float:
        return float(1 - (outputs - targets).square().mean() / targets.var(unbiased=False))

    evidence = found(
        make_model=lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)),
        dataset=TensorDataset(x, x[:, 0] * 2 + x[:, 2]),
        loss_fn=lambda m, b: (m(b[0]) - b[1]).square().mean(),
        metric=r_squared,
        predict=lambda m, b: (m(b[0]), b[1]),
        predictions=True,
        search={"lr": Choice((0.03,))},
        budget=3000,
        held_out=["north", "east"],
        folder=tmp_path,
    )
    assert evidence["ERM"].mean > 0.8
    for label, scores in evidence["Fish"].by_domain.items():
        for (outputs, targets), score in zip(evidence["Fish"].predictions[label], scores, strict=True):
            assert len(outputs) == 24
            assert r_squared(torch.tensor(outputs), torch.tensor(targets)) == pytest.approx(score, abs=1e-6)
    json.loads(evidence.to_json())


def test_a_control_says_so_and_deals_the_domains_out_anew():
    control = found(permuted=1)
    assert control.answer.startswith("Control: the domains are permuted")
    assert control.rows[0].by_domain != found().rows[0].by_domain


def test_it_shows_one_bar_and_the_result(capsys: pytest.CaptureFixture[str]):
    evidence = found(show=True)
    out, err = capsys.readouterr()
    assert str(evidence) in out
    assert "24/24" in err.replace(" ", "").rpartition("\r")[2] or "32/32" in err.replace(" ", "")
    assert "% measuring" in err
    for word in ("ERM", "Fish", "unseen", "4 domains, 96 samples", "Use ERM", "300 samples differentiated"):
        assert word in out


def test_the_wrapped_optimizer_is_the_users():
    built = []

    def optimizer(parameters: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        built.append(torch.optim.RMSprop(parameters, lr=lr, weight_decay=weight_decay))
        return built[-1]

    found(["Fish"], optimizer=optimizer, seeds=1, draws=1, held_out=["east"])
    assert {group["lr"] for one in built for group in one.param_groups} == {1e-3}
    assert not isinstance(built[0], GradMatch)
