"""The log format of all processes: one JSON object a line on standard output.

Keys that every line has: ``ts`` (seconds since the epoch), ``level``, ``logger``,
``message``. ``extra={"fields": {...}}`` adds further keys. The launcher reads the
lines of its children and prints them readable or as they are.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, TextIO

RESERVED_KEYS = ("ts", "level", "logger", "message")
# Made once: to make it takes as long as a line.
_encode = json.JSONEncoder(default=str, ensure_ascii=False).encode


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON; ``bound`` keys (rank, ...) go on every line."""

    def __init__(self, bound: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._bound = bound or {}

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON line of one record."""
        line: dict[str, Any] = {
            "ts": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._bound,
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line)


def configure(
    level: str = "info", *, stream: TextIO | None = None, bound: dict[str, Any] | None = None
) -> None:
    """Send all logging of this process to ``stream`` (standard output) as JSON lines."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(JsonFormatter(bound))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
