"""Whether Fish can serve an optimizer: what it must refuse and what it should warn of, said before anything moves."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim import Optimizer

from torch_gradmatch.slow.inner_state import resets_all
from torch_gradmatch.wrapped.members import shown_name
from torch_gradmatch.wrapped.traits import Traits

__all__ = ["judge", "warn_of_reset"]


def judge(optimizer: Optimizer, traits: Traits, inner_state: Any, *, stacklevel: int) -> None:
    """Refuse or warn where inner loops of an optimizer would not be what Fish says they are.

    Args:
        optimizer: The wrapped optimizer.
        traits: What it is like.
        inner_state: As in :class:`~torch_gradmatch.Fish`.
        stacklevel: Of a warning, as the caller would pass it.

    Raises:
        ValueError: If its state would be carried, and holds points of parameter space out of reach.
    """
    name = shown_name(optimizer)
    if inner_state == "reset" and traits.known and not resets_all(optimizer, traits):
        warn_of_reset(optimizer, stacklevel=stacklevel + 1)
    if inner_state == "carry" and traits.hidden:
        raise ValueError(
            f"Fish cannot carry the state of {name} from one inner loop to the next: it keeps points of parameter "
            f"space where an interpolation does not reach, in {traits.hidden[0]}. Pass "
            'Fish(inner_state="reset"), or use SmoothFish or IDGM, which take whole steps of it'
        )
    if inner_state == "carry" and traits.forgets:
        warnings.warn(
            f"{name} works the parameters out of the state it keeps, so in the step after an interpolation it goes "
            'back on most of it, and Fish\'s inner loops are one long walk: pass Fish(inner_state="reset"), or use '
            "SmoothFish, which walks by SGD",
            stacklevel=stacklevel + 1,
        )


def warn_of_reset(optimizer: Optimizer, *, stacklevel: int) -> None:
    """Warn that a reset does not reach all that an optimizer keeps.

    Args:
        optimizer: The wrapped optimizer.
        stacklevel: As the caller would pass it.
    """
    warnings.warn(
        f'inner_state="reset" does not make {shown_name(optimizer)} new: it keeps something where a reset finds '
        "nothing to reset. Pass a function that does, Fish(inner_state=function), which is called with the wrapped "
        "optimizer before every inner loop",
        stacklevel=stacklevel + 1,
    )
