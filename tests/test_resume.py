"""A training process is killed in the middle of an inner loop; a new one resumes to bit-identical parameters."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _models import assert_identical

TRAINING = """
import os, signal, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch_gradmatch import DomainBatchSampler, Fish, GradMatch

checkpoint, kill_after, inner_state = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
x, y = torch.randn(120, 4), torch.randn(120, 1)
domains = torch.arange(120) % 4
model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
optimizer = GradMatch(
    torch.optim.AdamW(model.parameters(), lr=1e-2),
    Fish(meta_lr=0.3, inner_steps=4, inner_state=inner_state, model=model, track_alignment=True),
)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=40)
sampler = DomainBatchSampler(domains, batch_size=8, seed=1)
# With a generator of its own the loader does not draw from the one that dropout uses each time it is iterated anew.
loader = DataLoader(TensorDataset(x, y), batch_sampler=sampler, generator=torch.Generator())
step = 0
if os.path.exists(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    sampler.load_state_dict(saved["sampler"])
    torch.set_rng_state(saved["random"])
    step = saved["step"]
while step < 40:
    for inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        scheduler.step()
        step += 1
        torch.save({
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
            "sampler": sampler.state_dict(), "random": torch.get_rng_state(), "step": step,
        }, checkpoint + ".new")
        os.replace(checkpoint + ".new", checkpoint)
        if step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 40:
            break
"""


def run(checkpoint: Path, kill_after: int, inner_state: str) -> int:
    command = [sys.executable, "-W", "error", "-c", TRAINING, str(checkpoint), str(kill_after), inner_state]
    return subprocess.run(command, timeout=240, check=False).returncode


@pytest.mark.parametrize("inner_state", ["carry", pytest.param("reset", marks=pytest.mark.large)])
def test_killed_and_resumed_training_ends_bit_for_bit_where_it_would_have(inner_state: str, tmp_path: Path):
    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    assert run(whole, 0, inner_state) == 0
    assert run(broken, 18, inner_state) == -signal.SIGKILL  # two inner steps into the fifth meta-iteration
    halfway = torch.load(broken, weights_only=True)
    assert halfway["optimizer"]["gradmatch"]["inner_step"] == 2
    assert run(broken, 0, inner_state) == 0
    assert_identical(torch.load(broken, weights_only=True), torch.load(whole, weights_only=True))
