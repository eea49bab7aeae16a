"""What is Lightning's own: validation, checkpoints and tests by the callback, loss scaling, skipped training steps."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import _in_lightning as lightning
import pytest
import torch
from _in_lightning import Recording, Staying, example
from _models import assert_identical
from _spurious_data import DOMAINS
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Subset
from torchdata.stateful_dataloader import StatefulDataLoader

from torch_gradmatch import DomainBatchSampler, Fish, GradMatch
from torch_gradmatch.integrations.lightning import GradMatchCallback


def test_it_resumes_where_epochs_differ_in_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = [256, 192, 100, 130]

    class Uneven(Recording):
        def train_dataloader(self) -> Any:
            kept = [index for index in range(4 * 256) if index % 256 < sizes[index // 256]]
            sampler = DomainBatchSampler([self.domains[index] for index in kept], 32, domains_per_step=2)
            totals = [sampler.total_batches(epochs) for epochs in range(5)]
            assert len({one - other for one, other in itertools.pairwise(totals)}) > 1
            return StatefulDataLoader(Subset(self.data, kept), batch_sampler=sampler)

    monkeypatch.setattr(example, "Fish", lambda *_, model, **__: Fish(0.05, inner_steps=2, model=model))
    whole = lightning.train(tmp_path, 75, kind=Uneven, save_every=1)
    for stop in (9, 47):
        resumed = lightning.train(tmp_path, 75, kind=Uneven, resume_from=stop)
        assert_identical((resumed.state(), resumed.place), (whole.state(), whole.place), f"resumed after {stop}")


def test_a_step_that_the_grad_scaler_skips_counts(tmp_path: Path):
    """So inner loops and the sampler's groups stay in phase."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)  # too large for half floats: halved until it fits
    trained = lightning.train(tmp_path, 41, precision="fp16", scaler=scaler)
    skipped = 30 - int(math.log2(scaler.get_scale()))
    assert 1 <= skipped <= 20
    assert skipped % DOMAINS != 0
    assert trained.optimizer.inner_step == 41 % DOMAINS
    assert all(bool(parameter.isfinite().all()) for parameter in trained.network.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"precision": "bf16"}, RuntimeError, "GradMatch, does not allow for gradient clipping"),
        ({"precision": "fp16", "method": "exact"}, AssertionError, "_scale is None"),
        ({"precision": "fp16", "skip": (1,)}, RuntimeError, r"unscale_\(\) has already been called"),
    ],
    ids=["clipping", "exact in fp16", "a step left out in fp16"],
)
def test_what_lightning_does_not_do_in_mixed_precision(
    settings: dict[str, Any], error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of which the example speaks; it does the clipping itself."""
    if "clipping" in words:
        monkeypatch.delattr(example.Classifier, "configure_gradient_clipping")
    with pytest.raises(error, match=words):
        lightning.train(tmp_path, 4, **settings)


def test_a_skipped_training_step_takes_its_turn(tmp_path: Path):
    skipped, whole = lightning.train(tmp_path, 8, skip=(1,)), lightning.train(tmp_path, 8)
    assert skipped.optimizer.inner_step == 0  # 8 batches are two groups, whatever was skipped
    assert [domain for _, domain in skipped.told] == [domain for _, domain in whole.told]
    assert not torch.equal(skipped.network[0].weight, whole.network[0].weight)


def test_the_model_of_a_checkpoint_is_the_one_that_was_validated(tmp_path: Path):
    """Also one that ModelCheckpoint keeps for its metric, from which training resumes all the same."""
    best = ModelCheckpoint(tmp_path, "best-{step}", monitor="held_out_loss", save_top_k=-1)
    whole = lightning.train(tmp_path, 22, evaluate_every=6, callbacks=[best, Staying()])
    short = lightning.train(tmp_path, DOMAINS)
    saved = torch.load(tmp_path / "best-step=6.ckpt", weights_only=True)
    assert_identical(saved["slow_weights"], short.trainer.lightning_module.state_dict())
    assert not torch.equal(saved["state_dict"]["model.0.weight"], saved["slow_weights"]["model.0.weight"])
    resumed = lightning.train(tmp_path, 22, resume_from="best-step=6", evaluate_every=6)
    assert_identical(resumed.state(), whole.state())


def test_a_validation_that_fails_leaves_the_fast_weights(tmp_path: Path):
    found = []

    class Failing(Recording):
        def validation_step(self, *_: Any) -> None:
            found.append(self.model)
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        lightning.train(tmp_path, 22, evaluate_every=6, kind=Failing)
    expected = lightning.train(tmp_path, 6).network
    assert_identical(found[0].state_dict(), expected.state_dict())


@pytest.mark.parametrize(("close", "weight"), [("rollback", 0.0), ("interpolate", 0.05)])
def test_the_wrapped_optimizer_reaches_everything(close: str, weight: float, tmp_path: Path):
    trained = lightning.train(tmp_path, 6)
    wrapped, ours = trained.trainer.lightning_module.optimizers(), trained.optimizer
    slow = copy.deepcopy(list(ours.state_dict()["gradmatch"]["slow_weights"].values()))
    fast = copy.deepcopy(list(trained.network.parameters()))
    assert wrapped is not ours
    assert isinstance(wrapped, GradMatch)
    assert wrapped.inner_step == ours.inner_step == 2
    assert wrapped.last_meta_step is ours.last_meta_step
    getattr(wrapped, close)()
    assert ours.inner_step == 0
    expected = [torch.lerp(*pair, weight) for pair in zip(slow, fast, strict=True)]
    torch.testing.assert_close(list(trained.network.parameters()), expected)


def test_loss_and_agreement_are_in_the_progress_bar(tmp_path: Path):
    for method, more in ("ERM", set()), ("Fish", {"train/cosine"}), ("exact", {"train/cosine"}):
        shown = lightning.train(tmp_path, 8, method).trainer.progress_bar_metrics
        assert shown.keys() == {"train/loss"} | more


def test_an_average_that_is_not_kept_is_an_error(tmp_path: Path):
    with pytest.raises(RuntimeError, match="this optimizer keeps no average"):
        lightning.train(tmp_path, 6, evaluate_every=4, weights="averaged")


def test_training_that_ends_in_an_inner_loop_leaves_the_slow_weights_behind(tmp_path: Path):
    short = lightning.train(tmp_path, DOMAINS)
    found = lightning.train(tmp_path, DOMAINS + 2, callbacks=[GradMatchCallback()])
    assert found.optimizer.inner_step == 0
    assert_identical(found.network.state_dict(), short.network.state_dict())


def test_a_loader_that_knows_no_domains_is_refused_with_fish_and_taken_without(tmp_path: Path):
    class Plain(Recording):
        def train_dataloader(self) -> Any:
            return DataLoader(self.data, batch_size=64)

    with pytest.raises(ValueError, match="loader should be a DataLoader over a DomainBatchSampler"):
        lightning.train(tmp_path, 3, kind=Plain)
    lightning.train(tmp_path, 3, "ERM", kind=Plain)
