"""Labels of all kinds: what the sampler calls its domains, and every label that is an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _samplers import LABELS, cycling, samplers, small_sampler
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_gradmatch.data.sampler import DomainBatchSampler

pytestmark = pytest.mark.filterwarnings("ignore:an epoch serves:UserWarning")  # test_unequal.py tests that

# What the sampler calls its domains


@pytest.mark.parametrize(
    ("domains", "labels"),
    [
        (LABELS, ("b", "a", "d", "c")),
        (np.array(LABELS), ("b", "a", "d", "c")),
        (list(np.array(LABELS)), ("b", "a", "d", "c")),
        (torch.tensor([5, 2, 5, 9]), (5, 2, 9)),
        (list(np.array([5, 2, 5, 9])), (5, 2, 9)),
        ({"y": [0], "x": [1]}, ("y", "x")),
        ({np.int64(4): [0], np.str_("x"): [1]}, (4, "x")),
    ],
    ids=["list", "array", "numpy-strings", "tensor", "numpy-integers", "mapping", "numpy-keys"],
)
def test_labels_are_plain_and_in_the_order_in_which_they_first_appear(domains, labels):
    sampler = DomainBatchSampler(domains, 1)
    assert sampler.labels == labels
    assert [type(label) for label in sampler.labels] == [type(label) for label in labels]


def test_labels_cannot_be_replaced():
    with pytest.raises(AttributeError):
        small_sampler().labels = ("a",)


@given(case=samplers() | cycling(), data=st.data())
@settings(deadline=None)
def test_labels_at_are_those_of_the_batches_that_are_served(case, data):
    labels, arguments = case
    sampler = DomainBatchSampler(labels, **arguments)
    epochs = [[labels[batch[0]] for batch in sampler] for _ in range(3)]
    before = sampler.state_dict()
    epoch = data.draw(st.integers(0, 2))
    start, number = (data.draw(st.integers(0, len(epochs[epoch]) + 1)) for _ in range(2))
    assert sampler._labels_at(epoch, start, number) == tuple(epochs[epoch][start : start + number])
    assert sampler.state_dict() == before
