"""The Trainer of transformers: it resumes bit for bit in the middle of an inner loop, and is a plain loop."""

from __future__ import annotations

import contextlib
import copy
import doctest
import importlib
import sys
from functools import partial

import pytest
import torch
import with_trainer as example
from _domains import domain_of
from _same import assert_same, without_prefix
from _spurious_data import DOMAINS, make_data, make_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from torch_gradmatch import Average, DomainBatchSampler, Fish, GradMatch
from torch_gradmatch.integrations import huggingface as integration

STEPS_IN_EPOCH = 16
DOMAIN_NAMES = [f"domain {domain}" for domain in range(DOMAINS)]


def train(directory, method="Fish", resume_from=None, **arguments):
    """Return the state after training and the batches that were seen."""
    arguments = {"save_strategy": "no", "use_cpu": True} | arguments
    trainer = example.make_trainer(method, str(directory), **arguments)
    optimizer, seen = trainer.optimizer, []
    trainer.model.register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append(inputs["features"].sum()), with_kwargs=True
    )
    trainer.train(resume_from_checkpoint=None if resume_from is None else f"{directory}/checkpoint-{resume_from}")
    state = {
        "model": dict(trainer.model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
    }
    return copy.deepcopy(state), seen


@pytest.mark.parametrize(
    ("stop", "arguments"),
    [
        pytest.param(7, {}, id="in an inner loop"),
        pytest.param(8, {}, id="between two inner loops"),
        pytest.param(STEPS_IN_EPOCH - 1, {}, id="before the last batch of an epoch"),
        pytest.param(STEPS_IN_EPOCH, {}, id="at the end of an epoch"),
        pytest.param(22, {}, id="in the second epoch"),
        pytest.param(22, {"bf16": True}, id="bf16"),
        pytest.param(22, {"eval_strategy": "steps", "eval_steps": 5}, id="with evaluation in inner loops"),
    ],
)
def test_it_resumes_bit_for_bit(tmp_path, stop, arguments):
    whole, all_seen = train(tmp_path, max_steps=39, save_strategy="steps", save_steps=stop, **arguments)
    rest, seen = train(tmp_path, max_steps=39, resume_from=stop, **arguments)
    assert len(seen) < len(all_seen)
    assert_same(seen, all_seen[len(all_seen) - len(seen) :])
    if "eval_strategy" not in arguments:
        assert len(all_seen) == 39
        assert len(seen) == 39 - stop
    assert_same(rest, whole)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_it_is_the_plain_loop(tmp_path, bf16):
    steps = 2 * STEPS_IN_EPOCH + 3
    found, _ = train(tmp_path, max_steps=steps, bf16=bf16)
    model, (data, names, _) = make_model(0), make_data()
    loader = DataLoader(data, batch_sampler=DomainBatchSampler(names, batch_size=example.BATCH_SIZE))
    fish = Fish(0.05, inner_steps=DOMAINS, inner_state="reset", model=model, track_alignment=True)
    optimizer = GradMatch(torch.optim.AdamW(model.parameters(), lr=example.FISH_LR), fish)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100, gamma=0.9)
    for (x, y), _ in zip((batch for _ in range(3) for batch in loader), range(steps), strict=False):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    assert optimizer.inner_step == 3
    assert_same(found["model"], {f"network.{name}": value for name, value in model.state_dict().items()})
    assert found["optimizer"]["gradmatch"]["slow_buffers"]
    assert_same(without_prefix(found["optimizer"], "network."), optimizer.state_dict())


def test_one_inner_step_kept_whole_is_erm(tmp_path, monkeypatch):
    monkeypatch.setattr(
        integration, "check_loader", lambda *_: None
    )  # it would refuse one inner step with four domains
    monkeypatch.setattr(example, "FISH_LR", example.ERM_LR)
    monkeypatch.setattr(example, "Fish", lambda *_, model, **__: Fish(1.0, inner_steps=1, model=model))
    fish, _ = train(tmp_path, "Fish", max_steps=21)
    erm, _ = train(tmp_path, "ERM", max_steps=21)
    assert_same(fish["model"], erm["model"])
    assert_same(fish["scheduler"], erm["scheduler"])
    assert_same(fish["optimizer"]["state"], erm["optimizer"]["state"])


