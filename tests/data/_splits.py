"""Samplers of several ranks that two test files draw, and what their batches are made of."""

from __future__ import annotations

from collections import Counter

from hypothesis import assume
from hypothesis import strategies as st

from torch_gradmatch.data.sampler import DomainBatchSampler

KINDS = ["batch", "walks", "domains"]


def ranks_of(labels, arguments, num_replicas, split):
    """The samplers of all ranks."""
    return [
        DomainBatchSampler(labels, **arguments, num_replicas=num_replicas, rank=rank, split=split)
        for rank in range(num_replicas)
    ]


@st.composite
def spread(draw, kind=None, even=False):
    """Labels, shuffled, arguments of a sampler, R and a split: ``ranks_of`` takes them.

    With ``even``, batches of R samples divide all domains, so that no last batch is cut.
    """
    kind = draw(st.sampled_from(KINDS)) if kind is None else kind
    num_replicas = draw(st.integers(1, 5))
    drop_last = draw(st.booleans())
    batch_size = draw(st.integers(1, 3)) * (num_replicas if kind == "batch" else 1)
    whole = batch_size * (num_replicas if kind == "walks" else 1)
    least = whole if drop_last or even else (1 if kind == "domains" else num_replicas)
    least_domains = num_replicas if kind == "domains" else 1
    sizes = draw(st.lists(st.integers(least, max(24, least + 6)), min_size=least_domains, max_size=least_domains + 4))
    if even:
        sizes = [size - size % whole for size in sizes]
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    draw(st.randoms(use_true_random=False)).shuffle(labels)
    step = num_replicas if kind == "domains" else 1
    domains_per_step = step * draw(st.integers(1, len(sizes) // step))
    arguments = {
        "batch_size": batch_size,
        "domains_per_step": domains_per_step,
        "weighting": draw(st.sampled_from(["uniform", "proportional"])),
        "seed": draw(st.integers(0, 2**40)),
        "drop_last": drop_last,
        "order": draw(st.sampled_from(["flipflop", "random"])),
        "exhausted": draw(st.sampled_from(["stop", "cycle"])),
    }
    if arguments["exhausted"] == "cycle" and draw(st.booleans()):
        arguments["batches_per_epoch"] = domains_per_step * draw(st.integers(1, 9))
    return labels, arguments, num_replicas, kind


@st.composite
def accumulating(draw, kind=None):
    """The same with several batches of a domain in a row, which every domain has."""
    labels, arguments, num_replicas, kind = draw(spread(kind))
    accumulate = draw(st.integers(1, 4))
    labels = [label for label in labels for _ in range(accumulate)]  # so many times as many samples
    if "batches_per_epoch" in arguments:
        arguments["batches_per_epoch"] *= accumulate
    whole = arguments["batch_size"] * (num_replicas if kind == "walks" else 1)
    assume(min(Counter(labels).values()) >= whole * accumulate)
    return labels, {**arguments, "accumulate": accumulate}, num_replicas, kind


def grouped(batches, size):
    assert len(batches) % size == 0
    return [batches[start : start + size] for start in range(0, len(batches), size)]


def walk(labels, group):
    """The domain of each batch of a group."""
    for batch in group:
        assert len({labels[index] for index in batch}) == 1
    return [labels[batch[0]] for batch in group]
