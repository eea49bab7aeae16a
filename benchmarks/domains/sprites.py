"""How many training domains it takes: accuracy on unseen colours of CdSprites-N against N.

    python -m benchmarks domains cdsprites [--quick | --full] [--processes P]

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937, show the same figure and state
that Fish succeeds from N of about 10 on.

Every run is one of ``examples/cdsprites.py``, with networks, methods and colours as there:

- **The same number of gradients** of one batch, whatever N and method; a Hessian-vector product counts as one. A
  meta-iteration over N domains takes N of them, or 2 N with the exact objective. So ERM always takes the same number of
  Adam's steps, SmoothFish an N-th of that and Exact half of that: at large N little training is left to them, which is
  part of what this shows. The accuracy on training images tells whether it was enough.
- **The same number of training images**, divided among the domains, as in the authors' code; the demo has as many in
  each domain. More domains are then more colours and nothing else: the same sprites, seen as often.
- **Both arrangements of colours**, which decide how hard colour is to learn, see ``palette`` in
  ``examples/_cdsprites_data.py``: ``pairs`` is the demo's.
- Fish walks by SGD as in the demo, not by Adam as in the authors' code; in both orders of ``DomainBatchSampler``.

To be quick, images are 16 pixels wide and sprites of the two largest of six scales. Learning rates, and the strength
of Exact, were chosen once by the accuracy on unseen colours with seed 100, which is not reported, at N = 15 and colours
in pairs; every N and both arrangements have the same. Tried were ERM's lr of 1e-3, 2e-3 and 5e-3; an inner_lr of 0.2,
0.4 and 0.8 for Fish, at the demo's meta_lr; for SmoothFish lr of 2e-3, 5e-3 and 1e-2 and inner_lr of 0.2 and 0.4; for
Exact lr from 2e-3 to 2e-2 and gamma from 0.05 to 1. Choosing by the test treats every method alike, and is no
estimate of what one reaches where unseen colours are not to be seen. With seeds 100, 101 and 102 at N = 15 and colours
in pairs, ERM then has 0.62, 0.81 and 0.51 on unseen colours, Fish 0.95, 1.00 and 0.87, SmoothFish 1.00 each time, and
Exact, whose 100 meta-iterations leave it at 0.79 to 0.87 on training images, 0.81, 0.78 and 0.66.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.outcome import DrawnSprites, cdsprites, make_cdsprites
from benchmarks.plots import GREEN, at_the_values, legend_below, style
from torch_gradmatch.evaluation.journal import Journal, Key

__all__ = ["DEFAULT", "FULL", "METHODS", "QUICK", "Result", "Settings", "measure", "plot", "sentence", "table"]

ERM = "ERM"
PAPER_SUCCEEDS_FROM = 10
PAPER_STATES = f"The paper states that Fish succeeds from N of about {PAPER_SUCCEEDS_FROM} on."
IN_WORDS = {"pairs": "colours in pairs, as in the demo", "random": "colours dealt at random"}


class Method(NamedTuple):
    """The demo's name of a method, and the order in which it visits the domains."""

    name: str
    order: str = "flipflop"


METHODS = {
    ERM: Method("erm"),
    "Fish": Method("fish"),
    "Fish (random order)": Method("fish", "random"),
    "SmoothFish": Method("smooth_fish"),
    "Exact": Method("exact"),
}
LOOKS = {title: style(title) for title in METHODS if title != "Fish (random order)"}
LOOKS["Fish (random order)"] = style("Fish") | {"color": GREEN, "marker": "v", "linestyle": "--"}


@dataclass(frozen=True)
class Settings:
    """What is run; what a run depends on.

    Attributes:
        numbers: N, numbers of training domains.
        gradients: Of one batch's loss, and Hessian-vector products of one, in every run.
        images: For training, in all domains together.
        eval_images: In unseen colours, and as many in training colours on either shape.
        scales: How many of the six scales of a sprite, the largest.
        inner_lr: Of the walk of Fish.
        smooth_inner_lr: Of the walk of SmoothFish.
    """

    numbers: tuple[int, ...] = (2, 5, 10, 15, 20, 30, 50)
    arrangements: tuple[str, ...] = ("pairs", "random")
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0, 1, 2)
    gradients: int = 3000
    images: int = 30_000
    eval_images: int = 1200
    size: int = 16
    scales: int = 2
    batch_size: int = 32
    erm_lr: float = 1e-3
    inner_lr: float = 0.4
    meta_lr: float = 0.5
    smooth_fish_lr: float = 5e-3
    smooth_inner_lr: float = 0.4
    exact_lr: float = 5e-3
    gamma: float = 0.1

    def __post_init__(self) -> None:
        for number in self.numbers:
            if self.gradients % (2 * number) or self.images % (2 * number):
                raise ValueError(
                    f"gradients and images should be multiples of 2 N (got gradients={self.gradients} and "
                    f"images={self.images} for N={number})"
                )


DEFAULT = Settings()
QUICK = replace(DEFAULT, numbers=(2, 10, 30), seeds=(0,), gradients=1200, eval_images=600)
FULL = replace(DEFAULT, seeds=(0, 1, 2, 3, 4), gradients=12_000, eval_images=3000)


