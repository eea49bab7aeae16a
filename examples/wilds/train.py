"""Train on a WILDS data set as in the paper: ERM, Fish, SmoothFish or the exact objective.

    python examples/wilds/train.py --dataset iwildcam --root data --method fish --download

trains a ResNet-50 with the authors' settings (``wilds_settings.py``): ordinary training first, then Fish over batches
that each come from one camera, and keeps the model that is best on the validation split by the data set's own metric.
Writes to ``runs/iwildcam-fish-seed0``:

    log.csv                 loss, inner product and cosine of the domains' gradients, and which domains were served
    tensorboard/            the same, and each domain's loss and norm of the gradient by its name
    evaluations.csv         the metrics of ``wilds`` on the split "val", during training
    best.pt, checkpoint.pt  the model that is kept; everything that ``--resume`` needs
    predictions/*.csv       of every split but "train", as the WILDS leaderboard takes them
    results.json            the metrics of ``wilds`` for every split, settings and versions

A run that was killed continues with the same command and ``--resume``, bit for bit the same (on PovertyMap, whose
images are augmented at random, with ``--workers 0`` only). SIGTERM and Ctrl-C save a checkpoint first.

What is as in the authors' code and what is not: docs/guides/wilds_domainbed.md. Shi et al., *Gradient Matching for
Domain Generalization*, ICLR 2022, arXiv 2104.09937.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch_gradmatch.alignment import gradient_alignment
from tqdm import tqdm
from wilds_checkpoint import random_state, restore_random_state, save_whole
from wilds_options import parse
from wilds_settings import PaperSettings

from torch_gradmatch import IDGM, DomainBatchSampler, Fish, GradMatch, MetaStep, SmoothFish, meta_batches

if TYPE_CHECKING:
    from wilds_data import TrainingData
    from wilds_logs import RunLog

NEEDED = ("wilds", "torchvision", "torchdata", "tensorboard", "transformers")
CHECKPOINT_VERSION = 2
PROGRESS = ("phase", "iteration", "epoch", "gradients", "best", "evaluated")  # of a Run, and its checkpoints
# A resumed run may differ from the one that was killed in these.
FREE_TO_CHANGE = {"root", "out", "resume", "download", "device", "checkpoint_every", "epochs", "iterations"}
# "optimizer" is that of the inner steps, of ERM and of the warm start: "adam" is Adam with amsgrad.
OPTIMIZERS: dict[str, Callable[[Any, float], Optimizer]] = {
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, amsgrad=True),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}


def make_method(model: nn.Module, options: argparse.Namespace) -> Fish | SmoothFish | IDGM:
    """Choose how gradients are matched.

    Args:
        model: The network.
        options: The command line.

    Returns:
        The method for ``GradMatch``.
    """
    if options.method == "fish":
        # The inner optimizer's state is carried, as the authors do on all six data sets.
        return Fish(options.meta_lr, options.domains_per_step, "carry", model=model, track_alignment=True)
    if options.method == "smooth_fish":
        return SmoothFish(options.gamma, options.inner_lr, model=model, track_alignment=True)
    return IDGM(model, agreement=options.agreement, strength=options.strength, track_alignment=True)


class Run:
    """One run: what a checkpoint holds, and the two phases that change it.

    Args:
        options: The command line, with the data set's settings where it is silent.
        settings: Those of the data set.
        dataset: The ``WILDSDataset``.
        data: Its training split.
        evaluation: Split -> loader.
        model: The network, on its device.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        settings: PaperSettings,
        dataset: Any,
        data: TrainingData,
        evaluation: dict[str, DataLoader[Any]],
        model: nn.Module,
    ) -> None:
        self.options, self.settings = options, settings
        self.dataset, self.data, self.evaluation, self.model = dataset, data, evaluation, model
        self.device = torch.device(options.device)
        self.criterion = nn.CrossEntropyLoss() if dataset.is_classification else nn.MSELoss()
        self.phase = "warm_start" if options.warm_start and options.method != "erm" else "train"
        self.iteration = self.epoch = self.gradients = 0
        self.best: float | None = None
        self.evaluated = 0  # the iteration after which the last evaluation was
        self.since_log: list[Tensor] = []
        self.interrupted = False
        self.log: RunLog
        self.probe = data.by_domain(options.batch_size, options.domains_per_step, options.seed + 1)
        self._begin_phase()

    # ------------------------------------------------------------------------------------------------------- phases

    def _begin_phase(self) -> None:
        options = self.options
        make_optimizer = OPTIMIZERS[self.settings.optimizer]
        # As in the authors' code a new optimizer begins after the warm start: its moments are not taken over.
        self.optimizer = make_optimizer(self.model.parameters(), options.lr)
        self.by_domain = self.phase == "train" and options.method != "erm"
        if self.by_domain:
            self.optimizer = GradMatch(self.optimizer, make_method(self.model, options))
            self.loader = self.data.by_domain(options.batch_size, options.domains_per_step, options.seed)
        else:
            self.loader = self.data.shuffled(options.batch_size, options.seed)
        self.iteration = self.epoch = self.evaluated = 0
        self.best = None
        self.since_log = []

    @property
    def sampler(self) -> DomainBatchSampler:
        """The sampler of the present loader."""
        return cast("DomainBatchSampler", self.loader.batch_sampler)

    def _last_iteration(self) -> float:
        if self.phase == "warm_start":
            return self.options.warm_start
        return math.inf if self.options.iterations is None else self.options.iterations

    def train(self) -> None:
        """Carry out what is left of the phases.

        Raises:
            KeyboardInterrupt: If the process was asked to stop. A checkpoint has been written.
        """
        if self.phase == "warm_start":
            self._train_phase(epochs=sys.maxsize)
            self.load_best()
            self.phase = "train"
            self._begin_phase()
            self.save()
        self._train_phase(epochs=self.options.epochs)

    def _train_phase(self, epochs: int) -> None:
        last = self._last_iteration()
        steps = self.options.domains_per_step if self.by_domain else 1
        while self.epoch < epochs and self.iteration < last:
            self.sampler.set_epoch(self.epoch)  # keeps the position that a checkpoint left
            meta_loader = meta_batches(self.loader, steps)
            bar = tqdm(total=int(min(len(meta_loader), last - self.iteration)), dynamic_ncols=True, disable=None)
            bar.set_description(f"{self.phase} epoch {self.epoch + 1}")
            for batches in meta_loader:
                self.model.train()
                logged = self._iterate(batches)
                bar.update()
                if logged is not None:
                    bar.set_postfix(loss=f"{logged['loss']:.3f}", cosine=f"{logged['cosine']:.3f}")
                if self.iteration == last:
                    break
                if self.options.eval_every and self.iteration % self.options.eval_every == 0:
                    self._evaluate_and_keep()
                    self.save()
                elif self.iteration % self.options.checkpoint_every == 0 or self.interrupted:
                    self.save()
                if self.interrupted:
                    raise KeyboardInterrupt
            else:
                self.epoch += 1
            bar.close()
            self._evaluate_and_keep()
            self.save()

    def _iterate(self, batches: list[Any]) -> dict[str, Any] | None:
        started = time.perf_counter()
        self.iteration += 1
        self.gradients += len(batches)
        log_now = self.iteration == 1 or self.iteration % self.options.log_every == 0
        measured = MetaStep()
        if isinstance(self.optimizer, GradMatch):
            measured = self.optimizer.meta_step(self.loss, batches)
            self.since_log.append(measured.losses.mean())
        else:
            self.optimizer.zero_grad()
            loss = self.loss(batches[0])
            loss.backward()
            self.optimizer.step()
            self.since_log.append(loss.detach())
            if log_now:
                measured = self._agreement_under_erm()
        if not log_now:
            return None
        scalars = measured.scalars()
        served = ["|".join(self.data.domains_served(batch[-1])) for batch in batches] if self.by_domain else []
        row = {
            "phase": self.phase,
            "iteration": self.iteration,
            "epoch": self.epoch,
            "gradients": self.gradients,
            "loss": torch.stack(self.since_log).mean().item(),
            **{name: scalars[name] for name in ("inner_product", "cosine", "grad_norm")},
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(time.perf_counter() - started, 4),
            "domains": "; ".join(served),
        }
        self.log.iteration(row, scalars)
        self.since_log = []
        return row

    def loss(self, batch: tuple[Any, ...]) -> Tensor:
        """Return the mean loss of a batch.

        Args:
            batch: (input, label, ...).

        Returns:
            The loss, shape ().
        """
        return self.criterion(self._outputs(batch[0]), batch[1].to(self.device, non_blocking=True))

    def _outputs(self, x: Any) -> Tensor:
        if isinstance(x, dict):
            x = {name: part.to(self.device, non_blocking=True) for name, part in x.items()}
        else:
            x = x.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp):
            outputs = self.model(x)
        return outputs.float()

    def _agreement_under_erm(self) -> MetaStep:
        # ERM's batches mix the domains, so its gradients are measured on batches of their own: in evaluation mode and
        # by a sampler that only the iteration decides, so that nothing of the training is touched.
        cast("DomainBatchSampler", self.probe.batch_sampler).set_epoch(self.gradients)
        batches = next(iter(meta_batches(self.probe, self.options.domains_per_step)))
        self.model.eval()
        measured = gradient_alignment(self.model.parameters(), self.loss, batches)
        self.model.train()
        return MetaStep(None, measured.inner_product, measured.cosine, measured.grad_norms, domains=batches.domains)

    # --------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def predict(self, split: str) -> tuple[Tensor, dict[str, float], str]:
        """Predict a split and evaluate it with the data set's own metrics.

        Args:
            split: Name of the split.

        Returns:
            Predictions, metrics by name, and how ``wilds`` prints them.
        """
        self.model.eval()
        predictions, labels, metadata = [], [], []
        loader = self.evaluation[split]
        for x, y, m in tqdm(loader, desc=f"evaluate {split}", leave=False, dynamic_ncols=True, disable=None):
            outputs = self._outputs(x)
            predictions.append((outputs.argmax(dim=1) if self.dataset.is_classification else outputs).cpu())
            labels.append(y)
            metadata.append(m)
        predicted = torch.cat(predictions)
        metrics, text = self.dataset.eval(predicted, torch.cat(labels), torch.cat(metadata))
        return predicted, {name: float(value) for name, value in metrics.items()}, text

    def _evaluate_and_keep(self) -> None:
        if self.evaluated == self.iteration:  # an epoch has just ended where an evaluation was due, too
            return
        self.evaluated = self.iteration
        _, metrics, _ = self.predict("val")
        self.log.evaluation(self.phase, self.iteration, self.gradients, "val", metrics)
        value = metrics[self.settings.metric]
        print(f"{self.phase} iteration {self.iteration}: {self.settings.metric} on val {value:.4f}")
        # A correlation of constant predictions is NaN, which is never better.
        if self.settings.keep == "last" or self.best is None or math.isnan(self.best) or value > self.best:
            self.best = value
            save_whole(self.model.state_dict(), self.options.out / "best.pt")

    def load_best(self) -> None:
        """Go back to the model that is kept."""
        self.model.load_state_dict(torch.load(self.options.out / "best.pt", self.device, weights_only=True))

    def finish(self) -> dict[str, dict[str, float]]:
        """Evaluate the model that is kept on every split but "train" and write predictions and results.

        Returns:
            Split -> metrics.
        """
        self.load_best()
        folder = self.options.out / "predictions"
        folder.mkdir(exist_ok=True)
        name = self.settings.wilds_name
        replicate = f"fold:{self.options.fold}" if name == "poverty" else f"seed:{self.options.seed}"
        results = {}
        for split in self.evaluation:
            predicted, results[split], text = self.predict(split)
            lines = "".join(f"{value!r}\n" for value in predicted.flatten().tolist())
            (folder / f"{name}_split:{split}_{replicate}_epoch:best_pred.csv").write_text(lines)
            print(f"---- {split} ----\n{text}")
        versions = {"torch": torch.__version__, "device": str(self.device)}
        document = {"options": _plain(self.options), "versions": versions, "results": results}
        (self.options.out / "results.json").write_text(json.dumps(document, indent=2) + "\n")
        return results

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Write ``checkpoint.pt``: everything that :meth:`resume` needs to continue bit for bit."""
        progress = {name: getattr(self, name) for name in PROGRESS}
        state = {
            "version": CHECKPOINT_VERSION,
            "options": _plain(self.options),
            **progress,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict() if self.iteration else None,  # it would begin to fetch
            "since_log": list(self.since_log),
            "random": random_state(self.device),
            "log": self.log.state_dict(),
        }
        save_whole(state, self.options.out / "checkpoint.pt")

    def resume(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint was written.

        Args:
            state: What :meth:`save` wrote.

        Raises:
            SystemExit: If it is another version's, or of a run with other options.
        """
        if state.get("version") != CHECKPOINT_VERSION:
            sys.exit(f"{self.options.out} was written by another version of this script (got {state.get('version')})")
        present = _plain(self.options)
        for name, value in state["options"].items():
            if name not in FREE_TO_CHANGE and present.get(name) != value:
                option = name.replace("_", "-")
                sys.exit(
                    f"--{option} is {present.get(name)}, but the run in {self.options.out} has {value}: "
                    "resume with the same options, or begin another run with another --out"
                )
        self.phase = state["phase"]
        self._begin_phase()
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])
        self.since_log = [loss.to(self.device) for loss in state["since_log"]]
        restore_random_state(state["random"], self.device)


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


