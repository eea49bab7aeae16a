"""What is Accelerate's own: saved models, its optimizer's loss scaling, gradients that it adds up."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _spurious_data import BATCH_SIZE, DOMAINS, make_data, make_model
from _training import STEPS_IN_EPOCH
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from torch_gradmatch import DomainBatchSampler, Fish, GradMatch, check_loader


@pytest.fixture(autouse=True)
def _no_settings_of_an_earlier_test() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_models_are_saved_in_the_block_and_states_are_not(tmp_path: Path):
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
    gradmatch = GradMatch(torch.optim.AdamW(model.parameters(), lr=0.1), Fish(inner_steps=DOMAINS, model=model))
    optimizer = AcceleratedOptimizer(gradmatch, device_placement=False, scaler=scaler)
    inner_steps, skipped = [], 0
    for x, y in DataLoader(data, batch_sampler=DomainBatchSampler(names, BATCH_SIZE)):
        inner_steps.append(gradmatch.inner_step)
        scale, before = scaler.get_scale(), model[0].weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.half):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        optimizer.step()
        skipped += scaler.get_scale() < scale
        if gradmatch.inner_step > 0:  # the last of a group interpolates, too
            assert torch.equal(model[0].weight, before) == (scaler.get_scale() < scale)
    assert inner_steps == [step % DOMAINS for step in range(STEPS_IN_EPOCH)]
    assert skipped % DOMAINS != 0


def test_a_prepared_loader_is_an_error():
    """Accelerate would fetch a batch ahead, and have each of several processes serve other domains."""
    (data, names, _), fish = make_data(), Fish(inner_steps=DOMAINS)
    loader = Accelerator(cpu=True).prepare(DataLoader(data, batch_sampler=DomainBatchSampler(names, BATCH_SIZE)))
    with pytest.raises(ValueError, match=r"as you made it \(got DataLoaderShard\): leave it out of what the"):
        check_loader(GradMatch(torch.optim.SGD(make_model(0).parameters(), lr=0.1), fish), loader)


def accumulated(k: int, batch_size: int) -> nn.Module:
    """Train by Fish on what Accelerate adds up of k batches of a domain."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=k)
    (data, names, _), model = make_data(), nn.Sequential(make_model(0)[0])
    gradmatch = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), Fish(0.5, inner_steps=DOMAINS))
    loader = DataLoader(data, batch_sampler=DomainBatchSampler(names, batch_size, accumulate=k))
    model, optimizer = accelerator.prepare(model, gradmatch)
    check_loader(optimizer, loader, accelerator.gradient_accumulation_steps)
    with pytest.raises(ValueError, match=rf"accumulation_steps={k + 1} .*accumulate={k + 1}"):
        check_loader(optimizer, loader, k + 1)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    assert gradmatch.inner_step == 0
    return model


def test_gradients_accumulated_in_a_domain_are_those_of_larger_batches():
    small, large = accumulated(4, 16).state_dict(), accumulated(1, 64).state_dict()
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-6)
