"""
Resume after a kill
===================

A training process is killed in the middle of an inner loop, where the model holds the fast weights. Another one goes on
from its checkpoint, and ends bit for bit where a run that was not killed ends.

What a checkpoint needs: the model, the optimizer (``GradMatch`` saves the slow weights and the place in the inner loop
with the wrapped optimizer's state), the sampler, and the random state that dropout draws from.
"""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TRAINING = """
import os, signal, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_gradmatch import DomainBatchSampler, Fish, GradMatch

path, kill_after = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
dataset, domains = TensorDataset(torch.randn(120, 4), torch.randn(120, 1)), torch.arange(120) % 4
model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
optimizer = GradMatch(torch.optim.AdamW(model.parameters(), lr=1e-2), Fish(meta_lr=0.3, inner_steps=4, model=model))
sampler = DomainBatchSampler(domains, batch_size=8)
# With a generator of its own the loader draws nothing from the random state that dropout uses.
loader = DataLoader(dataset, batch_sampler=sampler, generator=torch.Generator())
parts = {"model": model, "optimizer": optimizer, "sampler": sampler}
step = 0
if os.path.exists(path):
    saved = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["random"])
    step = saved["step"]
    print(f"resume after step {step}, with {optimizer.inner_step} inner steps taken since the last interpolation")
while step < 40:
    for inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        step += 1
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**state, "random": torch.get_rng_state(), "step": step}, path + ".new")
        os.replace(path + ".new", path)  # a kill while it is written leaves the one before
        if step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 40:
            break
print(f"end after step {step}")
"""


def train(path, kill_after=0):
    """Run the training in a process of its own; return what it prints, and how it ends."""
    command = [sys.executable, "-c", TRAINING, str(path), str(kill_after)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    if finished.returncode not in {0, -signal.SIGKILL}:
        raise RuntimeError(finished.stderr)
    return finished.stdout.strip(), finished.returncode


# %%
# One run to the end; one that is killed after step 18, two inner steps into the fifth meta-iteration; and the one that
# goes on from there.

with tempfile.TemporaryDirectory() as folder:
    whole, broken = Path(folder, "whole.pt"), Path(folder, "broken.pt")
    print("whole:", *train(whole))
    print("killed:", *train(broken, kill_after=18))
    print("resumed:", *train(broken))
    expected, found = torch.load(whole, weights_only=True), torch.load(broken, weights_only=True)

# %%
# All parameters and buffers have the same bits.

same = {name: torch.equal(found["model"][name], value) for name, value in expected["model"].items()}
print(same)
if not all(same.values()):
    raise RuntimeError("the resumed run ended elsewhere")
