"""The most memory that something needs while it runs, above what was in use before."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

__all__ = ["peak_memory"]


def peak_memory(
    run: Callable[[], Any], devices: Iterable[torch.device], warm_up: Callable[[], Any] | None = None
) -> int | None:
    """Run something once and return the most memory that it needed above the level before.

    On CUDA devices that is what torch's allocator handed out, exactly. On the CPU it is the growth of the process's
    resident memory, which Linux keeps the highest value of; it has a grain of about a megabyte, and holes that an
    earlier run left in the heap make it smaller. The most of a fresh process is therefore the more reliable.

    Args:
        run: What to run.
        devices: Where it allocates. With a CUDA device among them, the CPU's memory does not count.
        warm_up: What to run before, whose own peak does not count; but what it leaves allocated does.

    Returns:
        Bytes, or None where the system does not tell.

    Example:
        >>> import torch
        >>> needed = peak_memory(lambda: torch.ones(2**26), [torch.device("cpu")])
        >>> needed is None or 250e6 < needed < 300e6
        True
    """
    accelerators = [d for d in dict.fromkeys(devices) if d.type == "cuda"]
    gc.collect()
    warm_up = warm_up or (lambda: None)
    if accelerators:
        before = {device: torch.cuda.memory_allocated(device) for device in accelerators}
        warm_up()
        for device in accelerators:
            torch.cuda.reset_peak_memory_stats(device)
        run()
        return sum(torch.cuda.max_memory_allocated(device) - before[device] for device in accelerators)
    level = _resident_now()
    warm_up()
    _resident_now()
    run()
    return None if level is None else max(0, (_highest_resident() or 0) - level)


def _resident_now() -> int | None:
    """Let the record of the highest resident memory begin anew, and return its first entry.

    Returns:
        Bytes, or None where there is no such record.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is no longer resident
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _highest_resident()


def _highest_resident() -> int | None:
    """Return the process's highest resident memory in bytes since the record began, or None if it is not told."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
