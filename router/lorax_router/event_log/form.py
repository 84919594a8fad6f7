"""The form of a log: gzip of JSON lines, the settings first, then an event a line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import orjson

from lorax_router.core.settings import CoreSettings
from lorax_router.event_log.recording import Event
from lorax_router.event_log.values import ValueFormatError, ValueWriter, typed

# Raised whenever the same lines mean something else.
VERSION = 1
_FORMAT = "lorax events"
_KEY_BYTES = 8
_DUMP = orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE


class EventLogError(ValueError):
    """A file is no log of events, or none that this version can read."""


def header_line(settings: CoreSettings, program: str, values: ValueWriter) -> bytes:
    """Return the first line: whose log it is, and what its scheduler is made of."""
    header = {
        "format": _FORMAT, "version": VERSION, "program": program, "settings": values.plain(settings)
    }  # fmt: skip
    return orjson.dumps(header, option=_DUMP)


def event_line(event: Event, values: ValueWriter) -> bytes:
    """Return an event's line."""
    line: dict[str, Any] = {"call": event.call, "given": values.plain(event.given)}
    if event.result is not None:
        line["result"] = values.plain(event.result)
    if event.error:
        line["error"] = event.error
    if event.keys:
        keys: dict[int, list[str]] = {}
        for request_id, key in event.keys:
            named = values.digest(key.to_bytes(_KEY_BYTES, signed=True))
            keys.setdefault(request_id, []).append(named)
        line["keys"] = keys
    return orjson.dumps(line, option=_DUMP)


def last_line(reason: str) -> bytes:
    """Return the last line: why the log ends here."""
    return orjson.dumps({"end": reason}, option=_DUMP)


@dataclass(slots=True)
class LoggedEvent:
    """A line of a log: a call and what it gave then, as plain values."""

    number: int
    call: str
    given: dict[str, Any]
    result: Any
    error: str
    # By request: names of blocks that were made meanwhile.
    keys: dict[int, list[int]]

    @classmethod
    def of(cls, number: int, line: dict[str, Any]) -> Self:
        """Read a line."""
        keys = {
            int(request): [int(key, 16) for key in made]
            for request, made in line.get("keys", {}).items()
        }
        return cls(
            number, line["call"], line["given"], line.get("result"), line.get("error", ""), keys
        )


class EventLogReader:
    """Reads a log from its beginning; raises EventLogError for what is none.

    After the events were read, ``end`` says why there are no more; None: the log is torn, as
    that of a process that was killed, and what is whole of it was read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.end: str | None = None
        self._lines = self._read_lines()
        self.settings = self._read_header()

    def _read_lines(self) -> Iterator[bytes]:
        with gzip.open(self._path) as file:
            try:
                for line in file:
                    # The last may be without its end.
                    if line.endswith(b"\n"):
                        yield line
            except (EOFError, zlib.error):
                return  # torn within what was written last

    def _read_header(self) -> CoreSettings:
        try:
            header = orjson.loads(next(self._lines, b""))
        except (gzip.BadGzipFile, orjson.JSONDecodeError):
            header = None
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise EventLogError(f"{self._path} is no log that --record-events wrote")
        if header.get("version") != VERSION:
            raise EventLogError(
                f"{self._path} has version {header.get('version')} of the log, and this program "
                f"reads version {VERSION}: replay it with the program that wrote it, "
                f"{header.get('program', 'of a name unknown')}"
            )
        try:
            settings: CoreSettings = typed(CoreSettings, header["settings"])
        except (TypeError, ValueFormatError) as error:
            raise EventLogError(
                f"{self._path} was written by another version ({header.get('program')}): {error}"
            ) from error
        return settings

    def events(self) -> Iterator[LoggedEvent]:
        """Yield all that is whole."""
        try:
            for number, text in enumerate(self._lines, 1):
                line = orjson.loads(text)
                if "end" in line:
                    self.end = line["end"]
                    return
                yield LoggedEvent.of(number, line)
        except (gzip.BadGzipFile, orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise EventLogError(f"{self._path} is damaged: {error}") from error
