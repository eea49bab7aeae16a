"""Loops over samplers and loaders that tests kill and resume."""

from __future__ import annotations

import itertools

import pytest
import torch
from _feature_training import through_file

# From Python 3.12 on, forking a worker from a process with threads warns; these workers only read a range.
QUIET = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata's constructor calls it
]


def plain(item):
    """Batches and lists of them as numbers, strings and lists."""
    if isinstance(item, list):
        return [plain(batch) for batch in item], getattr(item, "domains", None)
    return item.tolist() if isinstance(item, torch.Tensor) else item


def epochs_of(loop, number):
    return [[plain(item) for item in loop] for _ in range(number)]


def assert_resumes(make, number, stops, through=through_file):
    """Killed behind any item of any epoch, the rest of it and the epochs after are what they would have been.

    ``make`` returns what has the state, and a loop over it.
    """
    whole = epochs_of(make()[1], number)
    for epoch, items in enumerate(whole):
        for stop in stops(len(items)):
            holder, loop = make()
            taken = epochs_of(loop, epoch)
            taken.append([plain(item) for item in itertools.islice(loop, stop)])
            state = through(holder.state_dict())
            holder, loop = make()
            holder.load_state_dict(state)
            rest = epochs_of(loop, number - epoch)
            assert taken[-1] + rest[0] == items, (epoch, stop)
            assert taken[:-1] + rest[1:] == whole[:epoch] + whole[epoch + 1 :], (epoch, stop)
