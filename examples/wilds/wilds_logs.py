"""Logs of a run that survive its being killed: csv files and TensorBoard, cut back to the checkpoint on resuming."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

__all__ = ["RunLog"]

ITERATION_COLUMNS = (
    "phase",
    "iteration",
    "epoch",
    "gradients",
    "loss",
    "inner_product",
    "cosine",
    "grad_norm",
    "lr",
    "seconds",
    "domains",
)
EVALUATION_COLUMNS = ("phase", "iteration", "gradients", "split", "metric", "value")


class _CsvFile:
    def __init__(self, path: Path, columns: Sequence[str], size: int | None) -> None:
        if size is None:
            path.write_text("")
        else:
            os.truncate(path, size)  # what was logged after the checkpoint is about to be logged again
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        if not self._file.tell():
            self._writer.writeheader()

    def write(self, row: Mapping[str, Any]) -> None:
        self._writer.writerow(row)
        self._file.flush()

    def size(self) -> int:
        return self._file.tell()


class RunLog:
    """``log.csv``, ``evaluations.csv`` and TensorBoard's files in the folder of a run.

    Args:
        folder: Of the run.
        state: From :meth:`state_dict`, to continue after a checkpoint; None to begin anew.
        gradients: Gradients evaluated by then: the step from which TensorBoard forgets.
    """

    def __init__(self, folder: Path, state: Mapping[str, int] | None, gradients: int) -> None:
        sizes = state or {}
        self._iterations = _CsvFile(folder / "log.csv", ITERATION_COLUMNS, sizes.get("log"))
        self._evaluations = _CsvFile(folder / "evaluations.csv", EVALUATION_COLUMNS, sizes.get("evaluations"))
        self._board = SummaryWriter(folder / "tensorboard", purge_step=gradients + 1 if state else None)

    def iteration(self, row: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        """Log what an iteration measured.

        Args:
            row: A value for each of ``ITERATION_COLUMNS``.
            scalars: What is for TensorBoard besides the loss and the learning rate in that row.
        """
        self._iterations.write(row)
        for name, value in {**scalars, "loss": row["loss"], "lr": row["lr"]}.items():
            self._board.add_scalar(f"{row['phase']}/{name}", value, row["gradients"])

    def evaluation(self, phase: str, iteration: int, gradients: int, split: str, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a split; those of single groups only by way of their worst.

        Args:
            phase: "warm_start" or "train".
            iteration: Of the phase.
            gradients: Gradients evaluated so far, the horizontal axis of TensorBoard.
            split: Name of the split.
            metrics: From ``WILDSDataset.eval``.
        """
        for metric, value in metrics.items():
            if ":" not in metric:  # as in "acc_location:17"
                row = (phase, iteration, gradients, split, metric, value)
                self._evaluations.write(dict(zip(EVALUATION_COLUMNS, row, strict=True)))
                self._board.add_scalar(f"{split}/{metric}", value, gradients)

    def state_dict(self) -> dict[str, int]:
        """Return how long the files are.

        Returns:
            Their lengths in bytes.
        """
        self._board.flush()
        return {"log": self._iterations.size(), "evaluations": self._evaluations.size()}
