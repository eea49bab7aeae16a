"""One mechanism that evaluates a loss twice alike: the same random numbers, the same buffers, and the same loss.

What a method that evaluates a loss twice differentiates is one function; a loss with a memory (class weights that it
counts, a counter of its calls) is another function at each call. The matching term is a derivative of gradients, or a
difference of two, so a change that training would not notice can be most of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torch_gradmatch._checks import check_loss, evaluating, name_of

__all__ = ["RandomState", "Replay", "check_repeats", "devices_of"]


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


class Replay:
    """The losses of some domains, each evaluated again with the random numbers and buffers of its first evaluation.

    Args:
        loss_fn: ``loss_fn(index, point)`` returns the loss of a domain; the point is None for the parameters as they
            are.
        batches: One of each domain, whose devices may draw random numbers.
        leaves: The parameters, whose devices may, too.
        places: Saves and restores the model's buffers, if they are followed.
        replays: Whether any loss may be evaluated again.
        chains: Whether, evaluated again in order from the second on, each finds the buffers that the one before it
            leaves then.

    Attributes:
        losses: Of the domains, as first evaluated.
        again: What was found when one was evaluated again at the same parameters, by number of the domain.
    """

    def __init__(
        self,
        loss_fn: Callable[[int, Any], Any],
        batches: Sequence[Any],
        leaves: Sequence[Tensor],
        places: Any = None,
        *,
        replays: bool = True,
        chains: bool = False,
    ) -> None:
        self.size = len(batches)
        self.losses: list[Tensor] = []
        self.again: dict[int, Tensor] = {}
        self._loss_fn = loss_fn
        self._places = places
        self._devices = devices_of(leaves, list(batches)) if replays else None
        self._chains = chains
        self._before: list[tuple[RandomState | None, Any]] = []
        self._start = None if places is None else places.save()

    def __call__(self, index: int, point: list[Tensor] | None = None) -> Tensor:
        """Evaluate a loss.

        Args:
            index: Of the domain; for the first time in order.
            point: Where, if not at the parameters as they are.

        Returns:
            The loss, shape ().
        """
        again = index < len(self.losses)
        if again:
            self.restore(self._before[index])
        elif self._devices is not None:
            random_state, buffers = self.save()
            self._before.append((random_state, None if self._chains and index > 1 else buffers))
        with evaluating(index, again=again):
            loss = check_loss(self._loss_fn(index, point), index)
        if not again:
            self.losses.append(loss.detach())
        return loss

    def save(self) -> tuple[RandomState | None, Any]:
        """Return random state and buffers as they are, for :meth:`restore`."""
        random_state = None if self._devices is None else RandomState.capture(self._devices)
        return random_state, None if self._places is None else self._places.save()

    def restore(self, saved: tuple[RandomState | None, Any]) -> None:
        """Return to what :meth:`save` once returned."""
        random_state, buffers = saved
        if random_state is not None:
            random_state.restore()
        if buffers is not None:
            self._places.restore(buffers)

    def close(self, after: tuple[RandomState | None, Any] | None) -> None:
        """Leave buffers as they were before and random numbers as one evaluation of each domain does.

        Args:
            after: What :meth:`save` returned when each had been evaluated once, if it came to that.
        """
        self.restore((after and after[0], self._start))

    def stacked(self) -> list[Tensor]:
        """Return the losses of the domains, shape (S,), and the same when they were evaluated again, if they were."""
        again, like = [self.again.get(i, loss) for i, loss in enumerate(self.losses)], self.losses[0]
        return [torch.stack([loss.to(like.device, like.dtype) for loss in part]) for part in (self.losses, again)]


def check_repeats(losses: Sequence[float], again: Sequence[float], tolerance: float) -> None:
    """Raise if a loss was not the same when it was evaluated again.

    Args:
        losses: Of the domains, when they were first evaluated; one that is not finite is another check's.
        again: What was found at the same parameters, with the same buffers and random numbers.
        tolerance: The change that is taken for rounding, relative to the mean size of the losses.

    Raises:
        ValueError: If one changed; the message says how much, what may be the cause and what to do.

    Example:
        >>> check_repeats([1.0, 2.0], [1.0, 2.0 + 1e-9], tolerance=1e-6)
    """
    size = sum(filter(math.isfinite, map(abs, losses))) / len(losses)
    for index, (loss, value) in enumerate(zip(losses, again, strict=True)):
        if math.isfinite(loss) and not abs(value - loss) <= tolerance * size:
            raise ValueError(
                f"the loss of {name_of(index)} is not the same twice: {loss:.7g}, and {value:.7g} when it is "
                "evaluated for the second time, at the same parameters and with the same random numbers, as this "
                "method has to. Something in it changes from one call to the next: a batch that loss_fn changes in "
                "place, class weights or statistics that it counts, a counter of calls, a teacher that it updates, a "
                "generator of your own (those of torch, numpy and Python are set back), buffers of a model that was "
                "not passed as model=. Take that out of loss_fn, or use what evaluates each loss once: IDGM with "
                "one_pass=True or keep_graphs=True and hvp='reverse', SmoothFish at gamma 1, or Fish"
            )
