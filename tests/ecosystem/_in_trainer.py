"""Training by the Trainer of ``examples/with_trainer.py``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import with_trainer as example
from _training import Trained, domain_of, watched


def build(directory: Path, steps: int, method: str = "Fish", weights: Any = "slow", **arguments: Any) -> Trained:
    """Set training up."""
    settings = {"use_cpu": True, "save_strategy": "no", "max_steps": steps, "per_device_eval_batch_size": 4000}
    with (
        watched(example) as (network, answers),
        mock.patch.object(example, "DomainTrainer", partial(example.DomainTrainer, weights=weights)),
    ):
        trainer = example.make_trainer(method, str(directory), **settings | arguments)
    trained = Trained(network, trainer.optimizer, trainer.lr_scheduler, trainer, answers=answers)
    training_step = trainer.training_step

    def noting(model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        domain = domain_of(inputs["features"], inputs["labels"])
        loss = training_step(model, inputs, *more)
        trained.told.append((domain if trainer.gradmatch is None else trainer.gradmatch.domain, domain))
        return loss

    trainer.training_step = noting
    return trained


def train(
    directory: Path,
    steps: int,
    method: str = "Fish",
    *,
    save_every: int | None = None,
    evaluate_every: int | None = None,
    resume_from: int | None = None,
    precision: str = "fp32",
    accumulate: int = 1,
    workers: int = 0,
    **arguments: Any,
) -> Trained:
    arguments |= {"bf16": precision == "bf16", "gradient_accumulation_steps": accumulate}
    arguments |= {"save_strategy": "steps", "save_steps": save_every} if save_every else {}
    arguments |= {"eval_strategy": "steps", "eval_steps": evaluate_every} if evaluate_every else {}
    arguments |= {"dataloader_num_workers": workers, "dataloader_prefetch_factor": 4} if workers else {}
    trained = build(directory, steps, method, **arguments)
    trained.trainer.train(resume_from_checkpoint=resume_from and f"{directory}/checkpoint-{resume_from}")
    return trained
