"""The example of ``compare``: its data, and that it ends with an answer."""

from __future__ import annotations

from pathlib import Path

import compare as example
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torch_gradmatch.evaluation import cost


def test_the_class_is_in_the_counts_and_mostly_in_the_mark():
    torch.manual_seed(0)
    for domain in range(example.DOMAINS):
        tokens, labels = example.draw(domain, 2000)
        assert tokens.shape == (2000, example.LENGTH)
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < example.VOCABULARY
        marked = tokens[:, 0] == 2 + domain
        assert float((marked == labels.bool()).float().mean()) == pytest.approx(0.9, abs=0.03)
        others = torch.tensor([2 + other for other in range(example.DOMAINS) if other != domain])
        assert not torch.isin(tokens, others).any()
        later = tokens[:, 1:]
        counted = (later == 0).sum(1) > (later == 1).sum(1)
        assert float((counted == labels.bool()).float().mean()) > 0.9


@pytest.mark.large
def test_it_ends_with_an_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(cost, "SHORTEST_TIMING", 1e-9)
    found = example.main(["--steps", "8", "--batch-size", "4"])
    assert not any(row.error for row in found.rows)
    assert found["IDGM"].fidelity.cosine == pytest.approx(1.0, abs=1e-4)
    assert found["SmoothFish, symmetric"].fidelity.cosine > 0.99
    printed = capsys.readouterr().out
    lines = printed[printed.index("time / ERM") :].splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == ["ERM", "Fish", "SmoothFish"]


def test_log_holds_the_loss_of_each_domain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    losses, forward = [], torch.nn.CrossEntropyLoss.forward
    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", lambda *a: losses.append(forward(*a)) or losses[-1])
    monkeypatch.setattr(example, "compare", lambda *_, **__: None)
    example.main(["--steps", "22", "--batch-size", "4", "--log", str(tmp_path)])
    board = EventAccumulator(str(tmp_path)).Reload()
    assert board.Tags()["scalars"] == [f"loss/{domain}" for domain in range(example.DOMAINS)]
    shown = {event.step: event.value for tag in board.Tags()["scalars"] for event in board.Scalars(tag)}
    assert shown == pytest.approx({step: losses[step].item() for step in (0, 5, 10, 15, 20)}, rel=1e-6)
