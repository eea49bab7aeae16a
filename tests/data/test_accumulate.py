"""Several batches of a domain in a row, whose gradients a loop adds up before it steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from _samplers import cycling, samplers
from _splits import accumulating, grouped, ranks_of, walk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_gradmatch import DomainBatchSampler, Fish, GradMatch, check_loader


@given(case=accumulating())
@settings(deadline=None)
def test_every_domain_serves_its_batches_in_runs_of_k(case):
    labels, arguments, num_replicas, kind = case
    k, size = arguments["accumulate"], arguments["domains_per_step"]
    own = size // num_replicas if kind == "domains" else size
    for sampler in ranks_of(*case):
        assert sampler.batches_per_group == own * k
        lengths = []
        for _ in range(3):
            lengths.append(len(sampler))
            batches = list(sampler)
            assert len(batches) == lengths[-1]
            for group in grouped(batches, own * k):
                domains = walk(labels, group)
                assert [domain for domain in domains[::k] for _ in range(k)] == domains
                assert len(set(domains)) == own
        assert sampler.total_batches(3) == sum(lengths)


@given(case=samplers() | cycling(), k=st.integers(1, 3))
@settings(deadline=None)
def test_runs_are_what_batches_k_times_as_large_would_be(case, k):
    """Where k batches divide the domains, the samples of a run are those of one large batch, in the same order."""
    labels, arguments = case
    labels = [label for label in labels for _ in range(k * arguments["batch_size"])]
    large = DomainBatchSampler(labels, **{**arguments, "batch_size": k * arguments["batch_size"]})
    if "batches_per_epoch" in arguments:
        arguments = {**arguments, "batches_per_epoch": k * arguments["batches_per_epoch"]}
    small = DomainBatchSampler(labels, **arguments, accumulate=k)
    for _ in range(3):
        assert [list(itertools.chain(*run)) for run in grouped(list(small), k)] == list(large)


def test_batches_beyond_a_multiple_of_k_are_others_in_each_epoch():
    sampler = DomainBatchSampler(["a"] * 5 + ["b"] * 5, 1, accumulate=2)
    unserved = []
    for _ in range(20):
        served = {index for (index,) in sampler}
        assert len(served) == 8
        unserved.append(frozenset(range(10)) - served)
    assert set.union(*map(set, unserved)) == set(range(10))


@pytest.mark.parametrize("exhausted", ["stop", "cycle"])
def test_gradients_that_are_added_up_are_those_of_whole_domains(exhausted):
    """A loop of step() that accumulates k batches ends where one with batches k times as large ends."""
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(72, 3, generator=generator, dtype=torch.float64))
    labels, k = ["a", "b", "c"] * 24, 4

    def train(batch_size, steps):
        model = nn.Linear(3, 1, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.3)
        optimizer = GradMatch(torch.optim.SGD(model.parameters(), 0.1), Fish(0.5, inner_steps=3))
        sampler = DomainBatchSampler(labels, batch_size, accumulate=steps, exhausted=exhausted)
        loader = DataLoader(data, batch_sampler=sampler)
        check_loader(optimizer, loader, steps)
        for _ in range(2):
            for number, (x,) in enumerate(loader, start=1):
                (model(x).square().mean() / steps).backward()
                if number % steps == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    for one, other in zip(train(2, k), train(2 * k, 1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
