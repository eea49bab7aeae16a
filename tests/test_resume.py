"""A training process is killed in the middle of an inner loop; a new one resumes to bit-identical parameters."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _layout import numbers_of
from _models import FeatureNet, assert_identical, assert_same_state, loss_of, make_batches
from _wrapped import ITERATES
from torch.optim import SGD

from torch_gradmatch import Fish, GradMatch

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
    assert numbers_of(halfway["optimizer"])["inner_step"] == 2
    assert run(broken, 0, inner_state) == 0
    assert_identical(torch.load(broken, weights_only=True), torch.load(whole, weights_only=True))


FORMAT_1 = torch.load(Path(__file__).with_name("saved_in_format_1.pt"), weights_only=True)


@pytest.mark.parametrize("case", FORMAT_1)
def test_a_state_dict_of_format_1_resumes_as_the_package_that_wrote_it_did(case: str):
    """Written, and continued to the end of thirteen steps, by the version of 24 November 2026 (commit 4858e78).

    Of the slow buffers wider than the model's that version saved nothing between two inner loops.
    """
    saved = FORMAT_1[case]
    dtype = torch.float32 if case.startswith("float32") else torch.float64
    model = FeatureNet(torch.Generator().manual_seed(9), dtype=dtype)
    method = Fish(
        0.3,
        inner_steps=4,
        inner_state="reset" if "reset" in case else "carry",
        model=model,
        track_alignment=True,
        meta_dtype=torch.float64 if dtype is torch.float32 else None,
    )
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=0.05), method)
    model.load_state_dict(saved["model"])
    assert saved["optimizer"]["gradmatch"]["version"] == 1
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.inner_step == saved["steps"] % 4
    for batch in make_batches(torch.Generator().manual_seed(1), 13, dtype=dtype)[saved["steps"] :]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    assert_same_state(dict(model.state_dict()), dict(saved["expected"]), rtol=1e-5 if dtype is torch.float32 else 1e-11)


FORMAT_3 = torch.load(Path(__file__).with_name("saved_in_format_3.pt"), weights_only=True)


@pytest.mark.parametrize("case", FORMAT_3)
def test_a_state_dict_of_format_3_resumes_as_the_package_that_wrote_it_did(case: str):
    """Written, and continued to the end of thirteen steps, by commit 860abf5 of 24 November 2026."""
    saved = FORMAT_3[case]
    dtype = torch.float32 if case.startswith("float32") else torch.float64
    model = FeatureNet(torch.Generator().manual_seed(9), dtype=dtype)
    parameters = list(model.parameters())
    wrapped: Any = torch.optim.Adam(parameters, lr=0.05)
    if case.startswith(("schedule-free", "Lookahead")):
        wrapped = ITERATES["Lookahead" if case.startswith("Lookahead") else "ScheduleFreeSGD"][0](parameters)
    elif case.startswith("several"):
        wrapped = [SGD(parameters[:3], lr=0.05, momentum=0.9), torch.optim.Adam(parameters[3:], lr=0.05)]
    method = Fish(
        0.3,
        inner_steps=4,
        inner_state="reset" if "reset" in case else "carry",
        model=model,
        track_alignment="pairs" if "pairs" in case else True,
        meta_dtype=torch.float64 if dtype is torch.float32 else None,
    )
    optimizer = GradMatch(wrapped, method)
    model.load_state_dict(saved["model"])
    assert saved["optimizer"]["gradmatch"]["version"] == 3
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.inner_step == saved["steps"] % 4
    again = copy.deepcopy(optimizer.state_dict())  # in the present format
    optimizer.load_state_dict(again)
    for batch in make_batches(torch.Generator().manual_seed(1), 13, dtype=dtype)[saved["steps"] :]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    assert_same_state(dict(model.state_dict()), dict(saved["expected"]), rtol=1e-5 if dtype is torch.float32 else 1e-11)
