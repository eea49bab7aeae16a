"""Training of the LightningModule of ``examples/with_lightning.py``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import lightning
import with_lightning as example
from _training import Trained, domain_of, watched
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torchdata.stateful_dataloader import StatefulDataLoader

from torch_gradmatch.integrations.lightning import GradMatchCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}


class Staying(GradMatchCallback):
    """Stops where training stops, for the comparison."""

    def on_train_end(self, *_: Any) -> None:
        pass


class Recording(example.Classifier):
    """Notes the domains that it is trained on, and takes the settings that a test wants."""

    def __init__(self, method: str, workers: int = 0, skip: Collection[int] = ()) -> None:
        super().__init__(method)
        self.workers, self.skip = workers, skip
        self.told: list[tuple[Any, str]] = []
        self.inner_steps: list[int] = []

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        if not self.workers:
            return loader
        ahead = {"num_workers": self.workers, "prefetch_factor": 4}
        return StatefulDataLoader(self.data, batch_sampler=loader.batch_sampler, **ahead)

    def training_step(self, batch: Any, index: int) -> Any:
        if self.hparams.method == "Fish":
            optimizer = self.optimizers()
            self.told.append((optimizer.domain, domain_of(*batch)))
            self.inner_steps.append(optimizer.inner_step)
        return None if self.global_step in self.skip else super().training_step(batch, index)


def place(loader: Any) -> Any:
    """Return the sampler's place behind the last batch that was handed out, whatever was fetched ahead."""
    loader = getattr(loader, "loader", loader)  # under meta_batches, or itself
    if not isinstance(loader, StatefulDataLoader):
        return None
    state = loader.state_dict()
    return state.get("_snapshot", {}).get("_main_snapshot", state)["_index_sampler_state"]


def train(
    directory: Path,
    steps: int,
    method: str = "Fish",
    *,
    save_every: int = 1000,
    evaluate_every: int | None = None,
    resume_from: int | str | None = None,
    precision: str = "fp32",
    accumulate: int = 1,
    workers: int = 0,
    skip: Collection[int] = (),
    scaler: Any = None,
    kind: type[Recording] = Recording,
    callbacks: Sequence[Any] | None = None,
    **settings: Any,
) -> Trained:
    settings = QUIET | {"accumulate_grad_batches": accumulate} | settings
    settings |= {"limit_val_batches": 0} if evaluate_every is None else {"val_check_interval": evaluate_every}
    # On a CPU Lightning would make bfloat16 of "16-mixed"; given as a plugin it scales the loss as on a GPU.
    scaled = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    settings |= scaled if precision == "fp16" else {"precision": PRECISIONS[precision]}
    saver = ModelCheckpoint(directory, "{step}", every_n_train_steps=save_every, save_top_k=-1)
    with warnings.catch_warnings(), watched(example) as (network, answers):
        warnings.filterwarnings("ignore", module="lightning")
        model = kind(method, workers, skip)
        trainer = lightning.Trainer(
            max_steps=steps,
            callbacks=[saver, *([Staying()] if callbacks is None else callbacks)],
            log_every_n_steps=example.LOG_EVERY,
            gradient_clip_val=0.5 if model.automatic_optimization else None,
            **settings,
        )
        name = f"step={resume_from}" if isinstance(resume_from, int) else resume_from
        trainer.fit(model, ckpt_path=None if name is None else directory / f"{name}.ckpt")
    (optimizer,) = trainer.optimizers
    schedule = next((config.scheduler for config in trainer.lr_scheduler_configs), None)
    where = place(trainer.train_dataloader)
    return Trained(network, optimizer, schedule, trainer, where, model.told, answers=answers)
