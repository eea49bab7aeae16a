"""Which domain a batch of the examples is from, by the data alone."""

from __future__ import annotations

from torch import Tensor


def domain_of(features: Tensor, classes: Tensor) -> str:
    """The one whose shortcut agrees with the classes: in 90 % of its own samples, and in half of all others."""
    return f"domain {int((features[:, 1:] * (2 * classes - 1)[:, None]).mean(0).argmax())}"
