"""What comes of it: accuracy on unseen colours of CdSprites-15, against time and gradient evaluations.

``examples/cdsprites.py`` at 24 pixels, every method for several seeds; the seed decides images, colours, initial
weights and the order of batches. As many runs at a time as there are processes, each on one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import cdsprites
from _cdsprites_data import DrawnSprites, make_cdsprites

METHODS = ["erm", "fish", "smooth_fish", "symmetric", "exact"]
SETTINGS: dict[str, Any] = cdsprites.DEMO | {
    "size": 24, "batch_size": 32, "eval_images": 1000, "iterations": 500, "smooth_iterations": 400,
    "exact_iterations": 420, "lr": 2e-3, "gamma": 0.3, "measurements": 20, "device": "cpu", "paper": False,
}  # fmt: skip


def run(method: str, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train one model on one thread; each list has what was up to each point of the curves."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    config = cdsprites.Config(**settings, seed=seed)
    sizes = {name: settings[name] for name in ("domains", "images_per_domain", "eval_images", "size")}
    found = cdsprites.train(method, make_cdsprites(DrawnSprites(), **sizes, seed=seed), config, lambda _: None)
    return {
        "method": method,
        "title": found.title,
        "seed": seed,
        "gradients": found.gradient_evaluations,
        "hessian_products": found.hessian_products,
        "seconds": found.seconds_training,
        "accuracy": found.unseen_accuracy,
    }


def measure(seeds: Sequence[int], processes: int, settings: Mapping[str, Any] = SETTINGS) -> list[dict[str, Any]]:
    """Train every method with every seed, the longest first."""
    tasks = [(method, seed, settings) for method in reversed(METHODS) for seed in seeds]
    found = Parallel(processes, batch_size=1, verbose=5)(delayed(run)(*task) for task in tasks)
    return sorted(found, key=lambda row: (METHODS.index(row["method"]), row["seed"]))
