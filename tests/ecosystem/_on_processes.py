"""Training in a framework, on however many processes torchrun starts: ``torchrun _on_processes.py NAME DIRECTORY``.

Writes what it ends with to ``NAME.pt``: a state by case, and what was raised. At last it runs the example. The examples
are as they are, but with a network without BatchNorm, which follows each process's own part of a batch, and in double
precision, so that what differs between one process and several is rounding.
"""

from __future__ import annotations

import copy
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _spurious_data import BATCH_SIZE, DOMAINS, make_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from torch_gradmatch import DomainBatchSampler, Fish, GradMatch, check_loader

STEPS, SAVED = 39, 22  # two epochs of 16 steps and seven more; in an inner loop of the second
BETWEEN = 20  # two inner loops of the second epoch
SIZE = int(os.environ.get("WORLD_SIZE", "1"))
SIZES = [256, 192, 100, 130]  # of the domains, where their last batches are smaller


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
    return [whole(entry) for entry in value] if isinstance(value, list | tuple) else copy.deepcopy(value)


def state(model: nn.Module, optimizer: GradMatch, **more: Any) -> dict[str, Any]:
    weights = {name.removeprefix("module."): value for name, value in model.state_dict().items()}
    saved, report = optimizer.state_dict(), optimizer.last_meta_step
    kept = {key: entry for key, entry in saved["state"].items() if isinstance(key, int)}
    slow = {key: saved["gradmatch"].get(key, {}) for key in ("slow_weights", "slow_buffers")}
    found = {"model": weights, "optimizer": kept, "slow": slow, "inner_step": optimizer.inner_step}
    return whole(found | {"measured": None if report is None else report.scalars()} | more)


def raised(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:  # noqa: BLE001  a test looks at it
        return re.sub(r" at 0x\w+|this is rank \d ", "", f"{type(error).__name__}: {error}")
    return "nothing"


def uneven() -> tuple[Subset[Any], list[str]]:
    data, names, _ = make_data()
    kept = [index for index in range(DOMAINS * 256) if index % 256 < SIZES[index // 256]]
    return Subset(data, kept), [names[index] for index in kept]


def ranks() -> dict[str, Any]:
    return {"num_replicas": SIZE, "rank": int(os.environ.get("RANK", "0")), "split": "batch"}


# ----------------------------------------------------------------------------------------------------------- Accelerate


def in_accelerate(directory: Path) -> dict[str, Any]:
    import with_accelerate as example
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin

    made: list[Any] = []
    kinds: set[type] = set()
    sharded = False

    class Remembered(Accelerator):
        def __init__(self, *args: Any, **settings: Any) -> None:
            AcceleratorState._reset_state()
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
            super().__init__(*args, **settings, **({"fsdp_plugin": plugin} if sharded else {}))
            made.append(self)
            if sharded and self.num_processes > 1:  # which Accelerate has for accelerators only
                PartialState().distributed_type = self.state.distributed_type = DistributedType.FSDP
                self.state.fsdp_plugin = plugin

    def train(method: str, where: str, *arguments: str) -> dict[str, Any]:
        options = example.make_parser().parse_args(["--cpu", "--epochs", "4", *arguments])
        model, _ = example.train(method, options, directory / where)
        accelerator = made[-1]
        kinds.update({type(parameter) for parameter in model.parameters()} if sharded else ())
        scheduler, loader = accelerator._schedulers[0], accelerator._custom_objects[0]
        place = loader.state_dict()["_index_sampler_state"]["position"]
        more = {"steps": scheduler.scheduler.last_epoch, "place": place}
        return state(model, accelerator._optimizers[0].optimizer, **more)

    def by_itself() -> dict[str, Any]:
        """A sampler that splits, and a loader that is not prepared."""
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
        (data, names), model = uneven(), make_model()
        sampler = DomainBatchSampler(names, 32, exhausted="cycle", **ranks())
        fish = Fish(0.05, inner_steps=DOMAINS, inner_state="reset", model=model)
        optimizer = gradmatch = GradMatch(torch.optim.AdamW(model.parameters(), 0.3), fish)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        loader = DataLoader(data, batch_sampler=sampler)
        check_loader(optimizer, loader)
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x.to(accelerator.device)), y))
            optimizer.step()
            scheduler.step()
        return state(model, gradmatch, steps=scheduler.scheduler.last_epoch)

    def prepared(split_batches: bool, **settings: Any) -> None:
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=split_batches))
        data, names, _ = make_data()
        loader = DataLoader(data, batch_sampler=DomainBatchSampler(names, BATCH_SIZE, **settings))
        optimizer = GradMatch(torch.optim.SGD(make_model().parameters(), 0.1), Fish(inner_steps=DOMAINS))
        check_loader(*accelerator.prepare(optimizer, loader))

    example.Accelerator, example.make_model = Remembered, make_model
    to_the_end = ("--stop-at", str(STEPS), "--save-every", "1000")
    found: dict[str, Any] = {
        "fish": train("Fish", "fish", *to_the_end),
        "stopped": train("Fish", "fish", "--stop-at", str(SAVED), "--save-every", str(SAVED)),
        "resumed": train("Fish", "fish", *to_the_end, "--resume"),
        "exact": train("exact", "exact", "--stop-at", "7"),
        "by itself": by_itself(),
    }
    sharded, as_it_is = True, PartialState().distributed_type
    if SIZE > 1:
        found["sharded"] = train("Fish", "sharded", *to_the_end)
        assert len(kinds) == 1
        assert kinds.pop().__name__ == "DTensor"
        found["sharded, in mid-loop"] = raised(lambda: train("Fish", "mid-loop", "--save-every", str(SAVED)))
        train("Fish", "sharded", "--stop-at", str(BETWEEN), "--save-every", str(BETWEEN))
        found["sharded, resumed"] = train("Fish", "sharded", *to_the_end, "--resume")
    sharded, PartialState().distributed_type = False, as_it_is
    if SIZE > 1:
        found["apart"] = raised(lambda: prepared(False))
        found["twice"] = raised(lambda: prepared(True, **ranks()))
    AcceleratorState._reset_state()
    return found


