"""Reads a call that is written as a JSON object, piece by piece.

The reading is lenient: a value ends where its brackets are closed, whatever is between them,
so that arguments come out as the model wrote them and nothing is read twice.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Collection

# With its quotes; longer ones are no names.
_MAX_STRING = 256
_IN_CONTAINER = re.compile(r'["{}\[\]<]')
_IN_STRING = re.compile(r'["\\]')
_BEGINS_VALUE = re.compile(r'["{\[\w-]')
_AFTER_SCALAR = re.compile(r'[\s,;:{}\[\]<"]')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
# Keys that stand in such objects and say nothing.
_SILENT_KEYS = frozenset({"id", "type"})


class Reading(enum.Enum):
    """How far the reading of something has come."""

    MORE = enum.auto()
    DONE = enum.auto()
    # It is not what it seemed to be.
    FAILED = enum.auto()


class JsonValue:
    """Finds the end of one JSON value.

    Args:
        end_marker: what ends a value that was never closed; it begins with ``<``.
    """

    def __init__(self, end_marker: str = "") -> None:
        self._end_marker = end_marker
        self._depth = 0
        self._in_string = False
        self._has_begun = False

    def read(self, text: str, at: int) -> tuple[int, Reading]:
        """Read from ``at`` on; return how far, and whether the value has ended there."""
        reading: Reading | None = None
        while reading is None:
            if at == len(text):
                return at, Reading.MORE
            if self._in_string:
                at, reading = self._string(text, at)
            elif self._depth or (not self._has_begun and text[at] in '{["'):
                at, reading = self._container(text, at)
            else:
                at, reading = self._scalar(text, at)
            self._has_begun = True
        return at, reading

    def _string(self, text: str, at: int) -> tuple[int, Reading | None]:
        found = _IN_STRING.search(text, at)
        if found is None:
            return len(text), Reading.MORE
        if found[0] == "\\":
            # What it escapes may not be there yet.
            is_whole = found.end() < len(text)
            return (found.end() + 1, None) if is_whole else (found.start(), Reading.MORE)
        self._in_string = False
        return found.end(), None if self._depth else Reading.DONE

    def _container(self, text: str, at: int) -> tuple[int, Reading | None]:
        found = _IN_CONTAINER.search(text, at)
        if found is None:
            return len(text), Reading.MORE
        match found[0]:
            case '"':
                self._in_string = True
            case "{" | "[":
                self._depth += 1
            case "<":
                return self._maybe_end(text, found.start())
            case _:
                self._depth -= 1
        is_open = self._depth or self._in_string
        return found.end(), None if is_open else Reading.DONE

    def _scalar(self, text: str, at: int) -> tuple[int, Reading]:
        found = _AFTER_SCALAR.search(text, at)
        return (len(text), Reading.MORE) if found is None else (found.start(), Reading.DONE)

    def _maybe_end(self, text: str, at: int) -> tuple[int, Reading | None]:
        marker = self._end_marker
        left = text[at : at + len(marker)]
        if not marker or not marker.startswith(left):
            return at + 1, None
        return at, Reading.FAILED if left == marker else Reading.MORE


class JsonCall:
    """Reads ``{"name": ..., "arguments": ...}``, in whichever order.

    Args:
        argument_keys: what the arguments may be called.
        names: those that a call may have; None: any. With them, an object with foreign keys,
            or whose arguments are no object, is none either: nothing else tells it from
            JSON that the model says.
        end_marker: what ends a call that was never closed.
    """

    def __init__(
        self,
        argument_keys: Collection[str],
        *,
        names: Collection[str] | None = None,
        end_marker: str = "",
    ) -> None:
        self._argument_keys = argument_keys
        self._names = names
        self._end_marker = end_marker
        self._state: Callable[[str, int], int | None] = self._open
        self._read_value: Callable[[str, int], int | None] = self._read_other
        self._value = JsonValue()
        self._has_arguments = False
        # Arguments that wait for the name, or to be whole: a string that holds them.
        self._held: list[str] | None = None
        self._is_string = False
        self._arguments: list[str] = []
        self._pauses = False
        # Known before the call has started, which it has once its arguments begin.
        self.name = ""
        self.has_started = False
        # Whether both are read, so that nothing of the call's is in the rest of the object.
        self.is_tail = False
        self.reading = Reading.MORE
        # Whether more text is needed to read on.
        self.waits = False

    def read(self, text: str, at: int) -> int:
        """Read from ``at`` on, at most to where the tail begins; return how far."""
        self.waits = self._pauses = False
        while self.reading is Reading.MORE and not self._pauses:
            following = self._state(text, at)
            if following is None:
                self.waits = True
                break
            at = following
        return at

    def arguments(self) -> str:
        """Return what has been read of the arguments since this was asked last."""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def end(self, rest: str) -> bool:
        """No more text comes than ``rest``; return whether that is part of the arguments."""
        if self.is_tail or self._state != self._in_arguments or not self.name:
            return False
        if self._held is None:
            self._arguments.append(rest)
        else:
            self._held.append(rest)
            self._start("".join(self._held))
        return True

    def _open(self, text: str, at: int) -> int | None:
        at = _behind_space(text, at)
        if at == len(text):
            return None
        return self._then(self._key, at + 1) if text[at] == "{" else self._fail(at)

    def _key(self, text: str, at: int) -> int | None:
        at = _behind_space(text, at)
        if text[at : at + 1] == "}":
            return self._close(at + 1)
        if (found := _short_string(text, at)) is None:
            return None
        key, end = found
        if key is None:
            return self._fail(at)
        if key == "name" and not self.name:
            self._read_value = self._read_name
        elif key in self._argument_keys and not self._has_arguments:
            self._read_value = self._begin_arguments
        elif self._names is None or key in _SILENT_KEYS:
            self._value = JsonValue(self._end_marker)
            self._read_value = self._read_other
        else:
            return self._fail(at)
        return self._then(self._colon, end)

    def _colon(self, text: str, at: int) -> int | None:
        at = _behind_space(text, at)
        if at == len(text):
            return None
        return self._then(self._begin_value, at + 1) if text[at] == ":" else self._fail(at)

    def _begin_value(self, text: str, at: int) -> int | None:
        at = _behind_space(text, at)
        if at == len(text):
            return None
        return self._then(self._read_value, at) if _BEGINS_VALUE.match(text, at) else self._fail(at)

    def _read_name(self, text: str, at: int) -> int | None:
        if (found := _short_string(text, at)) is None:
            return None
        name, end = found
        if not name or (self._names is not None and name not in self._names):
            return self._fail(at)
        self.name = name
        if self._held is not None:
            self._start_with_held()
        return self._then(self._next, end)

    def _begin_arguments(self, text: str, at: int) -> int | None:
        if self._names is not None and text[at] != "{":
            return self._fail(at)
        self._value = JsonValue(self._end_marker)
        self._has_arguments = True
        self._is_string = text[at] == '"'
        if self._is_string or not self.name:
            self._held = []
        else:
            self._start("")
        return self._then(self._in_arguments, at)

    def _in_arguments(self, text: str, at: int) -> int | None:
        end, reading = self._value.read(text, at)
        (self._arguments if self._held is None else self._held).append(text[at:end])
        if reading is Reading.MORE:
            return end if end > at else None
        if reading is Reading.FAILED:
            if self._held is not None and self.name:
                self._start("".join(self._held))
            return self._fail(end)
        if self._held is None:
            self._begin_tail()
        elif self.name:
            self._start_with_held()
        return self._then(self._next, end)

    def _read_other(self, text: str, at: int) -> int | None:
        end, reading = self._value.read(text, at)
        if reading is Reading.MORE:
            return end if end > at else None
        return self._fail(end) if reading is Reading.FAILED else self._then(self._next, end)

    def _next(self, text: str, at: int) -> int | None:
        at = _behind_space(text, at)
        if at == len(text):
            return None
        if text[at] == "}":
            return self._close(at + 1)
        return self._then(self._key, at + 1) if text[at] == "," else self._fail(at)

    def _close(self, at: int) -> int:
        if not self.name or (self._names is not None and not self._has_arguments):
            return self._fail(at)
        if not self.has_started:
            self._start("{}")
        self.reading = Reading.DONE
        return at

    def _fail(self, at: int) -> int:
        self.reading = Reading.FAILED
        return at

    def _then(self, state: Callable[[str, int], int | None], at: int) -> int:
        self._state = state
        return at

    def _start(self, arguments: str) -> None:
        self.has_started = True
        self._held = None
        self._arguments.append(arguments)

    def _start_with_held(self) -> None:
        raw = "".join(self._held or ())
        self._start(_unquoted(raw) if self._is_string else raw)
        self._begin_tail()

    def _begin_tail(self) -> None:
        self.is_tail = self._pauses = True


def _behind_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _short_string(text: str, at: int) -> tuple[str | None, int] | None:
    """Read a string that is a name or a key; None while it is not whole, (None, _) for no such."""
    found = _STRING.match(text, at)
    if found is None and text[at : at + 1] in ("", '"') and len(text) - at <= _MAX_STRING:
        return None
    if found is None or found.end() - at > _MAX_STRING:
        return None, at
    return _parsed_string(found[0]), found.end()


def _parsed_string(raw: str) -> str | None:
    try:
        parsed = json.loads(raw)
    except ValueError:
        return None
    return parsed if isinstance(parsed, str) else None


def _unquoted(raw: str) -> str:
    """Return the JSON object that a string holds, or the string as it is."""
    text = _parsed_string(raw)
    if text is None or not text.lstrip().startswith("{"):
        return raw
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return raw
    return text
