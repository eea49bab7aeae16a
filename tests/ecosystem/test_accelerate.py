"""Accelerate: training resumes bit for bit in the middle of an inner loop, and is that of a plain loop."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import torch
import with_accelerate as example
from _domains import domain_of
from _same import assert_same
from _spurious_data import DOMAINS, make_data, make_model
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from torch_gradmatch import IDGM, DomainBatchSampler, Fish, GradMatch, check_loader, domain_batches, meta_batches

STEPS_IN_EPOCH = 16


@pytest.fixture(autouse=True)
def _no_settings_of_an_earlier_test():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def made(monkeypatch):
    """Every Accelerator that the example makes: it holds optimizer, scheduler and loader."""
    accelerators = []

    class Remembered(Accelerator):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            accelerators.append(self)

    monkeypatch.setattr(example, "Accelerator", Remembered)
    return accelerators


def without_seeds(state):
    """A loader's state but for what it seeds its workers with, who draw nothing: it is another in each process."""
    if isinstance(state, dict):
        return {key: without_seeds(value) for key, value in state.items() if "seed" not in key}
    return state


def run(made, method: str, directory: Path, *arguments: str):
    options = example.make_parser().parse_args(["--cpu", *arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    model, seen = example.train(method, options, directory)
    accelerator = made[-1]
    state = {
        "model": dict(model.state_dict()),
        "optimizer": accelerator._optimizers[0].state_dict(),
        "scheduler": accelerator._schedulers[0].state_dict(),
        "loader": without_seeds(accelerator._custom_objects[0].state_dict()),
    }
    return copy.deepcopy(state), seen


@pytest.mark.parametrize(
    ("method", "stop", "arguments"),
    [
        pytest.param("Fish", 7, [], id="in an inner loop"),
        pytest.param("Fish", 8, [], id="between two inner loops"),
        pytest.param("Fish", STEPS_IN_EPOCH - 1, [], id="before the last batch of an epoch"),
        pytest.param("Fish", STEPS_IN_EPOCH, [], id="at the end of an epoch"),
        pytest.param("Fish", 22, [], id="in the second epoch"),
        pytest.param("Fish", 22, ["--precision", "bf16"], id="bf16"),
        pytest.param("Fish", 22, ["--workers", "1"], id="with a worker that runs ahead"),
        pytest.param("exact", 3, [], id="exact, in an epoch"),
        pytest.param("exact", 6, [], id="exact, in the second epoch"),
    ],
)
def test_it_resumes_bit_for_bit(made, tmp_path, method, stop, arguments):
    total = "9" if method == "exact" else "39"
    arguments = ["--epochs", "4", *arguments]
    whole, all_seen = run(made, method, tmp_path / "a", *arguments, "--stop-at", total, "--save-every", "1000")
    run(made, method, tmp_path / "b", *arguments, "--stop-at", str(stop), "--save-every", str(stop))
    rest = run(made, method, tmp_path / "b", *arguments, "--stop-at", total, "--save-every", "1000", "--resume")
    assert len(all_seen) == int(total)
    assert_same(rest[1], all_seen[stop:])
    assert_same(rest[0], whole)


def plain_loop(method: str, steps: int, precision: str = "no"):
    model, (data, names, _) = make_model(0), make_data()
    loader = DataLoader(data, batch_sampler=DomainBatchSampler(names, example.BATCH_SIZE, seed=0))
    fish = Fish(0.05, inner_steps=DOMAINS, inner_state="reset", model=model, track_alignment=True)
    exact = IDGM(model, track_alignment=True)
    wrapped = torch.optim.AdamW(model.parameters(), lr=example.FISH_LR if method == "Fish" else example.ERM_LR)
    optimizer = GradMatch(wrapped, fish if method == "Fish" else exact)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100, gamma=0.9)

    def loss_fn(batch):
        with contextlib.nullcontext() if precision == "no" else torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[0])
        return torch.nn.functional.cross_entropy(logits.float(), batch[1])

    served = domain_batches if method == "Fish" else meta_batches
    for batch, _ in zip((batch for _ in range(9) for batch in served(loader)), range(steps), strict=False):
        if method == "exact":
            optimizer.meta_step(loss_fn, batch)
        else:
            optimizer.domain, batch = batch
            assert optimizer.domain == domain_of(*batch)
            optimizer.zero_grad()
            loss_fn(batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        scheduler.step()
    return dict(model.state_dict()), optimizer


@pytest.mark.parametrize(("method", "precision"), [("Fish", "no"), ("Fish", "bf16"), ("exact", "no")])
def test_it_is_the_plain_loop(made, tmp_path, method, precision):
    steps = 7 if method == "exact" else 2 * STEPS_IN_EPOCH + 3
    arguments = ["--precision", precision, "--stop-at", str(steps)]
    found, _ = run(made, method, tmp_path, *arguments)
    model, optimizer = plain_loop(method, steps, precision)
    assert_same(found["model"], model)
    assert_same(found["optimizer"], optimizer.state_dict())


def evaluated_every(steps: int, made, directory, monkeypatch):
    """Return the losses that were found on the held-out domain, and the state after 22 steps."""
    losses = []

    def measure(model, data):
        x, y = data.tensors
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(model.eval()(x), y))
        model.train()
        return 0.0

    monkeypatch.setattr(example, "accuracy", measure)
    state, _ = run(made, "Fish", directory, "--stop-at", "22", "--eval-every", str(steps))
    return losses, state


