"""Accelerate, Lightning and the Trainer: training is that of a plain loop, and resumes bit for bit in an inner loop."""

from __future__ import annotations

import doctest
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import _in_accelerate as accelerate
import _in_lightning as lightning
import _in_trainer as trainer
import pytest
import torch
from _spurious_data import DOMAINS
from _training import DOMAIN_NAMES, STEPS_IN_EPOCH, assert_same, plain_loop
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torch_gradmatch import DomainBatchSampler, Fish, GradMatch
from torch_gradmatch.integrations import huggingface as for_trainer
from torch_gradmatch.integrations import lightning as for_lightning

each_framework = pytest.mark.parametrize("framework", [accelerate, lightning, trainer], ids=lambda m: m.__name__[4:])
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
        assert_same(resumed.state(), whole.state(), f"resumed after {stop}")
        assert_same(resumed.place, whole.place, f"the loader resumed after {stop}")
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
    assert_same(found.state(), expected.state())
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
    assert_same(inside.evaluated()[:2], [between.evaluated()[0], between.evaluated()[2]])
    assert not torch.equal(inside.evaluated()[0], fast.evaluated()[0])
    assert torch.equal(inside.evaluated()[1], fast.evaluated()[1])
    for evaluated in (inside, between):
        assert_same(evaluated.state(), never.state())


@each_framework
def test_a_wrong_number_of_domains_is_an_error(framework: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(framework.example, "Fish", lambda *_, **__: Fish(inner_steps=5))
    with pytest.raises(ValueError, match=r"inner_steps=5\).*domains_per_step=4"):
        framework.train(tmp_path, 5)


@pytest.mark.parametrize(
    ("framework", "loads"), [(lightning, lightning.example), (trainer, for_trainer)], ids=["lightning", "trainer"]
)
def test_another_accumulation_than_the_samplers_is_an_error(
    framework: Any, loads: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sampler = lambda *args, accumulate, **settings: DomainBatchSampler(*args, **settings)  # noqa: E731
    monkeypatch.setattr(loads, "DomainBatchSampler", sampler)
    with pytest.raises(ValueError, match="accumulation_steps=2"):
        framework.train(tmp_path, 5, accumulate=2)


# --------------------------------------------------------------------------------------------------------- the examples

OPTIONS = {accelerate: ["--cpu", "--save-every", "2"], lightning: [], trainer: ["--save-steps", "7"]}


@each_framework
def test_the_example_trains_resumes_and_logs_what_was_measured(framework: Any, tmp_path: Path, capsys: Any):
    options, exact = OPTIONS[framework], [] if framework is trainer else ["--exact"]
    directory = ["--directory", str(tmp_path / "run")]
    first = framework.example.main(["--epochs", "2", *options, *directory, *exact, "--log", str(tmp_path / "log")])
    again = framework.example.main(["--epochs", "3", *options, *directory, "--resume"])
    straight = framework.example.main(["--epochs", "3", *options, "--directory", str(tmp_path / "straight")])
    assert again == straight
    assert "Fish  accuracy on the held-out domain" in capsys.readouterr().out
    assert list(first) == ["ERM", "Fish", *(["exact"] if exact else [])]
    for method in first:
        logged = 8 if method == "exact" else 16
        plain = plain_loop(method, logged, clip=1.0 if framework is lightning else 0.5)
        expected = {} if method == "ERM" else plain.optimizer.last_meta_step.scalars()
        if method != "exact":
            losses = [loss for _, loss in plain.losses]
            expected["loss"] = sum(losses[-8:]) / 8 if framework is trainer else losses[-1]
            if framework is not accelerate:
                expected |= {f"loss/{domain}": loss for domain, loss in plain.losses}  # each domain's last
        board = EventAccumulator(str(tmp_path / "log" / method)).Reload()
        prefix = "" if framework is accelerate else "train/"
        tags = [tag for tag in board.Tags()["scalars"] if tag.startswith(prefix)]
        tags = [tag for tag in tags if not tag.startswith(("train/train_", "train/total"))]
        shown = {tag.removeprefix(prefix): {event.step: event.value for event in board.Scalars(tag)} for tag in tags}
        if framework is trainer:  # which has numbers of its own
            expected.pop("grad_norm", None)
            for own in ("grad_norm", "learning_rate", "epoch"):
                assert shown.pop(own)
        first_step = 7 if framework is lightning else 8
        steps = [*range(first_step, 9 if method == "exact" else 33, 8)]
        assert all(list(values) == steps for values in shown.values())
        at_step = {name: values[first_step + logged - 8] for name, values in shown.items()}
        assert at_step == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("integration", [for_lightning, for_trainer], ids=lambda m: m.__name__.rsplit(".")[-1])
def test_the_example_in_its_docstring(integration: ModuleType):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        failed, tried = doctest.testmod(integration)
    assert (failed, tried > 0) == (0, True)