@contextmanager
def _asked_to_stop(run: Run) -> Iterator[None]:
    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if run.interrupted:  # the second time at once
            raise SystemExit(128 + number)
        run.interrupted = True

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, evaluate and write what the module's text lists.

    Args:
        arguments: Command line without the program's name; None for that of the process.

    Returns:
        Split -> metrics of the model that was kept.
    """
    options, settings = parse(__doc__ or "", arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"this script needs {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}")
    from wilds_data import MissingDataError, TrainingData, eval_loader, image_transform, open_dataset
    from wilds_logs import RunLog
    from wilds_models import make_model, make_tokenizer

    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists() and not options.resume:
        sys.exit(f"{options.out} holds a run already: pass --resume to continue it, or another --out")
    torch.manual_seed(options.seed)
    np.random.seed(options.seed)  # noqa: NPY002 - what a transform may draw from
    random.seed(options.seed)
    try:
        dataset = open_dataset(settings, options.root, options.fold, options.download)
        options.out.mkdir(parents=True, exist_ok=True)
        transforms = {kind: image_transform(settings, options.image_size, kind) for kind in (True, False)}
        texts = (text for text, _, _ in dataset.get_subset("train"))
        tokens = make_tokenizer(settings, options.weights, options.max_tokens, texts, options.out)
        outputs = dataset.n_classes if dataset.is_classification else 1
        model = make_model(settings, outputs, options.weights).to(options.device)
    except MissingDataError as error:
        sys.exit(str(error))
    data = TrainingData(dataset, settings, transforms[True], tokens, options.workers)
    if options.domains_per_step > len(data.domains):
        sys.exit(f"--domains-per-step is {options.domains_per_step}, but there are {len(data.domains)} domains")
    evaluation = {
        split: eval_loader(dataset, split, transforms[False], tokens, options.eval_batch_size, options.workers)
        for split in dataset.split_dict
        if split != "train"
    }
    run = Run(options, settings, dataset, data, evaluation, model)
    saved = torch.load(checkpoint, "cpu", weights_only=True) if checkpoint.exists() else None
    if saved is not None:
        run.resume(saved)
    run.log = RunLog(options.out, saved["log"] if saved else None, run.gradients)
    print(
        f"{settings.wilds_name}: {len(data.subset)} samples of {len(data.domains)} domains ({settings.domain}), "
        f"{settings.model}, {options.method}, from {run.phase} iteration {run.iteration}; writes {options.out}"
    )
    with _asked_to_stop(run):
        try:
            run.train()
        except KeyboardInterrupt:
            sys.exit(f"stopped at {run.phase} iteration {run.iteration}: continue with the same command and --resume")
        return run.finish()


if __name__ == "__main__":
    main()
