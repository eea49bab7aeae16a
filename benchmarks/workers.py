"""Work in several processes, with one progress bar for all."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tqdm import tqdm

_news: Any = None  # in a worker, where to put the news of its progress


def _listen(news: Any) -> None:
    global _news
    _news = news


def _work(function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    return function(*task, told=lambda *_: _news.put(1))


def in_processes(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], processes: int, total: int, title: str, unit: str
) -> list[Any]:
    """Call ``function(*task, told=...)`` for each task, in as many processes; ``told`` moves the bar on by one.

    Args:
        function: At the top level of a module.
        tasks: Begun in this order.
        processes: How many at a time.
        total: Length of the bar.
        title: Of the bar.
        unit: Of what it counts.

    Returns:
        The results in the order of the tasks.
    """
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    with (
        ProcessPoolExecutor(processes, mp_context=context, initializer=_listen, initargs=(news,)) as pool,
        tqdm(total=total, desc=title, unit=unit, file=sys.stderr) as progress,
    ):
        waiting = [pool.submit(_work, function, task) for task in tasks]
        while not all(future.done() for future in waiting):
            time.sleep(0.2)
            while not news.empty():
                progress.update(news.get())
        progress.update(total - progress.n)
        return [future.result() for future in waiting]
