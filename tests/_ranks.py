"""Processes that talk by gloo, started once and kept: each test sends them a function and gets what every rank returns.

``on_ranks(2, function, *arguments)`` calls ``function(*arguments)`` in each of 2 processes, in which
``torch.distributed`` is initialized. The function has to be one of a test module's. An exception on any rank is raised
here with that rank's traceback; processes that hang are killed.
"""

from __future__ import annotations

import atexit
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 120.0  # seconds for one call


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT / 2))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:  # noqa: BLE001  the test is to see it
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class _Pool:
    """Some processes that wait for functions to call."""

    def __init__(self, size: int) -> None:
        # From a process that has imported torch once for all of them.
        context, port = mp.get_context("forkserver"), _free_port()
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint", "torch_gradmatch"])
        self.processes, self.pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(enumerate(self.pipes))
        while waiting:
            # Once one has failed, the others may wait for it for ever.
            ready = wait(list(waiting.values()), 10.0 if failures else TIMEOUT)
            if not ready:
                for rank in waiting:
                    failures.setdefault(rank, "still at work")
                break
            for rank, pipe in list(waiting.items()):
                if pipe in ready:
                    del waiting[rank]
                    try:
                        good, value = pipe.recv()
                    except EOFError:
                        good, value = False, "the process died"
                    (results if good else failures)[rank] = value
        if failures:
            self.close()
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return [results[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        _POOLS.pop(len(self.processes), None)


_POOLS: dict[int, _Pool] = {}


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function of a test module on every rank and return what each returns, by rank."""
    if size not in _POOLS:
        _POOLS[size] = _Pool(size)
    return _POOLS[size].call(function, arguments)


@atexit.register
def _close_all() -> None:
    for pool in list(_POOLS.values()):
        pool.close()
