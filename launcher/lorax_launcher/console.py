"""What a person or a log collector sees: the lines of all processes, in one form."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, TextIO

from lorax_contract.logs import RESERVED_KEYS
from lorax_launcher.display import Display, PlainDisplay
from lorax_launcher.memory_table import memory_table
from lorax_launcher.start_times import start_table

_LEVELS = ("debug", "info", "warning", "error", "critical")
_COLOURS = {"debug": "2", "warning": "33", "error": "31", "critical": "1;31"}
_SHOWN_ELSEWHERE = {*RESERVED_KEYS, "event", "exception", "process", "rank"}
_LAUNCHER = "launcher"
# Events of records of which one value is shown as a table: which one, and by what.
_TABLES: dict[object, tuple[str, Callable[[Any], list[str]]]] = {
    "memory_plan": ("memory", memory_table),
    "start_times": ("start", start_table),
}


class Console:
    """Turns log lines of the launcher and its children into one form.

    ``json_output`` keeps them JSON, one object a line, with the process named;
    otherwise they become readable, coloured on a terminal.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        json_output: bool = False,
        level: str = "info",
        clock: Callable[[], float] = time.time,
    ) -> None:
        stream = stream or sys.stdout
        self._json = json_output
        self._colour = stream.isatty() and not json_output
        self._least = _LEVELS.index(level.lower())
        self._clock = clock
        self._display = self._make_display(stream)

    def _make_display(self, stream: TextIO) -> Display:
        if self._colour:
            # Imported here: rich is slow to load, and only terminals need it.
            from lorax_launcher.terminal import TerminalDisplay

            return TerminalDisplay(stream)
        return PlainDisplay(stream, report=self.info)

    def info(self, message: str, **fields: Any) -> None:
        """Show a line of the launcher's own."""
        self._own("info", message, fields)

    def warning(self, message: str, **fields: Any) -> None:
        """Show what a person may not have meant."""
        self._own("warning", message, fields)

    def error(self, message: str, **fields: Any) -> None:
        """Show what went wrong."""
        self._own("error", message, fields)

    def phase(self, message: str) -> None:
        """Say what takes time now: a line, or on a terminal a spinner until the next thing."""
        if self._colour:
            self._display.progress(message, 0, None, "")
        else:
            self.info(message)

    def say(self, lines: list[str], **fields: Any) -> None:
        """Show lines for a person as they are; as one JSON object in JSON mode."""
        if self._json:
            self._own("info", "\n".join(lines), fields)
            return
        self._display.close()
        for line in lines:
            self._display.write(line)

    def child_line(self, process: str, line: str) -> dict[str, Any] | None:
        """Show one line of a child's output; return it parsed if it is a log record."""
        record = parse_record(line)
        if record is None:
            self._foreign(process, line)
        elif record.get("event") == "progress" and not self._json:
            self._progress(process, record)
        else:
            self._emit(process, record)
        return record

    def close(self) -> None:
        """End any progress display."""
        self._display.close()

    def _own(self, level: str, message: str, fields: dict[str, Any]) -> None:
        if _LEVELS.index(level) < self._least:
            return
        record = {"ts": self._clock(), "level": level, "logger": "lorax_launcher"}
        self._emit(_LAUNCHER, {**record, "message": message, **fields})

    def _foreign(self, process: str, line: str) -> None:
        if not line.strip():
            return
        if self._json:
            record = {"ts": self._clock(), "level": "info", "logger": "output", "message": line}
            self._emit(process, record)
            return
        self._display.write(f"{process} | {printable(line)}")

    def _progress(self, process: str, record: dict[str, Any]) -> None:
        done, total = record.get("done"), record.get("total")
        if not isinstance(done, int | float):
            self._emit(process, record)
            return
        key = f"{process} {printable(str(record.get('task', '')))}".rstrip()
        whole = float(total) if isinstance(total, int | float) else None
        self._display.progress(key, float(done), whole, str(record.get("unit") or ""))

    def _emit(self, process: str, record: dict[str, Any]) -> None:
        if self._json:
            line = json.dumps({**record, "process": process}, ensure_ascii=False, default=str)
        else:
            line = readable(process, record, colour=self._colour)
        self._display.write(line)


def parse_record(line: str) -> dict[str, Any] | None:
    """Return a log record of lorax_contract.logs, or None for any other line."""
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("message"), str):
        return None
    return record


def readable(process: str, record: dict[str, Any], *, colour: bool = False) -> str:
    """Render a record: time, level, process, message, then the other keys."""
    level = str(record.get("level", "info"))
    shown = f"{level.upper():<7}"
    if colour and level in _COLOURS:
        shown = f"\x1b[{_COLOURS[level]}m{shown}\x1b[0m"
    tabled, make_table = _TABLES.get(record.get("event"), ("", _no_table))
    table = make_table(record.get(tabled))
    extras = " ".join(
        f"{key}={printable(_value(value))}"
        for key, value in record.items()
        if key not in _SHOWN_ELSEWHERE and value is not None and not (table and key == tabled)
    )
    head = f"{_time(record.get('ts'))} {shown} {process:<8} {printable(record['message'])}"
    line = f"{head}  {extras}" if extras else head
    line = "\n".join([line, *(f"    {printable(each)}" for each in table)])
    exception = record.get("exception")
    if not isinstance(exception, str):
        return line
    return line + "\n" + printable(exception, keep="\n")


def _no_table(_value: Any) -> list[str]:
    return []


def printable(text: str, keep: str = "") -> str:
    """Escape control characters: a log line must not steer the terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    return json.dumps(_rounded(value), default=str, ensure_ascii=False)


def _rounded(value: Any) -> Any:
    """Cut floats to four digits, those within lists and tables too."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return value


def _time(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "--:--:--.---"
    moment = datetime.fromtimestamp(seconds).astimezone()
    return moment.strftime("%H:%M:%S.") + f"{moment.microsecond // 1000:03d}"
