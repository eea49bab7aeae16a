"""What is the Trainer's own: saved models, logs of accumulated losses, the rows of its data set."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import _in_trainer as trainer
import pytest
import torch
from _in_trainer import example
from _models import assert_identical
from _spurious_data import DOMAINS, make_data
from _training import DOMAIN_NAMES, plain_loop
from safetensors.torch import load_file


def test_a_model_is_saved_in_an_inner_loop(tmp_path: Path):
    expected = trainer.train(tmp_path, DOMAINS).network
    trained = trainer.train(tmp_path, DOMAINS + 2)
    assert trained.optimizer.inner_step == 2
    assert not torch.equal(trained.network[0].weight, expected[0].weight)
    for block in contextlib.nullcontext(), trained.optimizer.slow_weights():
        with block:
            trained.trainer.save_model(str(tmp_path / "model"))
        found = load_file(tmp_path / "model" / "model.safetensors")
        assert_identical(found, {f"network.{name}": value for name, value in expected.state_dict().items()})
        (tmp_path / "model" / "model.safetensors").unlink()
    rows = trained.trainer.eval_dataset
    predicted = trained.trainer.predict(rows).predictions
    trained.optimizer.rollback()
    assert (trained.trainer.predict(rows).predictions == predicted).all()


@pytest.mark.parametrize("method", ["ERM", "Fish"])
def test_the_losses_of_the_domains_in_logs_are_means_over_the_accumulated_batches(method: str, tmp_path: Path):
    trained = trainer.train(tmp_path, 8, method, accumulate=2)
    (logged,) = (entry for entry in trained.trainer.state.log_history if "loss" in entry)
    losses = plain_loop(method, 8, accumulate=2).losses  # halves, to add up
    for name in DOMAIN_NAMES:
        last = [loss for domain, loss in losses if domain == name][-2:]
        assert logged[f"loss/{name}"] == pytest.approx(sum(last), rel=1e-6)
    if method == "Fish":  # where names are the same the Trainer's count
        assert logged["grad_norm"] != trained.optimizer.last_meta_step.scalars()["grad_norm"]


def test_rows_of_lists_and_of_data_sets_that_fetch_batches_are_served_alike(tmp_path: Path):
    class Batched(example.Rows):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [super(Batched, self).__getitem__(index) for index in indices]

        def __getitem__(self, index: int) -> None:
            raise NotImplementedError

    seen = []
    for kind in example.Rows, Batched:
        built = trainer.build(tmp_path, 1).trainer
        built.train_dataset = kind(make_data()[0])
        seen.append([batch["features"].sum() for batch in built.get_train_dataloader()])
    assert_identical(*seen)


def test_domains_that_are_not_those_of_the_data_set_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data, names, held_out = make_data()
    monkeypatch.setattr(example, "make_data", lambda: (data, names[:-1], held_out))
    with pytest.raises(ValueError, match="domains is for 1023 samples, but the data set has 1024"):
        trainer.train(tmp_path, 1)
