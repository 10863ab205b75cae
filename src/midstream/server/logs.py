"""Structured logs: one JSON object a line, to standard error or a file. A log that cannot be written stops nothing."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any


class JsonFormatter(logging.Formatter):
    """Time, level, logger and message, and the fields of the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _Patient:
    """A handler's mixin: a full disk or a closed pipe is counted, and neither raised nor printed."""

    lost = 0

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        self.lost += 1

    def close(self) -> None:
        try:
            super().close()  # type: ignore[misc]
        except OSError:
            self.lost += 1  # what was still buffered


class PatientStreamHandler(_Patient, logging.StreamHandler):  # type: ignore[type-arg]
    """To standard error."""


class PatientFileHandler(_Patient, logging.FileHandler):
    """To a file."""


def set_up(file: Path | None) -> logging.Handler:
    """Send what this package and uvicorn log to one handler. Raises OSError where the file cannot be opened."""
    handler = PatientFileHandler(file, encoding="utf-8") if file is not None else PatientStreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("midstream", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return handler
