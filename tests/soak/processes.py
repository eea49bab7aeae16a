"""Functions called in processes of their own, all forked from one that has imported torch."""

from __future__ import annotations

import multiprocessing as mp
import os
import resource
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

# Small allocations are given back to the system, so that what is in use can be measured; no thread waits for another.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
MOST_MEMORY = 8 << 30
PRELOADED = ["torch.distributed.tensor", "torchdata.stateful_dataloader", "pytorch_optimizer"]
PRELOADED += [f"soak.{part}" for part in ("damage", "stateful", "kills", "flat")]  # or each process imports them


@contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def strict_and_alone() -> None:
    """What every process here begins with: one thread, and warnings are errors."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)  # workers are forked, and only fetch
    warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)  # torchdata's constructor calls it


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Start a process that calls a function of a module."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=function, args=arguments)
    with _environment():
        process.start()
    return process


def _serve(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    strict_and_alone()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))  # for what is damaged may ask for any
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:  # noqa: BLE001  it is to be reported
        pipe.send((False, traceback.format_exc()))


class Call:
    """One call in a process of its own.

    Args:
        function: One of a module.
        arguments: What can be pickled.
        limit: Seconds, after which the process is killed.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, limit: float) -> None:
        self.pipe, theirs = mp.get_context("forkserver").Pipe()
        self.process = start(_serve, theirs, function, arguments)
        theirs.close()
        self._began, self._limit = time.monotonic(), limit
        self.seconds = 0.0

    def result(self) -> tuple[bool, Any] | None:
        """Whether the function returned, and what; or what was raised. None while it is at work."""
        self.seconds = time.monotonic() - self._began
        if self.pipe.poll():
            try:
                found = self.pipe.recv()
            except EOFError:
                self.process.join()
                found = False, f"the process died with status {self.process.exitcode}"
        elif self.seconds > self._limit:
            self.process.kill()
            found = False, f"killed after {self._limit:.0f} s"
        else:
            return None
        self.process.join()
        self.pipe.close()
        return found
