"""Fish in Lightning: ``python examples/with_lightning.py``; ``--exact`` for exact matching, ``--resume`` to go on.

What changes in a LightningModule is the optimizer, and the loader that serves the domains in turn. Lightning stores the
place of torchdata's ``StatefulDataLoader`` in its checkpoints, so that training resumes in the middle of an inner loop.

- In the middle of an inner loop the model holds the fast weights. ``GradMatchCallback`` has the slow ones validated,
  whatever ``val_check_interval`` is, and adds them to checkpoints: training resumes from ``"state_dict"``, and
  ``"slow_weights"`` is the model that was validated. It also checks the loader and logs numbers of each domain.
- ``training_step`` may return None: that batch moves nothing and counts as an inner step, as its turn is over. (Not in
  16-mixed precision, where Lightning then leaves out the step.)
- Under ``accumulate_grad_batches=k`` the sampler serves k batches of a domain in a row, so that a step has one domain.
- In mixed precision, bf16 also, Lightning refuses to clip gradients for an optimizer that takes part in loss scaling,
  as a GradMatch does: ``configure_gradient_clipping`` clips here.
- Under ``precision="16-mixed"`` (tested on a CPU) a step that the GradScaler skips moves nothing and counts as an inner
  step. ``meta_step`` does not work there, since its losses are not scaled: take bf16-mixed.
- Lightning does not store random states: with dropout, add them in ``on_save_checkpoint``.
- Lightning takes the length of the first epoch for that of all. Where they differ (``domains_per_step`` below the
  number of domains) longer ones are cut off, after a whole group.
- It runs under torchrun as it is: each process's sampler serves its part of every batch, and ``BATCH_SIZE`` is that of
  all processes together. ``Trainer(use_distributed_sampler=False)`` has Lightning leave the sampler alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from typing import Any

import lightning
import torch
import torch.distributed as dist
from _spurious_data import BATCH_SIZE, DOMAINS, ERM_LR, FISH_LR, accuracy, make_data, make_model
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from torch_gradmatch import IDGM, DomainBatchSampler, Fish, GradMatch, meta_batches
from torch_gradmatch.integrations.lightning import GradMatchCallback

LOG_EVERY = 2 * DOMAINS  # steps: reading what a meta-iteration measured synchronizes


class Classifier(lightning.LightningModule):
    """Trained by ERM, by Fish in Lightning's automatic optimization, or by the exact objective in its manual one.

    Args:
        method: "ERM", "Fish" or "exact".
        seed: Decides the initial weights and the order of the data.
    """

    def __init__(self, method: str = "Fish", seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = method != "exact"
        self.model = make_model(seed)
        self.data, self.domains, self.held_out = make_data()
        self.place: dict[str, Any] | None = None  # in the epoch, from a checkpoint

    def train_dataloader(self) -> Any:
        """Serve the domains in turn; for the exact objective, a batch of each at once.

        Returns:
            The loader.
        """
        ranks = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank, "split": "batch"}
        accumulate = self.trainer.accumulate_grad_batches
        sampler = DomainBatchSampler(self.domains, BATCH_SIZE, seed=self.hparams.seed, accumulate=accumulate, **ranks)
        loader = StatefulDataLoader(self.data, batch_sampler=sampler)
        if self.automatic_optimization:
            return loader
        if self.place is not None:
            loader.load_state_dict(self.place)
        return meta_batches(loader)

    def val_dataloader(self) -> DataLoader[Any]:
        """Serve the held-out domain.

        Returns:
            The loader.
        """
        return DataLoader(self.held_out, batch_size=1000)

    def configure_optimizers(self) -> dict[str, Any]:
        """Wrap the optimizer: this is the line that changes.

        Returns:
            The optimizer and its schedule, which counts inner steps.
        """
        optimizer = torch.optim.AdamW(self.parameters(), lr=FISH_LR if self.hparams.method == "Fish" else ERM_LR)
        if self.hparams.method == "Fish":
            fish = Fish(0.05, inner_steps=DOMAINS, inner_state="reset", model=self, track_alignment=True)
            optimizer = GradMatch(optimizer, fish)
        elif self.hparams.method == "exact":
            together = {"process_group": dist.group.WORLD, "parallel": "data"} if self.trainer.world_size > 1 else {}
            exact = IDGM(self, track_alignment=True, **together)
            optimizer = GradMatch(optimizer, exact)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_batch_transfer(self, batch: Any, _index: int) -> Any:
        """Name the domains of a list in a dictionary: of the list Lightning makes a copy that has lost their names.

        Returns:
            The batch.
        """
        domains = getattr(batch, "domains", None)
        return batch if domains is None else dict(zip(domains, batch, strict=True))

    def loss(self, batch: Any) -> torch.Tensor:
        """Take the loss of one batch, which comes from one domain.

        Returns:
            A scalar.
        """
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def training_step(self, batch: Any, _index: int) -> torch.Tensor | None:
        """Return the loss as usual; the exact objective takes its own step over one batch of each domain.

        Returns:
            The loss, or None in manual optimization.
        """
        if self.automatic_optimization:
            loss = self.loss(batch)
            self.log("train/loss", loss, prog_bar=True)
            return loss
        self.optimizers().meta_step(self.loss, batch)
        self.lr_schedulers().step()
        return None

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as Lightning does, also a GradMatch in mixed precision, after unscaling what is scaled."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if not isinstance(optimizer, GradMatch):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            if scaler is not None:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def validation_step(self, batch: Any, _index: int) -> None:
        """Log the loss on the held-out domain."""
        self.log("held_out_loss", self.loss(batch), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the place of lists, which Lightning does not know. Between two epochs the callback finds it."""
        if self.hparams.method == "exact" and not self.trainer.is_last_batch:
            checkpoint["place"] = self.trainer.train_dataloader.loader.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the place for the loader that is about to be made."""
        self.place = checkpoint.get("place")


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train and print the accuracy on the held-out domain.

    Returns:
        The accuracy by method.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--precision", default="32-true", help="also bf16-mixed; 16-mixed on a GPU")
    parser.add_argument("--exact", action="store_true", help="train by exact gradient matching, too")
    parser.add_argument("--directory", default="out/lightning", help="for checkpoints")
    parser.add_argument("--log", metavar="DIR", help="write losses and agreement of each method there, for TensorBoard")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of each method")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    here, everywhere = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))  # by torchrun
    found = {}
    for method in ("ERM", "Fish", *(("exact",) if options.exact else ())):
        classifier = Classifier(method)
        trainer = lightning.Trainer(
            max_epochs=options.epochs,
            precision=options.precision,
            gradient_clip_val=1.0 if classifier.automatic_optimization else None,
            callbacks=[
                GradMatchCallback(),
                ModelCheckpoint(f"{options.directory}/{method}", every_n_train_steps=50, save_last=True),
            ],
            accelerator="auto",
            devices=here,
            num_nodes=everywhere // here,
            strategy="ddp" if everywhere > 1 else "auto",
            use_distributed_sampler=False,
            logger=TensorBoardLogger(options.log, "", method, default_hp_metric=False) if options.log else False,
            log_every_n_steps=LOG_EVERY,
            enable_progress_bar=sys.stdout.isatty(),
            enable_model_summary=False,
        )
        trainer.fit(classifier, ckpt_path="last" if options.resume else None)
        found[method] = accuracy(classifier.model, classifier.held_out)
        if trainer.is_global_zero:
            print(f"{method:5} accuracy on the held-out domain {found[method]:.3f}", flush=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
