"""The peak of what a run needs."""

from __future__ import annotations

import sys

import pytest
import torch

from torch_gradmatch.evaluation.peak_memory import peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a record that can begin anew")
@pytest.mark.parametrize("megabytes", [32, 128])
def test_it_is_the_highest_level_and_not_the_sum(megabytes: int):
    def run() -> None:
        for _ in range(3):  # one alive at a time
            torch.ones(megabytes * 2**20, dtype=torch.uint8)
        torch.ones(2**20, dtype=torch.uint8)

    kept = torch.ones(64 * 2**20, dtype=torch.uint8)  # in use before
    peak = peak_memory(run, [torch.device("cpu")])
    assert megabytes * 2**20 * 0.97 < peak < (megabytes + 4) * 2**20
    assert kept.all()
