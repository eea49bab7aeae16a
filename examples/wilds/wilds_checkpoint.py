"""Files that a kill leaves whole, and random states as plain tensors and numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torch_gradmatch.gradients.replay import RandomState

__all__ = ["random_state", "restore_random_state", "save_whole"]


def save_whole(state: Any, path: Path) -> None:
    """Save so that a run that is killed while it writes keeps the file that it had.

    Args:
        state: What ``torch.save`` takes.
        path: The file.
    """
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def random_state(device: torch.device) -> dict[str, Any]:
    """Note the random state of torch, numpy and Python.

    Args:
        device: The device of the model.

    Returns:
        What ``torch.load(weights_only=True)`` loads.
    """
    state = RandomState.capture([device])
    name, keys, *rest = state.numpy
    version, numbers, gauss = state.python
    return {
        "cpu": state.cpu,
        "device": state.devices.get(device),
        "numpy": [str(name), keys.tolist(), *(number.item() if hasattr(number, "item") else number for number in rest)],
        "python": [version, list(numbers), gauss],
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Return to a random state.

    Args:
        state: From :func:`random_state`.
        device: The device of the model; if it is of another kind than then, its own state stays.
    """
    name, keys, *rest = state["numpy"]
    version, numbers, gauss = state["python"]
    same_kind = state["device"] is not None and device.type != "cpu"
    RandomState(
        cpu=state["cpu"],
        devices={device: state["device"]} if same_kind else {},
        numpy=(name, np.array(keys, dtype=np.uint32), *rest),
        python=(version, tuple(numbers), gauss),
    ).restore()
