"""What comes of it: accuracy on unseen colours of CdSprites-15, against time and gradient evaluations.

``examples/cdsprites.py`` at 24 pixels, every method for several seeds; the seed decides images, colours, initial
weights and the order of batches. As many runs at a time as there are processes, each on one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.workers import in_processes

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import cdsprites
from _cdsprites_data import DrawnSprites, make_cdsprites

METHODS = ["erm", "fish", "smooth_fish", "symmetric", "exact"]
SETTINGS: dict[str, Any] = cdsprites.DEMO | {
    "size": 24,
    "batch_size": 32,
    "eval_images": 1000,
    "iterations": 500,
    "smooth_iterations": 400,
    "exact_iterations": 420,
    "lr": 2e-3,
    "gamma": 0.3,
    "measurements": 20,
    "device": "cpu",
    "paper": False,
}


@dataclass(frozen=True)
class Outcome:
    """One run's curves.

    Attributes:
        gradients: Gradients of one batch's loss, up to each point.
        hessian_products: Hessian-vector products of one batch's loss, up to each point.
        seconds: Time spent training, up to each point.
        accuracy: On images in colours that training never shows.
    """

    method: str
    title: str
    seed: int
    gradients: list[int]
    hessian_products: list[int]
    seconds: list[float]
    accuracy: list[float]


def run(method: str, seed: int, settings: dict[str, Any]) -> Outcome:
    """Train one model on one thread."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    config = cdsprites.Config(**settings, seed=seed)
    data = make_cdsprites(
        DrawnSprites(),
        domains=config.domains,
        images_per_domain=config.images_per_domain,
        eval_images=config.eval_images,
        size=config.size,
        seed=seed,
    )
    found = cdsprites.train(method, data, config, lambda _: None)
    return Outcome(
        method,
        found.title,
        seed,
        found.gradient_evaluations,
        found.hessian_products,
        found.seconds_training,
        found.unseen_accuracy,
    )


def measure(seeds: Sequence[int], processes: int, settings: dict[str, Any] | None = None) -> list[Outcome]:
    """Train every method with every seed, the longest first."""
    settings = SETTINGS if settings is None else settings
    tasks = [(method, seed, settings) for method in reversed(METHODS) for seed in seeds]
    found = in_processes(run, tasks, processes, "outcome")
    return sorted(found, key=lambda outcome: (METHODS.index(outcome.method), outcome.seed))
