"""The log of a run: one CSV file with a row for each step and task, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import importlib.util
import shutil
from pathlib import Path
from typing import Any

from fluxc.train.trainer import StepRecord

COLUMNS = (
    *("step", "task", "prompts", "loss", "omega", "target", "lambda1", "lambda2"),
    *("tau", "lr", "grad_norm", "padding"),
)
ALL = "all"
"""The task of a step's own row; its loss is what the step minimised."""


class Log:
    """Rows of `path`, a CSV file, and the same for TensorBoard in the folder `tensorboard` beside it.

    Rows of steps after `start`, left by a run that was cut off, are dropped.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_log(path) if int(row["step"]) <= start] if start else []
        self._file = path.open("w", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._rows.writeheader()
        self._rows.writerows(kept)
        self._board = _board(path.with_name("tensorboard"), start)

    def add(self, record: StepRecord) -> None:
        """Write one step down."""
        for row in rows_of(record):
            self._rows.writerow(row)
            for name, value in row.items():
                if self._board and name not in ("step", "task") and value != "":
                    self._board.add_scalar(f"{row['task']}/{name}", value, row["step"])
        self._file.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board:
            self._board.close()


def rows_of(record: StepRecord) -> list[dict[str, Any]]:
    """The rows of one step, counted from 1: the step itself, then each task."""
    step = record.step + 1
    shared = {name: getattr(record, name) for name in ("loss", "omega", "tau", "lr", "grad_norm", "padding")}
    total = {"step": step, "task": ALL, "prompts": sum(task.prompts for task in record.tasks.values()), **shared}
    tasks = [{"step": step, "task": name, **vars(task)} for name, task in sorted(record.tasks.items())]
    return [total, *tasks]


def read_log(path: Path) -> list[dict[str, str]]:
    """All rows of a log as text; [] where there is none."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["step"] and None not in row.values()]


def mean_padding(path: Path) -> float:
    """Mean share of padding over the steps of a log."""
    shares = [float(row["padding"]) for row in read_log(path) if row["task"] == ALL]
    return sum(shares) / len(shares)


def _board(folder: Path, start: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    if not start:
        shutil.rmtree(folder, ignore_errors=True)  # of a run before
    return SummaryWriter(str(folder), purge_step=start + 1)
