"""Errors that need not be told to the other ranks, or cannot: those that all have, and those of a collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistError

__all__ = ["in_collective", "is_told"]

_TOLD = "_torch_gradmatch_told"


@contextmanager
def in_collective() -> Iterator[None]:
    """Mark the errors of a collective, after which no other may be tried: the other ranks know, or cannot be reached.

    Yields:
        Once.
    """
    try:
        yield
    except BaseException as error:
        vars(error)[_TOLD] = True
        raise


def is_told(error: BaseException) -> bool:
    """Return whether an error is no news for the other ranks, or whether telling them would wait for ever.

    Args:
        error: What was raised.

    Returns:
        True for what was raised inside :func:`in_collective`, and for what looks as if a backend raised it elsewhere.
    """
    if _TOLD in vars(error) or isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo/", "NCCL"))
