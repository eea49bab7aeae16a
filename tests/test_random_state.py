"""Random numbers drawn twice are the same."""

from __future__ import annotations

import random

import numpy as np
import torch

from torch_gradmatch.gradients.replay import RandomState, devices_of


def draw() -> list[float]:
    return [float(torch.rand(())), float(torch.randn(5)[3]), float(np.random.rand()), random.random()]  # noqa: NPY002


def test_every_generator_is_returned_to_its_state():
    state = RandomState.capture([torch.device("cpu")])
    first = draw()
    second = draw()
    state.restore()
    assert draw() == first
    assert draw() == second


def test_capturing_draws_nothing():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    RandomState.capture([])
    assert torch.equal(torch.rand(3), expected)


def test_devices_of_nested_structures():
    batch = {"x": [torch.ones(1), "text", 3], "y": (torch.ones(1, device="meta"),)}
    assert devices_of(batch, torch.ones(2)) == {torch.device("cpu"), torch.device("meta")}
    assert devices_of(None, {}) == set()
    RandomState.capture(devices_of(batch)).restore()  # the meta device has no random state
