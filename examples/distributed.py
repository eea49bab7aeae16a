"""Gradient matching on several processes: ``torchrun --nproc-per-node 2 examples/distributed.py --parallel walks``.

Four training domains disagree on a shortcut, which is of no use in the fifth (``_spurious_data.py``). ``--parallel``
says how the processes share the work of a meta-iteration:

- ``ddp``: ``DistributedDataParallel``. All walk together: each has its part of every batch, and the gradients are
  averaged in every step.
- ``fsdp``: the same with ``fully_shard``: parameters, gradients, optimizer state and slow weights are sharded.
- ``walks``: each process walks through the domains by itself, in another order and with other samples, and the
  meta-update goes to the mean of the walks: one all-reduce of the parameters where ``ddp`` has one for every domain.
- ``domains``: the exact objective. Each process has some of the domains, and works out their gradients and
  Hessian-vector products: two all-reduces, however many domains there are.

With ``--checkpoint DIRECTORY`` it saves by ``torch.distributed.checkpoint``, and the same command goes on from there,
also on another number of processes and after being killed: then bit for bit if their number is the same.
``torchrun --max-restarts 3`` starts it again by itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _spurious_data import DOMAINS, accuracy, make_data
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from torch_gradmatch import IDGM, DomainBatchSampler, Fish, GradMatch, check_loader, meta_batches

BATCH_SIZE = 32  # of each domain: all processes together by ddp and fsdp, each process by walks and domains
SPLITS = {"ddp": "batch", "fsdp": "batch", "walks": "walks", "domains": "domains"}


def make_model(parallel: str, device: torch.device) -> nn.Module:
    """Build the same network on every process, and wrap it where gradients are averaged.

    Returns:
        The network.
    """
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(1 + DOMAINS, 32), nn.GELU(), nn.Linear(32, 2)).to(device)
    if parallel == "ddp":
        return DistributedDataParallel(model)
    if parallel == "fsdp":
        return fully_shard(model)
    return model


def make_optimizer(parallel: str, model: nn.Module) -> GradMatch:
    """Wrap an optimizer by the method that goes with ``--parallel``.

    Returns:
        The wrapper.
    """
    if parallel == "domains":
        method = IDGM(model, process_group=dist.group.WORLD, parallel="domains")
        return GradMatch(torch.optim.Adam(model.parameters(), lr=0.01), method)
    walks = {"process_group": dist.group.WORLD, "inner_state": "reset"} if parallel == "walks" else {}
    fish = Fish(meta_lr=0.5, model=model, track_alignment=True, **walks)
    return GradMatch(torch.optim.SGD(model.parameters(), lr=0.3), fish)


def join() -> tuple[int, int]:
    """Join the other processes: ``init_process_group()``, and fit to be started again by torchrun.

    The store by which processes find each other outlives them. In one that was started again they would find the
    addresses of those before (gloo, torch 2.13), so each start has its own part of it.

    Returns:
        The number of this process and how many there are.
    """
    store, rank, size = next(iter(dist.rendezvous("env://")))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(store=dist.PrefixStore(f"start {start}", store), rank=rank, world_size=size)
    return rank, size


class Checkpoints:
    """Checkpoints in a directory, of which the last whole one counts.

    Args:
        directory: Where; None for no checkpoints.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def whole(self) -> list[Path]:
        """Return the checkpoints that were written to the end, oldest first: their ``.metadata`` comes last."""
        found = [] if self.directory is None else self.directory.glob("step-*/.metadata")
        return sorted(path.parent for path in found)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write one, and remove all but the last two."""
        if self.directory is None:
            return
        path = self.directory / f"step-{step:08}"
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)  # a part of one, of a process that was killed
        dist.barrier()
        dcp.save(state, checkpoint_id=path)
        if dist.get_rank() == 0:
            for old in self.whole()[:-2]:
                shutil.rmtree(old)

    def load(self, state: dict[str, Any]) -> bool:
        """Read the last one into the tensors of a state.

        Returns:
            Whether there is one.
        """
        dist.barrier()  # or one process might see a checkpoint that another still removes
        found = self.whole()
        if found:
            dcp.load(state, checkpoint_id=found[-1])
        return bool(found)


def main(arguments: list[str] | None = None) -> float:
    """Train, or go on training, and evaluate.

    Returns:
        The accuracy in the domain that training does not show.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parallel", choices=list(SPLITS), default="walks")
    parser.add_argument("--steps", type=int, default=200, help="meta-iterations")
    parser.add_argument("--checkpoint", type=Path, help="directory to go on from, if it has a checkpoint, and to write")
    parser.add_argument("--save-every", type=int, default=20, help="meta-iterations between two checkpoints")
    options = parser.parse_args(arguments)

    rank, size = join()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)

    data, domains, unseen = make_data()
    sampler = DomainBatchSampler(
        domains, BATCH_SIZE, exhausted="cycle", num_replicas=size, rank=rank, split=SPLITS[options.parallel]
    )
    loader = DataLoader(data, batch_sampler=sampler)
    model = make_model(options.parallel, device)
    optimizer = make_optimizer(options.parallel, model)
    check_loader(optimizer, meta_batches(loader, sampler.batches_per_group))

    def state() -> dict[str, Any]:
        weights, of_optimizer = get_state_dict(model, optimizer)  # without the gamma that IDGM has found
        gamma = getattr(optimizer.last_meta_step, "gamma", None) or 0.0
        sampled = {"sampler": sampler.state_dict(), "step": step, "gamma": gamma}
        return {"model": weights, "optimizer": of_optimizer, **sampled}

    checkpoints, step = Checkpoints(options.checkpoint), 0
    saved = state()
    if checkpoints.load(saved):
        if isinstance(optimizer.method, IDGM):
            optimizer.method.gamma = saved["gamma"]
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        sampler.load_state_dict(saved["sampler"])
        step = saved["step"]

    def loss_fn(batch: list[Tensor]) -> Tensor:
        x, y = (part.to(device) for part in batch)
        return nn.functional.cross_entropy(model(x), y)

    bar = tqdm(total=options.steps, initial=step, disable=rank != 0)
    while step < options.steps:
        for batches in meta_batches(loader, sampler.batches_per_group):
            report = optimizer.meta_step(loss_fn, batches)
            step += 1
            bar.update()
            if step % 10 == 0:
                bar.set_postfix({name: f"{value:.3f}" for name, value in report.scalars().items() if "/" not in name})
            if step % options.save_every == 0 or step == options.steps:
                checkpoints.save(step, state())
            if step == options.steps:
                break
    bar.close()

    found = accuracy(model, unseen)
    if rank == 0:
        print(f"{options.parallel} on {size} processes: accuracy {found:.3f} in the unseen domain")
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors this small more would only wait for one another
    main()
