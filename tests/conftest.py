"""One thread for networks as small as these: more would only wait for one another, on a busy machine for long."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator

import pytest
import torch

USE_THREADS = {"test_ops", "test_native"}  # the kernel works on several


def pytest_collection_finish() -> None:
    importlib.import_module("torch._dynamo")  # as the first optimizer does
    gc.collect()
    gc.freeze()  # measuring memory collects garbage, among all that the tests have imported


@pytest.fixture(autouse=True, scope="session")
def _one_thread_in_children() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if "OMP_NUM_THREADS" not in os.environ:
            patch.setenv("OMP_NUM_THREADS", "1")  # in this process torch has read it
        yield


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    if request.module.__name__ not in USE_THREADS:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