@dataclass(frozen=True)
class Result:
    """One run's end.

    Attributes:
        method: A key of ``METHODS``.
        domains: N.
        unseen: Accuracy on images in colours that training never shows.
        validation: On training colours, on either shape alike.
        train: On training images.
        gradients: Of one batch's loss.
        hessian_products: Of the same.
        seconds: Of training, one thread.
    """

    arrangement: str
    method: str
    domains: int
    seed: int
    unseen: float
    validation: float
    train: float
    gradients: int
    hessian_products: int
    seconds: float


# ------------------------------------------------------------------------------------------------------- measuring


class LargeSprites(DrawnSprites):
    """Drawn sprites of the largest scales alone: the scale varies slowest in their numbers."""

    def __init__(self, scales: int) -> None:
        every = DrawnSprites.available // 6
        self.available = scales * every
        self._first = (6 - scales) * every

    def masks(self, labels: NDArray[np.int64], numbers: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
        return super().masks(labels, numbers + self._first, size)


def config_of(arrangement: str, method: str, domains: int, seed: int, settings: Settings) -> Any:
    """The demo's settings of one run, which spends exactly ``settings.gradients``."""
    name, order = METHODS[method]
    learning_rates = {"erm": settings.erm_lr, "smooth_fish": settings.smooth_fish_lr, "exact": settings.exact_lr}
    config = cdsprites.Config(
        **cdsprites.DEMO
        | {
            "domains": domains,
            "arrangement": arrangement,
            "order": order,
            "images_per_domain": settings.images // domains,
            "eval_images": settings.eval_images,
            "size": settings.size,
            "batch_size": settings.batch_size,
            "lr": learning_rates.get(name, cdsprites.DEMO["lr"]),  # Fish has no Adam
            "inner_lr": settings.smooth_inner_lr if name == "smooth_fish" else settings.inner_lr,
            "meta_lr": settings.meta_lr,
            "gamma": settings.gamma,
            "measurements": 1,
        },
        seed=seed,
        device="cpu",
        paper=False,
    )
    of_demo = cdsprites.METHODS[name]
    each = of_demo.gradients(domains, config) + of_demo.hessian_products(domains)
    return replace(config, **{of_demo.iterations_setting: settings.gradients // each})


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # gradients of a model that fits its training set vanish into slow numbers
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def run(arrangement: str, method: str, domains: int, seed: int, settings: Settings) -> Result:
    """Train one model on one thread."""
    config = config_of(arrangement, method, domains, seed, settings)
    shared = {name: getattr(config, name) for name in ("domains", "arrangement", "images_per_domain", "eval_images")}
    with one_thread():
        data = make_cdsprites(LargeSprites(settings.scales), **shared, size=config.size, seed=seed)
        found = cdsprites.train(METHODS[method].name, data, config, lambda _: None)
    return Result(
        arrangement,
        method,
        domains,
        seed,
        found.unseen_accuracy[-1],
        found.validation_accuracy[-1],
        found.train_accuracy[-1],
        found.gradient_evaluations[-1],
        found.hessian_products[-1],
        found.seconds_training[-1],
    )


def key_of(arrangement: str, method: str, domains: int, seed: int) -> Key:
    return Key(method, held_out=arrangement, draw=domains, seed=seed)


def measure(folder: Path | None, settings: Settings, processes: int, show: bool = True) -> list[Result]:
    """Run everything that ``folder`` does not hold yet, all of the first seed first.

    Args:
        folder: Keeps every run as soon as it is done. None to keep nothing.
        settings: What to run.
        processes: At a time, each on one thread; 1 to run here.
        show: A progress bar.
    """
    where = [
        (arrangement, method, domains, seed)
        for seed in settings.seeds
        for arrangement in settings.arrangements
        for domains in settings.numbers
        for method in settings.methods
    ]
    # More numbers or seeds are more runs of the same task.
    task = {name: value for name, value in asdict(settings).items() if not isinstance(value, tuple)}
    journal = Journal(folder, {"benchmark": "CdSprites-N"} | task)
    missing = [each for each in where if key_of(*each) not in journal]
    done = len(where) - len(missing)
    with tqdm(total=len(where), initial=done, desc="CdSprites-N", unit="run", disable=not show) as bar:
        for result in _runs(missing, settings, processes):
            found = asdict(result)
            key = key_of(*(found.pop(name) for name in ("arrangement", "method", "domains", "seed")))
            journal.add(key, found)
            bar.update()
    return [Result(*each, **journal[key_of(*each)]) for each in where]


def _runs(where: Sequence[tuple[str, str, int, int]], settings: Settings, processes: int) -> Iterator[Result]:
    """Yield runs as they end."""
    if processes == 1:
        yield from (run(*each, settings) for each in where)
        return
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    try:
        for future in as_completed([pool.submit(run, *each, settings) for each in where]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------------- showing


def over_seeds(
    results: Iterable[Result], arrangement: str, method: str, quantity: str = "unseen"
) -> dict[int, tuple[float, float, float]]:
    """For each N the least, the mean and the greatest over seeds."""
    found: dict[int, list[float]] = {}
    for result in results:
        if (result.arrangement, result.method) == (arrangement, method):
            found.setdefault(result.domains, []).append(getattr(result, quantity))
    return {domains: (min(values), mean(values), max(values)) for domains, values in sorted(found.items())}


def _in_order(results: Sequence[Result]) -> tuple[list[str], list[str], list[int]]:
    """Arrangements, methods and N that there are."""
    arrangements = list(dict.fromkeys(result.arrangement for result in results))
    methods = [method for method in METHODS if any(result.method == method for result in results)]
    return arrangements, methods, sorted({result.domains for result in results})


def table(results: Sequence[Result], quantity: str = "unseen") -> str:
    """Markdown, one table for each arrangement: mean and range over seeds of an accuracy of :class:`Result`."""
    arrangements, methods, numbers = _in_order(results)
    parts = []
    for arrangement in arrangements:
        columns = {method: over_seeds(results, arrangement, method, quantity) for method in methods}
        lines = [f"| N, {IN_WORDS[arrangement]} | {' | '.join(methods)} |", f"|---:|{':---:|' * len(methods)}"]
        for domains in numbers:
            cells = ["{1:.2f} ({0:.2f} to {2:.2f})".format(*columns[method][domains]) for method in methods]
            lines.append(f"| {domains} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def beats_erm_at(results: Sequence[Result], arrangement: str, method: str) -> list[int]:
    """N at which the method's worst seed is better than ERM's best."""
    erm = over_seeds(results, arrangement, ERM)
    own = over_seeds(results, arrangement, method)
    return [domains for domains, (low, _, _) in own.items() if low > erm[domains][2]]


def sentence(results: Sequence[Result]) -> str:
    """Where each method beats ERM, by the figures, and what the paper states."""
    arrangements, methods, numbers = _in_order(results)
    seeds = len({result.seed for result in results})
    spoken = []
    for arrangement in arrangements:
        phrases: dict[str, list[str]] = {}
        for method in methods:
            if method != ERM:
                better = beats_erm_at(results, arrangement, method)
                phrases.setdefault(_where(better, numbers), []).append(method)
        which = "; ".join(f"{_listed(titles)} {phrase}" for phrase, titles in phrases.items())
        spoken.append(f"With {IN_WORDS[arrangement]}: {which}.")
    over = f"all {seeds} seeds" if seeds > 1 else "the one seed"
    return f"Better than ERM on unseen colours, worst against best of {over}: {' '.join(spoken)} {PAPER_STATES}"


def _listed(titles: Sequence[str]) -> str:
    *others, last = titles
    return f"{', '.join(others)} and {last}" if others else last


def _where(better: Sequence[int], numbers: Sequence[int]) -> str:
    if not better:
        return "at no N"
    if list(better) == list(numbers):
        return "at every N"
    if len(better) > 1 and list(better) == list(numbers[-len(better) :]):
        return f"from N = {better[0]} on"
    return f"at N = {', '.join(map(str, better))}"


def plot(results: Sequence[Result], path: Path) -> None:
    """Accuracy on unseen colours against N, one panel for each arrangement; bars are ranges over seeds."""
    arrangements, methods, numbers = _in_order(results)
    figure = Figure(figsize=(5.4 * len(arrangements) + 0.4, 4.9), dpi=110, layout="constrained")
    figure.suptitle("CdSprites-N: accuracy on unseen colours (mean and range over seeds)", fontsize=12)
    (panels,) = figure.subplots(1, len(arrangements), squeeze=False, sharey=True)
    for ax, arrangement in zip(panels, arrangements, strict=True):
        ax.set_title(IN_WORDS[arrangement], fontsize=11)
        for place, method in enumerate(methods):
            found = over_seeds(results, arrangement, method)
            aside = 1.025 ** (place - (len(methods) - 1) / 2)  # bars beside each other, not on top
            low, middle, high = np.array(list(found.values())).T
            x = aside * np.array(list(found))
            ax.errorbar(x, middle, (middle - low, high - middle), label=method, elinewidth=1, **LOOKS[method])
        ax.axhline(0.5, color="0.5", linewidth=1, linestyle=":")
        ax.text(numbers[-1], 0.495, "chance", color="0.35", fontsize=9, ha="right", va="top")
        ax.axvline(PAPER_SUCCEEDS_FROM, color="0.5", linewidth=1, linestyle="--", zorder=0)
        ax.text(PAPER_SUCCEEDS_FROM * 0.96, 1.035, "the paper: Fish succeeds\nfrom about here on", color="0.25",
                fontsize=9, ha="right", va="bottom")  # fmt: skip
        at_the_values(ax, numbers)
        ax.set_xlabel("number of training domains N")
        ax.grid(alpha=0.25)
        ax.set_ylim(min(0.44, *(result.unseen for result in results)) - 0.02, 1.16)
        ax.set_yticks(np.linspace(0.5, 1, 6))
    panels[0].set_ylabel("accuracy on unseen colours")
    legend_below(figure, panels)
    figure.savefig(path)
