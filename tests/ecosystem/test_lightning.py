"""Lightning: training resumes bit for bit in the middle of an inner loop, and is that of a plain loop."""

from __future__ import annotations

import contextlib
import copy
import doctest
import logging
import math
import warnings

import lightning
import pytest
import torch
import with_lightning as example
from _domains import domain_of
from _same import assert_same, without_prefix
from _spurious_data import DOMAINS, make_data, make_model
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from torch_gradmatch import IDGM, Average, DomainBatchSampler, Fish, GradMatch, MetaStep, meta_batches
from torch_gradmatch.integrations import lightning as integration
from torch_gradmatch.integrations.lightning import GradMatchCallback

STEPS_IN_EPOCH = 16
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Recording(example.Classifier):
    """Notes which batches it is trained on, and takes the settings that a test wants."""

    def __init__(self, method="Fish", workers=0, skip=()):
        super().__init__(method)
        self.workers, self.skip, self.seen = workers, skip, []
        self.inner_steps, self.validated = [], []

    def train_dataloader(self):
        loader = super().train_dataloader()
        if self.workers:
            loader = StatefulDataLoader(
                self.data, batch_sampler=loader.batch_sampler, num_workers=self.workers, prefetch_factor=4
            )
        return loader

    def validation_step(self, batch, index):
        if index == 0:
            self.validated.append(self.loss(batch))
        super().validation_step(batch, index)

    def training_step(self, batch, index):
        served = batch.values() if isinstance(batch, dict) else [batch]
        self.seen.append(torch.stack([x.sum() for x, _ in served]))
        self.inner_steps.append(0 if self.hparams.method == "ERM" else self.optimizers().inner_step)
        if self.global_step in self.skip:
            return None
        return super().training_step(batch, index)


class Staying(GradMatchCallback):
    """Stops where training stops, for the comparison."""

    def on_train_end(self, *_):
        pass


def fit(
    directory,
    max_steps,
    resume_from=None,
    precision="32-true",
    scaler=None,
    every=1,
    callbacks=None,
    **settings,
):
    model = Recording(**{k: v for k, v in settings.items() if k not in ("trainer",)})
    saver = ModelCheckpoint(directory, "{step}", every_n_train_steps=every, save_top_k=-1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = lightning.Trainer(
            max_steps=max_steps,
            # On a CPU Lightning would make bfloat16 of "16-mixed"; given as a plugin it scales the loss as on a GPU.
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if precision == "16-mixed" else None,
            precision=None if precision == "16-mixed" else precision,
            callbacks=[saver, *([Staying()] if callbacks is None else callbacks)],
            accelerator="cpu",
            logger=False,
            log_every_n_steps=example.LOG_EVERY,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            gradient_clip_val=0.5 if model.automatic_optimization else None,
            **settings.get("trainer", {}),
        )
        trainer.fit(model, ckpt_path=None if resume_from is None else f"{directory}/{resume_from}.ckpt")
    return model, trainer


def place(loader):
    """The sampler's place behind the last batch that was handed out, whatever was fetched ahead."""
    state = getattr(loader, "loader", loader).state_dict()  # under meta_batches, or itself
    state = state.get("_snapshot", {}).get("_main_snapshot", state)
    return state["_index_sampler_state"]


def state(model, trainer):
    # Copies: an optimizer's state dict is alive.
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "loader": place(trainer.train_dataloader),
        }
    )


