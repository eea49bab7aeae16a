"""``DomainTrainer``: the ``Trainer`` of transformers, over batches of one domain each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torch_gradmatch._checks import check_choice
from torch_gradmatch.data.loaders import check_loader
from torch_gradmatch.data.sampler import DomainBatchSampler
from torch_gradmatch.integrations import WEIGHTS, evaluation_weights, needs
from torch_gradmatch.optimizer import GradMatch

try:
    from transformers import Trainer
except ImportError as error:
    raise needs("transformers accelerate", __name__, error) from error

__all__ = ["DomainTrainer"]
DOMAIN = "torch_gradmatch_domain"  # the entry of a batch that says where it is from


class DomainTrainer(Trainer):
    """A ``Trainer`` whose batches come from one domain each, the domains in turn; for methods that work in ``step``.

    ``evaluate``, ``predict`` and ``save_model`` are of the slow weights, also in an inner loop; checkpoints hold the
    fast ones, to resume from. Logs have what the last meta-iteration measured, and ``loss/NAME`` of each domain's last
    step, of ``gradient_accumulation_steps`` batches of one domain. ``gradmatch`` is the ``GradMatch``, or None.

    Args:
        arguments: Those of the Trainer, by position or name; ``optimizers=(GradMatch(AdamW(...), Fish(...)), None)``
            leaves the schedule to it. Without a ``GradMatch`` it trains a baseline on the same batches.
        domains: The label of every sample of ``train_dataset``, as for :class:`~torch_gradmatch.DomainBatchSampler`.
        weights: ``"averaged"`` for the mean that ``GradMatch(..., average=Average())`` keeps, from when it has begun.
        sampler_settings: More settings of the ``DomainBatchSampler``, such as ``domains_per_step``.

    Raises:
        ImportError: Without transformers, when the module is imported.
        ValueError: If ``weights`` is another; when training starts, if :func:`~torch_gradmatch.check_loader` says no.

    Example:
        >>> issubclass(DomainTrainer, Trainer)
        True
    """

    def __init__(
        self,
        *arguments: Any,
        domains: Any,
        weights: Literal["slow", "averaged"] = "slow",
        sampler_settings: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self.domains, self.sampler_settings = domains, sampler_settings or {}
        self.weights = check_choice("weights", weights, WEIGHTS)
        self.gradmatch: GradMatch[Any] | None = self.optimizer if isinstance(self.optimizer, GradMatch) else None
        self._losses: dict[str | int, tuple[int, Tensor]] = {}  # of the domains' last steps, behind their numbers

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Serve the domains in turn. The loader is not prepared: that would split what the sampler has split."""
        args, size, steps = self.args, self.accelerator.num_processes, self.args.gradient_accumulation_steps
        settings = {"seed": args.seed if args.data_seed is None else args.data_seed, **self.sampler_settings}
        settings |= {"num_replicas": size, "rank": self.accelerator.process_index, "accumulate": steps}
        sampler = DomainBatchSampler(self.domains, size * args.train_batch_size, **settings)
        rows = _Labelled(self.train_dataset, sampler, self._get_collator_with_removed_columns(self.data_collator))
        names = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
        options = {name: getattr(args, f"dataloader_{name}") for name in names}
        loader = DataLoader(rows, batch_sampler=sampler, collate_fn=dict, **options)
        loader.set_epoch = sampler.set_epoch  # the Trainer calls it where there is one
        if self.gradmatch is not None:
            check_loader(self.gradmatch, loader, steps)
        return loader

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **settings: Any) -> Tensor:
        """Tell the optimizer the domain of the batch, and keep its loss."""
        domain, number = inputs.pop(DOMAIN, None), self.state.global_step
        loss: Tensor = super().training_step(model, inputs, *arguments, **settings)
        if self.gradmatch is not None:
            self.gradmatch.domain = domain
        before, summed = self._losses.get(domain, (None, loss))
        self._losses[domain] = number, summed + loss if before == number else loss
        return loss

    def log(self, logs: dict[str, float], *arguments: Any, **settings: Any) -> None:
        """Add the domains' numbers to the loss; where names are the same the Trainer's count."""
        if "loss" in logs:
            report = None if self.gradmatch is None else self.gradmatch.last_meta_step
            numbers = {f"loss/{domain}": float(loss) for domain, (_, loss) in self._losses.items()}
            logs = numbers | ({} if report is None else report.scalars()) | logs
        super().log(logs, *arguments, **settings)

    def evaluation_loop(self, *arguments: Any, **settings: Any) -> Any:
        """Evaluate or predict by the slow weights or their average."""
        with evaluation_weights(self.gradmatch, self.weights):
            return super().evaluation_loop(*arguments, **settings)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the slow weights or their average; the Trainer's own call is for a checkpoint."""
        with evaluation_weights(None if _internal_call else self.gradmatch, self.weights):
            super().save_model(output_dir, _internal_call)


class _Labelled(Dataset[Any]):
    """Batches that say their domain, from whatever loader: to resume, the Trainer makes another over this data set."""

    def __init__(self, rows: Any, sampler: DomainBatchSampler, collate: Callable[[Any], Mapping[str, Any]]) -> None:
        self.rows, self.collate = rows, collate
        of_domain = zip(sampler.labels, sampler._indices, strict=True)
        self.labels = {index: label for label, indices in of_domain for index in indices.tolist()}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        fetch = getattr(self.rows, "__getitems__", lambda indices: [self.rows[index] for index in indices])
        return {**self.collate(fetch(indices)), DOMAIN: self.labels[indices[0]]}
