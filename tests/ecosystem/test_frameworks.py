"""Accelerate, Lightning and the Trainer: training is that of a plain loop, and resumes bit for bit in an inner loop."""

from __future__ import annotations

import doctest
import re
import warnings
from functools import partialmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import _in_accelerate as accelerate
import _in_lightning as lightning
import _in_trainer as trainer
import pytest
import torch
from _models import assert_identical
from _spurious_data import DOMAINS
from _training import DOMAIN_NAMES, STEPS_IN_EPOCH, plain_loop
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torch_gradmatch import Average, DomainBatchSampler, Fish, GradMatch
from torch_gradmatch.integrations import huggingface as for_trainer
from torch_gradmatch.integrations import lightning as for_lightning

each_framework = pytest.mark.parametrize("framework", [accelerate, lightning, trainer], ids=lambda m: m.__name__[4:])
each_integration = pytest.mark.parametrize("framework", [lightning, trainer], ids=lambda m: m.__name__[4:])
# In an inner loop, between two, before the last batch of an epoch, at its end, in the second epoch.
EDGES = (7, 8, STEPS_IN_EPOCH - 1, STEPS_IN_EPOCH, 22)


@pytest.fixture(autouse=True)
def _no_settings_of_an_earlier_test():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def case(framework: Any, *values: Any, **settings: Any) -> Any:
    """Return a parameter with a name that one can read."""
    words = [framework.__name__[4:], *map(str, values), *(f"{key}={value}" for key, value in settings.items())]
    return pytest.param(framework, *values, settings, id=" ".join(words))


@pytest.mark.parametrize(
    ("framework", "stops", "settings"),
    [
        case(accelerate, EDGES),
        case(accelerate, [22], precision="bf16"),
        case(accelerate, [22], workers=1),
        case(accelerate, [3, 6], method="exact"),
        case(lightning, EDGES),
        case(lightning, [22], precision="bf16"),
        case(lightning, [22], precision="fp16"),
        case(lightning, [22], workers=1),
        case(lightning, [12], accumulate=2),
        case(lightning, [22], evaluate_every=6),
        case(lightning, [13, 22], limit_train_batches=13),
        case(lightning, [3, 4], method="exact"),
        case(trainer, EDGES),
        case(trainer, [22], precision="bf16"),
        case(trainer, [22], workers=1),
        case(trainer, [9], accumulate=2),
        case(trainer, [22], evaluate_every=5),
    ],
)
def test_training_resumes_bit_for_bit(framework: Any, stops: Any, settings: dict[str, Any], tmp_path: Path):
    """And the optimizer is told the domain of every batch."""
    steps = 9 if "method" in settings else 39
    whole = framework.train(tmp_path / "whole", steps, **settings)
    for stop in stops:
        framework.train(tmp_path / str(stop), stop, save_every=stop, **settings)
        resumed = framework.train(tmp_path / str(stop), steps, resume_from=stop, **settings)
        assert_identical(resumed.state(), whole.state(), f"resumed after {stop}")
        assert_identical(resumed.place, whole.place, f"the loader resumed after {stop}")
        assert resumed.told == whole.told[stop * settings.get("accumulate", 1) :]
    assert all(told == domain for told, domain in whole.told)
    if framework is not accelerate and "method" not in settings:
        assert {domain for _, domain in whole.told} == set(DOMAIN_NAMES)


@pytest.mark.parametrize(
    ("framework", "method", "settings"),
    [
        *(case(framework, method) for framework in (accelerate, lightning) for method in ("ERM", "Fish", "exact")),
        *(case(trainer, method) for method in ("ERM", "Fish")),
        *(case(framework, "Fish", precision="bf16") for framework in (accelerate, lightning, trainer)),
        *(case(framework, "Fish", accumulate=2) for framework in (lightning, trainer)),
        case(lightning, "Fish", precision="fp16"),
    ],
)
def test_training_is_that_of_a_plain_loop(framework: Any, method: str, settings: dict[str, Any], tmp_path: Path):
    steps = 7 if method == "exact" else 2 * STEPS_IN_EPOCH + 3
    found = framework.train(tmp_path, steps, method, **settings)
    expected = plain_loop(method, steps, **settings)
    assert_identical(found.state(), expected.state())
    if method != "ERM":
        assert found.optimizer.inner_step == (3 if method == "Fish" else 0)
        assert found.optimizer.last_meta_step.scalars() == expected.optimizer.last_meta_step.scalars()