def test_a_wrong_number_of_domains_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "Fish", lambda *_, **__: Fish(inner_steps=5))
    with pytest.raises(ValueError, match=r"inner_steps=5\).*domains_per_step=4"):
        train(tmp_path, max_steps=5)


def test_gradients_accumulated_in_a_domain_are_those_of_a_plain_loop(tmp_path):
    k, steps = 2, 12
    found, _ = train(tmp_path, gradient_accumulation_steps=k, max_steps=steps)
    model, (data, names, _) = make_model(0), make_data()
    loader = DataLoader(data, batch_sampler=DomainBatchSampler(names, example.BATCH_SIZE, accumulate=k))
    fish = Fish(0.05, inner_steps=DOMAINS, inner_state="reset", model=model, track_alignment=True)
    optimizer = GradMatch(torch.optim.AdamW(model.parameters(), lr=example.FISH_LR), fish)
    batches = (batch for _ in range(3) for batch in loader)
    for (x, y), number in zip(batches, range(1, steps * k + 1), strict=False):
        (torch.nn.functional.cross_entropy(model(x), y) / k).backward()
        if number % k == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.inner_step == 0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found["model"][f"network.{name}"], value, rtol=1e-5, atol=1e-6)


def test_another_accumulation_than_the_samplers_is_an_error(tmp_path, monkeypatch):
    sampler = lambda *args, accumulate, **settings: DomainBatchSampler(*args, **settings)  # noqa: E731
    monkeypatch.setattr(integration, "DomainBatchSampler", sampler)
    with pytest.raises(ValueError, match="accumulation_steps=2"):
        train(tmp_path, gradient_accumulation_steps=2, max_steps=5)


def evaluated_every(steps, directory, slow=True, total=22):
    """Return the losses that were found on the held-out domain, and the state after training."""
    evaluates = {"eval_strategy": "steps", "eval_steps": steps} if steps else {}
    arguments = {"save_strategy": "no", "use_cpu": True, "max_steps": total, "per_device_eval_batch_size": 4000}
    trainer = example.make_trainer("Fish", str(directory), **arguments, **evaluates)
    optimizer = trainer.gradmatch
    if not slow:
        trainer.gradmatch = None
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return losses, copy.deepcopy((dict(trainer.model.state_dict()), optimizer.state_dict())), trainer


def test_evaluation_in_an_inner_loop_is_that_of_the_slow_weights(tmp_path):
    """After 6, 12, 18 and 22 steps it finds what it finds after 4, 12, 16 and 20; training goes on as without it."""
    inside, after, _ = evaluated_every(6, tmp_path)
    between, _, _ = evaluated_every(DOMAINS, tmp_path)
    fast, _, _ = evaluated_every(6, tmp_path, slow=False)
    _, expected, _ = evaluated_every(None, tmp_path)
    assert inside == [between[0], between[2], between[3], between[4]]
    assert inside[0] != fast[0]
    assert inside[1] == fast[1]
    assert_same(after, expected)


