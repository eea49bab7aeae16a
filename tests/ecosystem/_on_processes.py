"""Training in a framework, on however many processes torchrun starts: ``torchrun _on_processes.py NAME DIRECTORY``.

Writes what it ends with to ``NAME.pt``: a state by case, and what was raised. At last it runs the example. The examples
are as they are, but with a network without BatchNorm, which follows each process's own part of a batch, and in double
precision, so that what differs between one process and several is rounding.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from _spurious_data import BATCH_SIZE, DOMAINS, make_data
from _training import Trained
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torch_gradmatch import DomainBatchSampler, Fish, GradMatch, check_loader

STEPS, SAVED = 39, 22  # two epochs of 16 steps and seven more; in an inner loop of the second
BETWEEN = 20  # two inner loops of the second epoch
SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANKS = {"num_replicas": SIZE, "rank": int(os.environ.get("RANK", "0")), "split": "batch"}


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


def state(trained: Trained, **more: Any) -> dict[str, Any]:
    optimizer, report = trained.optimizer, trained.optimizer.last_meta_step
    saved = optimizer.state_dict()
    found = {"model": dict(trained.network.state_dict()), "optimizer": saved["state"]}
    found |= {"slow": saved["gradmatch"].get("slow_weights", {}), "inner_step": optimizer.inner_step}
    found |= {"measured": None if report is None else report.scalars(), "steps": trained.schedule.last_epoch}
    return whole(found | more)


def raised(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:  # noqa: BLE001  a test looks at it
        return re.sub(r" at 0x\w+|this is rank \d ", "", f"{type(error).__name__}: {error}")
    return "nothing"


# ----------------------------------------------------------------------------------------------------------- Accelerate


def in_accelerate(directory: Path) -> dict[str, Any]:
    import _in_accelerate
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin

    _in_accelerate.example.make_model = make_model

    def train(steps: int, method: str = "Fish", where: str = "fish", **settings: Any) -> dict[str, Any]:
        trained = _in_accelerate.train(directory / where, steps, method, **settings)
        assert {hasattr(parameter, "full_tensor") for parameter in trained.network.parameters()} == {where == "sharded"}
        return state(trained, place=trained.place["_index_sampler_state"]["position"])

    def sharding(**settings: Any) -> Accelerator:
        """FSDP2 on CPUs: Accelerate has it for accelerators only."""
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        accelerator = Accelerator(**settings, fsdp_plugin=plugin)
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        return accelerator

    def prepared(split_batches: bool, **settings: Any) -> None:
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=split_batches))
        data, names, _ = make_data()
        loader = DataLoader(data, batch_sampler=DomainBatchSampler(names, BATCH_SIZE, **settings))
        optimizer = GradMatch(torch.optim.SGD(make_model().parameters(), 0.1), Fish(inner_steps=DOMAINS))
        check_loader(*accelerator.prepare(optimizer, loader))

    found: dict[str, Any] = {"fish": train(STEPS), "stopped": train(SAVED, save_every=SAVED)}
    found |= {"resumed": train(STEPS, resume_from=SAVED), "exact": train(7, "exact")}
    if SIZE > 1:
        as_it_is = PartialState().distributed_type
        with mock.patch.object(_in_accelerate.example, "Accelerator", sharding):
            sharded = partial(train, where="sharded")
            found["sharded"] = sharded(STEPS)
            found["sharded, in mid-loop"] = raised(lambda: sharded(STEPS, save_every=SAVED))
            sharded(BETWEEN, save_every=BETWEEN)
            found["sharded, resumed"] = sharded(STEPS, resume_from=BETWEEN)
        PartialState().distributed_type = as_it_is
        found["apart"] = raised(lambda: prepared(False))
        found["twice"] = raised(lambda: prepared(True, **RANKS))
    AcceleratorState._reset_state()
    return found


# ------------------------------------------------------------------------------------------------------------ Lightning


def in_lightning(directory: Path) -> dict[str, Any]:
    import _in_lightning

    _in_lightning.example.make_model = make_model

    def fit(steps: int, method: str = "Fish", **settings: Any) -> dict[str, Any]:
        where = {"devices": SIZE, "strategy": "ddp" if SIZE > 1 else "auto"}
        return state(_in_lightning.train(directory, steps, method, save_every=SAVED, **where, **settings))

    def bare(distributed: bool, **ranks: Any) -> str:
        class Bare(_in_lightning.Recording):
            """Its loader is a DataLoader, which Lightning changes."""

            def train_dataloader(self) -> Any:
                return DataLoader(self.data, batch_sampler=DomainBatchSampler(self.domains, BATCH_SIZE, **ranks))

        return raised(lambda: fit(5, use_distributed_sampler=distributed, kind=Bare))

    found: dict[str, Any] = {"fish": fit(STEPS), "resumed": fit(STEPS, resume_from=SAVED), "exact": fit(7, "exact")}
    if SIZE > 1:
        found |= {"apart": bare(False), "bare": bare(False, **RANKS), "twice": bare(True, **RANKS)}
    return found


# -------------------------------------------------------------------------------------------------------------- Trainer


def in_trainer(directory: Path) -> dict[str, Any]:
    import _in_trainer

    example = _in_trainer.example
    example.make_model = make_model

    def train(**settings: Any) -> dict[str, Any]:
        size = {"per_device_train_batch_size": BATCH_SIZE // SIZE}
        return state(_in_trainer.train(directory, STEPS, **size, **settings))

    def prepared(**ranks: Any) -> str:
        class Prepared(example.DomainTrainer):
            def get_train_dataloader(self) -> Any:
                sampler = DomainBatchSampler(self.domains, BATCH_SIZE, **ranks)
                loader = self.accelerator.prepare(DataLoader(self.train_dataset, batch_sampler=sampler))
                check_loader(self.gradmatch, loader)
                return loader

        with mock.patch.object(example, "DomainTrainer", Prepared):
            return raised(train)

    found: dict[str, Any] = {"fish": train(save_every=SAVED), "resumed": train(resume_from=SAVED)}
    return found | ({"apart": prepared(), "twice": prepared(**RANKS)} if SIZE > 1 else {})


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore", module="lightning|transformers")
    name, directory = sys.argv[1], Path(sys.argv[2])
    found = {"accelerate": in_accelerate, "lightning": in_lightning, "trainer": in_trainer}[name](directory)
    if SIZE > 1:
        everything: list[Any] = [None] * SIZE
        dist.all_gather_object(everything, found)
        for case, value in found.items():  # what is said, and the weights, are the same on all
            for other in everything:
                if isinstance(value, str):
                    assert other[case] == value
                else:
                    assert all(torch.equal(other[case]["model"][key], value["model"][key]) for key in value["model"])
    if RANKS["rank"] == 0:
        torch.save(found, directory / f"{name}.pt")
    if SIZE > 1:
        arguments = ["--epochs", "1", "--directory", str(directory / "example")]
        importlib.import_module(f"with_{name}").main(arguments + (["--cpu"] if name == "accelerate" else []))


if __name__ == "__main__":
    main()
