"""Leave one domain out: against a plain loop, without peeking, killed and resumed, on one process and on two."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from torch_gradmatch import Evidence, Fish, GradMatch, leave_one_domain_out
from torch_gradmatch.evaluation.fold import Task, train
from torch_gradmatch.evaluation.recipes import Choice, LogUniform, Recipe, default_recipes, draw_settings

ROOT = Path(__file__).parents[2]
DOMAINS = ("north", "south", "west", "east")
SMALL = {"seeds": 2, "budget": 24, "draws": 2, "evaluations": 3, "show": False}


def data(seed: int = 0, samples: int = 96) -> tuple[TensorDataset, list[str]]:
    """A weak feature that all domains share, and a strong one whose sign they do not."""
    generator = torch.Generator().manual_seed(seed)
    domains = [DOMAINS[i % len(DOMAINS)] for i in range(samples)]
    y = torch.randint(2, (samples,), generator=generator)
    sign = 2.0 * y - 1
    x = torch.randn(samples, 5, generator=generator)
    x[:, 0] += sign
    x[:, 1] += sign * torch.tensor([3.0 if d != "east" else -3.0 for d in domains])
    return TensorDataset(x, y), domains


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def metric(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).argmax(dim=1) == batch[1]).float()


def found(methods: Any = ("ERM", "Fish"), **settings: Any) -> Evidence:
    dataset, domains = data()
    return leave_one_domain_out(net, dataset, domains, loss_fn, metric, methods, **(SMALL | settings))


def lines(folder: Path) -> dict[tuple[Any, ...], Any]:
    """The runs that a folder holds, without their times."""
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    for run in runs:
        del run["seconds"]
    return {(r["method"], r["held_out"], r["draw"], r["seed"]): r for r in runs}


# --------------------------------------------------------------------------------------------------------------- runs


def task(dataset: Dataset[Any], domains: list[str], **settings: Any) -> Task:
    by_domain: dict[str, list[int]] = {}
    for index, label in enumerate(domains):
        by_domain.setdefault(label, []).append(index)
    own: dict[str, Any] = {
        "optimizer": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), "collate_fn": None, "device": "cpu",
        "domains_per_step": None, "validation": 0.25, "budget": 24, "evaluations": 3,
    }  # fmt: skip
    return Task(net, dataset, by_domain, loss_fn, metric, **(own | settings))


def test_ordinary_training_is_a_plain_loop():
    dataset, domains = data()
    own = task(dataset, domains)
    run = train(own, Recipe(order="pooled"), {"lr": 0.1, "batch_size": 8}, "west", seed=3)
    split = own.split("west", 3)
    torch.manual_seed(3)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    indices = [i for of_domain in split.training.values() for i in of_domain]
    shuffled = torch.Generator().manual_seed(3)
    loader = DataLoader(Subset(dataset, indices), batch_size=8, shuffle=True, generator=shuffled)
    taken, curve = 0, []
    while taken < 24:
        for batch in loader:
            if taken in (8, 16):
                curve.append(metric(model, dataset[own.by_domain["west"]]).mean().item())
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            taken += 1
            if taken == 24:
                break
    curve.append(metric(model, dataset[own.by_domain["west"]]).mean().item())
    assert [point["gradients"] for point in run["curve"]] == [0, 8, 16, 24]
    assert [point["held_out"] for point in run["curve"]][1:] == pytest.approx(curve)
    assert run["stopped"] is None


def test_no_sample_of_the_held_out_domain_nor_one_to_select_by_is_trained_on():
    seen: set[int] = set()

    def noting(model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            seen.update(batch[2].tolist())
        return loss_fn(model, batch)

    dataset, domains = data()
    with_numbers = TensorDataset(*dataset.tensors, torch.arange(len(domains)))
    own = task(with_numbers, domains, budget=120)
    object.__setattr__(own, "loss_fn", noting)
    for recipe in (Recipe(order="pooled"), default_recipes()["Fish"], default_recipes()["IDGM, variance"]):
        seen.clear()
        split = own.split("south", 1)
        train(own, recipe, {"lr": 0.01, "batch_size": 4, "meta_lr": 0.5, "gamma": 0.1}, "south", seed=1)
        assert seen == {i for of_domain in split.training.values() for i in of_domain}
        everything = [*seen, *split.held_out, *(i for of_domain in split.validation.values() for i in of_domain)]
        assert sorted(everything) == list(range(len(domains)))


@pytest.mark.parametrize("name", default_recipes())
def test_every_method_takes_the_gradients_that_it_says(name: str):
    """Counted where losses are differentiated in training: a Hessian-vector product is one more of each domain."""
    calls = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Tensor) -> Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            calls.append(1)
            return gradient.clone()

    def counting(model: nn.Module, batch: Any) -> Tensor:
        loss = loss_fn(model, batch)
        return Counted.apply(loss) if model.training else loss

    own = task(*data(), budget=42)
    object.__setattr__(own, "loss_fn", counting)
    recipe = default_recipes()[name]
    settings = draw_settings({"lr": LogUniform(1e-3, 1e-3, 1e-3), "batch_size": Choice((8,))} | recipe.search, 0, 0)
    run = train(own, recipe, settings, "east", seed=0)
    assert run["stopped"] is None
    spent = run["curve"][-1]["gradients"]
    assert 42 <= spent < 42 + 7
    taken = len(calls)
    if name.startswith("IDGM"):
        taken += spent // 2  # the products, which differentiate past the loss
        taken -= 1  # the first meta-iteration also compares a gradient with that of backward()
    assert taken == spent


def test_a_warm_start_is_plain_steps_with_the_same_batches():
    own = task(*data(), budget=24)
    settings = {"lr": 0.05, "batch_size": 8, "meta_lr": 0.5}
    plain = train(own, Recipe(), settings, "east", seed=0)
    warm = train(own, default_recipes()["Fish, warm start"], settings, "east", seed=0)
    assert [p["gradients"] for p in warm["curve"]] == [0, 9, 18, 24]  # 30 % of 24 are three groups of three
    assert warm["curve"][1] == train(own, Recipe(), settings, "east", seed=0)["curve"][1]
    assert warm["curve"][2] != plain["curve"][2]


def test_a_run_leaves_random_state_and_threads_alone():
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(task(*data()), default_recipes()["Fish"], {"lr": 0.01, "batch_size": 8, "meta_lr": 0.5}, "east", seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", ["ERM", "Fish", "IDGM, variance"])
def test_a_run_that_diverges_counts_as_far_as_it_came(name: str):
    own = task(*data(), budget=60, evaluations=10)
    settings = {"lr": 1e6, "batch_size": 8, "meta_lr": 1.0, "gamma": 1e9}
    object.__setattr__(own, "loss_fn", lambda model, batch: (model(batch[0]).square().sum(1) + 1).square().mean())
    run = train(own, default_recipes()[name], settings, "east", seed=0)
    assert run["stopped"] is not None
    assert run["curve"][0]["gradients"] == 0
    assert len(run["curve"]) < 11


def test_a_metric_that_is_not_finite_ends_the_run_and_none_at_the_beginning_is_raised():
    def until_moved(model: nn.Module, batch: Any) -> Tensor:
        first = next(model.parameters()).detach().norm()
        return metric(model, batch) * torch.where((first - norms[0]).abs() < 1e-6, 1.0, torch.nan)

    own = task(*data())
    torch.manual_seed(0)
    norms = [next(net().parameters()).detach().norm()]
    object.__setattr__(own, "metric", until_moved)
    arguments = (Recipe(), {"lr": 0.1, "batch_size": 8}, "east")
    run = train(own, *arguments, seed=0)
    assert run["stopped"] == "the metric is not finite after 9 gradients"
    assert [point["gradients"] for point in run["curve"]] == [0]
    with pytest.raises(ValueError, match="the metric is not finite after 0 gradients"):
        train(own, *arguments, seed=1)


# ---------------------------------------------------------------------------------------------------------- selection


def test_the_held_out_domain_has_no_say(tmp_path: Path):
    """With other labels there, every run is the same but for its score there, and the same settings are selected."""
    dataset, domains = data()
    x, y = dataset.tensors
    flipped = TensorDataset(x, torch.where(torch.tensor([d == "east" for d in domains]), 1 - y, y))
    both = [
        leave_one_domain_out(
            net, d, domains, loss_fn, metric, ["ERM", "Fish"], held_out=["east"], folder=tmp_path / str(i), **SMALL
        )
        for i, d in enumerate((dataset, flipped))
    ]
    one, other = (lines(tmp_path / str(i)) for i in range(2))
    first = {key for key in one if key[3] == 0}
    assert first == {key for key in other if key[3] == 0}  # what the oracle selects may be something else now
    common = one.keys() & other.keys()
    assert len(common) >= len(first)
    for key, run in ((key, one[key]) for key in common):
        for here, there in zip(run["curve"], other[key]["curve"], strict=True):
            assert there.pop("held_out") == pytest.approx(1 - here.pop("held_out"))
        assert run == other[key]
    for row, again in zip(both[0].rows, both[1].rows, strict=True):
        assert row.settings == again.settings
        assert again.by_domain["east"] == pytest.approx([1 - value for value in row.by_domain["east"]])


def test_rows_are_what_the_protocol_says(tmp_path: Path):
    """Worked out once more from the lines in the folder."""
    evidence = found(folder=tmp_path, draws=3)
    runs = lines(tmp_path)
    means = {}
    for name in ("ERM", "Fish"):
        row = evidence[name]
        for held_out in DOMAINS:
            validations = [max(p["validation"] for p in runs[name, held_out, d, 0]["curve"]) for d in range(3)]
            chosen = validations.index(max(validations))
            assert row.settings[held_out] == runs[name, held_out, chosen, 0]["settings"]
            for seed, value in enumerate(row.by_domain[held_out]):
                curve = runs[name, held_out, chosen, seed]["curve"]
                validation = [p["validation"] for p in curve]
                assert value == curve[validation.index(max(validation))]["held_out"]
            ends = [runs[name, held_out, d, 0]["curve"][-1]["held_out"] for d in range(3)]
            oracle = ends.index(max(ends))
            assert row.oracle_by_domain[held_out][1] == runs[name, held_out, oracle, 1]["curve"][-1]["held_out"]
        means[name] = {h: sum(v) / len(v) for h, v in row.by_domain.items()}
    paired = torch.tensor([means["Fish"][h] - means["ERM"][h] for h in DOMAINS], dtype=torch.float64)
    difference = evidence["Fish"].difference
    assert difference.mean == pytest.approx(float(paired.mean()))
    half = 3.182446 * float(paired.std()) / 2  # Student's t with 3 degrees of freedom at 97.5 %
    assert (difference.low, difference.high) == pytest.approx((difference.mean - half, difference.mean + half))
    assert evidence["Fish"].worst[1] == min(means["Fish"].values())
    by_seed = [
        sum(evidence["Fish"].by_domain[h][s] - evidence["ERM"].by_domain[h][s] for h in DOMAINS) / 4 for s in (0, 1)
    ]
    assert evidence["Fish"].difference_here.mean == pytest.approx(sum(by_seed) / 2)
    assert evidence["ERM"].difference is None
    assert evidence["ERM"].seconds > 0
    assert json.loads(json.dumps(evidence.to_dict()))["rows"][1]["name"] == "Fish"


def test_methods_get_the_same_draws_of_what_they_share():
    shared = {"lr": LogUniform(1e-4, 1e-2, 1e-3), "batch_size": Choice((8, 16, 32))}
    for draw in range(20):
        one = draw_settings(shared, draw, 0)
        other = draw_settings(shared | {"gamma": LogUniform(1e-3, 1.0, 0.1)}, draw, 0)
        assert one.items() <= other.items()
        assert 1e-4 <= one["lr"] <= 1e-2
    assert draw_settings(shared, 0, 0) == {"lr": 1e-3, "batch_size": 8}
    drawn = torch.tensor([math.log10(draw_settings(shared, d, 0)["lr"]) for d in range(1, 2001)])
    assert abs(float(drawn.mean()) + 3) < 0.05
    assert float(drawn.std()) == pytest.approx(2 / 12**0.5, rel=0.05)
    assert draw_settings(shared, 1, 0) != draw_settings(shared, 1, 1) != draw_settings(shared, 2, 1)


# ------------------------------------------------------------------------------------------- processes, kills, resuming


def test_two_processes_find_what_one_finds(tmp_path: Path):
    one, two = (found(folder=tmp_path / str(n), processes=n, held_out=["south", "east"]) for n in (1, 2))
    assert lines(tmp_path / "1") == lines(tmp_path / "2")
    for row, other in zip(one.rows, two.rows, strict=True):
        assert (row.by_domain, row.difference) == (other.by_domain, other.difference)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_leave_one_out import found
from pathlib import Path
found(folder=Path({folder!r}), processes={processes}, **{settings!r})
"""


