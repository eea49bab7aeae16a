"""One run: train on some samples within a budget, and measure weights and averaged weights on the way.

The budget is counted in samples that were differentiated. At some moments the model is scored on a part of the
validation samples; the weights that were best there are kept, and scored on all samples in the end. So is the mean of
the weights over the second half of the run (Izmailov et al., *Averaging Weights Leads to Wider Optima and Better
Generalization*, UAI 2018), which costs a copy of the parameters and no training.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves
from torch.utils.data import Subset

from torch_gradmatch._checks import check_loss
from torch_gradmatch.data.sampler import DomainBatchSampler
from torch_gradmatch.evaluation.cost import describe
from torch_gradmatch.evaluation.recipes import Recipe, Settings, passes_of
from torch_gradmatch.evaluation.task import Split, Task, seeded
from torch_gradmatch.methods.direction import DirectionMethod
from torch_gradmatch.optimizer import GradMatch

__all__ = ["AVERAGED", "PLAIN", "Training", "train"]

PACKAGE = Path(__file__).parents[1]
AT_MOMENTS = 256  # samples of each validation part
PLAIN, AVERAGED = "plain", "averaged"
Run = dict[str, Any]


class Training:
    """What a ``Recipe``'s own training is given: samples, a budget, and the user's loss and optimizer.

    The generators :meth:`pooled` and :meth:`by_domain` serve batches until the budget is spent; whoever has a loop of
    another kind calls :meth:`spend` after each step. Both measure the model on the way: whatever is trained without
    them is measured once, at its end, and has no averaged weights.

    Attributes:
        samples: The training samples, a ``Subset`` of the data set.
        domains: The label of each one's domain.
        domains_per_step: S, how many domains a meta-iteration has.
        budget: How many samples may be differentiated.
        spent: How many were.
        measuring: Seconds for averaging and measuring.

    Example:
        >>> def clipped(model, training, settings):
        ...     optimizer = training.optimizer(model, settings)
        ...     for x, y in training.pooled(settings["batch_size"]):
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.cross_entropy(model(x), y).backward()
        ...         torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ...         optimizer.step()
        >>> recipe = Recipe(train=clipped)
    """

    samples: Subset[Any]
    domains: list[str]
    domains_per_step: int
    budget: int
    spent: float
    measuring: float

    def __init__(self, task: Task, split: Split, model: nn.Module, seed: int) -> None:
        self._task, self._split, self._model, self._seed = task, split, model, seed
        self._averaged: AveragedModel | None = None
        self._kept: dict[str, tuple[float, float, dict[str, Any]]] = {}  # moment, score, weights
        self._curves: dict[str, list[tuple[float, float]]] = {PLAIN: [], AVERAGED: []}
        self._outputs: list[Any] = []

        def look(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
            self._outputs = [x.detach() for x in tree_leaves(outputs) if isinstance(x, Tensor)]

        self._hook = model.register_forward_hook(look)
        draw = random.Random(seed)
        self._some = {d: draw.sample(own, min(AT_MOMENTS, len(own))) for d, own in split.validation.items()}
        indices = [i for own in split.training.values() for i in own]
        self.samples: Subset[Any] = Subset(task.dataset, indices)
        self.domains = [label for label, own in split.training.items() for _ in own]
        self.domains_per_step = task.domains_per_step or len(split.training)
        self.budget, self.spent, self.measuring = task.budget, 0.0, 0.0
        self._marks = [task.budget * k / task.evaluations for k in range(1, task.evaluations + 1)]
        self._measure()

    @property
    def progress(self) -> float:
        """The part of the budget that is spent, from 0 to 1."""
        return min(1.0, self.spent / self.budget)

    def loss_fn(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the user's loss of a batch."""
        return self._task.loss_fn(model, batch)

    def optimizer(self, model: nn.Module, settings: Settings) -> Optimizer:
        """Make the user's optimizer with ``settings["lr"]`` and ``settings["weight_decay"]``."""
        return self._task.optimizer(model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])

    def step(self, optimizer: Optimizer, model: nn.Module, batch: Any) -> None:
        """Take a plain step.

        Args:
            optimizer: The optimizer.
            model: The model.
            batch: The batch.

        Raises:
            ValueError: If the loss is not finite.
        """
        loss = check_loss(self.loss_fn(model, batch), 0)
        if not math.isfinite(float(loss.detach())):
            raise ValueError(f"the loss is {float(loss.detach())}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def pooled(self, batch_size: int) -> Iterator[Any]:
        """Serve batches of all training samples, shuffled, until the budget is spent.

        Args:
            batch_size: Samples in a batch. Those left over at the end of an epoch are left out.

        Yields:
            A batch.
        """
        generator = torch.Generator().manual_seed(self._seed)
        indices = torch.tensor(self.samples.indices)
        size = min(batch_size, len(indices))
        while True:
            shuffled = indices[torch.randperm(len(indices), generator=generator)]
            for chosen in shuffled[: len(indices) // size * size].split(size):
                yield self._task.batch(chosen.tolist())
                if not self.spend(len(chosen)):
                    return

    def by_domain(
        self, batch_size: int, *, shared: bool = True, order: Any = "flipflop", passes: float = 1.0
    ) -> Iterator[dict[Any, Any]]:
        """Serve one batch of each of S domains, until the budget is spent.

        Args:
            batch_size: Samples of the S domains together, an equal share of at least two for each: for a loop that
                takes one step of the optimizer with all of them.
            shared: False for a loop that takes a step with each: then each batch has that many samples. So both take as
                many steps as ordinary training on the same samples.
            order: As for ``DomainBatchSampler``.
            passes: How often each sample is differentiated.

        Yields:
            Batches by the domain's label, in the order in which to visit them.
        """
        size, draw = self.domains_per_step, random.Random(self._seed)
        share = max(2, batch_size // size) if shared else batch_size
        whole = share <= min(map(len, self._split.training.values()))
        sampler = DomainBatchSampler(
            self.domains, share, size, seed=self._seed, order=order, exhausted="cycle", drop_last=whole
        )
        while True:
            positions = iter(sampler)
            for group in zip(*[positions] * size, strict=True):
                batches, served = {}, 0
                for places in group:
                    label = self.domains[places[0]]
                    chosen = [self.samples.indices[place] for place in places]
                    others = self._split.training[label]
                    if len(chosen) == 1 < len(others):  # BatchNorm cannot do with one
                        chosen.append(draw.choice([i for i in others if i != chosen[0]]))
                    batches[label] = self._task.batch(chosen)
                    served += len(chosen)
                yield batches
                if not self.spend(served * passes):
                    return

    def spend(self, samples: float) -> bool:
        """Count samples that were differentiated in the step just taken, and measure if it is time to.

        Args:
            samples: How many.

        Returns:
            Whether something of the budget is left.
        """
        started = time.perf_counter()
        self.spent += samples
        if self.spent >= self.budget / 2:
            if self._averaged is None:
                self._averaged = AveragedModel(self._model, use_buffers=True)
            self._averaged.update_parameters(self._model)
        if self._marks and self.spent >= self._marks[0]:
            self._marks = [mark for mark in self._marks if mark > self.spent]
            self._measure()
        self.measuring += time.perf_counter() - started
        return self.spent < self.budget

    def close(self) -> None:
        """Measure the end of the run, unless it was measured already."""
        if self.spent == 0 or self._curves[PLAIN][-1][0] != self.spent:
            started = time.perf_counter()
            self._measure()
            self.measuring += time.perf_counter() - started

    def result(self) -> Run:
        """Score the weights that were kept on all samples.

        Returns:
            By ``"plain"`` and ``"averaged"``, None without one: ``"validation"`` and ``"held_out"``, scores, -inf if
            not finite; ``"moment"``, the samples after which the weights were kept; ``"curve"``, scores at all moments.
        """
        self._hook.remove()
        return {kind: self._final(kind) if kind in self._kept else None for kind in (PLAIN, AVERAGED)}

    def load(self, kind: str) -> nn.Module:
        """Return the model with the weights that were kept: ``"plain"`` ones, or ``"averaged"`` ones."""
        self._model.load_state_dict(self._kept[kind][2])
        return self._model

    def _final(self, kind: str) -> Run:
        model, task = self.load(kind), self._task
        with _evaluating(model):
            validation = _mean([task.score(model, own)[0] for own in self._split.validation.values()])
            held_out, kept = task.score(model, self._split.held_out) if self._split.held_out else (math.nan, [])
        scores = {"validation": validation, "held_out": held_out}
        found: Run = {part: score if math.isfinite(score) else -math.inf for part, score in scores.items()}
        found |= {"moment": self._kept[kind][0], "curve": self._curves[kind]}
        return found | ({"predictions": kept} if kept else {})

    def _measure(self) -> None:
        """Score the weights, and their average if there is one, on a part of the validation samples."""
        models: dict[str, nn.Module] = {PLAIN: self._model}
        if self._averaged is not None:
            models[AVERAGED] = self._averaged.module
        for kind, model in models.items():
            with _evaluating(model):
                score = _mean([self._task.score(model, own)[0] for own in self._some.values()])
            if not math.isfinite(score):
                raise ValueError(f"the metric is {score} after {self.spent:g} samples")
            self._curves[kind].append((self.spent, score))
            if kind not in self._kept or score > self._kept[kind][1]:
                self._kept[kind] = self.spent, score, copy.deepcopy(model.state_dict())

    def has_diverged(self, error: Exception) -> bool:
        """Return whether an error is one of a run that diverged, and not of what it has called.

        Args:
            error: What was raised in training.

        Returns:
            Whether it is the library's own refusal, or weights or outputs are not finite.
        """
        raised_in = Path(extract_tb(error.__traceback__)[-1].filename)
        if raised_in.is_relative_to(PACKAGE) and isinstance(error, RuntimeError | ValueError):
            return True
        seen = [*self._model.state_dict().values(), *self._outputs]
        return not all(bool(t.isfinite().all()) for t in seen if isinstance(t, Tensor))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Let a model be in evaluation mode inside a ``with`` block, and each of its modules what it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    yield
    for module, mode in modes:
        module.training = mode


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def carry_out(recipe: Recipe, model: nn.Module, training: Training, settings: Settings) -> None:
    """Train a model by a recipe until the budget is spent."""
    if recipe.train is not None:
        recipe.train(model, training, settings)
        return
    optimizer = training.optimizer(model, settings)
    if recipe.order == "pooled":
        for batch in training.pooled(settings["batch_size"]):
            training.step(optimizer, model, batch)
    elif recipe.method is None:
        for batches in training.by_domain(settings["batch_size"], shared=False, order=recipe.order):
            for batch in batches.values():
                training.step(optimizer, model, batch)
    else:
        method = recipe.method(model, settings)
        passes = passes_of(method, model, training.domains_per_step) if recipe.passes is None else recipe.passes
        wrapper = GradMatch(optimizer, method)
        shared = isinstance(method, DirectionMethod)  # Fish steps with each batch
        for batches in training.by_domain(settings["batch_size"], shared=shared, order=recipe.order, passes=passes):
            wrapper.meta_step(lambda batch: training.loss_fn(model, batch), batches)


def train(task: Task, recipe: Recipe, settings: Settings, held_out: Any, seed: int) -> tuple[Run, Training]:
    """Train one model, on one thread, and measure it on the way.

    Depends on the arguments alone: the random states of torch, numpy and Python are set, and restored in the end.

    Args:
        task: What is to be learned.
        recipe: By which method.
        settings: Its hyperparameters.
        held_out: The label of the domain to hold out; None to train on all.
        seed: Of the initial weights, of the order of batches and of the validation parts.

    Returns:
        What was found, as plain numbers and text: that of :meth:`Training.result`; ``"spent"``, samples;
        ``"seconds"`` of training and ``"measuring"``; ``"stopped"``, an error's text if training ended by one, or
        None. And the training with the weights that it kept.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with seeded(seed, task.device):
            return _train(task, recipe, settings, held_out, seed)
    finally:
        torch.set_num_threads(threads)


def _train(task: Task, recipe: Recipe, settings: Settings, held_out: Any, seed: int) -> tuple[Run, Training]:
    started = time.perf_counter()
    model = task.make_model().to(task.device).train()
    training = Training(task, task.split(held_out, seed), model, seed)
    stopped = None
    begun = time.perf_counter()
    try:
        carry_out(recipe, model, training, settings)
        training.close()
    except Exception as error:
        if not training.has_diverged(error):
            raise
        stopped = describe(error)  # a run that diverges is a result, and others are to go on
    seconds = time.perf_counter() - begun - training.measuring
    run = training.result() | {"spent": training.spent, "stopped": stopped, "seconds": seconds}
    return run | {"measuring": time.perf_counter() - started - seconds}, training