def test_a_model_is_saved_in_an_inner_loop(tmp_path):
    _, (expected, _), _ = evaluated_every(None, tmp_path, total=DOMAINS)
    _, _, trainer = evaluated_every(None, tmp_path, total=DOMAINS + 2)
    assert trainer.gradmatch.inner_step == 2
    for block in contextlib.nullcontext(), trainer.gradmatch.slow_weights():
        with block:
            trainer.save_model(str(tmp_path / "model"))
        found = load_file(tmp_path / "model" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    (tmp_path / "model" / "model.safetensors").unlink()
    evaluated = trainer.predict(trainer.eval_dataset).predictions
    trainer.gradmatch.rollback()
    assert (trainer.predict(trainer.eval_dataset).predictions == evaluated).all()


def test_rollback_after_the_last_step_leaves_the_slow_weights(tmp_path):
    """Training that ends after 6 steps of 4 each is, rolled back, training that ended after 4."""
    short, _ = train(tmp_path, max_steps=DOMAINS)
    trainer = example.make_trainer("Fish", str(tmp_path), max_steps=DOMAINS + 2, save_strategy="no", use_cpu=True)
    optimizer = trainer.optimizer
    inner_steps = []

    class Note(TrainerCallback):
        def on_step_end(self, *_args, **_kwargs):
            inner_steps.append(optimizer.inner_step)

    trainer.add_callback(Note)
    trainer.train()
    assert inner_steps == [1, 2, 3, 0, 1, 2]
    assert not torch.equal(next(trainer.model.parameters()), next(iter(short["model"].values())))
    optimizer.rollback()
    floating = {name: value for name, value in short["model"].items() if value.is_floating_point()}
    assert_same({name: trainer.model.state_dict()[name] for name in floating}, floating)


def test_the_average_is_evaluated_and_saved_from_when_it_has_begun(tmp_path, monkeypatch):
    slow, _, _ = evaluated_every(6, tmp_path)
    make = GradMatch
    monkeypatch.setattr(example, "GradMatch", lambda optimizer, fish: make(optimizer, fish, Average(start=1)))
    monkeypatch.setattr(example, "DomainTrainer", partial(integration.DomainTrainer, weights="averaged"))
    averaged, (fast, _), trainer = evaluated_every(6, tmp_path)
    assert averaged[0] == slow[0]  # after 1 meta-update there is no average yet
    assert averaged[1] != slow[1]
    trainer.save_model(str(tmp_path / "model"))
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert not torch.equal(found["network.0.weight"], fast["network.0.weight"])
    with trainer.gradmatch.averaged_weights():
        assert_same(found, dict(trainer.model.state_dict()))
    monkeypatch.setattr(example, "DomainTrainer", partial(integration.DomainTrainer, weights="fast"))
    with pytest.raises(ValueError, match=r"weights should be .*\(got 'fast'\)"):
        example.make_trainer("Fish", str(tmp_path), use_cpu=True)


@pytest.mark.parametrize(
    ("stop", "arguments"),
    [
        pytest.param(7, {}, id="in an inner loop"),
        pytest.param(22, {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 4}, id="a worker that runs ahead"),
        pytest.param(9, {"gradient_accumulation_steps": 2}, id="accumulating"),
    ],
)
def test_the_optimizer_is_told_the_domain_of_every_step_also_after_it_resumes(tmp_path, monkeypatch, stop, arguments):
    told, seen, compute_loss = [], [], Trainer.compute_loss
    k = arguments.get("gradient_accumulation_steps", 1)

    def watched(self, model, inputs, *args, **settings):
        told.append(domain_of(inputs["features"], inputs["labels"]))
        return compute_loss(self, model, inputs, *args, **settings)

    class Note(TrainerCallback):
        def on_optimizer_step(self, _args, _state, _control, optimizer, **_kwargs):
            if optimizer.optimizer.inner_step == 0:
                seen.append((optimizer.optimizer.last_meta_step.domains, tuple(told[-DOMAINS * k :: k])))

    monkeypatch.setattr(Trainer, "compute_loss", watched)
    for resume_from in None, f"{tmp_path}/checkpoint-{stop}":
        settings = {"use_cpu": True, "max_steps": 39, "save_strategy": "steps", "save_steps": stop}
        trainer = example.make_trainer("Fish", str(tmp_path), **settings, **arguments)
        trainer.add_callback(Note)
        trainer.train(resume_from_checkpoint=resume_from)
        if resume_from is not None:
            assert seen.pop(0)[0] is None  # of an inner loop that was resumed in its middle
        assert len(seen) >= 2
        assert all(names == truth and set(names) == set(DOMAIN_NAMES) for names, truth in seen)
        told.clear()
        seen.clear()


def test_a_baseline_logs_the_losses_of_the_domains_and_accumulated_ones_are_means(tmp_path, monkeypatch):
    losses, compute_loss = {}, Trainer.compute_loss

    def watched(self, model, inputs, *args, **settings):
        loss = compute_loss(self, model, inputs, *args, **settings)
        losses.setdefault((domain_of(inputs["features"], inputs["labels"]), self.state.global_step), []).append(
            loss.item()
        )
        return loss

    monkeypatch.setattr(Trainer, "compute_loss", watched)
    arguments = {"use_cpu": True, "save_strategy": "no", "max_steps": 8, "gradient_accumulation_steps": 2}
    trainer = example.make_trainer("ERM", str(tmp_path), logging_steps=8, **arguments)
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    last = {domain: values for (domain, _), values in sorted(losses.items(), key=lambda item: item[0][1])}
    assert {len(values) for values in last.values()} == {2}
    for domain in range(DOMAINS):
        expected = sum(last[f"domain {domain}"]) / 2
        assert logged[f"loss/domain {domain}"] == pytest.approx(expected, rel=1e-6)


def test_rows_of_lists_and_of_data_sets_that_fetch_batches_are_served_alike(tmp_path):
    class Batched(example.Rows):
        def __getitems__(self, indices):
            return [self[index] for index in reversed(indices)][::-1]

    seen = []
    for kind in example.Rows, Batched:
        trainer = example.make_trainer("Fish", str(tmp_path), use_cpu=True)
        trainer.train_dataset = kind(make_data()[0])
        seen.append([batch["features"].sum() for batch in trainer.get_train_dataloader()])
    assert_same(*seen)


def test_domains_that_are_not_those_of_the_data_set_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "make_data", lambda: (make_data()[0], make_data()[1][:-1], make_data()[2]))
    with pytest.raises(ValueError, match="domains is for 1023 samples, but the data set has 1024"):
        train(tmp_path, max_steps=1)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "torch_gradmatch.integrations.huggingface")
    with pytest.raises(
        ImportError, match=r"integrations\.huggingface needs transformers .*pip install transformers acc"
    ):
        importlib.import_module("torch_gradmatch.integrations.huggingface")


