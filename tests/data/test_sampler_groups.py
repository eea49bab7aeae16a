"""meta_batches over a DomainBatchSampler and over other loaders."""

from __future__ import annotations

import itertools

import pytest
from _samplers import (
    loader_of,
    small_sampler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_gradmatch.data.meta_batches import meta_batches

# From Python 3.12 on, forking a worker from a process with threads warns; these workers only read a range.
# Domains are drawn of any sizes, so that an epoch may well serve little; test_unequal.py tests that warning.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*:DeprecationWarning", "ignore:an epoch serves:UserWarning"
)


@given(length=st.integers(0, 20), group_size=st.integers(1, 6))
@settings(deadline=None)
def test_meta_batches_groups_any_loader(length, group_size):
    loop = meta_batches(list(range(length)), group_size)
    for _ in range(2):
        groups = list(loop)
        assert len(loop) == len(groups) == length // group_size
        assert list(itertools.chain(*groups)) == list(range(length // group_size * group_size))
        assert all(isinstance(group, list) and len(group) == group_size for group in groups)


def test_meta_batches_has_no_length_where_the_loader_has_none():
    loop = meta_batches((number for number in range(4)), 2)
    with pytest.raises(TypeError, match="has no len"):
        len(loop)
    assert list(loop) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("domains_per_step", [1, 4])
def test_meta_batches_refuses_another_number_of_domains(domains_per_step):
    with pytest.raises(ValueError, match=rf"domains_per_step should be 2, as in .* \(got {domains_per_step}\)"):
        meta_batches(loader_of(small_sampler()), domains_per_step)


@pytest.mark.parametrize("domains_per_step", [0, -1, 2.0, True])
def test_meta_batches_refuses_a_number_that_is_none(domains_per_step):
    with pytest.raises(ValueError, match=rf"domains_per_step .* \(got {domains_per_step!r}\)"):
        meta_batches([], domains_per_step)


def test_meta_batches_refuses_a_loader_that_loses_the_order():
    with pytest.raises(ValueError, match="in_order=False"):
        meta_batches(loader_of(small_sampler(), num_workers=2, in_order=False), 2)


def test_meta_batches_refuses_to_start_in_the_middle_of_a_group():
    batches = list(small_sampler())
    sampler = small_sampler()
    list(itertools.islice(sampler, 3))
    state_dict = sampler.state_dict()
    sampler.load_state_dict(state_dict)
    loop = meta_batches(loader_of(sampler), 2)
    with pytest.raises(RuntimeError, match=r"resumes at batch 3, in the middle of a group of 2: .*'position'"):
        next(iter(loop))
    sampler.load_state_dict({**state_dict, "position": 2})
    assert [batch for group in loop for batch in group] == batches[2:]
