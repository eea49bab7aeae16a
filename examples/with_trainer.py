"""Fish in the Trainer of transformers: ``python examples/with_trainer.py``, and ``--resume`` to go on.

What changes is the optimizer handed to the Trainer, and the Trainer itself: ``DomainTrainer`` serves the domains in
turn, evaluates and saves the slow weights, and logs numbers of each domain. Checkpoints in the middle of an inner loop
are fine to resume from.

- In the middle of an inner loop checkpoints hold the fast weights: where they are to be used as a model, also by
  ``load_best_model_at_end``, let ``save_steps`` be a multiple of S. If ``max_steps`` ends there, ``rollback()`` leaves
  them behind.
- ``log`` adds what was measured in the last meta-iteration that was over: let ``logging_steps`` be a multiple of S.
- The Trainer takes the length of the first epoch for that of all. They differ only with ``domains_per_step`` below the
  number of domains: then a resume in a later epoch may not find its place.
- With several GPUs in one process the Trainer uses DataParallel, where BatchNorm follows the first one's part of the
  batch: set ``CUDA_VISIBLE_DEVICES=0``, or start one process for each. It runs under torchrun as it is.
- Exact matching needs ``meta_step`` and so a loop of one's own: see ``with_accelerate.py``.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from _spurious_data import BATCH_SIZE, DOMAINS, ERM_LR, FISH_LR, accuracy, make_data, make_model
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from torch_gradmatch import Fish, GradMatch
from torch_gradmatch.integrations.huggingface import DomainTrainer


class Rows(Dataset[dict[str, Tensor]]):
    """A data set as the Trainer wants it: a dictionary for each sample.

    Args:
        data: Features and classes.
    """

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        features, label = self.data[index]
        return {"features": features, "labels": label}


class Tabular(PreTrainedModel):
    """The network with BatchNorm of the other examples, as a model of transformers."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.network = make_model(0)
        self.all_tied_weights_keys = {}

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Classify.

        Returns:
            Logits, and the loss if there are labels.
        """
        logits = self.network(features)
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


def make_trainer(method: str, directory: str, **arguments: Any) -> Any:
    """Set training up.

    Args:
        method: "ERM" or "Fish".
        directory: For checkpoints.
        arguments: More ``TrainingArguments``.

    Returns:
        The Trainer.
    """
    model = Tabular(PretrainedConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=FISH_LR if method == "Fish" else ERM_LR)
    if method == "Fish":  # this is what changes
        fish = Fish(0.05, inner_steps=DOMAINS, inner_state="reset", model=model, track_alignment=True)
        optimizer = GradMatch(optimizer, fish)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100, gamma=0.9)
    settings = {
        "per_device_train_batch_size": BATCH_SIZE,
        "ddp_find_unused_parameters": False,
        "max_grad_norm": 0.5,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "logging_steps": 2 * DOMAINS,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "data_seed": 0,
    }
    args = TrainingArguments(directory, **settings | arguments)
    data, domains, held_out = make_data()
    trainer = DomainTrainer(
        model,
        args,
        domains=domains,
        train_dataset=Rows(data),
        eval_dataset=Rows(held_out),
        optimizers=(optimizer, scheduler),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train and print the accuracy on the held-out domain.

    Returns:
        The accuracy by method.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--save-steps", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--directory", default="out/trainer", help="for checkpoints")
    parser.add_argument("--log", metavar="DIR", help="write losses and agreement of each method there, for TensorBoard")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of each method")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    found = {}
    for method in ("ERM", "Fish"):
        trainer = make_trainer(
            method,
            f"{options.directory}/{method}",
            num_train_epochs=options.epochs,
            save_steps=options.save_steps,
            save_total_limit=1,
            bf16=options.bf16,
        )
        if options.log is not None and trainer.is_world_process_zero():
            trainer.add_callback(TensorBoardCallback(SummaryWriter(f"{options.log}/{method}")))
        trainer.train(resume_from_checkpoint=options.resume)
        if method == "Fish":
            trainer.gradmatch.rollback()  # to the slow weights, if training stopped in the middle of an inner loop
        found[method] = accuracy(trainer.model.network, trainer.eval_dataset.data)
        trainer.accelerator.print(f"{method:5} accuracy on the held-out domain {found[method]:.3f}", flush=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
