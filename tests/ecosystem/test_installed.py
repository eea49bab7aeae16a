"""The library under test is the wheel, not the checkout, and its kernel runs on a torch it was not built against."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import torch

import torch_gradmatch


def test_it_is_the_wheel_and_its_native_kernel_runs():
    assert not Path(torch_gradmatch.__file__).is_relative_to(Path(__file__).parents[2] / "torch_gradmatch")
    files = [str(file) for file in distribution("torch_gradmatch").files or ()]
    assert "torch_gradmatch/_C.abi3.so" in files
    assert not any("editable" in file for file in files)
    assert torch_gradmatch.native_status().cpu, torch_gradmatch.native_status()
    slow, fast = [torch.zeros(1000)], [torch.ones(1000)]
    torch_gradmatch.ops.interpolate_(slow, fast, 0.25)
    assert torch.equal(slow[0], torch.full((1000,), 0.25))
    assert torch.equal(fast[0], slow[0])
