"""``GradMatchCallback``: slow or averaged weights at validation, and numbers of each domain, in Lightning."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Literal

from torch import Tensor

from torch_gradmatch._checks import check_choice
from torch_gradmatch.data.loaders import check_loader
from torch_gradmatch.data.meta_batches import MetaBatches, sampler_of, served_labels
from torch_gradmatch.integrations import WEIGHTS, evaluation_weights, needs
from torch_gradmatch.optimizer import GradMatch

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise needs("lightning", __name__, error) from error

__all__ = ["GradMatchCallback"]


class GradMatchCallback(Callback):
    """Does in Lightning what stands around the steps in a loop of your own. Without a ``GradMatch`` it only logs.

    - Before training it refuses a loader that does not fit: :func:`~torch_gradmatch.check_loader`.
    - Validation and testing are of the slow weights. Checkpoints have them as ``"slow_weights"``, a state dict of the
      LightningModule; training resumes from ``"state_dict"``.
    - Every ``log_every_n_steps`` steps it logs what the last meta-iteration measured, and the loss of each domain's
      last batch as ``train/loss/NAME``.
    - An epoch that ``limit_train_batches`` cuts short, or that was saved at its end, is followed by the next.
    - Training that ends in an inner loop leaves the slow weights behind.

    Args:
        weights: ``"averaged"`` for the average of a ``GradMatch(..., average=Average())`` in place of the slow weights,
            from when it has begun; in checkpoints ``"averaged_weights"``.
        prefix: In front of the names that are logged.

    Raises:
        ImportError: Without Lightning, when the module is imported.
        ValueError: If ``weights`` is another; when training starts, if the loader does not fit.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = GradMatchCallback()
        >>> trainer = Trainer(callbacks=callback, use_distributed_sampler=False, logger=False)
    """

    def __init__(self, weights: Literal["slow", "averaged"] = "slow", prefix: str = "train/") -> None:
        self.weights, self.prefix = check_choice("weights", weights, WEIGHTS), prefix
        self._block = ExitStack()
        self._labels: Iterator[str | int] | None = None  # of the batches of the epoch that are to come
        self._domain: str | int | None = None
        self._losses: dict[str | int, Tensor] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Refuse a loader that does not fit the method."""
        for optimizer in _matching(trainer):
            check_loader(optimizer, trainer.train_dataloader, trainer.accumulate_grad_batches)
        self.on_train_epoch_start(trainer, module)

    def on_train_epoch_start(self, trainer: Any, _module: Any) -> None:
        """Go to the epoch that follows where Lightning resumes between two, or has cut the one before short."""
        loader = trainer.train_dataloader
        sampler, self._labels = sampler_of(loader.loader if isinstance(loader, MetaBatches) else loader), None
        if sampler is not None and sampler._place[0] < trainer.current_epoch:
            sampler.set_epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Tell the optimizer the domain of the batch. Lists of them, for ``meta_step``, have their own names."""
        if (sampler := sampler_of(trainer.train_dataloader)) is not None:
            self._labels = self._labels or served_labels(sampler)
            self._domain = next(self._labels)
            for optimizer in _matching(trainer):
                optimizer.domain = self._domain

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Log what was measured; reading it synchronizes."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self._domain is not None and isinstance(loss, Tensor):
            self._losses[self._domain] = loss.detach()
        if trainer.global_step % trainer.log_every_n_steps == 0:
            found = {f"{self.prefix}loss/{domain}": float(loss) for domain, loss in self._losses.items()}
            for report in (optimizer.last_meta_step for optimizer in _matching(trainer)):
                found |= {} if report is None else report.scalars(self.prefix)
            for name, value in found.items():
                module.log(name, value, prog_bar=name in {f"{self.prefix}loss", f"{self.prefix}cosine"})

    def on_validation_start(self, trainer: Any, _module: Any) -> None:
        """Let the model hold the slow weights or their average."""
        for optimizer in _matching(trainer):
            self._block.enter_context(evaluation_weights(optimizer, self.weights))

    def on_validation_end(self, *_: Any) -> None:
        """Return to what training goes on from. Lightning has every ModelCheckpoint come after this."""
        self._block.close()

    on_test_start, on_test_end, on_exception = on_validation_start, on_validation_end, on_validation_end

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the model to use."""
        for optimizer in _matching(trainer):
            with evaluation_weights(optimizer, self.weights):
                checkpoint[f"{self.weights}_weights"] = copy.deepcopy(module.state_dict())

    def on_train_end(self, trainer: Any, _module: Any) -> None:
        """Leave the slow weights behind if training stops in the middle of an inner loop."""
        for optimizer in _matching(trainer):
            optimizer.rollback()


def _matching(trainer: Any) -> list[GradMatch[Any]]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, GradMatch)]