@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        pytest.param(7, {}, id="in an inner loop"),
        pytest.param(8, {}, id="between two inner loops"),
        pytest.param(STEPS_IN_EPOCH - 1, {}, id="before the last batch of an epoch"),
        pytest.param(STEPS_IN_EPOCH, {}, id="at the end of an epoch"),
        pytest.param(22, {}, id="in the second epoch"),
        pytest.param(22, {"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param(22, {"precision": "16-mixed"}, id="16-mixed"),
        pytest.param(22, {"workers": 1}, id="with a worker that runs ahead"),
        pytest.param(22, {"trainer": {"val_check_interval": 6}}, id="with validation in inner loops"),
        pytest.param(22, {"trainer": {"limit_train_batches": 12}}, id="with epochs cut short"),
        pytest.param(12, {"trainer": {"limit_train_batches": 12}}, id="at the end of an epoch cut short"),
        pytest.param(3, {"method": "exact"}, id="exact, in an epoch"),
        pytest.param(4, {"method": "exact"}, id="exact, at the end of an epoch"),
    ],
)
def test_it_resumes_bit_for_bit(tmp_path, stop, settings):
    total = 9 if settings.get("method") == "exact" else 39
    whole = fit(tmp_path, total, **settings)
    resumed = fit(tmp_path, total, resume_from=f"step={stop}", **settings)
    assert len(whole[0].seen) == total
    assert_same(resumed[0].seen, whole[0].seen[stop:])
    assert_same(state(*resumed), state(*whole))