def test_the_example_in_its_docstring():
    failed, tried = doctest.testmod(integration)
    assert (failed, tried > 0) == (0, True)


def test_log_holds_the_agreement_beside_the_trainers_own_numbers(tmp_path, monkeypatch):
    measured, losses, make_trainer = {}, {}, example.make_trainer

    class Note(TrainerCallback):
        def on_step_end(self, _args, state, _control, optimizer, **_kwargs):
            if isinstance(optimizer.optimizer, GradMatch) and optimizer.optimizer.inner_step == 0:
                measured[state.global_step] = optimizer.optimizer.last_meta_step.scalars()

        def on_log(self, _args, state, _control, optimizer, logs, **_kwargs):
            if "loss" in logs:
                losses[type(optimizer.optimizer), state.global_step] = logs["loss"]

    def noting(*args, **settings):
        trainer = make_trainer(*args, **settings)
        trainer.add_callback(Note)
        return trainer

    monkeypatch.setattr(example, "make_trainer", noting)
    example.main(["--epochs", "2", "--directory", str(tmp_path), "--log", str(tmp_path / "log")])
    own = {"train/loss", "train/grad_norm", "train/learning_rate", "train/epoch"}
    for method, kind in (("ERM", torch.optim.AdamW), ("Fish", GradMatch)):
        board = EventAccumulator(str(tmp_path / "log" / method)).Reload()
        agreement = {"train/inner_product", "train/cosine", "train/grad_norm"} if method == "Fish" else set()
        of_domains = {f"train/loss/domain {domain}" for domain in range(DOMAINS)}
        if method == "Fish":
            of_domains |= {f"train/grad_norm/domain {domain}" for domain in range(DOMAINS)}
        found = {tag for tag in board.Tags()["scalars"] if not tag.startswith(("train/train_", "train/total"))}
        assert found == own | agreement | of_domains
        agreement |= {name for name in of_domains if "grad_norm/" in name}
        agreement -= {"train/grad_norm"}  # the Trainer's own counts
        shown = {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in own | agreement}
        assert shown["train/loss"] == pytest.approx({step: losses[kind, step] for step in (8, 16, 24, 32)}, rel=1e-6)
        for tag in agreement:
            expected = {step: measured[step][tag.removeprefix("train/")] for step in (8, 16, 24, 32)}
            assert shown[tag] == pytest.approx(expected, rel=1e-6)


def test_the_example_trains_and_resumes(tmp_path, capsys):
    first = example.main(["--epochs", "2", "--save-steps", "7", "--directory", str(tmp_path)])
    assert first.keys() == {"ERM", "Fish"}
    again = example.main(["--epochs", "3", "--directory", str(tmp_path), "--resume"])
    straight = example.main(["--epochs", "3", "--directory", str(tmp_path / "other")])
    assert again == straight
    assert "Fish  accuracy on the held-out domain" in capsys.readouterr().out
