"""DomainBatchSampler and meta_batches: the laws of a draw, epochs, resuming, workers, and every error."""

from __future__ import annotations

import ast
import copy
import dataclasses
import itertools
import math
import pickle
import random
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from _samplers import (
    LABELS,
    ORDERS,
    WEIGHTINGS,
    assert_distributed,
    cycling,
    loader_of,
    plan_probabilities,
    samplers,
    small_sampler,
    through_a_file,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Sampler

from torch_gradmatch.data import _draw, _split
from torch_gradmatch.data import sampler as sampler_module
from torch_gradmatch.data._draw import draw_groups
from torch_gradmatch.data.meta_batches import meta_batches
from torch_gradmatch.data.sampler import DomainBatchSampler

# From Python 3.12 on, forking a worker from a process with threads warns; these workers only read a range.
# Domains are drawn of any sizes, so that an epoch may well serve little; test_unequal.py tests that warning.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*:DeprecationWarning", "ignore:an epoch serves:UserWarning"
)


def changing(message, **changes):
    return pytest.param(changes, message, id=", ".join(f"{name}={value!r}" for name, value in changes.items()))


# The laws of an epoch


@given(case=samplers())
@settings(deadline=None, max_examples=200)
def test_an_epoch_serves_groups_of_distinct_domains_until_too_few_have_a_batch_left(case):
    labels, arguments = case
    sampler = DomainBatchSampler(labels, **arguments)
    num_domains = len(set(labels))
    size, group_size = arguments["batch_size"], arguments["domains_per_step"] or num_domains
    samples_left = Counter(labels)

    def num_drawable():
        return sum(left >= (size if arguments["drop_last"] else 1) for left in samples_left.values())

    for _ in range(2):
        expected_length = len(sampler)
        samples_left.update(Counter(labels) - samples_left)
        batches = list(sampler)
        assert len(batches) == expected_length
        assert len(batches) % group_size == 0
        served = [index for batch in batches for index in batch]
        assert len(served) == len(set(served))
        for start in range(0, len(batches), group_size):
            assert num_drawable() >= group_size
            group = batches[start : start + group_size]
            domains = [{labels[index] for index in batch} for batch in group]
            assert all(len(domain) == 1 for domain in domains)
            assert len(set.union(*domains)) == group_size
            for batch, (domain,) in zip(group, domains, strict=True):
                full = size if arguments["drop_last"] else min(size, samples_left[domain])
                assert len(batch) == full
                assert all(type(index) is int for index in batch)
                samples_left[domain] -= len(batch)
        assert num_drawable() < group_size


@given(case=samplers() | cycling(), epoch=st.integers(0, 5))
@settings(deadline=None)
def test_an_epoch_depends_on_the_arguments_and_its_number_alone(case, epoch):
    labels, arguments = case
    sampler, again = (DomainBatchSampler(labels, **arguments) for _ in range(2))
    served = [list(sampler) for _ in range(epoch + 1)][-1]
    again.set_epoch(epoch)
    assert list(again) == served


@given(case=samplers(), data=st.data())
@settings(deadline=None)
def test_renaming_the_domains_and_renumbering_the_samples_changes_nothing_else(case, data):
    labels, arguments = case
    sampler = DomainBatchSampler(labels, **arguments)
    mapping: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        mapping.setdefault(f"hospital {label}", []).append(index * 3 + 1)
    renumbered = DomainBatchSampler(mapping, **arguments)
    epoch = data.draw(st.integers(0, 1000))
    sampler.set_epoch(epoch)
    renumbered.set_epoch(epoch)
    assert list(renumbered) == [[index * 3 + 1 for index in batch] for batch in sampler]


def test_epochs_and_seeds_differ_in_domains_and_in_samples():
    def orders(sampler):
        batches = list(sampler)
        return [LABELS[batch[0]] for batch in batches], [index for batch in batches for index in batch if index < 7]

    sampler = small_sampler(domains_per_step=1)
    epochs = [orders(sampler) for _ in range(5)] + [
        orders(small_sampler(domains_per_step=1, seed=seed)) for seed in (4, 5)
    ]
    for one, other in itertools.combinations(epochs, 2):
        assert one[0] != other[0]
        assert one[1] != other[1]