# ------------------------------------------------------------------------------------------------------------ Lightning


def in_lightning(directory: Path) -> dict[str, Any]:
    import lightning
    import with_lightning as example
    from lightning.pytorch.callbacks import ModelCheckpoint

    from torch_gradmatch.integrations.lightning import GradMatchCallback

    example.make_model = make_model

    class Bare(example.Classifier):
        """Its loader is a DataLoader, which Lightning changes."""

        settings: dict[str, Any]

        def train_dataloader(self) -> Any:
            return DataLoader(self.data, batch_sampler=DomainBatchSampler(self.domains, BATCH_SIZE, **self.settings))

    def fit(
        where: str, max_steps: int, resume: bool = False, split: bool = False, model: Any = None, method: str = "Fish"
    ) -> dict[str, Any]:
        model = example.Classifier(method) if model is None else model
        callback = GradMatchCallback()
        callback.on_train_end = lambda *_: None  # stop where training stops, for the comparison
        saver = ModelCheckpoint(directory / where, "{step}", every_n_train_steps=SAVED, save_top_k=-1)
        trainer = lightning.Trainer(
            max_steps=max_steps,
            callbacks=[saver, callback],
            accelerator="cpu",
            devices=SIZE,
            strategy="ddp" if SIZE > 1 else "auto",
            use_distributed_sampler=split,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            gradient_clip_val=0.5 if model.automatic_optimization else None,
        )
        trainer.fit(model, ckpt_path=directory / where / f"step={SAVED}.ckpt" if resume else None)
        return state(model, trainer.optimizers[0], steps=trainer.lr_scheduler_configs[0].scheduler.last_epoch)

    def bare(distributed: bool, **settings: Any) -> str:
        model = Bare()
        model.settings = settings
        return raised(lambda: fit("bare", 5, split=distributed, model=model))

    found: dict[str, Any] = {
        "fish": fit("fish", STEPS),
        "resumed": fit("fish", STEPS, resume=True),
        "exact": fit("exact", 7, method="exact"),
    }
    if SIZE > 1:
        found["apart"] = bare(False)
        found["bare"] = bare(False, **ranks())
        found["twice"] = bare(True, **ranks())
    return found


# -------------------------------------------------------------------------------------------------------------- Trainer


def in_trainer(directory: Path) -> dict[str, Any]:
    import with_trainer as example

    example.make_model = make_model

    def train(resume: bool = False, **settings: Any) -> dict[str, Any]:
        arguments = {"use_cpu": True, "max_steps": STEPS, "per_device_train_batch_size": BATCH_SIZE // SIZE}
        trainer = example.make_trainer("Fish", str(directory), **arguments | settings)
        gradmatch = trainer.gradmatch
        trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-{SAVED}" if resume else None)
        return state(trainer.model, gradmatch, steps=trainer.lr_scheduler.last_epoch)

    found: dict[str, Any] = {
        "fish": train(save_strategy="steps", save_steps=SAVED),
        "resumed": train(resume=True, save_strategy="no"),
    }

    class Prepared(example.DomainTrainer):
        ranks: dict[str, Any]

        def get_train_dataloader(self) -> Any:
            sampler = DomainBatchSampler(self.domains, BATCH_SIZE, **self.ranks)
            loader = self.accelerator.prepare(DataLoader(self.train_dataset, batch_sampler=sampler))
            check_loader(self.gradmatch, loader)
            return loader

    as_it_is, example.DomainTrainer = example.DomainTrainer, Prepared
    if SIZE > 1:
        Prepared.ranks = {}
        found["apart"] = raised(train)
        Prepared.ranks = ranks()
        found["twice"] = raised(train)
    example.DomainTrainer = as_it_is
    return found


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
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, directory / f"{name}.pt")
    if SIZE > 1:
        arguments = ["--epochs", "1", "--directory", str(directory / "example")]
        importlib.import_module(f"with_{name}").main(arguments + (["--cpu"] if name == "accelerate" else []))


if __name__ == "__main__":
    main()
