"""What is to be learned, whatever the method: samples, domains and groups, and how a model is scored on them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import TensorDataset, default_collate

from torch_gradmatch.gradients.replay import RandomState

__all__ = ["EVALUATED", "Split", "Task", "near_duplicates", "seeded"]

EVALUATED = 128  # samples in a batch without gradients: half the time of 512 for convolutions, the same for others


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Set the random states of torch, numpy and Python inside a ``with`` block, and restore them."""
    before = RandomState.capture([torch.device(device)])
    try:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the global generator is what a data set or a model may draw from
        random.seed(seed)
        yield
    finally:
        before.restore()


@dataclass(frozen=True)
class Split:
    """The samples of one run, by indices.

    Attributes:
        training: Of each training domain, by its label: those to train on.
        validation: Of each training domain: those to select by.
        held_out: Those of the domain that is held out.
    """

    training: dict[Any, list[int]]
    validation: dict[Any, list[int]]
    held_out: list[int]


@dataclass(frozen=True)
class Task:
    """What is to be learned. See ``leave_one_domain_out`` for the attributes that it has, too.

    Attributes:
        by_domain: The indices of each domain's samples, by its label.
        group_of: The group of each sample, by its index; empty without groups.
    """

    make_model: Callable[[], nn.Module]
    dataset: Any
    by_domain: dict[Any, list[int]]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    metric: Callable[..., Any]
    predict: Callable[[nn.Module, Any], tuple[Tensor, Tensor]] | None
    optimizer: Callable[..., Optimizer]
    collate_fn: Callable[[list[Any]], Any] | None
    group_of: Mapping[int, Any]
    device: str
    domains_per_step: int | None
    validation: float
    budget: int
    evaluations: int
    predictions: bool

    def split(self, held_out: Any, seed: int) -> Split:
        """Part the samples: the same for every method.

        A group is never on both sides: one that is chosen for validation is so in every domain. Where the held-out
        domain shares groups with others, it is scored on a part of these, as large as that for validation, which is
        left out of all other domains; the rest of the shared ones are only trained on.

        Args:
            held_out: The domain to hold out; None to train on all.
            seed: Draws which part of each training domain is for validation, and of shared groups for scoring.

        Returns:
            The parts.

        Raises:
            ValueError: If the groups leave a domain no sample to train on or to select by.
        """
        own = self.by_domain[held_out] if held_out is not None else []
        others = {label: part for label, part in self.by_domain.items() if held_out is None or label != held_out}
        shared = self._sizes(own).keys() & {self._group(i) for part in others.values() for i in part}
        sizes = {group: size for group, size in self._sizes(own).items() if group in shared}
        never = set(self._drawn(sizes, self.validation * len(own), f"{seed}/{held_out}/shared"))
        tested = [i for i in own if self._group(i) not in shared - never]
        rest: dict[Any, list[int]] = {}
        selecting: set[Any] = set()
        for label, indices in others.items():
            rest[label] = [i for i in indices if self._group(i) not in never]
            sizes = self._sizes(rest[label])
            wanted = self.validation * len(rest[label]) - sum(sizes[group] for group in selecting & sizes.keys())
            free = {group: size for group, size in sizes.items() if group not in selecting}
            selecting |= set(self._drawn(free, wanted, f"{seed}/{label}")[: len(sizes) - 1])
        sides: tuple[dict[Any, list[int]], dict[Any, list[int]]] = ({}, {})
        for label, indices in rest.items():
            for is_validation, side in enumerate(sides):
                side[label] = [i for i in indices if (self._group(i) in selecting) == is_validation]
                if not side[label]:
                    raise ValueError(
                        f"the groups leave domain {label!r} no sample to {('train on', 'select by')[is_validation]}"
                        f"{'' if held_out is None else f' where {held_out!r} is held out'}: a group is never on both "
                        "sides. Give it more groups, leave it out, or merge it with another"
                    )
        return Split(sides[0], sides[1], tested)

    def _group(self, index: int) -> Any:
        return self.group_of.get(index, (index,))

    def _sizes(self, indices: Sequence[int]) -> Counter[Any]:
        return Counter(map(self._group, indices))

    @staticmethod
    def _drawn(sizes: Mapping[Any, int], wanted: float, seed: str) -> list[Any]:
        """Draw groups until they have about as many samples as wanted, at least one if any is."""
        drawn, left = [], max(1, round(wanted)) if wanted > 0 else 0
        for group in random.Random(seed).sample(list(sizes), len(sizes)):
            if left <= 0:
                break
            drawn.append(group)
            left -= sizes[group]
        return drawn

    def permuted(self, seed: int) -> Task:
        """Return the task with the labels of the domains dealt out anew: whole groups, or single samples.

        Args:
            seed: Of the permutation.

        Returns:
            The task.
        """
        members: dict[Any, list[int]] = {}
        labels: dict[Any, Any] = {}
        for label, indices in self.by_domain.items():
            for i in indices:
                group = self._group(i)
                members.setdefault(group, []).append(i)
                labels.setdefault(group, label)
        dealt = random.Random(seed).sample(list(labels.values()), len(labels))
        by_domain: dict[Any, list[int]] = {label: [] for label in self.by_domain}
        for label, indices in zip(dealt, members.values(), strict=True):
            by_domain[label] += indices
        return replace(self, by_domain={label: sorted(indices) for label, indices in by_domain.items()})

    def batch(self, indices: Sequence[int]) -> Any:
        """Make a batch of some samples, on :attr:`device`."""
        if type(self.dataset) is TensorDataset and self.collate_fn is None:  # one by one takes much longer
            chosen = torch.as_tensor(indices)
            batch: Any = [tensor[chosen] for tensor in self.dataset.tensors]
        else:
            many = getattr(self.dataset, "__getitems__", None)
            samples = [self.dataset[i] for i in indices] if many is None else many(list(indices))
            batch = (self.collate_fn or default_collate)(samples)
        return tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, batch)

    def score(self, model: nn.Module, indices: Sequence[int]) -> tuple[float, list[Any]]:
        """Score a model on some samples of one domain.

        Args:
            model: In evaluation mode.
            indices: Of the samples.

        Returns:
            The metric of all of them, or its mean; and outputs and targets, if they are to be kept.

        Raises:
            ValueError: If the metric does not give one number for each sample, or for all of them.
        """
        found = []
        with torch.no_grad():
            for first in range(0, len(indices), EVALUATED):
                batch = self.batch(indices[first : first + EVALUATED])
                values = (self.metric(model, batch),) if self.predict is None else self.predict(model, batch)
                found.append([_rows("metric" if self.predict is None else "predict", v) for v in values])
        together = [torch.cat(parts) for parts in zip(*found, strict=True)]
        if self.predict is not None:
            return float(self.metric(*together)), [t.tolist() for t in together] if self.predictions else []
        if together[0].shape != (len(indices),):
            raise ValueError(
                f"metric should return one number for each of {len(indices)} samples (got {tuple(together[0].shape)}); "
                "for a metric of a whole domain, metric(outputs, targets), pass predict="
            )
        return float(together[0].double().mean()), []


