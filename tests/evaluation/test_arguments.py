"""What is wrong with a call is said in words before anything is trained."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pandas as pd
import pytest
import torch
from _study import OnceDifferentiable, data, found, net
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from torch_gradmatch import Choice, Fish, Recipe

MODEL = net()
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"seeds": 0}, ValueError, "seeds should be"),
    ({"budget": 0}, ValueError, "budget should be"),
    ({"draws": True}, ValueError, "draws should be"),
    ({"processes": 0}, ValueError, "processes should be"),
    ({"permuted": -1}, ValueError, "permuted should be"),
    ({"validation": 1.0}, ValueError, r"validation should be in \(0, 1\)"),
    ({"predictions": True}, ValueError, "predictions=True needs predict="),
    ({"domains_per_step": 4}, ValueError, "domains_per_step should be from 2 to 3"),
    ({"held_out": ["up"]}, ValueError, r"held_out should name domains \(got 'up'\)"),
    ({"held_out": "east"}, TypeError, r"held_out should be a list of labels \(got 'east'\)"),
    ({"held_out": []}, ValueError, "held_out should name at least one domain"),
    ({"methods": "Fish"}, TypeError, r"methods should be a list or a mapping from names \(got 'Fish'\)"),
    ({"methods": Fish()}, TypeError, "methods should be a list or a mapping"),
    ({"methods": ["Fisch"]}, ValueError, r"methods should be among 'ERM', .* \(got 'Fisch'\)"),
    ({"methods": []}, ValueError, "methods should hold at least one"),
    ({"methods": [Fish(), Fish(0.2)]}, ValueError, r"should have a name each \(got 'Fish' twice\): pass a mapping"),
    ({"methods": [Recipe()]}, TypeError, "a Recipe has no name of its own: pass methods as a mapping"),
    ({"methods": {"a": 3}}, TypeError, r"methods\['a'\] should be a name, a method object .* \(got int\)"),
    ({"methods": [nn.Linear]}, TypeError, r"methods\['type'\] should be a name"),
    ({"search": {"momentum": Choice((0.9,))}}, ValueError, r"search should name hyperparameters among .*'momentum'"),
    ({"search": {"lr": 0.1}}, TypeError, r"search\['lr'\] should be a LogUniform or a Choice \(got 0.1\)"),
    ({"search": 0.1}, TypeError, r"search should map names of hyperparameters to ranges \(got 0.1\)"),
    ({"make_model": MODEL}, TypeError, r"make_model should be a function that .* \(got a Sequential\)"),
    ({"make_model": lambda: None}, TypeError, r"make_model should return a torch.nn.Module \(got NoneType\)"),
    ({"loss_fn": data()[1]}, TypeError, r"loss_fn should be a function \(got list\): the order is make_model, dataset"),
    ({"dataset": pd.DataFrame({"x": [1.0]})}, TypeError, r"should be a sequence of samples \(got a DataFrame\)"),
    ({"dataset": {"x": [1.0]}}, TypeError, r"dataset should be a map-style Dataset .* \(got a dict\)"),
    ({"dataset": iter([1])}, TypeError, r"dataset should be a map-style Dataset .* \(got a list_iterator\)"),
    ({"domains": ["a", "b"] * 48}, ValueError, "at least three labels"),
    ({"domains": ["a", "b", "c"] * 40}, ValueError, r"each of the 96 samples of the dataset \(got 120\)"),
    ({"domains": {"a": [0, 1], "b": [2, 3], "c": [4, 96]}}, ValueError, r"of the 96 samples .* \(got 97\)"),
    ({"domains": ["a", "b"] * 47 + ["b", "c"]}, ValueError, "domain 'c' has one sample"),
    ({"groups": ["a", "b"]}, ValueError, r"groups should have a label for each of the 96 samples .* \(got 2\)"),
    ({"groups": 3}, TypeError, "groups should be a sequence of labels"),
    ({"groups": data()[1]}, ValueError, "leave domain 'south' no sample to select by where 'north' is held out"),
    ({"loss_fn": lambda m, b: m(b[0])}, ValueError, "scalar"),
    ({"metric": lambda m, b: m(b[0])}, ValueError, r"for each of 24 samples \(got \(24, 2\)\); for a metric of a"),
    ({"metric": lambda m, b: torch.ones(3)}, ValueError, r"number for each of 24 samples \(got \(3,\)\)"),
    ({"metric": lambda m, b: 0.5}, ValueError, r"metric should return a row for each sample \(got float\)"),
    ({"predict": lambda m, b: (m(b[0]), 3)}, ValueError, r"predict should return a row for each sample \(got int\)"),
    ({"metric": lambda o, t: 1 / 0, "predict": lambda m, b: b}, ZeroDivisionError, "metric was called with .*'north'"),
    ({"methods": ["IDGM"], "make_model": lambda: Opaque()}, RuntimeError, "finite_difference"),
]  # fmt: skip


class Opaque(nn.Module):
    """A network without second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = net()

    def forward(self, x: Tensor) -> Any:
        return OnceDifferentiable.apply(self.layers(x))