def test_one_domain_per_step_serves_every_batch_once():
    for weighting in WEIGHTINGS:
        sampler = small_sampler(domains_per_step=1, weighting=weighting)
        assert len(sampler) == 4 + 2 + 1 + 5
        assert sorted(index for batch in sampler for index in batch) == list(range(21))
        assert len(small_sampler(domains_per_step=1, weighting=weighting, batch_size=1, drop_last=True)) == 21


def test_all_domains_per_step_is_the_default_and_ends_with_the_smallest():
    sampler = small_sampler(domains_per_step=None)
    assert sampler.domains_per_step == 4
    assert len(sampler) == 4


# The distribution of the draws: every plan that is possible, with its exact probability


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(
    ("num_batches", "group_size", "max_groups"),
    [
        ([1, 2, 3], 2, None),
        ([3, 1, 1], 1, None),
        ([2, 2], 2, None),
        ([1, 2, 1, 4], 3, None),
        ([1, 3, 6, 40, 100], 2, 1),
        ([5, 6, 7, 1, 1, 8], 3, 1),
        ([1, 50, 2, 4], 2, 2),
    ],
    ids=str,
)
def test_whole_plans_have_their_exact_probabilities(order, weighting, num_batches, group_size, max_groups):
    generator = np.random.default_rng(20)
    weights = None if weighting == "proportional" else [1] * len(num_batches)
    plans = []
    for _ in range(12000):
        groups = draw_groups(num_batches, group_size, weights, generator, order == "flipflop")
        plans.append(tuple(groups[:max_groups].reshape(-1).tolist()))
    assert_distributed(plans, plan_probabilities(num_batches, group_size, weights, order, max_groups))


