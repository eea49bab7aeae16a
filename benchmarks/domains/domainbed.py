r"""One run of DomainBed's own training script, unmodified, on MNIST: what is set from outside, and what is read of it.

DomainBed (Gulrajani and Lopez-Paz, ICLR 2021, arXiv 2007.01434) is not changed: a run is its
``domainbed.scripts.train``, called through ``examples/domainbed/train.py``, and what it measured is read from the
``results.jsonl`` that it writes. What is set from outside:

- ``N_WORKERS`` of its data sets, a class attribute, is 0: 8 processes for each of up to 17 loaders take longer to start
  than a run takes.
- *Hyperparameters.* Draw 0 is DomainBed's defaults, another its own random draw by that number. There the draw also
  depends on the trial; here a draw is the same for all seeds, that of trial 0, passed on by ``--hparams``. The batch
  size is fixed.
- *Precision.* With ``bfloat16`` the script runs under :class:`torch.autocast`: parameters, their gradients and the
  optimizer stay float32. On a CPU that multiplies bfloat16 (AMX) a gradient takes two fifths of the time, and a
  Hessian-vector product as long as before; on another CPU ``--float32`` is meant to be faster, which was not tried.
- *Seeds.* ``--trial_seed`` is the run's seed, which parts a domain's images; ``--seed`` is derived from it and nothing
  else, so that methods begin with the same images, noise and weights.

**Gradients.** A step of every method takes one minibatch of each of S training domains. All methods get the same number
of gradients of one such minibatch, a Hessian-vector product counting as one; what a step takes, by their code:

=========================== ========= ==================================================================================
``ERM``                     S         one gradient of the S minibatches together
``Fish``, ``GradMatchFish`` S         one for each step of the walk
``GradMatchSmoothFish``     2S - 1    S along the walk and S at its start, of which the first is the same; S if gamma=1
``IGA``                     2S        S, and differentiating the norms of their differences; the mean gradient, which it
                                      works out anew by S passes more, is not counted: it has it already
``GradMatchIDGM...``        2S        S, and S Hessian-vector products
=========================== ========= ==================================================================================

DomainBed measures after the first step and at each checkpoint. A run that diverges, by an error of a method or a loss
that is not finite, counts with what it reached.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import torch

from benchmarks.domains.source import MissingDataError
from torch_gradmatch.evaluation.journal import Key

__all__ = [
    "CLONE",
    "DOMAINS",
    "HOLDOUT",
    "METHODS",
    "TITLES",
    "Settings",
    "Task",
    "digest_of",
    "gradients_of_step",
    "record_of",
    "sizes",
    "train_once",
]

EXAMPLE = Path(__file__).parents[2] / "examples" / "domainbed"
CLONE = "git clone https://github.com/facebookresearch/DomainBed"
DOMAINS = {"ColoredMNIST": ("+90%", "+80%", "-90%"), "RotatedMNIST": ("0", "15", "30", "45", "60", "75")}
METHODS = (
    "ERM",
    "Fish",
    "IGA",
    "GradMatchFish",
    "GradMatchSmoothFish",
    "GradMatchIDGMVariance",
    "GradMatchIDGMCosine",
)
# What is called in a report as the same method of ours is elsewhere, so that both stand in one column.
TITLES = {
    "Fish": "Fish, DomainBed's",
    "IGA": "IGA, DomainBed's",
    "GradMatchFish": "Fish",
    "GradMatchSmoothFish": "SmoothFish",
    "GradMatchIDGMVariance": "IDGM, variance",
    "GradMatchIDGMInnerProduct": "IDGM, inner product",
    "GradMatchIDGMCosine": "IDGM, cosine",
}
HOLDOUT = 0.2


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        images: Of MNIST's 70,000.
        batch_size: Of one domain's minibatch.
        gradients: The most gradients of one minibatch in a run.
        evaluations: How often a run is measured, beside after its first step.
        draws: How many settings of the hyperparameters are tried.
        seeds: How many seeds; they are 0, 1, and so on.
        held_out: The domains to hold out in turn.
        methods: The first is what the others are compared to.
        bfloat16: Whether convolutions and linear layers are in bfloat16, by :class:`torch.autocast`; see above.
    """

    images: int
    batch_size: int
    gradients: int
    evaluations: int
    draws: int
    seeds: int
    held_out: tuple[str, ...]
    methods: tuple[str, ...] = METHODS
    bfloat16: bool = False