def _rows(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() == 0:
        shown = "a tensor of no dimension" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} should return a row for each sample (got {shown})")
    return value.detach().cpu()


def near_duplicates(task: Task, most: int = 256) -> dict[Any, float]:
    """Return how many samples of each domain have a twin there, of domains where that is more than a tenth.

    A twin is nearer than a fifth of the median distance, of inputs with at least eight numbers.

    Args:
        task: Has the samples. Of each, the first tensor or array of numbers counts.
        most: How many of a domain are looked at.

    Returns:
        The shares by label.
    """
    found = {}
    for label, indices in task.by_domain.items():
        chosen = random.Random(0).sample(indices, min(most, len(indices)))
        leaves = [x for x in tree_leaves(task.batch(chosen)) if isinstance(x, Tensor) and x.dim() > 1]
        if not leaves or leaves[0].dtype.is_complex or leaves[0][0].numel() < 8 or len(leaves[0]) != len(chosen):
            continue
        inputs = leaves[0].detach().cpu().flatten(1).double()
        scale = inputs.std(0)
        inputs = inputs[:, scale > 0] / scale[scale > 0]
        typical = float(np.median(torch.pdist(inputs).numpy()))
        nearest = torch.cdist(inputs, inputs).fill_diagonal_(math.inf).min(1).values
        share = float((nearest < typical / 5).double().mean())
        if share > 0.1:
            found[label] = share
    return found
