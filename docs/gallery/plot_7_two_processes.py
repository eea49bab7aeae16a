"""
Two processes
=============

With a ``process_group`` every rank walks through the domains by itself, with other samples and in another order, and
the meta-update goes to the mean of the walks: one all-reduce of the parameters in a meta-iteration.

What runs on each process is a script like any other. torchrun starts it twice; the processes talk by gloo.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

TRAINING = r"""
import gc
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_gradmatch import DomainBatchSampler, Fish, GradMatch, check_loader, meta_batches

torch.set_num_threads(1)


def main():
    torch.manual_seed(0)  # the same data and the same initial parameters on every rank
    features = torch.randn(3 * 256, 8)
    labels = (features.sum(1) > 0).long()
    names = [("north", "south", "west")[number % 3] for number in range(len(features))]

    sampler = DomainBatchSampler(
        names, batch_size=16, num_replicas=dist.get_world_size(), rank=dist.get_rank(), split="walks"
    )
    loader = DataLoader(TensorDataset(features, labels), batch_sampler=sampler)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
    walks = Fish(meta_lr=0.5, inner_steps=3, inner_state="reset", model=model, process_group=dist.group.WORLD)
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), walks)
    check_loader(optimizer, loader)

    for epoch in range(5):
        for batches in meta_batches(loader):
            report = optimizer.meta_step(lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), batches)
        shown = f"rank {dist.get_rank()}, epoch {epoch}: {', '.join(report.domains)}"
        weights = [p.detach().clone() for p in model.parameters()]
        others = [[torch.empty_like(w) for _ in range(dist.get_world_size())] for w in weights]
        for weight, of_ranks in zip(weights, others):
            dist.all_gather(of_ranks, weight)
        same = all(torch.equal(of_ranks[0], other) for of_ranks in others for other in of_ranks)
        # One write for each line: the ranks share what they write to.
        sys.stdout.write(f"{shown}; loss {report.losses.mean():.3f}; same bits on all ranks: {same}\n")
        sys.stdout.flush()


dist.init_process_group("gloo")
main()
gc.collect()  # gloo's threads end with the group, if nothing refers to it; at exit it would be too late for them
dist.destroy_process_group()
"""

with tempfile.TemporaryDirectory() as folder:
    script = Path(folder, "training.py")
    script.write_text(TRAINING, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run([*torchrun, str(script)], capture_output=True, text=True, check=False, timeout=240)
lines = sorted(line for line in finished.stdout.splitlines() if line.startswith("rank"))
print("\n".join(lines))
if finished.returncode:
    raise RuntimeError(f"training ended with {finished.returncode}:\n{finished.stderr}")

# %%
# The two ranks walk in opposite orders: the mean of their walks is the direction of the exact objective to second order
# in the step. After each meta-iteration both hold the same bits.
