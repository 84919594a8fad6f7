"""Server-sent events out of bytes that are cut anywhere."""

from __future__ import annotations


class EventReader:
    """Give it bytes as they come; it returns the data of each event that is complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, part: bytes) -> list[bytes]:
        """Return the data of the events that end within these bytes."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        return [event for line in lines if (event := self._take(line)) is not None]

    def close(self) -> list[bytes]:
        """Return the data of a last event that no empty line ended."""
        events = self.feed(b"\n\n")
        self._rest = b""
        return events

    def _take(self, line: bytes) -> bytes | None:
        line = line.removesuffix(b"\r")
        if not line:
            data, self._data = self._data, []
            return b"\n".join(data) if data else None
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        return None
