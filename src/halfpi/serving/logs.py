"""Logs as JSON lines on standard error: what happened, and its fields. They hold no secrets."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any


def fields(**values: object) -> dict[str, Any]:
    """The `extra` of a log call that puts `values` beside the event."""
    return {"fields": values}


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, event, its fields, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of `record`."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr() -> None:
    """Send what this package does, and every warning of others, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("halfpi.serving").setLevel(logging.INFO)