def gradients_of_step(method: str, domains: int, hparams: Mapping[str, Any]) -> int:
    """Return how many gradients of one minibatch a step takes.

    Args:
        method: The algorithm's name.
        domains: S, those that are trained on.
        hparams: Its hyperparameters.

    Returns:
        The number; see above how it is counted.

    Raises:
        ValueError: If the algorithm is unknown.
    """
    if method in {"ERM", "Fish", "GradMatchFish"}:
        return domains
    if method == "GradMatchSmoothFish":
        return domains if hparams["gamma"] == 1 else 2 * domains - 1
    if method == "IGA" or method.startswith("GradMatchIDGM"):
        return 2 * domains
    raise ValueError(f"methods should be some whose gradients are counted here (got {method!r})")


def sizes(images: int, domains: int) -> list[tuple[int, int]]:
    """Return how many images DomainBed's ``in`` and ``out`` splits of each domain have.

    Args:
        images: Of all domains.
        domains: How many.

    Returns:
        Both numbers, by domain.
    """
    whole = [len(range(start, images, domains)) for start in range(domains)]
    return [(n - int(n * HOLDOUT), int(n * HOLDOUT)) for n in whole]


def record_of(
    results: Sequence[Mapping[str, Any]], labels: Sequence[str], held_out: str, images: int, per_step: int
) -> dict[str, Any]:
    """Make a run's record for the journal of what DomainBed has written.

    Args:
        results: The lines of ``results.jsonl``.
        labels: Of all domains.
        held_out: The one that was held out.
        images: Of all domains.
        per_step: Gradients in a step.

    Returns:
        ``"curve"``, ``"seconds"`` of training without measuring, ``"stopped"``: None, or that the loss was not finite.
    """
    test = labels.index(held_out)
    in_size, out_size = sizes(images, len(labels))[test]
    curve: list[dict[str, Any]] = []
    seconds, before, stopped = 0.0, -1, None
    for line in results:
        gradients = (line["step"] + 1) * per_step
        seconds += line["step_time"] * (line["step"] - before)
        before = line["step"]
        if not math.isfinite(line["loss"]):
            stopped = f"the loss was {line['loss']} between {curve[-1]['gradients'] if curve else 0} and {gradients}"
            stopped += " gradients"
            break
        validation = {label: line[f"env{i}_out_acc"] for i, label in enumerate(labels) if i != test}
        right = line[f"env{test}_in_acc"] * in_size + line[f"env{test}_out_acc"] * out_size
        curve.append(
            {
                "gradients": gradients,
                "validation": fmean(validation.values()),
                "validation_by_domain": validation,
                "held_out": right / (in_size + out_size),
            }
        )
    return {"curve": curve, "seconds": seconds, "stopped": stopped}


@dataclass(frozen=True)
class Task:
    """What the runs have in common.

    Attributes:
        name: Of the data set.
        checkout: Of DomainBed.
        data: Folder with the images, as ``--data_dir``.
        settings: How much is measured.
    """

    name: str
    checkout: Path
    data: Path
    settings: Settings


def train_once(task: Task, key: Key) -> dict[str, Any]:
    """Carry out one run of DomainBed's training script, in this process and on one thread.

    Depends on the arguments alone: two calls return the same, bit for bit, but for the seconds.

    Args:
        task: What it has in common with the others.
        key: Which run.

    Returns:
        The record for the journal.

    Raises:
        RuntimeError: If the script ended by an error that is no divergence; with the end of what it printed.
        MissingDataError: If there is no checkout of DomainBed.
    """
    launcher = _launcher(task.checkout)
    settings, labels = task.settings, DOMAINS[task.name]
    hparams, steps, per_step = _plan(task, key)
    frequency = max(1, math.ceil((steps - 1) / settings.evaluations))
    misc = importlib.import_module("domainbed.lib.misc")
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out"
        arguments = {
            "domainbed": task.checkout, "algorithm": key.method, "dataset": task.name, "data_dir": task.data,
            "output_dir": output, "test_envs": labels.index(key.held_out), "holdout_fraction": HOLDOUT,
            "hparams_seed": key.draw, "hparams": json.dumps(hparams), "trial_seed": key.seed,
            "seed": misc.seed_hash(task.name, key.seed), "steps": steps, "checkpoint_freq": frequency,
        }  # fmt: skip
        command = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
        stopped = None
        with (Path(scratch) / "log").open("w+") as log, _surroundings(log), _precision(settings):
            try:
                launcher.main([*command, "--skip_model_save"])
            except (RuntimeError, ValueError) as error:
                stopped = str(error) or type(error).__name__
                if not _is_refusal(error):
                    traceback.print_exc(file=log)
                    raise RuntimeError(f"DomainBed failed in {key}:\n{_end_of(log)}") from error
            except SystemExit as error:
                raise RuntimeError(f"DomainBed refused the arguments of {key}:\n{_end_of(log)}") from error
        results = output / "results.jsonl"
        lines = results.read_text().splitlines() if results.exists() else []
    own = set(hparams) & ({"lr", "batch_size"} | set(hparams) - set(_registry().default_hparams("ERM", task.name)))
    run = record_of([json.loads(line) for line in lines], labels, key.held_out, settings.images, per_step)
    if not run["curve"]:
        raise RuntimeError(f"{key} diverged in its first step: {stopped or run['stopped']}")
    run["stopped"] = run["stopped"] or stopped
    by = "torch_gradmatch" if key.method.startswith("GradMatch") else "DomainBed's own"
    plain = {name: hparams[name] for name in sorted(own)}
    return {"settings": plain, "by": f"{by}, {steps} steps of {per_step} gradients", **run}


