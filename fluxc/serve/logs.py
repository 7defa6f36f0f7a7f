"""Structured logs: one JSON object a line, on standard error. Prompts are in it only where that was asked for."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

NAME = "fluxc.serve"
FIELDS = "fluxc_fields"


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, event, and the fields given to `log`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log(event: str, level: int = logging.INFO, exc_info: Any = None, **fields: Any) -> None:
    """Write one event."""
    logging.getLogger(NAME).log(level, event, exc_info=exc_info, extra={FIELDS: fields})


def set_up(quiet: bool = False) -> None:
    """Send fluxc's and uvicorn's logs to standard error as JSON lines; `quiet`: warnings alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in (NAME, "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING if quiet or name != NAME else logging.INFO)
