"""Samplers that tests draw or build, what their batches are made of, kills and resumes, the probabilities of plans."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from _feature_training import through_file
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from torch_gradmatch.data.sampler import DomainBatchSampler

LABELS = ["b"] * 7 + ["a"] * 3 + ["d"] * 1 + ["c"] * 10
ORDERS = ["flipflop", "random"]
SPLITS = ["batch", "walks", "domains"]
# From Python 3.12 on, forking a worker from a process with threads warns; these workers only read a range.
QUIET = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata's constructor calls it
]


def small_sampler(**changes: Any) -> DomainBatchSampler:
    return DomainBatchSampler(LABELS, **{"batch_size": 2, "domains_per_step": 2, "seed": 3, **changes})


def loader_of(sampler: DomainBatchSampler, num_workers: int = 0, **options: Any) -> DataLoader[Any]:
    data: Any = range(sum(indices.size for indices in sampler._indices))
    return DataLoader(data, batch_sampler=sampler, collate_fn=list, num_workers=num_workers, **options)


def changing(message: str, **changes: Any) -> Any:
    return pytest.param(changes, message, id=", ".join(f"{name}={value!r:.30}" for name, value in changes.items()))


def place_of(sampler: DomainBatchSampler) -> tuple[int, int]:
    state = sampler.state_dict()
    return state["epoch"], state["position"]


# Samplers of all ranks


@dataclass(frozen=True)
class Case:
    """The labels of a data set, shuffled, and the arguments of its samplers."""

    labels: list[int]
    arguments: dict[str, Any]

    def ranks(self, **changes: Any) -> list[DomainBatchSampler]:
        arguments = {**self.arguments, **changes}
        return [DomainBatchSampler(self.labels, **arguments, rank=rank) for rank in range(arguments["num_replicas"])]

    def alone(self, **changes: Any) -> DomainBatchSampler:
        return self.ranks(num_replicas=1, **changes)[0]

    @property
    def whole(self) -> int:
        """How many samples of a domain all ranks take together."""
        at_once = self.arguments["num_replicas"] if self.arguments["split"] == "walks" else 1
        return self.arguments["batch_size"] * at_once

    @property
    def of_round(self) -> dict[int, int]:
        """How many samples each domain can share out equally before it begins again."""
        parts = 1 if self.arguments["split"] == "domains" else self.arguments["num_replicas"]
        left_out = self.whole if self.arguments["drop_last"] else parts
        return {label: size - size % self.whole % left_out for label, size in Counter(self.labels).items()}

    @property
    def runs(self) -> dict[int, int]:
        """How often each domain can be in a group before it begins again."""
        return {label: -(-size // self.whole) // self.arguments["accumulate"] for label, size in self.of_round.items()}

    def walk(self, batches: Iterable[Sequence[int]]) -> tuple[int, ...]:
        """The domain of each run of k batches."""
        domains = [{self.labels[index] for index in batch} for batch in batches]
        runs = in_groups(domains, self.arguments["accumulate"])
        assert all(len(set.union(*run)) == 1 for run in runs)
        return tuple(next(iter(run[0])) for run in runs)

    def by_domain(self, batches: Iterable[Sequence[int]]) -> dict[int, list[Sequence[int]]]:
        found: dict[int, list[Sequence[int]]] = {label: [] for label in self.labels}
        for batch in batches:
            found[self.labels[batch[0]]].append(batch)
        return found


@st.composite
def cases(draw, **chosen) -> Case:
    """Of all kinds but for what is chosen."""
    choices: dict[str, list[Any]] = {"split": SPLITS, "order": ORDERS, "exhausted": ["stop", "cycle"]}
    choices |= {"num_replicas": [1, 2, 3, 4], "accumulate": [1, 2, 3], "drop_last": [False, True], **chosen}
    arguments = {name: draw(st.sampled_from(values)) for name, values in choices.items()}
    ranks, k, split = (arguments[name] for name in ("num_replicas", "accumulate", "split"))
    parts, dealt = (1, ranks) if split == "domains" else (ranks, 1)
    batch_size = draw(st.integers(1, 4)) * (ranks if split == "batch" else 1)
    whole = batch_size * (ranks if split == "walks" else 1)
    least = whole * k if arguments["drop_last"] else whole * (k - 1) + parts
    sizes = draw(st.lists(st.integers(least, least + 30), min_size=dealt, max_size=dealt + 5))
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    draw(st.randoms(use_true_random=False)).shuffle(labels)
    domains_per_step = dealt * draw(st.integers(1, len(sizes) // dealt))
    if arguments["exhausted"] == "cycle" and draw(st.booleans()):
        arguments["batches_per_epoch"] = domains_per_step * k * draw(st.integers(1, 20))
    weights = st.fixed_dictionaries(dict.fromkeys(range(len(sizes)), st.floats(0.01, 100)))
    return Case(labels, {
        **arguments, "batch_size": batch_size, "domains_per_step": domains_per_step,
        "seed": draw(st.integers(0, 2**70)), "weighting": draw(st.sampled_from(["uniform", "proportional"]) | weights),
    })  # fmt: skip


def in_groups(items: Sequence[Any], size: int) -> list[Any]:
    assert len(items) % size == 0
    return [items[start : start + size] for start in range(0, len(items), size)]


# Kills and resumes


def plain(item: Any) -> Any:
    """Batches and lists of them as numbers, strings and lists."""
    if isinstance(item, list):
        return [plain(batch) for batch in item], getattr(item, "domains", None)
    return item.tolist() if isinstance(item, torch.Tensor) else item


def epochs_of(loop: Iterable[Any], number: int) -> list[list[Any]]:
    return [[plain(item) for item in loop] for _ in range(number)]


def assert_resumes(
    make: Callable[[], tuple[Any, Iterable[Any]]], number: int, stops: Callable[[int], Iterable[int]]
) -> None:
    """Killed behind any item of any epoch, the rest of it and the epochs after are what they would have been.

    ``make`` returns what has the state, and a loop over it.
    """
    whole = epochs_of(make()[1], number)
    for epoch, items in enumerate(whole):
        for stop in stops(len(items)):
            holder, loop = make()
            taken = epochs_of(loop, epoch)
            taken.append([plain(item) for item in itertools.islice(loop, stop)])
            state = through_file(holder.state_dict())
            holder, loop = make()
            holder.load_state_dict(state)
            rest = epochs_of(loop, number - epoch)
            assert taken[-1] + rest[0] == items, (epoch, stop)
            assert taken[:-1] + rest[1:] == whole[:epoch] + whole[epoch + 1 :], (epoch, stop)


# Distributions


def plan_probabilities(num_batches, group_size, weights, order, max_groups=None, first_of_pair=None):
    """Every sequence of groups and its probability, by enumeration in fractions; weights None: the batches left."""
    if sum(left > 0 for left in num_batches) < group_size or max_groups == 0:
        return {(): Fraction(1)}

    def followed(served, first_of_pair):
        left = [count - (domain in served) for domain, count in enumerate(num_batches)]
        max_following = None if max_groups is None else max_groups - 1
        rest = plan_probabilities(left, group_size, weights, order, max_following, first_of_pair)
        return {(*served, *plan): probability for plan, probability in rest.items()}

    if first_of_pair is not None and all(num_batches[domain] for domain in first_of_pair):
        return followed(first_of_pair[::-1], None)
    begins_pair = order == "flipflop" and first_of_pair is None
    plans: Counter[Any] = Counter()
    for drawn in itertools.permutations([domain for domain, left in enumerate(num_batches) if left], group_size):
        probability, weights_left = Fraction(1), [Fraction(weight) for weight in (weights or num_batches)]
        weights_left = [weight * (left > 0) for weight, left in zip(weights_left, num_batches, strict=True)]
        for domain in drawn:
            probability *= weights_left[domain] / sum(weights_left)
            weights_left[domain] = Fraction(0)
        for served in itertools.permutations(drawn):  # the group is served in any order
            for plan, following in followed(served, served if begins_pair else None).items():
                plans[plan] += probability / math.factorial(group_size) * following
    assert sum(plans.values()) == 1
    return dict(plans)


def assert_distributed(outcomes: Sequence[Any], probabilities: dict[Any, Fraction]) -> None:
    """Chi-square within 7 standard deviations of its mean; its bins expect at least 5 each."""
    counts = Counter(outcomes)
    assert set(counts) <= set(probabilities)
    expected = {outcome: float(probability) * len(outcomes) for outcome, probability in probabilities.items()}
    rare = [outcome for outcome, number in expected.items() if number < 5]
    bins = [([outcome], number) for outcome, number in expected.items() if number >= 5]
    if rare:
        bins.append((rare, sum(expected[outcome] for outcome in rare)))
    statistic = sum((sum(counts[outcome] for outcome in members) - number) ** 2 / number for members, number in bins)
    degrees = len(bins) - 1
    assert statistic < degrees + 7 * math.sqrt(2 * degrees), (statistic, degrees)