def test_evaluation_in_an_inner_loop_is_that_of_the_slow_weights(made, tmp_path, monkeypatch):
    """After 6, 12 and 18 steps it finds what it finds after 4, 12 and 16, and training goes on as without it."""
    inside, after = evaluated_every(6, made, tmp_path, monkeypatch)
    between, _ = evaluated_every(DOMAINS, made, tmp_path, monkeypatch)
    _, expected = evaluated_every(1000, made, tmp_path, monkeypatch)
    monkeypatch.setattr(GradMatch, "slow_weights", lambda _: contextlib.nullcontext())
    fast, _ = evaluated_every(6, made, tmp_path, monkeypatch)
    assert_same(inside, [between[0], between[2], between[3]])
    assert not torch.equal(inside[0], fast[0])
    assert torch.equal(inside[1], fast[1])
    assert_same(after, expected)


def test_models_are_saved_in_the_block_and_states_are_not(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = make_model(0)
    expected = copy.deepcopy(dict(model.state_dict()))
    gradmatch = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), Fish(inner_steps=DOMAINS, model=model))
    model, optimizer = accelerator.prepare(model, gradmatch)
    accelerator.backward(model(torch.randn(8, 1 + DOMAINS)).square().mean())
    optimizer.step()
    with gradmatch.slow_weights():
        accelerator.save_model(model, str(tmp_path))
        with pytest.raises(RuntimeError, match=r"state_dict\(\) inside slow_weights\(\)"):
            accelerator.save_state(str(tmp_path / "state"))
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_step_that_the_grad_scaler_skips_counts():
    """Accelerate wants a GPU for fp16, so here its optimizer gets the GradScaler that it would have there."""
    Accelerator(cpu=True)  # which its optimizer asks for
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
    model, (data, names, _) = make_model(0), make_data()
    loader = DataLoader(data, batch_sampler=DomainBatchSampler(names, batch_size=example.BATCH_SIZE))
    gradmatch = GradMatch(torch.optim.AdamW(model.parameters(), lr=0.1), Fish(inner_steps=DOMAINS, model=model))
    optimizer = AcceleratedOptimizer(gradmatch, device_placement=False, scaler=scaler)
    inner_steps, skipped = [], []
    for x, y in loader:
        inner_steps.append(gradmatch.inner_step)
        scale, before = scaler.get_scale(), [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.half):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        optimizer.step()
        skipped.append(scaler.get_scale() < scale)
        if gradmatch.inner_step > 0:  # the last of a group interpolates, too
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert moved == (not skipped[-1])
    assert inner_steps == [step % DOMAINS for step in range(STEPS_IN_EPOCH)]
    assert sum(skipped) % DOMAINS != 0


