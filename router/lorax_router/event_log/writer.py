"""Writes a log of events from a thread of its own, so that no step waits for a disk."""

from __future__ import annotations

import logging
import os
import secrets
import zlib
from collections import deque
from importlib.metadata import version
from pathlib import Path
from threading import Event as Signal
from threading import Thread

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_router.core.settings import CoreSettings
from lorax_router.event_log.form import event_line, header_line, last_line
from lorax_router.event_log.recording import Event
from lorax_router.event_log.values import ValueWriter

logger = logging.getLogger(__name__)

# What a killed process loses at most.
_PAUSE_S = 0.2
# Events that wait to be written: beyond it the disk is too slow, and the log ends.
_MAX_WAITING = 100_000
_LEVEL = 1
_GZIP = 31


class EventLogWriter:
    """A log that ends by itself at its limit; what goes wrong with it harms no request.

    What a log of the same name held before is kept beside it as ``NAME.1``.

    Args:
        path: the file; only this user may read it.
        settings: what the scheduler is made of.
        max_bytes: how large the file may become.
    """

    def __init__(self, path: Path, settings: CoreSettings, *, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._waiting: deque[Event] = deque()
        self._is_open = True
        self._closing = Signal()
        self._num_bytes = 0
        self._num_events = 0
        self._values = ValueWriter(secrets.token_bytes(16))
        if path.exists():
            path.replace(path.with_name(f"{path.name}.1"))
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        self._write([header_line(settings, f"lorax-py {version('lorax-py')}", self._values)])
        self._thread = Thread(target=self._run, name="event-log", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        """Note an event; its values are not changed any more."""
        if self._is_open and len(self._waiting) <= _MAX_WAITING:
            self._waiting.append(event)

    def close(self) -> None:
        """Write what is left, and the end."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._is_open:
                is_last = self._closing.wait(_PAUSE_S)
                self._write_waiting()
                if is_last and self._is_open:
                    self._end("closed")
        except Exception as error:  # noqa: BLE001 - a log that cannot be written is no reason to stop
            logger.error("the log of events ends, it cannot be written: %s", error)
        finally:
            self._is_open = False
            self._waiting.clear()
            self._file.close()

    def _write_waiting(self) -> None:
        num = len(self._waiting)
        if num > _MAX_WAITING:
            self._end("the disk was too slow")
            return
        lines: list[bytes] = []
        for _ in range(num):
            lines.append(event_line(self._waiting.popleft(), self._values))
            if len(lines) >= 256:
                self._write(lines)
                lines = []
            if self._num_bytes > self._max_bytes:
                self._end("the log has the size that it may have")
                return
        if lines:
            self._write(lines)

    def _write(self, lines: list[bytes]) -> None:
        """Write lines as a member of their own, whole whatever happens after them."""
        packer = zlib.compressobj(_LEVEL, wbits=_GZIP)
        data = packer.compress(b"".join(lines)) + packer.flush()
        self._file.write(data)
        self._file.flush()
        self._num_bytes += len(data)
        self._num_events += len(lines)

    def _end(self, reason: str) -> None:
        self._write([last_line(reason)])
        self._is_open = False
        level = logging.INFO if reason == "closed" else logging.WARNING
        logger.log(level, "the log of events ends: %s (%s)", reason, self._path)


def open_event_log(path: str, settings: CoreSettings, max_bytes: int) -> EventLogWriter:
    """Return the log that a configuration asks for; StartupError if it cannot be written."""
    try:
        return EventLogWriter(Path(path), settings, max_bytes=max_bytes)
    except OSError as error:
        raise StartupError(
            f"events cannot be recorded into {path}: {error.strerror}; name a file that can be "
            "written with --record-events",
            ExitCode.BAD_CONFIG,
        ) from error
