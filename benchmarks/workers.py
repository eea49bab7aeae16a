"""Work in several processes, with one progress bar for all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from joblib import Parallel, delayed
from tqdm import tqdm


def in_processes(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], processes: int, title: str
) -> list[Any]:
    """Call ``function(*task)`` for each task, in as many processes; return the results in the order of the tasks."""
    results = Parallel(processes, return_as="generator", batch_size=1)(delayed(function)(*task) for task in tasks)
    return list(tqdm(results, desc=title, total=len(tasks), file=sys.stderr))
