"""Training by ``examples/with_accelerate.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import with_accelerate as example
from _training import Trained, watched
from accelerate.state import AcceleratorState

PRECISIONS = {"fp32": "no", "bf16": "bf16"}


def without_seeds(state: Any) -> Any:
    """Leave out of a loader's state what it seeds its workers with, who draw nothing: it is another each time."""
    if isinstance(state, dict):
        return {key: without_seeds(value) for key, value in state.items() if "seed" not in key}
    return state


def train(
    directory: Path,
    steps: int,
    method: str = "Fish",
    *,
    save_every: int = 1000,
    evaluate_every: int = 1000,
    resume_from: int | None = None,
    precision: str = "fp32",
    workers: int = 0,
) -> Trained:
    arguments = {"epochs": 4, "stop_at": steps, "save_every": save_every, "eval_every": evaluate_every}
    arguments |= {"precision": PRECISIONS[precision], "workers": workers}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    options += ["--cpu"] if resume_from is None else ["--cpu", "--resume"]
    AcceleratorState._reset_state()
    with watched(example) as (network, answers), mock.patch.object(example, "finish", wraps=example.finish) as finish:
        example.train(method, example.make_parser().parse_args(options), directory)
    accelerator = finish.call_args.args[0]  # it holds optimizer, scheduler and loader
    optimizer, scheduler = accelerator._optimizers[0].optimizer, accelerator._schedulers[0].scheduler
    place = without_seeds(accelerator._custom_objects[0].state_dict())
    return Trained(network, optimizer, scheduler, accelerator, place, answers=answers)