@each_framework
def test_evaluation_in_an_inner_loop_is_that_of_the_slow_weights(
    framework: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After 6 and 12 steps it finds what it finds after 4 and 12, and training goes on as if it had not been."""
    inside = framework.train(tmp_path, 14, evaluate_every=6)
    between = framework.train(tmp_path, 14, evaluate_every=DOMAINS)
    never = framework.train(tmp_path, 14)
    monkeypatch.setattr(GradMatch, "slow_weights", lambda _: torch.no_grad())
    fast = framework.train(tmp_path, 14, evaluate_every=6)
    assert_identical(inside.evaluated()[:2], [between.evaluated()[0], between.evaluated()[2]])
    assert not torch.equal(inside.evaluated()[0], fast.evaluated()[0])
    assert torch.equal(inside.evaluated()[1], fast.evaluated()[1])
    for evaluated in (inside, between):
        assert_identical(evaluated.state(), never.state())


@each_integration
def test_the_average_is_evaluated_and_saved_from_when_it_has_begun(
    framework: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    slow = framework.train(tmp_path, 14, evaluate_every=7).evaluated()
    monkeypatch.setattr(GradMatch, "__init__", partialmethod(GradMatch.__init__, average=Average(start=1)))
    trained = framework.train(tmp_path, 14, evaluate_every=7, save_every=14, weights="averaged")
    found = trained.evaluated()
    assert torch.equal(found[0], slow[0])  # after 1 meta-update there is no average yet
    assert not torch.equal(found[1], slow[1])
    if framework is lightning:
        module = trained.trainer.lightning_module
        trained.trainer.test(module, module.val_dataloader(), verbose=False)
        saved, prefix = torch.load(tmp_path / "step=14.ckpt", weights_only=True)["averaged_weights"], "model."
    else:
        trained.trainer.predict(trained.trainer.eval_dataset)
        trained.trainer.save_model(str(tmp_path))
        saved, prefix = load_file(tmp_path / "model.safetensors"), "network."
    assert torch.equal(trained.evaluated()[2], found[1])
    assert not torch.equal(saved[f"{prefix}0.weight"], trained.network[0].weight)
    with trained.optimizer.averaged_weights():
        assert_identical(saved, {f"{prefix}{name}": value for name, value in trained.network.state_dict().items()})


@each_integration
def test_other_weights_are_an_error(framework: Any, tmp_path: Path):
    with pytest.raises(ValueError, match=r"weights should be .*\(got 'fast'\)"):
        framework.train(tmp_path, 1, weights="fast")


@each_framework
def test_a_wrong_number_of_domains_is_an_error(framework: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(framework.example, "Fish", lambda *_, **__: Fish(inner_steps=5))
    with pytest.raises(ValueError, match=r"inner_steps=5\).*domains_per_step=4"):
        framework.train(tmp_path, 5)


@each_integration
def test_another_accumulation_than_the_samplers_is_an_error(
    framework: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = framework.example if framework is lightning else for_trainer
    sampler = lambda *args, accumulate, **settings: DomainBatchSampler(*args, **settings)  # noqa: E731
    monkeypatch.setattr(module, "DomainBatchSampler", sampler)
    with pytest.raises(ValueError, match="accumulation_steps=2"):
        framework.train(tmp_path, 5, accumulate=2)


# --------------------------------------------------------------------------------------------------------- the examples

OPTIONS = {accelerate: ["--cpu", "--save-every", "2"], lightning: [], trainer: ["--save-steps", "7"]}
OURS = {  # among what is logged; the rest is the framework's own
    accelerate: ".*",
    lightning: "train/.*",
    trainer: "train/(?!(grad_norm|learning_rate|epoch)$|train_|total).*",
}


def logged(framework: Any, method: str, steps: int) -> dict[str, float]:
    """Return what is logged after so many steps, by a plain loop."""
    plain = plain_loop(method, steps, clip=1.0 if framework is lightning else 0.5)
    found = {} if method == "ERM" else plain.optimizer.last_meta_step.scalars()
    if method != "exact":
        losses = [loss for _, loss in plain.losses]
        found["loss"] = sum(losses[-8:]) / 8 if framework is trainer else losses[-1]
        if framework is not accelerate:
            found |= {f"loss/{domain}": loss for domain, loss in plain.losses}  # the last of each
    named = {f"{'' if framework is accelerate else 'train/'}{name}": value for name, value in found.items()}
    return {name: value for name, value in named.items() if re.fullmatch(OURS[framework], name)}


@each_framework
def test_the_example_trains_resumes_and_logs_what_was_measured(framework: Any, tmp_path: Path, capsys: Any):
    def main(*options: str, directory: str) -> dict[str, float]:
        return framework.example.main([*OPTIONS[framework], *options, "--directory", str(tmp_path / directory)])

    exact = [] if framework is trainer else ["--exact"]
    first = main("--epochs", "2", *exact, "--log", str(tmp_path / "log"), directory="parts")
    assert main("--epochs", "3", "--resume", directory="parts") == main("--epochs", "3", directory="straight")
    assert "Fish  accuracy on the held-out domain" in capsys.readouterr().out
    assert list(first) == ["ERM", "Fish", *(["exact"] if exact else [])]
    for method in first:
        board = EventAccumulator(str(tmp_path / "log" / method)).Reload()
        tags = [tag for tag in board.Tags()["scalars"] if re.fullmatch(OURS[framework], tag)]
        first_step = 0 if framework is lightning else 1
        shown = {tag: {event.step - first_step + 1: event.value for event in board.Scalars(tag)} for tag in tags}
        assert all(list(values) == ([8] if method == "exact" else [8, 16, 24, 32]) for values in shown.values())
        steps = 8 if method == "exact" else 16
        expected = logged(framework, method, steps)
        assert {tag: values[steps] for tag, values in shown.items()} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("integration", [for_lightning, for_trainer], ids=lambda m: m.__name__.rsplit(".")[-1])
def test_the_example_in_its_docstring(integration: ModuleType):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        failed, tried = doctest.testmod(integration)
    assert (failed, tried > 0) == (0, True)
