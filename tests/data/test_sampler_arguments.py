"""DomainBatchSampler: every argument that is refused, and why."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _samplers import (
    changing,
    small_sampler,
)

from torch_gradmatch.data.sampler import DomainBatchSampler


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        changing(r"batch_size should be an integer of at least 1 \(got 0\)", batch_size=0),
        changing(r"batch_size .* \(got 2.5\)", batch_size=2.5),
        changing(r"batch_size .* \(got True\)", batch_size=True),
        changing(r"domains_per_step should be an integer of at least 1 \(got 0\)", domains_per_step=0),
        changing(r"domains_per_step should be at most 4, the number of domains \(got 5\)", domains_per_step=5),
        changing(r"domains_per_step .* \(got '2'\)", domains_per_step="2"),
        changing(
            r"weighting, if no mapping from labels, should be one of 'uniform', .* \(got 'stratified'\)",
            weighting="stratified",
        ),
        changing(r"seed should be an integer of at least 0 \(got -1\)", seed=-1),
        changing(r"seed .* \(got 1.0\)", seed=1.0),
        changing(r"seed .* \(got None\)", seed=None),
        changing(r"drop_last should be True or False \(got 1\)", drop_last=1),
        changing(r"drop_last .* \(got 'no'\)", drop_last="no"),
        changing(r"drop_last .* \(got None\)", drop_last=None),
        changing(r"order should be one of 'flipflop', 'random' \(got 'reverse'\)", order="reverse"),
        changing(r"order .* \(got None\)", order=None),
        changing(
            r"domain 'a' has 3 samples, too few for accumulate=1, batch_size=4, .* drop_last=True",
            drop_last=True,
            batch_size=4,
        ),
        changing(r"domain 'a' has 3 samples, too few for accumulate=3, batch_size=2", accumulate=3),
        changing(r"accumulate should be an integer of at least 1 \(got 0\)", accumulate=0),
        changing(
            r"batches_per_epoch=2 needs exhausted='cycle' and a multiple of 4",
            batches_per_epoch=2,
            exhausted="cycle",
            domains_per_step=4,
            batch_size=1,
        ),
    ],
)
def test_arguments_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        small_sampler(**changes)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ([], "domains should hold one label per sample, .*got none"),
        (["a", None, "b"], r"domains\[1\] is None: a label should be a string or an integer"),
        ([0, 1, math.nan], r"domains\[2\] is nan"),
        (np.array([0.0, math.nan]), r"domains\[1\] is nan"),
        (torch.tensor([True, False]), r"domains\[0\] is True"),
        ([b"a"], r"domains\[0\] is b'a'"),
        ([1, True], r"domains\[1\] is True"),
        ([["a"], ["b"]], r"domains\[0\] is \['a'\]"),
        (np.zeros((2, 3), dtype=int), r"domains\[0\] is \[0, 0, 0\]"),
        ({}, "got none"),
        ({"a": [0], "b": [], "c": []}, r"domains\['b'\] should be indices .*\(got \[\]\)"),
        ({"a": [0], "b": np.array([], dtype=int)}, r"domains\['b'\] should be indices .*\(got array"),
        ({None: [0]}, "a key of domains is None"),
        ({"a": [0], "b": [1.5]}, r"domains\['b'\] should be indices of samples, none below 0 \(got \[1.5\]\)"),
        ({"a": [True, False]}, r"domains\['a'\] should be indices of samples, none below 0"),
        ({"a": [[0, 1]]}, r"domains\['a'\] should be indices of samples, none below 0"),
        ({"a": 7}, r"domains\['a'\] should be indices of samples, none below 0 \(got 7\)"),
        ({"a": [0], "b": [1, -2]}, r"domains\['b'\] should be indices of samples, none below 0 \(got \[1, -2\]\)"),
        ({"a": [0, 4], "b": [1, 4]}, r"sample 4 is in the domains \['a', 'b'\] more than once"),
        ({"a": [0, 4, 4]}, r"sample 4 is in the domains \['a'\] more than once"),
    ],
    ids=[
        "no-label",
        "none",
        "nan",
        "float",
        "bool-tensor",
        "bytes",
        "bool-after-int",
        "nested",
        "matrix",
        "no-domain",
        "empty",
        "empty-array",
        "none-as-key",
        "float-index",
        "bool-index",
        "nested-index",
        "single-index",
        "negative-index",
        "shared-index",
        "repeated-index",
    ],
)
def test_domains_that_are_malformed(domains, message):
    with pytest.raises(ValueError, match=message):
        DomainBatchSampler(domains, 1)


@pytest.mark.parametrize("domains", ["abc", b"abc", None, 3, {1, 2}, torch.tensor(3)], ids=repr)
def test_domains_of_another_type(domains):
    with pytest.raises(TypeError, match="domains should be a sequence of labels or map labels"):
        DomainBatchSampler(domains, 1)


@pytest.mark.parametrize("epoch", [-1, 1.0, True, None])
def test_an_epoch_that_is_none(epoch):
    sampler = small_sampler()
    with pytest.raises(ValueError, match=rf"epoch should be an integer of at least 0 \(got {epoch!r}\)"):
        sampler.set_epoch(epoch)
    assert list(sampler) == list(small_sampler())
