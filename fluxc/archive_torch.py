"""The one place where torch reads a saved program: a new archive, made of what was checked, in memory."""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram

from fluxc import archive_weights
from fluxc.archive_weights import CONSTANTS, WEIGHTS
from fluxc.archive_zip import Archive
from fluxc.errors import ArchiveError

MODEL = "models/model.json"
WEIGHTS_CONFIG = WEIGHTS + "model_weights_config.json"
CONSTANTS_CONFIG = CONSTANTS + "model_constants_config.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
RECORDS = ("archive_format", "archive_version", "byteorder", "version", ".format_version", ".storage_alignment")

# The second one warns about each empty tensor in torch 2.11.
_LOGGERS = ("torch.export", "torch.export.pt2_archive._package")


def read_graph(archive: Archive, model: Any, weights: dict[str, Any], constants: dict[str, Any]) -> ExportedProgram:
    """The program described by the checked `model`, with all tensors on the meta device and no sample inputs.

    Raises ArchiveError if torch cannot read the graph.
    """
    return _torch_load(_clean_copy(archive, model, weights, constants), archive)


def _clean_copy(archive: Archive, model: Any, weights: dict[str, Any], constants: dict[str, Any]) -> io.BytesIO:
    """A new archive of what was checked, with empty tensors and empty sample inputs: the only thing torch reads."""
    weights = archive_weights.without_data(weights, WEIGHTS)
    constants = archive_weights.without_data(constants, CONSTANTS)
    records = {name: archive.read(name) for name in (*RECORDS, ".data/version") if name in archive.members}
    records |= {MODEL: json.dumps(model).encode(), SAMPLE_INPUTS: b""}
    records |= {WEIGHTS_CONFIG: json.dumps({"config": weights}).encode()}
    records |= {CONSTANTS_CONFIG: json.dumps({"config": constants}).encode()}
    records |= {WEIGHTS + p["path_name"]: b"" for p in weights.values()}
    records |= {CONSTANTS + p["path_name"]: b"" for p in constants.values()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as clean:
        for name, data in records.items():
            clean.writestr(f"archive/{name}", data)
    buffer.seek(0)
    return buffer


def _torch_load(buffer: io.BytesIO, archive: Archive) -> ExportedProgram:
    with _reasons() as reasons:
        try:
            return torch.export.load(buffer)
        except Exception as error:  # torch raises every kind of error on a graph it cannot read
            reason = " ".join(str(reasons[-1] if reasons else error).split())
            message = f"torch {torch.__version__} cannot read the graph in {archive.path}: {reason[-200:]}"
            raise ArchiveError(message, hint="save it again with the torch installed here") from error


@contextmanager
def _reasons() -> Iterator[list[BaseException]]:
    """Collect what torch.export.load only logs, and keep its tracebacks off the terminal."""
    found: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        found.extend(e for e in (record.exc_info or ())[1:2] if isinstance(e, BaseException))
        return False

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield found
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
