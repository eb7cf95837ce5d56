"""Structured logs: one JSON object per line on stderr. Never prompts, responses or token ids."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON; line breaks and terminal escapes in values are escaped by JSON itself."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def setup_logging(service: str, level: str) -> None:
    """Send all logs of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    for ours in ("tether", "tether_services"):
        logging.getLogger(ours).setLevel(level)


def log_event(log: logging.Logger, event: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Write one event with its fields, for example `log_event(log, "adapter activated", policy_version=3)`."""
    log.log(level, event, extra={"fields": fields})