def test_shuffles_of_the_domains_and_the_draw_are_independent():
    sampler = DomainBatchSampler([0, 0, 0, 1, 1, 1], batch_size=1, seed=8)
    outcomes = []
    for _ in range(7200):
        served = [index for (index,) in sampler]
        first, second = (tuple(index for index in served if index // 3 == domain) for domain in (0, 1))
        outcomes.append((served[0] // 3, first, second))
    orders = list(itertools.permutations(range(3)))
    equally = {
        (domain, one, tuple(index + 3 for index in other)): Fraction(1, 72)
        for domain in (0, 1)
        for one in orders
        for other in orders
    }
    assert_distributed(outcomes, equally)


@pytest.mark.large
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_ten_thousand_very_unequal_domains(weighting, order, record_property):
    sizes = np.clip(np.random.default_rng(0).lognormal(3.7, 1.5, 10_000), 1, 8000).astype(int)
    started = time.perf_counter()
    labels = np.repeat(np.arange(10_000), sizes)
    sampler = DomainBatchSampler(labels, 2, domains_per_step=15, weighting=weighting, order=order)
    built = time.perf_counter()
    num_batches = len(sampler)
    planned = time.perf_counter()
    first_of_batch = np.fromiter((batch[0] for batch in sampler), dtype=np.int64)
    served = time.perf_counter()
    times = {"build": built - started, "plan": planned - built, "serve": served - planned}
    record_property("seconds", times)
    shown = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in times.items())
    sys.stdout.write(
        f"10,000 domains of 1 to {sizes.max()} samples, {num_batches} batches, {weighting}, {order}: {shown}\n"
    )

    domains = labels[first_of_batch]
    assert len(domains) == num_batches
    assert np.all(np.diff(np.sort(domains.reshape(-1, 15), axis=1), axis=1) > 0)
    left = (sizes + 1) // 2 - np.bincount(domains, minlength=10_000)
    assert left.min() >= 0
    assert np.count_nonzero(left) < 15


# Labels


def test_a_mapping_serves_only_its_own_samples_in_order_of_its_keys():
    mapping = {"x": [5, 9], "y": [100]}
    assert sorted(itertools.chain(*DomainBatchSampler(mapping, 2))) == [5, 9, 100]


@settings(deadline=None)
@given(
    domains=st.dictionaries(st.text(max_size=2), st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_domains_that_share_samples_each_serve_all_of_their_own(domains, seed):
    mapping = {label: sorted(indices) for label, indices in domains.items()}
    served = list(itertools.chain(*DomainBatchSampler(mapping, 2, domains_per_step=1, seed=seed, overlapping=True)))
    assert sorted(served) == sorted(itertools.chain(*mapping.values()))


def test_domains_that_share_no_sample_are_served_alike_with_and_without_overlapping():
    mapping = {"x": range(7), "y": [9, 8, 30], "z": range(20, 25)}
    assert list(DomainBatchSampler(mapping, 2)) == list(DomainBatchSampler(mapping, 2, overlapping=True))


def test_a_domain_that_has_a_sample_twice_is_an_error_also_where_domains_share_samples():
    with pytest.raises(ValueError, match=r"sample 4 is in domains\['b'\] and again in domains\['b'\]: give it once$"):
        DomainBatchSampler({"a": [0, 4], "b": [4, 1, 4]}, 1, overlapping=True)
    with pytest.raises(ValueError, match=r"give it once or, if domains may share samples, pass overlapping=True$"):
        DomainBatchSampler({"a": [0, 4], "b": [1, 4]}, 1)


def test_numpy_integers_are_accepted_as_arguments():
    sampler = small_sampler(batch_size=np.int64(2), domains_per_step=np.int32(2), seed=np.uint8(3))
    assert list(sampler) == list(small_sampler())
    through_a_file(sampler.state_dict())


# Epochs, length


def test_epochs_advance_after_an_end_and_after_a_break():
    sampler, reference = small_sampler(), small_sampler()
    epochs = [list(reference) for _ in range(5)]
    assert list(sampler) == epochs[0]
    broken_off = iter(sampler)
    assert next(broken_off) == epochs[1][0]
    assert list(sampler) == epochs[2]
    assert next(broken_off) == epochs[1][1]  # an iterator keeps to its epoch
    sampler.set_epoch(4)
    assert list(sampler) == epochs[4]
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]


def test_choosing_an_epoch_ends_the_one_in_progress():
    sampler = small_sampler(seed=0)
    lengths = {len(list(sampler)): epoch for epoch in range(20)}
    for length, epoch in lengths.items():
        next(iterator := iter(sampler))
        sampler.set_epoch(epoch)
        assert len(sampler) == length
        assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (epoch, 0)
        with pytest.raises(ValueError, match="served should be at most 0"):
            sampler.state_dict(served=1)
        next(iterator)
        assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (epoch, 0)


@pytest.mark.parametrize("domains_per_step", [1, 4])
def test_every_stream_of_random_numbers_has_one_use(monkeypatch, domains_per_step):
    streams = []
    random_stream = _draw.random_stream

    def recording(*key):
        streams.append(key)
        return random_stream(*key)

    for module in (_draw, _split, sampler_module):
        monkeypatch.setattr(module, "random_stream", recording)
    sampler = small_sampler(domains_per_step=domains_per_step)
    for _ in range(3):
        list(sampler)
    assert len(streams) == len(set(streams)) == 3 * (1 + 4)  # the plan and four shuffles


def test_length_is_that_of_the_epoch_in_progress_or_else_the_next():
    reference = small_sampler(seed=0)
    lengths = [len(list(reference)) for _ in range(20)]
    assert len(set(lengths)) > 1
    sampler = small_sampler(seed=0)
    for epoch, length in enumerate(lengths):
        assert len(sampler) == length
        iterator = iter(sampler)
        for position, _ in enumerate(iterator):
            assert len(sampler) == length
            if epoch % 2 and position == 2:
                break
        del iterator  # breaking off and letting go ends the epoch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_length_under_meta_batches_holds_until_the_loop_ends(num_workers):
    reference = small_sampler(seed=0)
    lengths = [len(list(reference)) // 2 for _ in range(6)]
    assert len(set(lengths)) > 1
    loop = meta_batches(loader_of(small_sampler(seed=0), num_workers), 2)
    for epoch, length in enumerate(lengths):
        assert len(loop) == length
        for position, _ in enumerate(loop):
            assert len(loop) == length
            if epoch % 2 and position == 2:
                break


def test_iterators_of_one_sampler_do_not_disturb_each_other():
    reference = small_sampler()
    epochs = [list(reference) for _ in range(2)]
    sampler = small_sampler()
    together = list(itertools.zip_longest(sampler, sampler))
    for epoch, served in zip(epochs, zip(*together, strict=True), strict=True):
        assert [batch for batch in served if batch is not None] == epoch


# Resuming


@given(case=samplers() | cycling(), data=st.data())
@settings(deadline=None)
def test_a_state_dict_taken_anywhere_continues_exactly(case, data):
    labels, arguments = case
    reference = DomainBatchSampler(labels, **arguments)
    epochs = [list(reference) for _ in range(4)]
    epoch = data.draw(st.integers(0, 2))
    position = data.draw(st.integers(0, len(epochs[epoch])))
    sampler = DomainBatchSampler(labels, **arguments)
    sampler.set_epoch(epoch)
    list(itertools.islice(sampler, position))

    resumed = DomainBatchSampler(labels, **arguments)
    resumed.load_state_dict(through_a_file(sampler.state_dict()))
    # Asking changes nothing, and neither does saving what was just loaded.
    assert resumed.state_dict() == sampler.state_dict()
    if data.draw(st.booleans(), label="set_epoch before the epoch, as many loops do"):
        resumed.set_epoch(epoch)
    assert len(resumed) == len(epochs[epoch]) - position
    # Once more in the middle of what was resumed; ``served`` counts from the resume.
    further = data.draw(st.integers(0, len(epochs[epoch]) - position))
    assert list(itertools.islice(resumed, further)) == epochs[epoch][position : position + further]
    again = DomainBatchSampler(labels, **arguments)
    again.load_state_dict(resumed.state_dict(served=further) if further else resumed.state_dict())
    assert list(again) == epochs[epoch][position + further :]
    assert list(again) == epochs[epoch + 1]


def test_after_the_end_of_an_epoch_the_state_is_the_start_of_the_next():
    sampler = small_sampler()
    length = len(list(sampler))
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (1, 0)
    # A loop that counts from 0 again is about to start the next epoch; one that counts to the end is still in the last.
    assert sampler.state_dict(served=0) == sampler.state_dict()
    assert (sampler.state_dict(served=length)["epoch"], sampler.state_dict(served=length)["position"]) == (0, length)


def test_prefetched_but_not_yet_served():
    sampler = small_sampler()
    next(iterator := iter(sampler))
    assert sampler.state_dict(served=0) == small_sampler().state_dict()
    assert sampler.state_dict(served=1)["position"] == 1
    next(iterator)


def test_choosing_another_epoch_drops_a_resumed_position():
    reference = small_sampler()
    epochs = [list(reference) for _ in range(3)]
    sampler = small_sampler()
    next(iterator := iter(sampler))
    state_dict = sampler.state_dict()
    del iterator
    sampler.load_state_dict(state_dict)
    sampler.set_epoch(2)
    assert list(sampler) == epochs[2]
    sampler.load_state_dict(state_dict)
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0][1:]
    assert list(sampler) == epochs[1]


def test_the_state_is_numbers_and_strings():
    state_dict = small_sampler(weighting="proportional", drop_last=False).state_dict()
    assert {type(value) for value in state_dict.values()} == {int, str, bool}


def resume_and_finish(state_dict, num_epochs, num_workers):
    sampler = small_sampler()
    sampler.load_state_dict(state_dict)
    loop = meta_batches(loader_of(sampler, num_workers), 2)
    served = []
    while sampler.state_dict()["epoch"] < num_epochs:
        served += list(loop)
    return served


@pytest.mark.parametrize("num_workers", [0, 2])
def test_meta_batches_knows_what_the_loop_received_although_workers_run_ahead(num_workers):
    reference = small_sampler()
    groups, states = [], []
    for epoch in range(2):
        batches = list(reference)
        groups += [batches[start : start + 2] for start in range(0, len(batches), 2)]
        states += [(epoch, stop) for stop in range(2, len(batches) + 1, 2)]
    sampler = small_sampler()
    loop = meta_batches(loader_of(sampler, num_workers, prefetch_factor=50 if num_workers else None), 2)
    saved = []
    served = []
    for _ in range(2):
        for group in loop:
            served.append(group)
            saved.append(sampler.state_dict())
    assert served == groups
    assert [(state["epoch"], state["position"]) for state in saved] == states
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (2, 0)
    for stop in (0, len(groups) // 2 - 1, len(groups) // 2, len(groups) - 1):
        assert resume_and_finish(through_a_file(saved[stop]), 2, num_workers) == groups[stop + 1 :]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loop_broken_off_under_meta_batches_can_be_resumed(num_workers):
    reference = list(small_sampler())
    sampler = small_sampler()
    for number, _ in enumerate(meta_batches(loader_of(sampler, num_workers), 2)):
        if number == 1:
            break
    resumed = small_sampler()
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == reference[4:]
    assert list(sampler) == list(resumed)  # the one that was broken off goes on to the next epoch


def test_a_plain_loop_over_workers_resumes_with_served():
    batches = list(small_sampler())
    sampler = small_sampler()
    loader = loader_of(sampler, num_workers=2, prefetch_factor=50)
    for number, _ in enumerate(loader):
        resumed = small_sampler()
        resumed.load_state_dict(sampler.state_dict(served=number + 1))
        assert list(resumed) == batches[number + 1 :]
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (1, 0)


# DataLoader


@pytest.mark.parametrize(
    ("num_workers", "persistent"),
    [(0, False), (2, False), (2, True)],
    ids=["no-workers", "workers", "persistent-workers"],
)
def test_a_data_loader_serves_epoch_after_epoch(num_workers, persistent):
    reference = small_sampler()
    epochs = [list(reference) for _ in range(3)]
    loader = loader_of(small_sampler(), num_workers, persistent_workers=persistent)
    for epoch in epochs:
        assert len(loader) == len(epoch)
        assert list(loader) == epoch


def test_it_is_a_sampler_and_uses_no_global_randomness():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    sampler = small_sampler(weighting="proportional")
    assert isinstance(sampler, Sampler)
    served = list(sampler)
    sampler.load_state_dict(sampler.state_dict())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), pickle.dumps(np.random.get_state()))  # noqa: NPY002
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert list(small_sampler(weighting="proportional")) == served


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_the_same_state_and_the_same_future(duplicate):
    sampler = small_sampler()
    iterator = iter(sampler)
    next(iterator)
    copied = duplicate(sampler)
    assert copied.state_dict() == sampler.state_dict()
    next(iterator)
    assert copied.state_dict()["position"] == 1
    assert [list(copied), list(copied)] == [list(sampler), list(sampler)]


# meta_batches


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


def test_meta_batches_groups_a_loader_without_a_domain_batch_sampler():
    assert [len(group) for group in meta_batches(DataLoader(range(10), batch_size=2), 2)] == [2, 2]


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


# Who reads and writes the progress

PROGRESS = {"_progress", "_next", "_plan"} | {
    field.name for field in dataclasses.fields(sampler_module._Progress) if field.name not in {"epoch", "start"}
}


def progress_attributes(source, inside):
    """The attributes that hold a sampler's progress and occur inside, or else outside, class DomainBatchSampler."""
    tree = ast.parse(source)
    own = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "DomainBatchSampler"]
    within = {id(node) for owner in own for node in ast.walk(owner)}
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in PROGRESS)
    return {
        f"line {node.lineno}: {ast.unparse(node)}": node.attr for node in attributes if (id(node) in within) is inside
    }


SOURCES = sorted(  # the others cannot reach a sampler
    path
    for path in Path(sampler_module.__file__).parent.glob("*.py")
    if path.name == "sampler.py" or "data.sampler import" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_sampler_alone_touches_its_progress(path):
    assert not progress_attributes(path.read_text(encoding="utf-8"), inside=False)


def test_a_line_that_touches_the_progress_would_be_found():
    assert {"loaders.py", "sampler.py"} <= {path.name for path in SOURCES}
    source = Path(sampler_module.__file__).read_text(encoding="utf-8")
    assert set(progress_attributes(source, inside=True).values()) == PROGRESS  # the names are still right
    for line in ("sampler._next = (1, 0)", "loop.sampler._progress.over = True", "progress.handed_out += 1"):
        assert len(progress_attributes(f"{source}\n\ndef elsewhere():\n    {line}\n", inside=False)) >= 1


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        changing(r"batch_size should be an integer of at least 1 \(got 0\)", batch_size=0),
        changing(r"batch_size .* \(got 2.5\)", batch_size=2.5),
        changing(r"batch_size .* \(got True\)", batch_size=True),
        changing(r"domains_per_step should be an integer of at least 1 \(got 0\)", domains_per_step=0),
        changing(r"domains_per_step should be at most 4, the number of domains \(got 5\)", domains_per_step=5),
        changing(r"domains_per_step .* \(got '2'\)", domains_per_step="2"),
        changing(r"weighting should be 'uniform', 'proportional', .* \(got 'stratified'\)", weighting="stratified"),
        changing(r"seed should be an integer of at least 0 \(got -1\)", seed=-1),
        changing(r"seed .* \(got 1.0\)", seed=1.0),
        changing(r"seed .* \(got None\)", seed=None),
        changing(r"drop_last should be True or False \(got 1\)", drop_last=1),
        changing(r"drop_last .* \(got 'no'\)", drop_last="no"),
        changing(r"drop_last .* \(got None\)", drop_last=None),
        changing(r"overlapping should be True or False \(got 0\)", overlapping=0),
        changing(r"overlapping .* \(got 'yes'\)", overlapping="yes"),
        changing(r"order should be one of 'flipflop', 'random' \(got 'reverse'\)", order="reverse"),
        changing(r"order .* \(got None\)", order=None),
        changing(
            r"domain 'a' has 3 samples, with drop_last=True not one batch of batch_size=4 \(so have 2 of 4 domains\)",
            drop_last=True,
            batch_size=4,
        ),
    ],
)
def test_arguments_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        small_sampler(**changes)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ([], "domains should hold one label per sample .got none"),
        (["a", None, "b"], r"domains\[1\] is None: the label of a domain should be a string or an integer"),
        ([0, 1, math.nan], r"domains\[2\] is nan"),
        (np.array([0.0, math.nan]), r"domains\[0\] is 0.0"),
        (torch.tensor([True, False]), r"domains\[0\] is True"),
        ([b"a"], r"domains\[0\] is b'a'"),
        ([1, True], r"domains\[1\] is True"),
        ([["a"], ["b"]], r"domains\[0\] is \['a'\]"),
        (np.zeros((2, 3), dtype=int), r"one dimension, one label per sample \(got shape \(2, 3\)\)"),
        (torch.tensor(3), "one dimension"),
        ({}, "got no domain"),
        ({"a": [0], "b": [], "c": []}, "domain 'b' is empty, 2 of 3 are"),
        ({"a": [0], "b": np.array([], dtype=int)}, "domain 'b' is empty, 1 of 2 are"),
        ({None: [0]}, "a key of domains is None"),
        ({"a": [0], "b": [1.5]}, r"domains\['b'\] should be a sequence of sample indices \(got \[1.5\]\)"),
        ({"a": [True, False]}, r"domains\['a'\] should be a sequence of sample indices"),
        ({"a": [[0, 1]]}, r"domains\['a'\] should be a sequence of sample indices"),
        ({"a": 7}, r"domains\['a'\] should be a sequence of sample indices \(got 7\)"),
        ({"a": [0], "b": [1, -2]}, r"domains\['b'\] should hold indices of at least 0 \(got -2\)"),
        ({"a": [0, 4], "b": [1, 4]}, r"sample 4 is in domains\['a'\] and again in domains\['b'\]"),
        ({"a": [0, 4, 4]}, r"sample 4 is in domains\['a'\] and again in domains\['a'\]"),
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
        "0-d-tensor",
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


