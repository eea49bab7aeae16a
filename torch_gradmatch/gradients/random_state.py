"""The state of every generator of random numbers that a loss may draw from, so that a second pass replays the first."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["RandomState", "devices_of"]


def devices_of(*trees: Any) -> set[torch.device]:
    """Return the devices of all tensors in some structures: where a loss of them may draw random numbers.

    Args:
        trees: Tensors, or dictionaries, lists or tuples of them and of anything else.

    Returns:
        The devices.
    """
    return {leaf.device for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)}


@dataclass(frozen=True)
class RandomState:
    """The random state of torch on the CPU and on some accelerators, of numpy and of Python at one moment.

    Example:
        >>> import torch
        >>> state = RandomState.capture([])
        >>> first = torch.rand(3)
        >>> state.restore()
        >>> bool((torch.rand(3) == first).all())
        True
    """

    cpu: Tensor
    devices: dict[torch.device, Tensor]
    numpy: Any
    python: Any

    @staticmethod
    def capture(devices: Iterable[torch.device]) -> RandomState:
        """Note the present state. Draws nothing.

        Args:
            devices: The devices on which random numbers may be drawn; the CPU is always among them.

        Returns:
            The state.
        """
        accelerators = dict.fromkeys(d for d in devices if d.type not in ("cpu", "meta"))
        return RandomState(
            cpu=torch.get_rng_state(),
            devices={d: torch.get_device_module(d).get_rng_state(d) for d in accelerators},
            numpy=np.random.get_state(),  # noqa: NPY002  the global generator is what a loss may draw from
            python=random.getstate(),
        )

    def restore(self) -> None:
        """Return every generator to the state noted."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)
