"""The example of ``leave_one_domain_out``: its data, and that it ends with an answer and a picture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import would_i_win as example
from sklearn.datasets import load_digits


def test_the_digits_are_turned_and_nothing_else():
    dataset, domains = example.turned_digits()
    images, digits = dataset.tensors
    assert images.shape == (1797, 1, 8, 8)
    assert len(set(domains)) == len(example.ANGLES)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    upright = torch.tensor([domain == "0 degrees" for domain in domains])
    plain = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    torch.testing.assert_close(images[upright, 0], plain[upright])
    assert not torch.allclose(images[~upright, 0], plain[~upright], atol=0.1)
    assert digits.tolist() == load_digits().target.tolist()


@pytest.mark.large
def test_it_ends_with_an_answer_and_goes_on_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    small = ["--budget", "320", "--draws", "1", "--seeds", "2", "--methods", "ERM", "Fish", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", ["would_i_win.py", "--folder", str(tmp_path), *small])
    printed = []
    for _ in range(2):
        example.main()
        printed.append(capsys.readouterr().out)
    assert "6 domains, 1797 samples, 6 held out in turn" in printed[0]
    assert "Use ERM: nothing is better" in printed[0] or "Yes. Use " in printed[0]
    assert printed[0] == printed[1]
    assert (tmp_path / "would_i_win.png").stat().st_size > 10_000
