"""Counts the operations that torch dispatches, and how often Python waits for a value: what a GPU's time goes into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = "aten._local_scalar_dense.default"  # item(), float(), bool()


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher, views too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count(work: Callable[[], object]) -> Counter[str]:
    with Operations() as operations:
        work()
    return operations.counts


@contextmanager
def waits() -> Iterator[list[str]]:
    """What reads tensors' values, which on an accelerator waits: ``tolist`` does so past the dispatcher."""
    found: list[str] = []
    tolist = torch.Tensor.tolist

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func) == READS:
                found.append("item")
            return func(*args, **(kwargs or {}))

    def noted(tensor: torch.Tensor) -> Any:
        found.append("tolist")
        return tolist(tensor)

    torch.Tensor.tolist = noted
    try:
        with Reads():
            yield found
    finally:
        torch.Tensor.tolist = tolist