@pytest.mark.parametrize(("processes", "kills"), [(1, 1), pytest.param(2, 3, marks=pytest.mark.large)])
def test_killed_and_called_again_it_ends_where_it_would_have(tmp_path: Path, processes: int, kills: int):
    settings = {"budget": 120, "held_out": ["south", "east"]}
    expected = found(folder=tmp_path / "whole", **settings)
    folder = tmp_path / "killed"
    code = SCRIPT.format(
        tests=str(Path(__file__).parent), folder=str(folder), processes=processes, settings=settings
    )  # fmt: skip
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


def test_more_seeds_draws_domains_and_methods_only_add(tmp_path: Path):
    found(folder=tmp_path, held_out=["west"])
    first = (tmp_path / "runs.jsonl").read_text()
    more: dict[str, Any] = {"draws": 3, "seeds": 3, "held_out": ["west", "east"]}
    evidence = found(["ERM", "Fish", "SmoothFish"], folder=tmp_path, **more)
    assert (tmp_path / "runs.jsonl").read_text().startswith(first)
    fresh = found(["ERM", "Fish", "SmoothFish"], **more)
    assert [row.by_domain for row in evidence.rows] == [row.by_domain for row in fresh.rows]


def test_a_line_that_was_being_written_is_written_again(tmp_path: Path):
    found(folder=tmp_path)
    whole = lines(tmp_path)
    text = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text(text[:-30])
    found(folder=tmp_path)
    assert lines(tmp_path) == whole
    (tmp_path / "runs.jsonl").write_text("{}\n" + text)
    with pytest.raises(ValueError, match=r"line 1 of .*runs.jsonl is no run: remove it to go on"):
        found(folder=tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    found(folder=tmp_path)
    with pytest.raises(ValueError, match=r"holds runs with budget=24, and here it is 30: pass another folder"):
        found(folder=tmp_path, budget=30)
    dataset, domains = data(seed=1)
    with pytest.raises(ValueError, match="holds runs with losses="):
        leave_one_domain_out(net, dataset, domains, loss_fn, metric, ["ERM"], folder=tmp_path, **SMALL)
    with pytest.raises(ValueError, match=r"has a run of 'Fish' with \{'lr': 0.001"):
        found(folder=tmp_path, search={"lr": LogUniform(1e-3, 1.0, 0.1)}, methods=["Fish"])
    other = {
        "Fish": Recipe(lambda model, s: Fish(s["meta_lr"], inner_state="carry"), search={"meta_lr": Choice((0.5,))})
    }
    with pytest.raises(ValueError, match=r"has a run of 'Fish' with flipflop, warm_up=0\.0, Fish"):
        found(other, folder=tmp_path, draws=1)
    (tmp_path / "task.json").unlink()
    with pytest.raises(ValueError, match=r"has runs\.jsonl but no task\.json"):
        found(folder=tmp_path)


# ----------------------------------------------------------------------------------------------------------- inputs


class Words(Dataset[Any]):
    """Samples that are dictionaries, of one kind that only a collate function can put together."""

    def __init__(self) -> None:
        self.rows = data()[0]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.rows[index]
        return {"x": x.tolist(), "y": int(y)}


def collate(samples: list[dict[str, Any]]) -> list[Tensor]:
    return [torch.tensor([s["x"] for s in samples]), torch.tensor([s["y"] for s in samples])]


def test_any_dataset_and_any_labels_give_what_tensors_give():
    expected = found(["Fish"]).rows[0].by_domain
    domains = torch.tensor([DOMAINS.index(d) for d in data()[1]])
    words = leave_one_domain_out(net, Words(), domains, loss_fn, metric, ["Fish"], collate_fn=collate, **SMALL)
    assert len(words.rows[0].by_domain["2"]) == len(expected["west"])
    some = {label: [i for i, d in enumerate(data()[1]) if d == label][:12] for label in DOMAINS}
    fewer = leave_one_domain_out(net, data()[0], some, loss_fn, metric, ["Fish"], **SMALL)
    assert sorted(fewer.rows[0].by_domain) == sorted(DOMAINS)
    assert "4 domains, 48 samples" in fewer.setting
    of_names = leave_one_domain_out(net, Words(), data()[1], loss_fn, metric, ["Fish"], collate_fn=collate, **SMALL)
    assert of_names.rows[0].by_domain == expected


def test_a_model_with_buffers_and_dropout_trains():
    make = lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))  # noqa: E731
    dataset, domains = data()
    own = SMALL | {"draws": 1, "held_out": ["east"]}
    one, two = (leave_one_domain_out(make, dataset, domains, loss_fn, metric, **own) for _ in range(2))
    assert len(one.rows) == len(default_recipes())
    assert not any(row.stopped for row in one.rows)
    assert [row.by_domain for row in one.rows] == [row.by_domain for row in two.rows]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"seeds": 0}, ValueError, "seeds should be"),
    ({"budget": 0}, ValueError, "budget should be"),
    ({"draws": True}, ValueError, "draws should be"),
    ({"processes": 0}, ValueError, "processes should be"),
    ({"validation": 1.0}, ValueError, r"validation should be in \(0, 1\)"),
    ({"domains_per_step": 4}, ValueError, "domains_per_step should be from 2 to 3"),
    ({"held_out": ["up"]}, ValueError, r"held_out should name domains \(got 'up'\)"),
    ({"held_out": []}, ValueError, "held_out should name at least one domain"),
    ({"methods": ["Fisch"]}, ValueError, r"methods should be among 'ERM', .* \(got 'Fisch'\)"),
    ({"methods": []}, ValueError, "methods should hold at least one"),
    ({"methods": {"mine": Fish()}}, TypeError, r"methods\['mine'\] should be a Recipe \(got Fish\)"),
    ({"search": {"momentum": Choice((0.9,))}}, ValueError, r"search should name hyperparameters among .*'momentum'"),
    ({"methods": {"mine": Recipe(lambda m, s: Fish(), order="pooled")}}, ValueError, "order='pooled', and Fish"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD, ids=[message[:30] for *_, message in BAD])
