"""A run from its first or its last kept step to its end, logged, and kept whatever stops it."""

from __future__ import annotations

from pathlib import Path

from fluxc.progress import Progress
from fluxc.train.checkpoint import Checkpoints
from fluxc.train.log import Log
from fluxc.train.processes import Processes
from fluxc.train.report import said
from fluxc.train.trainer import StepRecord, Trainer

NOTES = 10
"""Lines said of a run on its way."""


def run(
    trainer: Trainer, checkpoints: Checkpoints, log_file: Path, processes: Processes, progress: Progress
) -> StepRecord | None:
    """Train to the last step; returns its record, None where all steps were done before."""
    done = checkpoints.restore(trainer)
    if done:
        progress.note(f"going on after step {done}")
    progress.start("training", trainer.options.steps - done)
    if not processes.is_first:
        return _steps(trainer, None, None, progress)
    log = Log(log_file, done)
    try:
        return _steps(trainer, checkpoints, log, progress)
    finally:
        log.close()
        if trainer.is_whole and trainer.step:
            checkpoints.save(trainer)


def _steps(trainer: Trainer, checkpoints: Checkpoints | None, log: Log | None, progress: Progress) -> StepRecord | None:
    options, record = trainer.options, None
    while trainer.step < options.steps:
        record = trainer.run_step()
        progress.advance()
        if log:
            log.add(record)
        if trainer.step % max(1, options.steps // NOTES) == 0:
            progress.note(said(record, options.steps))
        if checkpoints and trainer.step % options.save_every == 0:
            checkpoints.save(trainer)
    return record
