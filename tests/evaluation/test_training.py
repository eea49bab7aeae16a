"""One run: a plain loop, its budget in samples, its averaged weights, and what becomes of one that diverges."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
from _study import data, loss_fn, metric, net, task
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_gradmatch import Average, Choice, Fish, GradMatch, LogUniform, Recipe
from torch_gradmatch.evaluation.recipes import draw_settings, known_recipes
from torch_gradmatch.evaluation.training import AVERAGED, PLAIN, train

PLAINLY = {"lr": 0.1, "weight_decay": 0.0, "batch_size": 8}


def settings_of(recipe: Recipe, batch_size: int = 12) -> dict[str, Any]:
    shared = {"lr": LogUniform(1e-3, 1e-3, 1e-3), "weight_decay": Choice((0.0,)), "batch_size": Choice((batch_size,))}
    return draw_settings(shared | dict(recipe.search), 0, 0)


def test_ordinary_training_is_a_plain_loop():
    """Weights and averaged weights of the moment that validates best, also those of ``Average``."""
    run, _ = train(task(), Recipe(), PLAINLY, "west", seed=3)
    split = task().split("west", 3)
    torch.manual_seed(3)
    model = net()
    optimizer = GradMatch(
        torch.optim.SGD(model.parameters(), lr=0.1), Fish(1.0, inner_steps=1), average=Average(start=14)
    )  # the 15th step reaches half of 240
    indices = torch.tensor([i for of_domain in split.training.values() for i in of_domain])
    best: dict[str, tuple[float, float]] = {}

    def measure(kind: str) -> None:
        scores = [metric(model, data()[0][own]).mean().item() for own in (*split.validation.values(), split.held_out)]
        if kind not in best or fmean(scores[:-1]) > best[kind][0]:
            best[kind] = fmean(scores[:-1]), scores[-1]

    measure(PLAIN)
    generator = torch.Generator().manual_seed(3)
    orders = [indices[torch.randperm(54, generator=generator)[:48]] for _ in range(5)]  # 6 of 54 are left over
    for number, chosen in enumerate(torch.cat(orders).split(8), start=1):
        optimizer.zero_grad()
        loss_fn(model, data()[0][chosen]).backward()
        optimizer.step()
        if number in (10, 20, 30):
            measure(PLAIN)
        if number in (20, 30):
            with optimizer.averaged_weights():
                measure(AVERAGED)
    assert [moment for moment, _ in run[PLAIN]["curve"]] == [0, 80, 160, 240]
    assert [moment for moment, _ in run[AVERAGED]["curve"]] == [160, 240]
    for kind in (PLAIN, AVERAGED):
        assert (run[kind]["validation"], run[kind]["held_out"]) == pytest.approx(best[kind])
    assert run["stopped"] is None


def test_no_sample_of_the_held_out_domain_nor_one_to_select_by_is_trained_on():
    seen: set[int] = set()

    def noting(model: nn.Module, batch: Any) -> Tensor:
        seen.update(batch[2].tolist())
        return loss_fn(model, batch)

    dataset, domains = data()
    own = task(TensorDataset(*dataset.tensors, torch.arange(96)), domains, budget=1000, loss_fn=noting)
    for name, recipe in known_recipes("2").items():
        seen.clear()
        split = own.split("south", 1)
        train(own, recipe, settings_of(recipe), "south", seed=1)
        assert seen == {i for of_domain in split.training.values() for i in of_domain}, name


STEPS = {"ERM": 40, "ERM, balanced": 40, "SmoothFish": 40, "Fish": 42, "ERM, domains in turn": 42}


@pytest.mark.parametrize("name", known_recipes("2"))
def test_the_budget_counts_the_samples_that_are_differentiated_and_all_take_as_many_steps(name: str):
    """A batch is shared out, so that no method takes more steps than plain training: that won on permuted domains."""
    differentiated: list[int] = []
    steps: list[int] = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Tensor, size: int) -> Tensor:
            ctx.size = size
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            differentiated.append(ctx.size)
            return gradient.clone(), None

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            steps.append(1)
            return super().step(closure)

    counted = lambda model, batch: Counted.apply(loss_fn(model, batch), len(batch[1]))  # noqa: E731
    recipe = known_recipes("2")[name]
    run, _ = train(task(budget=480, loss_fn=counted, optimizer=Counting), recipe, settings_of(recipe), "east", seed=0)
    assert run["stopped"] is None
    assert 480 <= run["spent"] < 480 + 36
    if not name.startswith(("IDGM", "Fishr")):  # whose second derivatives do not begin at the loss
        assert sum(differentiated) == run["spent"]
    assert len(steps) == STEPS.get(name, len(steps))  # 42: to the end of a meta-iteration of three


def test_a_sample_left_over_does_not_end_a_run_under_batch_norm():
    make = lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))  # noqa: E731
    dataset, domains = data(samples=52)
    own = task(dataset, domains, make_model=make, budget=400, validation=0.3)
    assert {len(side) for side in own.split("east", 0).training.values()} == {9}
    few = replace(own, by_domain=own.by_domain | {"north": own.by_domain["north"][:6]})  # batches of 8 do not fit in
    assert sorted(len(side) for side in few.split("east", 0).training.values()) == [4, 9, 9]
    for name in ("ERM", "ERM, domains in turn", "Fish", "IDGM"):
        recipe = known_recipes()[name]
        for unequal in (own, few):
            run, _ = train(unequal, recipe, settings_of(recipe, 13 if name == "ERM" else 24), "east", seed=0)
            assert run["stopped"] is None


def test_averaged_weights_take_the_running_statistics_along():
    make = lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))  # noqa: E731
    means: list[Tensor] = []

    def noting(model: nn.Module, training: Any, settings: Any) -> None:
        optimizer = training.optimizer(model, settings)
        for batch in training.pooled(settings["batch_size"]):
            training.step(optimizer, model, batch)
            means.append(model[1].running_mean.clone())

    run, training = train(task(make_model=make, evaluations=1), Recipe(train=noting), PLAINLY, "west", 0)
    averaged = training.load(AVERAGED)
    torch.testing.assert_close(averaged[1].running_mean, torch.stack(means[14:]).mean(0))
    assert run[AVERAGED]["moment"] == run["spent"]


def test_an_own_training_without_batches_of_ours_is_measured_once():
    def own_loop(model: nn.Module, training: Any, settings: Any) -> None:
        optimizer = training.optimizer(model, settings)
        for _ in range(9 if settings["counts"] else 1):
            for batch in DataLoader(training.samples, batch_size=8):
                training.step(optimizer, model, batch)
                if settings["counts"] and not training.spend(len(batch[1])):
                    return

    run, _ = train(task(), Recipe(train=own_loop), PLAINLY | {"counts": False}, "west", 0)
    assert (run["spent"], run[AVERAGED]) == (0, None)
    assert len(run[PLAIN]["curve"]) == 2
    run, training = train(task(), Recipe(train=own_loop), PLAINLY | {"counts": True}, "west", 0)
    assert 240 <= run["spent"] < 248
    assert run[AVERAGED] is not None
    assert len(run[PLAIN]["curve"]) == 4
    assert sorted(set(training.domains)) == ["east", "north", "south"]


def square(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).square().sum(1) + 1).square().mean()


@pytest.mark.parametrize("name", ["ERM", "Fish", "IDGM", "SmoothFish"])
def test_a_run_that_diverges_counts_as_far_as_it_came(name: str):
    recipe = known_recipes()[name]
    settings = settings_of(recipe) | {"lr": 1e6, "meta_lr": 1.0, "strength": 1.0, "inner_lr": 0.3}
    run, _ = train(task(loss_fn=square, evaluations=10, budget=600), recipe, settings, "east", seed=0)
    assert run["stopped"] is not None
    assert run[PLAIN]["curve"][0][0] == 0
    assert len(run[PLAIN]["curve"]) < 11


@pytest.mark.parametrize("whole", [False, True], ids=["of samples", "of a domain"])
def test_a_metric_that_raises_on_nan_is_a_run_that_diverged(whole: bool):
    """As scikit-learn's metrics do."""

    def strict(outputs: Tensor, targets: Tensor) -> Tensor:
        if not outputs.isfinite().all():
            raise TypeError("Input contains NaN.")
        return (outputs.argmax(1) == targets).float()

    def careless(model: nn.Module, training: Any, settings: Any) -> None:
        for number, _ in enumerate(training.pooled(8)):
            if number == 12:
                model[0].weight.data.fill_(torch.nan)

    of_domain = {"metric": lambda o, t: strict(o, t).mean(), "predict": lambda m, b: (m(b[0]), b[1])}
    own = task(**(of_domain if whole else {"metric": lambda m, b: strict(m(b[0]), b[1])}))
    run, _ = train(own, Recipe(train=careless), PLAINLY, "east", seed=0)
    assert run["stopped"] == "Input contains NaN."
    assert len(run[PLAIN]["curve"]) == 2


def test_an_error_of_the_users_own_and_a_metric_that_is_never_finite_are_raised():
    def broken(model: nn.Module, training: Any, settings: Any) -> None:
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        train(task(), Recipe(train=broken), PLAINLY, "east", seed=0)
    own = task(metric=lambda m, b: torch.full((len(b[1]),), torch.nan))
    with pytest.raises(ValueError, match="the metric is nan after 0 samples"):
        train(own, Recipe(), PLAINLY, "east", seed=0)
