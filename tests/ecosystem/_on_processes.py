"""Training in a framework, on however many processes torchrun starts: ``torchrun _on_processes.py NAME DIRECTORY``.

Writes what it ends with to ``NAME.pt``: a state by case, and what was raised. At last it runs the example. The examples
are as they are, but with a network without BatchNorm, which follows each process's own part of a batch, and in double
precision, so that what differs between one process and several is rounding.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from _models import assert_identical
from _spurious_data import BATCH_SIZE, DOMAINS
from torch import Tensor, nn

STEPS, SAVED = 39, 22  # two epochs of 16 steps and seven more; in an inner loop of the second
BETWEEN = 20  # two inner loops of the second epoch
SIZE = int(os.environ.get("WORLD_SIZE", "1"))
SETTINGS: dict[str, dict[str, Any]] = {
    "accelerate": {},
    "lightning": {"devices": SIZE, "strategy": "ddp" if SIZE > 1 else "auto"},
    "trainer": {"per_device_train_batch_size": BATCH_SIZE // SIZE},
}


def make_model(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(1 + DOMAINS, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 2))


def whole(value: Any) -> Any:
    """Copy a state, with shards put together."""
    if isinstance(value, Tensor):
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        return full.detach().clone()
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    return [whole(entry) for entry in value] if isinstance(value, list | tuple) else value


def train_each(name: str, directory: Path) -> dict[str, Any]:
    framework = importlib.import_module(f"_in_{name}")
    framework.example.make_model = make_model

    def train(steps: int, method: str = "Fish", where: str = "fish", **settings: Any) -> dict[str, Any]:
        trained = framework.train(directory / where, steps, method, **SETTINGS[name], **settings)
        assert {hasattr(parameter, "full_tensor") for parameter in trained.network.parameters()} == {where == "sharded"}
        optimizer, state = trained.optimizer, trained.state()
        found = {"network": state["network"], "optimizer": state["optimizer"]["state"]}
        found |= {"slow": state["optimizer"]["gradmatch"].get("slow_weights", {}), "inner_step": optimizer.inner_step}
        found |= {"steps": trained.schedule.last_epoch, "measured": optimizer.last_meta_step.scalars()}
        return whole(found)

    found: dict[str, Any] = {"fish": train(STEPS)}
    train(SAVED, save_every=SAVED)
    found["resumed"] = train(STEPS, resume_from=SAVED)
    if name != "trainer":
        found["exact"] = train(7, "exact")
    if SIZE > 1 and name == "accelerate":
        found |= train_sharded(framework, train)
    return found


def train_sharded(framework: Any, train: Callable[..., Any]) -> dict[str, Any]:
    """Train by FSDP2 on CPUs: Accelerate has it for accelerators only."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    def sharding(**settings: Any) -> Accelerator:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        accelerator = Accelerator(**settings, fsdp_plugin=plugin)
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        return accelerator

    as_it_is, found = PartialState().distributed_type, {}
    with mock.patch.object(framework.example, "Accelerator", sharding):
        found["sharded"] = train(STEPS, where="sharded")
        try:
            train(STEPS, where="sharded", save_every=SAVED)
        except KeyError as error:
            found["said in mid-loop"] = str(error)
        train(BETWEEN, where="sharded", save_every=BETWEEN)
        found["sharded, resumed"] = train(STEPS, where="sharded", resume_from=BETWEEN)
    PartialState().distributed_type = as_it_is
    AcceleratorState._reset_state()
    return found


def main(name: str, directory: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore", module="lightning|transformers")
    found = train_each(name, directory)
    if SIZE > 1:
        everything: list[Any] = [None] * SIZE
        dist.all_gather_object(everything, found)
        for other in everything:
            assert_identical(other, found)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, directory / f"{name}.pt")
    if SIZE > 1:
        arguments = ["--epochs", "1", "--directory", str(directory / "example")]
        importlib.import_module(f"with_{name}").main(arguments + (["--cpu"] if name == "accelerate" else []))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