@pytest.mark.parametrize(("settings", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_arguments_are_named(settings: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        found(**settings)


@pytest.mark.parametrize("whole", [True, False])
def test_models_that_share_parameters_are_refused(whole: bool):
    """On labels of pure noise ``lambda: model`` "had" .872."""
    shared = net()
    make = (lambda: shared) if whole else (lambda: nn.Sequential(shared[0], nn.Tanh(), nn.Linear(8, 2)))
    with pytest.raises(ValueError, match=r"make_model returned the same 0.weight twice, .* return copy.deepcopy\(m"):
        found(make_model=make)


def test_a_method_that_cannot_run_is_left_out_and_the_answer_says_why():
    """Without second derivatives IDGM counted as a loss of 35 points."""
    with pytest.warns(UserWarning, match="IDGM is left out, since its first step failed: .*finite_difference"):
        evidence = found(["ERM", "IDGM"], make_model=Opaque, held_out=["east"])
    assert [row.name for row in evidence.rows] == ["ERM", "ERM, averaged"]
    assert list(evidence.left_out) == ["IDGM"]
    assert "IDGM was left out: " in evidence.answer


def test_a_metric_that_is_not_finite_is_found_before_training_or_its_method_is_left_out():
    x, y = data()[0].tensors
    x[:, 4] = torch.tensor([100.0 if label == "east" else 0.0 for label in data()[1]])
    own: dict[str, Any] = {"make_model": lambda: nn.Linear(5, 2), "metric": lambda m, b: -m(b[0]).square().sum(1)}

    def explodes(model: nn.Module, training: Any, settings: Any) -> None:
        for number, _ in enumerate(training.pooled(8)):
            if number == 2:  # the trial has one step
                model.weight.data *= 0.5
                model.weight.data[:, 4] = 1e18  # seen in the domain held out alone

    methods = {"ERM": Recipe(), "mine": Recipe(train=explodes)}
    evidence = found(methods, dataset=TensorDataset(x, y), **own)
    assert [row.name for row in evidence.rows] == ["ERM", "ERM, averaged"]
    assert evidence.left_out == dict.fromkeys(("mine", "mine, averaged"), "its metric is not finite on 'east'")
    with pytest.raises(
        ValueError, match=r"mine cannot be compared with: its metric is not finite on 'east'\. Pass a m"
    ):
        found({"mine": methods["mine"]}, dataset=TensorDataset(x, y), **own)
    x[0] = torch.nan
    with pytest.raises(ValueError, match="the metric of domain 'north' is nan before training: look at its samples"):
        found(methods, dataset=TensorDataset(x, y), **own)


def test_a_missing_extra_is_noticed_first(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"needs scipy: install the extra, torch_gradmatch\[evidence\]"):
        found(make_model=lambda: pytest.fail("something was trained"))


def test_near_identical_samples_without_groups_are_warned_of():
    """Selection is blind to what is memorized of a patient with several slides."""
    generator = torch.Generator().manual_seed(0)
    patients = torch.randn(40, 12, generator=generator).repeat_interleave(4, 0)
    noise = torch.randn(160, 12, generator=generator)

    def brief(x: Tensor, **settings: Any) -> None:
        domains = ["abcd"[i // 40] for i in range(160)]
        own: dict[str, Any] = {"make_model": lambda: nn.Linear(12, 2), "held_out": ["a"], "seeds": 1, "draws": 1}
        found(["ERM"], dataset=TensorDataset(x, (x[:, 0] > 0).long()), domains=domains, **own, **settings)

    shares = ", ".join(f"100% of '{label}'" for label in "abcd")
    with pytest.warns(UserWarning, match=rf"near-identical twin in their domain \({shares}\).*Pass groups="):
        brief(patients + 0.05 * noise)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        brief(patients + 0.05 * noise, groups=[i // 4 for i in range(160)])
        brief(patients + noise)


def test_the_head_is_the_linear_layer_that_is_called_last():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(8, 2), nn.Linear(5, 8)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.body(x).tanh())

    brief: dict[str, Any] = {"make_model": Backwards, "seeds": 1, "draws": 1, "held_out": ["east"]}
    assert "IDGM, head" in [row.name for row in found(None, **brief).rows]
    convolutional = lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 5), nn.Flatten())  # noqa: E731
    assert not any("head" in row.name for row in found(None, **(brief | {"make_model": convolutional})).rows)
    assert "IDGM, body" not in [row.name for row in found(["ERM", "IDGM, head"], head="body", **brief).rows]
