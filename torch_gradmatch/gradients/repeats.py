"""Whether a loss is the same when it is evaluated again: every method that evaluates one twice rests on it.

What such a method differentiates is one function; a loss with a memory (class weights that it counts, a counter of its
calls) is another function at each call. The matching term is a derivative of gradients, or a difference of two, so a
change that training would not notice can be most of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from torch_gradmatch._checks import name_of

__all__ = ["check_repeats", "precision"]


def precision(tensors: Iterable[Tensor]) -> float:
    """Return the machine epsilon of the coarsest dtype among some floating or complex tensors.

    Args:
        tensors: At least one.

    Returns:
        The epsilon.

    Example:
        >>> import torch
        >>> precision([torch.zeros(2), torch.zeros(2, dtype=torch.float64)]) == torch.finfo(torch.float32).eps
        True
    """
    return max(torch.finfo(t.dtype).eps for t in tensors)


def check_repeats(losses: Sequence[float], again: Mapping[int, float], tolerance: float) -> None:
    """Raise if a loss was not the same when it was evaluated again.

    Args:
        losses: Of the domains, when they were first evaluated; one that is not finite is another check's.
        again: By number of the domain, what was found at the same parameters, with the same buffers and random numbers.
        tolerance: The change that is taken for rounding, relative to the mean size of the losses.

    Raises:
        ValueError: If one changed; the message says how much, what may be the cause and what to do.

    Example:
        >>> check_repeats([1.0, 2.0], {1: 2.0 + 1e-9}, tolerance=1e-6)
    """
    size = sum(filter(math.isfinite, map(abs, losses))) / len(losses)
    for index, value in again.items():
        if math.isfinite(losses[index]) and not abs(value - losses[index]) <= tolerance * size:
            raise ValueError(
                f"the loss of {name_of(index)} is not the same twice: {losses[index]:.7g}, and {value:.7g} when it is "
                "evaluated for the second time, at the same parameters and with the same random numbers, as this "
                "method has to. Something in it changes from one call to the next: a batch that loss_fn changes in "
                "place, class weights or statistics that it counts, a counter of calls, a teacher that it updates, a "
                "generator of your own (those of torch, numpy and Python are set back), buffers of a model that was "
                "not passed as model=. Take that out of loss_fn, or use what evaluates each loss once: IDGM with "
                "keep_graphs=True and hvp='reverse', SmoothFish at gamma 1, or Fish"
            )
