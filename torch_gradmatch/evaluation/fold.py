"""One run of ``leave_one_domain_out``: train on all domains but one, and see what the model knows of that one."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from torch_gradmatch._checks import check_loss
from torch_gradmatch.data.meta_batches import meta_batches
from torch_gradmatch.data.sampler import DomainBatchSampler
from torch_gradmatch.evaluation.cost import describe
from torch_gradmatch.evaluation.recipes import Recipe, Settings
from torch_gradmatch.gradients.alignment import gradient_alignment
from torch_gradmatch.gradients.replay import RandomState
from torch_gradmatch.optimizer import GradMatch

__all__ = ["Split", "Task", "train"]

PACKAGE = Path(__file__).parents[1]
EVALUATED = 512  # samples in a batch without gradients


@dataclass(frozen=True)
class Split:
    """The samples of one run.

    Attributes:
        training: Of each training domain, by its label: the indices to train on.
        validation: Of each training domain, those to select by.
        held_out: Those of the domain that is held out.
    """

    training: dict[Any, list[int]]
    validation: dict[Any, list[int]]
    held_out: list[int]


@dataclass(frozen=True)
class Task:
    """What is to be learned, whatever the method. See ``leave_one_domain_out`` for the attributes that it has, too.

    Attributes:
        by_domain: The indices of each domain's samples, by its label.
    """

    make_model: Callable[[], nn.Module]
    dataset: Any
    by_domain: dict[Any, list[int]]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    metric: Callable[[nn.Module, Any], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter], float], Optimizer]
    collate_fn: Callable[[list[Any]], Any] | None
    device: str
    domains_per_step: int | None
    validation: float
    budget: int
    evaluations: int

    def split(self, held_out: Any, seed: int) -> Split:
        """Part the samples: the same for every method.

        Args:
            held_out: The domain to hold out.
            seed: Draws which part of each training domain is for validation.

        Returns:
            The parts.
        """
        training, validation = {}, {}
        for label, indices in self.by_domain.items():
            if label == held_out:
                continue
            shuffled = random.Random(f"{seed}/{label}").sample(indices, len(indices))
            number = min(max(1, round(self.validation * len(indices))), len(indices) - 1)
            validation[label], training[label] = sorted(shuffled[:number]), sorted(shuffled[number:])
        return Split(training, validation, self.by_domain[held_out])

    def loader(self, indices: Sequence[int], **arguments: Any) -> DataLoader[Any]:
        """Make a loader of some samples.

        Args:
            indices: Which.
            arguments: Of ``DataLoader``.

        Returns:
            The loader.
        """
        if type(self.dataset) is TensorDataset and self.collate_fn is None:
            return DataLoader(_Rows(self.dataset.tensors, indices), collate_fn=_as_they_are, **arguments)
        return DataLoader(Subset(self.dataset, indices), collate_fn=self.collate_fn, **arguments)

    def batch_of(self, indices: Sequence[int]) -> Any:
        """Make one batch.

        Args:
            indices: Of its samples.

        Returns:
            The batch, on :attr:`device`.
        """
        return self.moved(next(iter(self.loader(indices, batch_size=len(indices)))))

    def moved(self, batch: Any) -> Any:
        """Move a batch to :attr:`device`.

        Args:
            batch: Tensors, or lists, tuples and dictionaries of them and of anything else.

        Returns:
            The batch there.
        """
        if self.device == "cpu":
            return batch
        return torch.utils._pytree.tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, batch)

    def score(self, model: nn.Module, indices: Sequence[int]) -> float:
        """Return the mean of the metric over some samples.

        Args:
            model: In evaluation mode.
            indices: Of the samples.

        Returns:
            The mean.

        Raises:
            ValueError: If the metric does not give one number for each sample.
        """
        found = []
        with torch.no_grad():
            for batch in self.loader(indices, batch_size=EVALUATED):
                scores = self.metric(model, self.moved(batch))
                if not isinstance(scores, Tensor) or scores.dim() != 1:
                    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                    raise ValueError(f"metric should return a tensor of one number for each sample (got {shape})")
                found.append(scores.double().cpu())
        together = torch.cat(found)
        if len(together) != len(indices):
            raise ValueError(
                f"metric should return one number for each of {len(indices)} samples (got {len(together)})"
            )
        return float(together.mean())


class _Rows(Dataset[Any]):
    """Rows of tensors, a whole batch at a time: for what a ``TensorDataset`` holds, one by one takes much longer."""

    def __init__(self, tensors: Sequence[Tensor], indices: Sequence[int]) -> None:
        self._tensors = tensors
        self._indices = torch.as_tensor(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitems__(self, positions: list[int]) -> list[Tensor]:
        indices = self._indices[torch.as_tensor(positions)]
        return [tensor[indices] for tensor in self._tensors]


def _as_they_are(batch: Any) -> Any:
    return batch


class _Measured:
    """The curve of a run."""

    def __init__(self, task: Task, split: Split, model: nn.Module, seed: int) -> None:
        self.task, self.split, self.model = task, split, model
        self.curve: list[dict[str, Any]] = []
        generator = random.Random(seed)
        # The same batches each time, from what is trained on.
        self._probes = {
            str(label): task.batch_of(generator.sample(indices, min(64, len(indices))))
            for label, indices in split.training.items()
        }

    def add(self, gradients: int) -> None:
        """Measure after so many gradients."""
        task, model = self.task, self.model
        model.eval()
        validation = {str(label): task.score(model, indices) for label, indices in self.split.validation.items()}
        held_out = task.score(model, self.split.held_out)
        if not all(map(math.isfinite, [*validation.values(), held_out])):
            raise ValueError(f"the metric is not finite after {gradients} gradients")
        found = gradient_alignment(
            [p for p in model.parameters() if p.requires_grad],
            lambda batch: task.loss_fn(model, batch),
            self._probes,
            pairs=True,
        )
        assert found.cosine is not None
        assert found.agreement_with_rest is not None
        self.curve.append(
            {
                "gradients": gradients,
                "validation": sum(validation.values()) / len(validation),
                "validation_by_domain": validation,
                "held_out": held_out,
                "cosine": float(found.cosine),
                "agreement_with_rest": dict(zip(self._probes, found.agreement_with_rest.tolist(), strict=True)),
            }
        )
        model.train()


def train(task: Task, recipe: Recipe, settings: Settings, held_out: Any, seed: int) -> dict[str, Any]:
    """Train one model, on one thread, and measure it on the way.

    Depends on the arguments alone: the random states of torch, numpy and Python are set, and restored in the end.

    Args:
        task: What is to be learned.
        recipe: By which method.
        settings: Its hyperparameters.
        held_out: The label of the domain to hold out.
        seed: Of the initial weights, of the order of batches and of the validation parts.

    Returns:
        ``"curve"``, a list over the evaluations and the beginning; ``"seconds"`` of training without measuring;
        ``"stopped"``, an error's text if training ended by one.
    """
    devices = [] if task.device == "cpu" else [torch.device(task.device)]
    before, threads = RandomState.capture(devices), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the global generator is what a data set may draw from
        random.seed(seed)
        return _train(task, recipe, settings, held_out, seed)
    finally:
        torch.set_num_threads(threads)
        before.restore()


def _train(task: Task, recipe: Recipe, settings: Settings, held_out: Any, seed: int) -> dict[str, Any]:
    split = task.split(held_out, seed)
    model = task.make_model().to(task.device)
    model.train()
    measured = _Measured(task, split, model, seed)
    measured.add(0)
    plain = task.optimizer(model.parameters(), settings["lr"])
    method = recipe.method(model, settings)
    optimizer = None if method is None else GradMatch(plain, method)
    marks = [round(task.budget * k / task.evaluations) for k in range(1, task.evaluations + 1)]
    spent, seconds, stopped = 0, 0.0, None
    warm = recipe.warm_up * task.budget
    groups = _groups(task, recipe, settings, split, seed)
    try:
        while marks:
            started = time.perf_counter()
            batches = next(groups)
            if optimizer is None or spent < warm:
                for batch in batches:
                    _step(plain, task.loss_fn(model, batch))
                spent += len(batches)
            else:
                optimizer.meta_step(lambda batch: task.loss_fn(model, batch), batches)
                spent += recipe.gradients(len(batches), settings)
            seconds += time.perf_counter() - started
            if spent >= marks[0]:
                marks = [mark for mark in marks if mark > spent]
                measured.add(spent)
    except (RuntimeError, ValueError) as error:
        if not _is_refusal(error):
            raise
        stopped = describe(error)  # a run that diverges is a result, and others are to go on
    return {"curve": measured.curve, "seconds": seconds, "stopped": stopped}


def _is_refusal(error: BaseException) -> bool:
    """Return whether an error is one that a method, and not what it has called, raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(PACKAGE)


def _step(optimizer: Optimizer, loss: Tensor) -> None:
    value = float(check_loss(loss, 0).detach())
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _groups(task: Task, recipe: Recipe, settings: Settings, split: Split, seed: int) -> Iterator[Sequence[Any]]:
    """Yield batches without end: lists of one, or one of each of S domains."""
    batch_size = settings["batch_size"]
    indices = [index for of_domain in split.training.values() for index in of_domain]
    if recipe.order == "pooled":
        generator = torch.Generator().manual_seed(seed)
        loader = task.loader(indices, batch_size=batch_size, shuffle=True, generator=generator)
        while True:
            for batch in loader:
                yield [task.moved(batch)]
    labels = [label for label, of_domain in split.training.items() for _ in of_domain]
    sampler = DomainBatchSampler(
        labels, batch_size, task.domains_per_step, seed=seed, order=recipe.order, exhausted="cycle"
    )
    loader = task.loader(indices, batch_sampler=sampler)
    while True:
        for batches in meta_batches(loader):
            batches[:] = [task.moved(batch) for batch in batches]
            yield batches
