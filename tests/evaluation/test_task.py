"""Parting the samples, groups, the control by permutation, twins, and scoring."""

from __future__ import annotations

import random
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from _study import data, net, task
from hypothesis import given, settings
from hypothesis import strategies as st


def all_of(split: Any) -> list[int]:
    sides = [*split.training.values(), *split.validation.values(), split.held_out]
    return [i for side in sides for i in side]


def test_every_sample_is_on_one_side():
    own = task()
    for seed in range(5):
        split = own.split("south", seed)
        assert sorted(all_of(split)) == list(range(96))
        assert all(len(side) == 6 for side in split.validation.values())
        assert list(split.training) == ["north", "west", "east"]
    assert own.split("south", 0) != own.split("south", 1)
    assert own.split(None, 0).held_out == []
    assert sorted(all_of(own.split(None, 0))) == list(range(96))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 9), st.booleans())
def test_a_group_is_never_on_both_sides(seed: int, size: int, across: bool):
    """Also one that several domains have, and one that the held-out domain has, too."""
    draw = random.Random(seed)
    domains = data(samples=240)[1]
    groups = {i: draw.randrange(240 // size) for i in range(240)}
    if not across:
        groups = {i: f"{domains[i]} {group}" for i, group in groups.items()}
    own = task(data(samples=240)[0], domains, group_of=groups)
    with suppress(ValueError) if across else nullcontext():  # which says that groups leave a domain nothing
        check_sides(own, own.split("west", seed), groups, complete=not across)


def check_sides(own: Any, split: Any, groups: dict[int, Any], *, complete: bool) -> None:
    training = {groups[i] for side in split.training.values() for i in side}
    validation = {groups[i] for side in split.validation.values() for i in side}
    assert not training & validation
    assert not (training | validation) & {groups[i] for i in split.held_out}
    if complete:
        assert sorted(all_of(split)) == list(range(240))


def test_groups_that_all_domains_have_are_shared_out():
    by_domain = task(*data(samples=240)).by_domain
    groups = {i: place % 20 for own in by_domain.values() for place, i in enumerate(own)}  # each thrice in each style
    own = task(*data(samples=240), group_of=groups)
    tested = []
    for seed in range(8):
        split = own.split("west", seed)
        check_sides(own, split, groups, complete=False)
        tested.append({groups[i] for i in split.held_out})
        assert len(tested[-1]) == 5, "a quarter of twenty"
        assert len({groups[i] for side in split.validation.values() for i in side}) == 4, "a quarter of what is left"
        assert all(len(side) == 11 * 3 for side in split.training.values())
        assert sorted(split.held_out) == [i for i in own.by_domain["west"] if groups[i] in tested[-1]]
    assert len(set.union(*tested)) > 12, "another part for each seed"


def test_groups_of_the_held_out_domain_alone_are_all_scored():
    groups = {i: f"{data()[1][i]} {i // 8}" for i in range(96)}
    west = [i for i in range(96) if data()[1][i] == "west"]
    groups[west[0]] = groups[0]  # one sample in a group of the north
    split = task(group_of=groups).split("west", 0)
    assert split.held_out == west
    assert not {i for i in range(96) if groups[i] == groups[0]} & {i for side in split.training.values() for i in side}


def test_permuted_domains_keep_sizes_and_whole_groups():
    own = task()
    other = own.permuted(1)
    assert {d: len(i) for d, i in other.by_domain.items()} == {d: len(i) for d, i in own.by_domain.items()}
    assert other.by_domain != own.by_domain
    assert other == own.permuted(1) != own.permuted(2)
    grouped = task(group_of={i: f"{i % 4} {i // 8}" for i in range(96)}).permuted(3)
    of_group: dict[str, set[str]] = {}
    for label, indices in grouped.by_domain.items():
        for i in indices:
            of_group.setdefault(grouped.group_of[i], set()).add(label)
    assert all(len(labels) == 1 for labels in of_group.values())
    assert sorted(i for indices in grouped.by_domain.values() for i in indices) == list(range(96))


def test_a_metric_of_a_whole_domain_sees_all_outputs_at_once():
    def whole(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        assert outputs.shape == (700, 2)
        return float((outputs.argmax(1) == targets).double().mean())

    dataset, domains = data(samples=700)
    model = net().eval()
    own = task(dataset, domains, metric=whole, predict=lambda m, b: (m(b[0]), b[1]))
    expected = task(dataset, domains).score(model, range(700))[0]
    assert own.score(model, range(700)) == (pytest.approx(expected), [])
    kept = task(dataset, domains, metric=whole, predict=lambda m, b: (m(b[0]), b[1]), predictions=True)
    _, (outputs, targets) = kept.score(model, range(700))
    assert targets == dataset.tensors[1].tolist()
    torch.testing.assert_close(torch.tensor(outputs), model(dataset.tensors[0]).detach())
