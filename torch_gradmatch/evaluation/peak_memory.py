"""The most memory that something needs while it runs, above what was in use before."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

__all__ = ["peak_memory"]


def peak_memory(
    run: Callable[[], Any], devices: Iterable[torch.device], warm_up: Callable[[], Any] = lambda: None
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
    gc.collect()
    accelerators = {d: torch.cuda.memory_allocated(d) for d in devices if d.type == "cuda"}
    if accelerators:
        warm_up()
        for device in accelerators:
            torch.cuda.reset_peak_memory_stats(device)
        run()
        return sum(torch.cuda.max_memory_allocated(device) - before for device, before in accelerators.items())
    before = _resident_anew()
    warm_up()
    _resident_anew()
    run()
    return None if before is None else max(0, _highest_resident() - before)


def _resident_anew() -> int | None:
    """Let the record of the highest resident memory begin anew.

    Returns:
        Its first entry in bytes, or None where there is no such record.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is no longer resident
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return _highest_resident()
    return None


def _highest_resident() -> int:
    """Return the process's highest resident memory in bytes since the record began."""
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024