def digest_of(checkout: Path) -> str:
    """Return what tells one DomainBed from another: a digest of its Python files and their names.

    Args:
        checkout: Of DomainBed.

    Returns:
        SHA-256, in hexadecimal.
    """
    package, digest = checkout / "domainbed", hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _plan(task: Task, key: Key) -> tuple[dict[str, Any], int, int]:
    """Return hyperparameters, the number of steps, and gradients in a step."""
    registry, misc = _registry(), importlib.import_module("domainbed.lib.misc")
    if key.draw == 0:
        hparams = registry.default_hparams(key.method, task.name)
    else:
        hparams = registry.random_hparams(key.method, task.name, misc.seed_hash(key.draw, 0))
    hparams["batch_size"] = task.settings.batch_size
    per_step = gradients_of_step(key.method, len(DOMAINS[task.name]) - 1, hparams)
    steps = task.settings.gradients // per_step
    if steps < 2:
        raise ValueError(f"gradients should do for 2 steps of {key.method}, {2 * per_step} (got {task.settings})")
    # Numbers of numpy's become Python's, as DomainBed reads them again.
    return json.loads(json.dumps(hparams)), steps, per_step


def _registry() -> Any:
    return importlib.import_module("domainbed.hparams_registry")


@functools.cache
def _launcher(checkout: Path) -> Any:
    """Import ``train.py`` of the example, and all that DomainBed imports, which takes seconds: once in a process."""
    spec = importlib.util.spec_from_file_location("domainbed_train", EXAMPLE / "train.py")
    assert spec is not None
    assert spec.loader is not None
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    if str(EXAMPLE) not in sys.path:
        sys.path.insert(0, str(EXAMPLE))

    def fail(what: str) -> NoReturn:
        raise MissingDataError(what)

    launcher.prepare(checkout.resolve(), fail)
    importlib.import_module("domainbed.datasets").MultipleDomainDataset.N_WORKERS = 0
    return launcher


@contextlib.contextmanager
def _surroundings(log: Any) -> Iterator[None]:
    """Keep what DomainBed's script changes in its process: streams, arguments, path, number of threads."""
    argv, path, threads = list(sys.argv), list(sys.path), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # It replaces both streams by its own, which write to those that it finds.
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                yield
            finally:
                for tee in (sys.stdout, sys.stderr):
                    if tee is not log:
                        tee.file.close()
    finally:
        sys.argv, sys.path[:] = argv, path
        torch.set_num_threads(threads)


def _precision(settings: Settings) -> torch.autocast:
    """Return the context that a run is in. Kept casts would be those of the parameters before the first step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # as DomainBed chooses it
    return torch.autocast(device, torch.bfloat16, enabled=settings.bfloat16, cache_enabled=False)


def _is_refusal(error: BaseException) -> bool:
    """Return whether an error is one that a method of ours, and not what it has called, raised."""
    package = Path(sys.modules["torch_gradmatch"].__file__ or "").parent
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(package)


def _end_of(log: Any) -> str:
    log.flush()
    log.seek(0)
    return "".join(log.readlines()[-25:])
