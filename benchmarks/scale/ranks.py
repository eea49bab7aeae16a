"""Processes that talk by gloo, started once, on one thread each: every call runs a function on all of them."""

from __future__ import annotations

import gc
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

TIMEOUT = 300.0  # seconds in which one of them has to be heard of


def _serve(rank: int, size: int, rendezvous: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        gc.freeze()  # the library asks the collector for models: what was imported need not be looked through
        try:
            pipe.send(("done", function(*arguments, told=lambda *_: pipe.send(("news", 1)))))
        except Exception:  # noqa: BLE001  the parent raises it
            pipe.send(("failed", traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """R processes of one group.

    Args:
        size: R.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self._processes, self._pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            rendezvous = str(Path(self._folder.name) / "rendezvous")
            process = context.Process(target=_serve, args=(rank, size, rendezvous, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()  # by which they end
        for process in self._processes:
            if kind is None:
                process.join(10.0)
            process.kill()
            process.join()
        self._folder.cleanup()

    def call(self, title: str, unit: str, total: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(*arguments, told=...)`` on every rank; each call of ``told`` moves a bar on by one.

        Args:
            title: Of the bar.
            unit: Of what it counts.
            total: Its length, the news of all ranks.
            function: At the top level of a module.
            arguments: What can be pickled.

        Returns:
            What every rank returned.

        Raises:
            RuntimeError: If it raised on one; the message has its traceback.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        with tqdm(total=total, desc=title, unit=unit, file=sys.stderr) as progress:
            while len(results) < self.size:
                waiting = {self._pipes[rank]: rank for rank in range(self.size) if rank not in results}
                ready: list[Any] = wait(list(waiting), TIMEOUT)
                if not ready:
                    raise RuntimeError(f"{title}: nothing was heard of ranks {sorted(waiting.values())}")
                for pipe in ready:
                    try:
                        kind, value = pipe.recv()
                    except EOFError:
                        kind, value = "failed", "the process died"
                    if kind == "news":
                        progress.update(value)
                    elif kind == "done":
                        results[waiting[pipe]] = value
                    else:
                        raise RuntimeError(f"{title}: on rank {waiting[pipe]}: {value}")
            progress.update(total - progress.n)
        return [results[rank] for rank in range(self.size)]