@pytest.mark.parametrize("domains", ["abc", b"abc", None, 3, {1, 2}], ids=repr)
def test_domains_of_another_type(domains):
    with pytest.raises(TypeError, match="domains should be a sequence of labels or a mapping"):
        DomainBatchSampler(domains, 1)


@pytest.mark.parametrize("epoch", [-1, 1.0, True, None])
def test_an_epoch_that_is_none(epoch):
    sampler = small_sampler()
    with pytest.raises(ValueError, match=rf"epoch should be an integer of at least 0 \(got {epoch!r}\)"):
        sampler.set_epoch(epoch)
    assert list(sampler) == list(small_sampler())


@pytest.mark.parametrize("served", [-1, 1.0, True, 4])
def test_more_served_than_the_sampler_has(served):
    sampler = small_sampler()
    list(itertools.islice(sampler, 3))
    with pytest.raises(ValueError, match=rf"served should be .*\(got {served!r}\)"):
        sampler.state_dict(served=served)
    with pytest.raises(ValueError, match=r"served should be at most 0"):
        small_sampler().state_dict(served=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        changing("version is 5, but this sampler's is 4", version=5),
        changing("version is 3, but this sampler's is 4", version=3),  # a state of version 3 has no num_replicas
        changing("version is 2, but this sampler's is 4", version=2),  # a state of version 2 has no exhausted
        changing("version is 1, but this sampler's is 4", version=1),  # a state of version 1 has no order
        changing("order is 'random', but this sampler's is 'flipflop'", order="random"),
        changing("order is 'reverse', but this sampler's is 'flipflop': resume with the same", order="reverse"),
        changing("seed is 4, but this sampler's is 3", seed=4),
        changing("seed is 3.0, but this sampler's is 3", seed=3.0),
        changing("batch_size is 3", batch_size=3),
        changing("domains_per_step is 1", domains_per_step=1),
        changing("weighting is 'proportional', but this sampler's is 'uniform'", weighting="proportional"),
        changing("drop_last is True", drop_last=True),
        changing("num_domains is 5", num_domains=5),
        changing("num_samples is 5", num_samples=5),
        changing("domains_checksum is '0'", domains_checksum="0"),
        changing(r"epoch should be an integer of at least 0 \(got -1\)", epoch=-1),
        changing(r"epoch .* \(got '1'\)", epoch="1"),
        changing(r"position .* \(got 1.5\)", position=1.5),
        changing(r"position .* \(got True\)", position=True),
        changing("position is 1000, but epoch 0 has 12 batches", position=1000),
        changing("should hold exactly", more=1),
        changing("should hold exactly", position=...),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(changes, message):
    batches = list(small_sampler())
    sampler = small_sampler()
    iterator = iter(sampler)
    next(iterator)
    before = sampler.state_dict()
    malformed = {name: value for name, value in {**before, **changes}.items() if value is not ...}
    with pytest.raises(ValueError, match=f"the state dict.*{message}"):
        sampler.load_state_dict(malformed)
    assert sampler.state_dict() == before
    assert list(iterator) == batches[1:]


@pytest.mark.parametrize("state_dict", [None, [], "state"])
def test_a_state_dict_that_is_none(state_dict):
    with pytest.raises(ValueError, match="the state dict should hold exactly"):
        small_sampler().load_state_dict(state_dict)


@pytest.mark.parametrize(
    "labels",
    [LABELS[1:] + LABELS[:1], ["b"] * 6 + ["a"] * 4 + ["d"] * 1 + ["c"] * 10],
    ids=["other-samples", "other-sizes"],
)
def test_a_state_dict_of_other_domains(labels):
    state_dict = small_sampler().state_dict()
    with pytest.raises(ValueError, match="the state dict's domains_checksum"):
        DomainBatchSampler(labels, 2, domains_per_step=2, seed=3).load_state_dict(state_dict)