def test_one_inner_step_kept_whole_is_erm(made, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "check_loader", lambda *_: None)  # it would refuse one inner step with four domains
    monkeypatch.setattr(example, "Fish", lambda *_, model, **__: Fish(1.0, inner_steps=1, model=model))
    monkeypatch.setattr(example, "FISH_LR", example.ERM_LR)
    fish, _ = run(made, "Fish", tmp_path, "--stop-at", "21")
    erm, _ = run(made, "ERM", tmp_path, "--stop-at", "21")
    assert_same(fish["model"], erm["model"])
    assert_same(fish["scheduler"], erm["scheduler"])


def test_a_wrong_number_of_domains_is_an_error(made, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "Fish", lambda *_, **__: Fish(inner_steps=5))
    with pytest.raises(ValueError, match=r"inner_steps=5\).*domains_per_step=4"):
        run(made, "Fish", tmp_path)


def prepared(accelerator=None, **settings):
    model, (data, names, _) = make_model(0), make_data()
    sampler = DomainBatchSampler(names, batch_size=64)
    loader = DataLoader(data, batch_sampler=sampler)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), Fish(inner_steps=DOMAINS))
    return (accelerator or Accelerator(cpu=True, **settings)).prepare(optimizer, loader)


def accumulated(k, batch_size):
    """Train by Fish on what Accelerate adds up of k batches of a domain."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=k)
    data, names, _ = make_data()
    model = torch.nn.Sequential(torch.nn.Linear(1 + DOMAINS, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    gradmatch = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), Fish(0.5, inner_steps=DOMAINS))
    loader = DataLoader(data, batch_sampler=DomainBatchSampler(names, batch_size, accumulate=k))
    model, optimizer = accelerator.prepare(model, gradmatch)
    check_loader(optimizer, loader, accelerator.gradient_accumulation_steps)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(torch.nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(ValueError, match=rf"accumulation_steps={k + 1} .*accumulate={k + 1}"):
        check_loader(optimizer, loader, k + 1)
    accelerator.gradient_accumulation_steps = 1
    assert gradmatch.inner_step == 0
    return dict(model.state_dict())


def test_gradients_accumulated_in_a_domain_are_those_of_larger_batches():
    for name, value in accumulated(4, 16).items():
        torch.testing.assert_close(value, accumulated(1, 64)[name], rtol=1e-4, atol=1e-6)


def test_a_prepared_loader_is_an_error():
    """Accelerate would fetch a batch ahead, and have each of several processes serve other domains."""
    with pytest.raises(ValueError, match=r"as you made it \(got DataLoaderShard\): leave it out of what the"):
        check_loader(*prepared())


@pytest.mark.parametrize("method", ["ERM", "Fish", "exact"])
def test_log_holds_what_every_second_meta_iteration_measured(made, tmp_path, method):
    """At the steps 8 and 16, at the latter what the plain loop measures there."""
    run(made, method, tmp_path, "--stop-at", "19", "--log", str(tmp_path / "log"))
    board = EventAccumulator(str(tmp_path / "log" / method)).Reload()
    shown = {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}
    assert all(values.keys() == {8, 16} for values in shown.values())
    assert shown["loss"][16] > 0
    expected = {} if method == "ERM" else plain_loop(method, 16)[1].last_meta_step.scalars()
    assert len(expected) == {"ERM": 0, "Fish": 3 + DOMAINS, "exact": 5 + 2 * DOMAINS}[method]
    assert shown.keys() == {"loss"} | expected.keys()
    assert {tag: shown[tag][16] for tag in expected} == pytest.approx(expected, rel=1e-6)


def test_the_example_trains_and_resumes(made, tmp_path, capsys):
    arguments = ["--cpu", "--directory", str(tmp_path), "--save-every", "15"]
    first = example.main(["--epochs", "2", "--exact", *arguments, "--save-every", "2"])
    assert first.keys() == {"ERM", "Fish", "exact"}
    again = example.main(["--epochs", "3", *arguments, "--resume"])
    straight = example.main(["--epochs", "3", *arguments, "--directory", str(tmp_path / "other")])
    assert again == straight
    assert "Fish  accuracy on the held-out domain" in capsys.readouterr().out