def test_it_resumes_where_epochs_differ_in_length(tmp_path, monkeypatch):
    sizes = [256, 192, 100, 130]

    class Uneven(Recording):
        def train_dataloader(self):
            kept = [index for index in range(4 * 256) if index % 256 < sizes[index // 256]]
            sampler = DomainBatchSampler([self.domains[index] for index in kept], 32, domains_per_step=2)
            lengths = set()
            for epoch in (3, 2, 1, 0):
                sampler.set_epoch(epoch)
                lengths.add(len(sampler))
            assert len(lengths) > 1
            return StatefulDataLoader(torch.utils.data.Subset(self.data, kept), batch_sampler=sampler)

    monkeypatch.setitem(globals(), "Recording", Uneven)
    monkeypatch.setattr(example, "Fish", lambda *_, model, **__: Fish(0.05, inner_steps=2, model=model))
    whole = fit(tmp_path, 75)
    for stop in (9, 47):
        resumed = fit(tmp_path, 75, resume_from=f"step={stop}")
        assert_same(resumed[0].seen, whole[0].seen[stop:])
        assert_same(state(*resumed), state(*whole))


AUTOCAST = {
    "32-true": contextlib.nullcontext,
    "bf16-mixed": lambda: torch.autocast("cpu", torch.bfloat16),
    "16-mixed": lambda: torch.autocast("cpu", torch.half),
}


@pytest.mark.parametrize("precision", AUTOCAST)
def test_it_is_the_plain_loop(tmp_path, precision):
    steps = 2 * STEPS_IN_EPOCH + 3
    model, trainer = fit(tmp_path, steps, precision=precision, every=1000)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    plain = make_model(0)
    data, names, _ = make_data()
    sampler = DomainBatchSampler(names, example.BATCH_SIZE, seed=0)
    wrapped = torch.optim.AdamW(plain.parameters(), lr=example.FISH_LR)
    fish = Fish(0.05, inner_steps=DOMAINS, inner_state="reset", model=plain, track_alignment=True)
    optimizer = GradMatch(wrapped, fish)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100, gamma=0.9)
    batches = (batch for _ in range(3) for batch in DataLoader(data, batch_sampler=sampler))
    for (x, y), _ in zip(batches, range(steps), strict=False):
        optimizer.zero_grad()
        with AUTOCAST[precision]():
            loss = torch.nn.functional.cross_entropy(plain(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    assert_same(dict(model.model.state_dict()), dict(plain.state_dict()))
    assert optimizer.inner_step == 3
    assert_same(without_prefix(trainer.optimizers[0].state_dict(), "model."), optimizer.state_dict())
    assert_same(optimizer.last_meta_step.inner_product, trainer.optimizers[0].last_meta_step.inner_product)


def test_a_step_that_the_grad_scaler_skips_counts(tmp_path):
    """So inner loops and the sampler's groups stay in phase."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)  # too large for half floats: halved until it fits
    model, trainer = fit(tmp_path, 41, precision="16-mixed", scaler=scaler, every=1000)
    skipped = 30 - int(math.log2(scaler.get_scale()))
    assert 1 <= skipped <= 20
    assert skipped % DOMAINS != 0
    assert model.inner_steps == [step % DOMAINS for step in range(41)]
    assert trainer.optimizers[0].inner_step == 41 % DOMAINS
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_itself_does_not_clip_in_mixed_precision(tmp_path, monkeypatch, precision):
    """Were it to, the example would have no need of its own clipping."""
    monkeypatch.delattr(example.Classifier, "configure_gradient_clipping")
    with pytest.raises(RuntimeError, match="GradMatch, does not allow for gradient clipping"):
        fit(tmp_path, 4, precision=precision)


def test_what_16_mixed_does_not_do_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match="_scale is None"):
        fit(tmp_path, 4, precision="16-mixed", method="exact")
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        fit(tmp_path, 4, precision="16-mixed", skip=(1,))


def test_exact_is_the_plain_loop(tmp_path):
    model, trainer = fit(tmp_path, 8, method="exact", every=1000)
    plain = make_model(0)
    data, names, _ = make_data()
    sampler = DomainBatchSampler(names, example.BATCH_SIZE, seed=0)
    exact = IDGM(plain, track_alignment=True)
    optimizer = GradMatch(torch.optim.AdamW(plain.parameters(), lr=example.ERM_LR), exact)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100, gamma=0.9)
    batches = (b for _ in range(2) for b in meta_batches(DataLoader(data, batch_sampler=sampler), DOMAINS))
    for batch, _ in zip(batches, range(8), strict=False):
        optimizer.meta_step(lambda b: torch.nn.functional.cross_entropy(plain(b[0]), b[1]), batch)
        scheduler.step()
    assert_same(dict(model.model.state_dict()), dict(plain.state_dict()))
    assert_same(trainer.optimizers[0].state_dict(), optimizer.state_dict())
    assert_same(trainer.callback_metrics["train/inner_product"], optimizer.last_meta_step.inner_product)


def test_one_inner_step_kept_whole_is_erm(monkeypatch):
    monkeypatch.setattr(example, "Fish", lambda *_, model, **__: Fish(1.0, inner_steps=1, model=model))
    monkeypatch.setattr(example, "FISH_LR", example.ERM_LR)
    fish, erm = Recording("Fish"), Recording("ERM")
    for model in (fish, erm):
        trainer = lightning.Trainer(
            max_steps=20,
            gradient_clip_val=0.5,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model)
    assert_same(dict(fish.state_dict()), dict(erm.state_dict()))


def test_a_skipped_training_step_takes_its_turn(tmp_path):
    model, trainer = fit(tmp_path, 8, skip=(1,), every=1000)
    whole, _ = fit(tmp_path, 8, every=1000)
    assert trainer.optimizers[0].inner_step == 0  # 8 batches are two groups, whatever was skipped
    assert_same(model.seen, whole.seen)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_validation_in_an_inner_loop_is_that_of_the_slow_weights(tmp_path):
    """After 6 and 12 steps it finds what it finds after 4 and 12, and training goes on as if it had not been."""
    inside = fit(tmp_path, 22, every=1000, trainer={"val_check_interval": 6})
    between = fit(tmp_path, 22, every=1000, trainer={"val_check_interval": DOMAINS})
    fast = fit(tmp_path, 22, every=1000, trainer={"val_check_interval": 6}, callbacks=[])
    never = fit(tmp_path, 22, every=1000, trainer={"limit_val_batches": 0})
    assert (len(inside[0].validated), len(between[0].validated)) == (3, 5)  # the last: 6 or 4 steps into epoch 2
    assert_same(inside[0].validated, [between[0].validated[index] for index in (0, 2, 4)])
    assert not torch.equal(inside[0].validated[0], fast[0].validated[0])
    assert torch.equal(inside[0].validated[1], fast[0].validated[1])
    assert_same(state(*inside), state(*never))
    assert_same(state(*between), state(*never))


def test_the_model_of_a_checkpoint_is_the_one_that_was_validated(tmp_path):
    """Also one that ModelCheckpoint keeps for its metric, from which training resumes all the same."""
    best = ModelCheckpoint(tmp_path, "best-{step}", monitor="held_out_loss", save_top_k=-1)
    trainer = {"val_check_interval": 6}
    whole = fit(tmp_path, 22, every=1000, trainer=trainer, callbacks=[best, Staying()])
    short, _ = fit(tmp_path, DOMAINS, every=1000)
    saved = torch.load(tmp_path / "best-step=6.ckpt", weights_only=True)
    assert_same(dict(saved["slow_weights"]), dict(short.state_dict()))
    assert not torch.equal(saved["state_dict"]["model.0.weight"], saved["slow_weights"]["model.0.weight"])
    resumed = fit(tmp_path, 22, resume_from="best-step=6", every=1000, trainer=trainer)
    assert_same(state(*resumed), state(*whole))


def test_a_validation_that_fails_leaves_the_fast_weights(tmp_path, monkeypatch):
    models = []

    class Failing(Recording):
        def validation_step(self, *_):
            models.append(self)
            raise OSError("the disk is gone")

    expected, _ = fit(tmp_path, 6, every=1000, trainer={"limit_val_batches": 0})
    monkeypatch.setitem(globals(), "Recording", Failing)
    with pytest.raises(OSError, match="the disk is gone"):
        fit(tmp_path, 22, every=1000, trainer={"val_check_interval": 6})
    assert_same(dict(models[0].state_dict()), dict(expected.state_dict()))


def test_the_wrapped_optimizer_reaches_everything(tmp_path):
    model, trainer = fit(tmp_path, 6, every=1000)
    wrapped, ours = model.optimizers(), trainer.optimizers[0]
    slow = copy.deepcopy(ours.state_dict()["gradmatch"]["slow_weights"])
    assert wrapped is not ours
    assert isinstance(wrapped, GradMatch)
    assert wrapped.inner_step == ours.inner_step == 2
    assert wrapped.last_meta_step is ours.last_meta_step
    wrapped.rollback()
    assert ours.inner_step == 0
    for index, parameter in enumerate(model.parameters()):
        assert torch.equal(parameter, slow[index])


def test_the_wrapped_optimizer_interpolates(tmp_path):
    model, trainer = fit(tmp_path, 6, every=1000)
    slow = copy.deepcopy(trainer.optimizers[0].state_dict()["gradmatch"]["slow_weights"])
    fast = [parameter.detach().clone() for parameter in model.parameters()]
    model.optimizers().interpolate()
    assert trainer.optimizers[0].inner_step == 0
    for index, parameter in enumerate(model.parameters()):
        torch.testing.assert_close(parameter.detach(), torch.lerp(slow[index], fast[index], 0.05))


def test_a_wrong_number_of_domains_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "Fish", lambda *_, **__: Fish(inner_steps=5))
    with pytest.raises(ValueError, match=r"inner_steps=5\).*domains_per_step=4"):
        fit(tmp_path, 4)


def test_gradients_accumulated_in_a_domain_are_those_of_a_plain_loop(tmp_path):
    k, steps = 2, 12
    model, trainer = fit(tmp_path, steps, every=1000, trainer={"accumulate_grad_batches": k})
    plain = make_model(0)
    data, names, _ = make_data()
    sampler = DomainBatchSampler(names, example.BATCH_SIZE, accumulate=k)
    fish = Fish(0.05, inner_steps=DOMAINS, inner_state="reset", model=plain, track_alignment=True)
    optimizer = GradMatch(torch.optim.AdamW(plain.parameters(), lr=example.FISH_LR), fish)
    batches = (batch for _ in range(3) for batch in DataLoader(data, batch_sampler=sampler))
    for (x, y), number in zip(batches, range(1, steps * k + 1), strict=False):
        (torch.nn.functional.cross_entropy(plain(x), y) / k).backward()
        if number % k == 0:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert trainer.global_step == steps
    assert_same(dict(model.model.state_dict()), dict(plain.state_dict()))


def test_another_accumulation_than_the_samplers_is_an_error(tmp_path, monkeypatch):
    sampler = lambda *args, accumulate, **settings: DomainBatchSampler(*args, **settings)  # noqa: E731
    monkeypatch.setattr(example, "DomainBatchSampler", sampler)
    with pytest.raises(ValueError, match="accumulation_steps=2"):
        fit(tmp_path, 4, trainer={"accumulate_grad_batches": 2})


def test_log_holds_what_every_second_meta_iteration_measured(tmp_path, monkeypatch):
    """Its numbers, and the loss and the agreement also in the progress bar."""
    models = []

    class Noting(example.Classifier):
        def __init__(self, *args):
            super().__init__(*args)
            self.measured, self.losses, self.shown = {}, {}, set()
            models.append(self)

        def training_step(self, batch, index):
            self.batch = batch
            return super().training_step(batch, index)

        def on_train_batch_end(self, outputs, *args):
            super().on_train_batch_end(outputs, *args)
            report = MetaStep() if self.hparams.method == "ERM" else self.optimizers().last_meta_step or MetaStep()
            if self.automatic_optimization:
                self.losses["train/loss"] = self.losses[f"train/loss/{domain_of(*self.batch)}"] = float(outputs["loss"])
            self.measured[self.global_step - 1] = report.scalars("train/") | self.losses
            self.shown |= self.trainer.progress_bar_metrics.keys() - {"v_num"}

    monkeypatch.setattr(example, "Classifier", Noting)
    where = ["--directory", str(tmp_path / "checkpoints"), "--log", str(tmp_path / "log")]
    example.main(["--epochs", "4", "--exact", *where])
    agreement = {"train/grad_norm", "train/inner_product", "train/cosine"}
    losses, norms = ({f"train/{name}/domain {domain}" for domain in range(DOMAINS)} for name in ("loss", "grad_norm"))
    all_of_fish = losses | norms | agreement
    for model, tags in zip(models, [losses, all_of_fish, all_of_fish | {"train/gamma"}], strict=True):
        board = EventAccumulator(str(tmp_path / "log" / model.hparams.method)).Reload()
        tags = tags | {"train/loss"}
        assert {tag for tag in board.Tags()["scalars"] if tag.startswith("train/")} == tags
        steps = [step for step in model.measured if (step + 1) % example.LOG_EVERY == 0]
        assert len(steps) == (8 if model.automatic_optimization else 2)
        for tag in tags:
            shown = {event.step: event.value for event in board.Scalars(tag)}
            assert shown == pytest.approx({step: model.measured[step][tag] for step in steps}, rel=1e-6), tag
        assert model.shown == tags & {"train/loss", "train/cosine"}
    names = [model.hparams.method for model in models]
    assert names == ["ERM", "Fish", "exact"]


@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        pytest.param(7, {}, id="in an inner loop"),
        pytest.param(22, {"workers": 1}, id="with a worker that runs ahead"),
        pytest.param(22, {"trainer": {"limit_train_batches": 13}}, id="with epochs cut short"),
        pytest.param(12, {"trainer": {"accumulate_grad_batches": 2}}, id="accumulating"),
    ],
)
def test_the_optimizer_is_told_the_domain_of_every_batch_also_after_it_resumes(tmp_path, stop, settings):
    told = []

    class Watching(Staying):
        def on_train_batch_start(self, trainer, module, batch, index):
            super().on_train_batch_start(trainer, module, batch, index)
            told.append((trainer.optimizers[0].domain, domain_of(*batch)))

    for resume_from in None, f"step={stop}":
        _, trainer = fit(tmp_path, 36, resume_from, callbacks=[Watching()], **settings)
        assert len(told) == (36 - (0 if resume_from is None else stop)) * trainer.accumulate_grad_batches
        assert {label for label, _ in told} == {f"domain {domain}" for domain in range(DOMAINS)}
        assert all(label == truth for label, truth in told)
        told.clear()


def test_the_average_is_validated_tested_and_saved_from_when_it_has_begun(tmp_path, monkeypatch):
    inside = []

    class Averaging(Recording):
        def configure_optimizers(self):
            without = super().configure_optimizers()["optimizer"]
            return GradMatch(without.optimizer, without.method, Average(start=1))

        def test_dataloader(self):
            return self.val_dataloader()

        def test_step(self, batch, index):
            inside.append(self.model[0].weight.detach().clone())

    slow, _ = fit(tmp_path, 14, every=1000, trainer={"val_check_interval": 6})
    monkeypatch.setitem(globals(), "Recording", Averaging)
    callback = Staying("averaged")
    model, trainer = fit(tmp_path, 14, every=14, callbacks=[callback], trainer={"val_check_interval": 6})
    optimizer = trainer.optimizers[0]
    assert torch.equal(model.validated[0], slow.validated[0])  # after 1 meta-update there is no average yet
    assert not torch.equal(model.validated[1], slow.validated[1])
    with optimizer.averaged_weights():
        expected = copy.deepcopy(dict(model.state_dict()))
    saved = torch.load(tmp_path / "step=14.ckpt", weights_only=True)
    assert_same(dict(saved["averaged_weights"]), expected)
    assert not torch.equal(saved["state_dict"]["model.0.weight"], expected["model.0.weight"])
    trainer.test(model, verbose=False)
    assert all(torch.equal(weight, expected["model.0.weight"]) for weight in inside)
    assert inside


def test_an_average_that_is_not_kept_and_other_weights_are_errors(tmp_path):
    with pytest.raises(RuntimeError, match="this optimizer keeps no average"):
        fit(tmp_path, 6, callbacks=[GradMatchCallback("averaged")], trainer={"val_check_interval": 4})
    with pytest.raises(ValueError, match=r"weights should be .*\(got 'fast'\)"):
        GradMatchCallback("fast")


def test_training_that_ends_in_an_inner_loop_leaves_the_slow_weights_behind(tmp_path):
    short, _ = fit(tmp_path, DOMAINS, every=1000)
    found, trainer = fit(tmp_path, DOMAINS + 2, every=1000, callbacks=[GradMatchCallback()])
    assert trainer.optimizers[0].inner_step == 0
    assert_same(dict(found.state_dict()), dict(short.state_dict()))


def test_a_loader_that_knows_no_domains_is_refused_with_fish_and_taken_without():
    class Plain(example.Classifier):
        def train_dataloader(self):
            return DataLoader(self.data, batch_size=64)

    settings = {"max_steps": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    with pytest.raises(ValueError, match="loader should be a DataLoader over a DomainBatchSampler"):
        lightning.Trainer(callbacks=[GradMatchCallback()], **settings).fit(Plain("Fish"))
    lightning.Trainer(callbacks=[GradMatchCallback()], **settings).fit(Plain("ERM"))


def test_the_example_in_its_docstring():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        failed, tried = doctest.testmod(integration)
    assert (failed, tried > 0) == (0, True)


def test_the_example_trains_and_resumes(tmp_path, capsys):
    first = example.main(["--epochs", "2", "--exact", "--directory", str(tmp_path)])
    assert first.keys() == {"ERM", "Fish", "exact"}
    again = example.main(["--epochs", "3", "--directory", str(tmp_path), "--resume"])
    straight = example.main(["--epochs", "3", "--directory", str(tmp_path / "other")])
    assert again == straight
    assert "Fish  accuracy on the held-out domain" in capsys.readouterr().out
