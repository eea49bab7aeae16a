"""Training of the LightningModule of ``examples/with_lightning.py``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning
import with_lightning as example
from _training import Trained, domain_of, watched
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torchdata.stateful_dataloader import StatefulDataLoader

from torch_gradmatch.integrations.lightning import GradMatchCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
OFF = ("logger", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler", "num_sanity_val_steps")


class Staying(GradMatchCallback):
    """Stops where training stops, for the comparison."""

    def on_train_end(self, *_: Any) -> None:
        pass


class Recording(example.Classifier):
    """Notes the domains that it is trained on, and leaves steps out."""

    def __init__(self, method: str, skip: Collection[int] = ()) -> None:
        super().__init__(method)
        self.skip = skip
        self.told: list[tuple[Any, str]] = []

    test_step = example.Classifier.validation_step

    def training_step(self, batch: Any, index: int) -> Any:
        if self.hparams.method == "Fish":
            self.told.append((self.optimizers().domain, domain_of(*batch)))
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
    weights: Any = "slow",
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> Trained:
    settings = {"accelerator": "cpu", "accumulate_grad_batches": accumulate} | dict.fromkeys(OFF, False) | settings
    settings |= {"limit_val_batches": 0} if evaluate_every is None else {"val_check_interval": evaluate_every}
    if precision == "fp16":  # on a CPU Lightning makes it bfloat16; given as a plugin it scales the loss as on a GPU
        settings["plugins"] = MixedPrecision("16-mixed", "cpu", scaler)
    else:
        settings["precision"] = PRECISIONS[precision]
    saver = ModelCheckpoint(directory, "{step}", every_n_train_steps=save_every, save_top_k=-1)
    ahead = {"num_workers": workers, "prefetch_factor": 4 if workers else None}
    with (
        warnings.catch_warnings(),
        mock.patch.object(example, "StatefulDataLoader", partial(StatefulDataLoader, **ahead)),
        watched(example) as (network, answers),
    ):
        warnings.filterwarnings("ignore", module="lightning")
        model = kind(method, skip)
        trainer = lightning.Trainer(
            max_steps=steps,
            callbacks=[saver, *(callbacks or [Staying(weights)])],
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
