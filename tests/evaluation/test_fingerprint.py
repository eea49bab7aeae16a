"""A hash changes with whatever a run depends on, and with nothing else."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset, TensorDataset

from torch_gradmatch import Fish, Recipe
from torch_gradmatch.evaluation.fingerprint import UnhashableError, fingerprint, fingerprint_of_data

FACTOR = 2.0


def factory(value: Any) -> Any:
    def function(x: float) -> Any:
        return [value for _ in range(3)], x

    return function


def with_global(x: float) -> float:
    return (lambda y: FACTOR * y)(x)


class Scaled:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: float) -> float:
        return self.factor * x


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(2, 2)


PAIRS: list[tuple[Any, Any]] = [
    (1, True),
    ("1", 1),
    ((1, 2), [1, 2]),
    ({"a": 1}, {"a": 2}),
    ({1, 2}, {1, 3}),
    (torch.zeros(4), torch.zeros(4).double()),
    (torch.zeros(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)),
    (np.arange(3), np.arange(3.0)),
    (np.array(["a"], object), np.array(["b"], object)),
    (lambda x: x + 1, lambda x: x + 2),
    (lambda x, y=1: x, lambda x, y=2: x),
    (factory(factory(1)), factory(factory(2))),
    (functools.partial(torch.optim.SGD, momentum=0.9), functools.partial(torch.optim.SGD, momentum=0.8)),
    (lambda m, b: cross_entropy(m(b[0]), b[1]), lambda m, b: mse_loss(m(b[0]), b[1])),
    (Scaled(1.0).__call__, Scaled(2.0).__call__),
    (linear(0), linear(1)),
    (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
    (Recipe(lambda m, s: Fish(0.5)), Recipe(lambda m, s: Fish(0.25))),
    (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)),
]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=range(len(PAIRS)))
def test_what_differs_has_another_hash(one: Any, other: Any):
    assert fingerprint(one) == fingerprint(one)
    assert fingerprint(one) != fingerprint(other)


def test_a_global_name_and_a_method_of_a_users_class_that_are_used_count(monkeypatch: pytest.MonkeyPatch):
    before = fingerprint(with_global), fingerprint(Scaled(1.0))
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    monkeypatch.setattr(Scaled, "__call__", lambda self, x: x)
    assert fingerprint(with_global) != before[0]
    assert fingerprint(Scaled(1.0)) != before[1]


def test_structures_that_hold_themselves_end():
    one: list[Any] = [1]
    one.append(one)
    assert fingerprint(one) != fingerprint([1, [1]])


@pytest.mark.parametrize("value", [threading.Lock(), (i for i in range(3))], ids=["lock", "generator"])
def test_what_cannot_be_read_is_refused(value: Any):
    with pytest.raises(UnhashableError, match=f"cannot be hashed: .*{type(value).__name__}"):
        fingerprint(factory(value))


class Augmented(Dataset[Any]):
    def __init__(self, strength: float = 0.1, label: int = 0) -> None:
        self.strength, self.label = strength, label

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError
        return {"x": torch.rand(3) * self.strength + index, "y": self.label if index == 13 else 0}


def test_the_whole_of_the_data_counts_and_its_random_numbers_do_not():
    state = torch.get_rng_state()
    found = fingerprint_of_data(Augmented())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert fingerprint_of_data(Augmented()) == found
    assert fingerprint_of_data(Augmented(label=1)) != found  # of one sample
    assert fingerprint_of_data(Augmented(strength=0.2)) != found
    one, other = (TensorDataset(torch.arange(6.0)), TensorDataset(torch.arange(6.0).flip(0)))
    assert fingerprint_of_data(one) != fingerprint_of_data(other)