def test_bad_arguments_are_named_before_anything_is_trained(
    settings: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        found(**settings)


def made(**changed: Any) -> Callable[[], Evidence]:
    dataset, domains = data()
    own = {"make_model": net, "dataset": dataset, "domains": domains, "loss_fn": loss_fn, "metric": metric} | changed
    return lambda: leave_one_domain_out(**own, methods=["ERM"], **SMALL)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"domains": ["a", "b"] * 48}, ValueError, "at least three labels"),
        ({"domains": ["a", "b", "c"] * 40}, ValueError, r"each of the 96 samples of the dataset \(got 120\)"),
        ({"domains": ["a", "b", "c"] * 30}, ValueError, r"each of the 96 samples of the dataset \(got 90\)"),
        ({"domains": {"a": [0, 1], "b": [2, 3], "c": [4, 96]}}, ValueError, r"of the 96 samples .* \(got 97\)"),
        ({"domains": ["a", "b"] * 47 + ["b", "c"]}, ValueError, "domain 'c' has one sample"),
        ({"make_model": lambda: None}, TypeError, "make_model should return a torch.nn.Module"),
        ({"loss_fn": lambda m, b: m(b[0])}, ValueError, "scalar"),
        ({"metric": lambda m, b: m(b[0])}, ValueError, r"one number for each sample \(got \(8, 2\)\)"),
        ({"metric": lambda m, b: 0.5}, ValueError, r"one number for each sample \(got float\)"),
        ({"metric": lambda m, b: torch.ones(3)}, ValueError, r"for each of 8 samples \(got 3\)"),
    ],
)
def test_a_bad_task_is_refused_before_anything_is_trained(
    changed: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        made(**changed)()


def test_ranges_and_recipes_are_checked():
    with pytest.raises(ValueError, match="0 < low <= default <= high"):
        LogUniform(1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="values should hold at least one"):
        Choice(())
    with pytest.raises(ValueError, match="order should be one of"):
        Recipe(order="sorted")
    with pytest.raises(ValueError, match=r"warm_up should be in \[0, 1\)"):
        Recipe(warm_up=1.0)


def test_it_shows_progress_and_the_result(capsys: pytest.CaptureFixture[str]):
    evidence = found(show=True)
    out, err = capsys.readouterr()
    assert str(evidence) in out
    assert "run" in err
    for word in ("ERM", "Fish", "unseen", "4 domains, 96 samples", "No method beats ERM", "gradients in a run"):
        assert word in out


def test_the_wrapped_optimizer_is_the_users():
    built = []

    def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        built.append(torch.optim.RMSprop(parameters, lr=lr))
        return built[-1]

    found(["Fish"], optimizer=optimizer, seeds=1, draws=1, held_out=["east"])
    assert {group["lr"] for one in built for group in one.param_groups} == {1e-3}
    assert not isinstance(built[0], GradMatch)
