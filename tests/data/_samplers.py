"""Samplers that several test files draw or build, and a trip through a checkpoint."""

from __future__ import annotations

import io

import torch
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from torch_gradmatch.data.sampler import DomainBatchSampler

LABELS = ["b"] * 7 + ["a"] * 3 + ["d"] * 1 + ["c"] * 10
WEIGHTINGS = ["uniform", "proportional"]
ORDERS = ["flipflop", "random"]


def small_sampler(**changes):
    arguments = {"batch_size": 2, "domains_per_step": 2, "seed": 3, **changes}
    return DomainBatchSampler(LABELS, **arguments)


def loader_of(sampler, num_workers=0, **options):
    return DataLoader(range(1000), batch_sampler=sampler, collate_fn=list, num_workers=num_workers, **options)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@st.composite
def samplers(draw, orders=ORDERS):
    """The labels of a data set, shuffled, and the arguments of a sampler for it."""
    drop_last = draw(st.booleans())
    batch_size = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(batch_size if drop_last else 1, 40), min_size=1, max_size=8))
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    draw(st.randoms(use_true_random=False)).shuffle(labels)
    arguments = {
        "batch_size": batch_size,
        "domains_per_step": draw(st.none() | st.integers(1, len(sizes))),
        "weighting": draw(st.sampled_from(WEIGHTINGS)),
        "seed": draw(st.integers(0, 2**70)),
        "drop_last": drop_last,
        "order": draw(st.sampled_from(orders)),
    }
    return labels, arguments
