"""DomainBatchSampler: every argument that is refused, and why."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from _samplers import changing, small_sampler


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        changing(r"batch_size should be an integer of at least 1 \(got 0\)", batch_size=0),
        changing(r"batch_size .* \(got True\)", batch_size=True),
        changing(r"domains_per_step should be an integer of at least 1 \(got 0\)", domains_per_step=0),
        changing(r"domains_per_step should be at most 4, the number of domains \(got 5\)", domains_per_step=5),
        changing(r"seed should be an integer of at least 0 \(got -1\)", seed=-1),
        changing(r"seed .* \(got None\)", seed=None),
        changing(r"drop_last should be True or False \(got 1\)", drop_last=1),
        changing(r"order should be one of 'flipflop', 'random' \(got 'reverse'\)", order="reverse"),
        changing(r"accumulate should be an integer of at least 1 \(got 0\)", accumulate=0),
        changing(r"exhausted should be one of 'stop', 'cycle' \(got 'repeat'\)", exhausted="repeat"),
        changing("batches_per_epoch=4 needs exhausted='cycle'", batches_per_epoch=4),
        changing("batches_per_epoch=3 .* multiples of 2", batches_per_epoch=3, exhausted="cycle"),
        changing(r"at least 1 \(got 0\)", batches_per_epoch=0, exhausted="cycle"),
        changing(r"batches_per_epoch .* \(got 3.0\)", batches_per_epoch=3.0, exhausted="cycle"),
        changing(r"num_replicas should be an integer of at least 1 \(got 0\)", num_replicas=0),
        changing(r"rank should be an integer of at least 0 \(got -1\)", rank=-1),
        changing(r"rank should be less than num_replicas=2 \(got 2\)", num_replicas=2, rank=2),
        changing(r"split should be one of 'batch', 'walks', 'domains' \(got 'samples'\)", split="samples"),
        changing("batch_size=2 should be a multiple of num_replicas=3 with split='batch'", num_replicas=3),
        changing("domains_per_step=2 should be a multiple of num_rep.*'domains'", num_replicas=3, split="domains"),
        changing("'a' has 3 samples, too few .* batch_size=4, .* drop_last=True", drop_last=True, batch_size=4),
        changing("'a' has 3 samples, too few for accumulate=3, batch_size=2", accumulate=3),
        changing("'d' has 1 samples, too few for .* num_replicas=2", num_replicas=2),
        changing("'a' has 3 samples, too few for .* num_replicas=4", num_replicas=4, split="walks"),
        changing("weighting, if no mapping .*'uniform', 'proportional' .got 'strat", weighting="stratified"),
        changing(r"weighting.* \(got 0.5\)", weighting=0.5),
        changing(r"weighting.* \(got \[1, 1, 1, 1\]\)", weighting=[1, 1, 1, 1]),
        changing(r"it lacks 'd'\)", weighting={"a": 1, "b": 1, "c": 1}),
        changing(r"it has the unknown 'e'\)", weighting=dict.fromkeys("abcde", 1)),
        *(
            changing(r"weighting\['c'\] should be .* greater than 0", weighting={"a": 1, "b": 1, "c": weight, "d": 1})
            for weight in (True, 0, -1, math.nan, math.inf, "1", None, Fraction(1, 10**400))
        ),
    ],
)
def test_arguments_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        small_sampler(**changes)


@pytest.mark.parametrize("number", [-1, 1.0, True, None])
def test_an_epoch_and_a_number_of_epochs_that_are_none(number):
    sampler = small_sampler()
    with pytest.raises(ValueError, match=rf"epoch should be an integer of at least 0 \(got {number!r}\)"):
        sampler.set_epoch(number)
    with pytest.raises(ValueError, match=rf"epochs should be an integer of at least 0 \(got {number!r}\)"):
        sampler.total_batches(number)
    assert list(sampler) == list(small_sampler())
