"""The interface of parsers of tool calls, and what those share that find calls in a text.

A parser reads a text once, from front to end, and decides by what it has read, never by how
the text was cut into pieces: so what it says of a stream is what it says of the whole text.
What turns out to be no call comes out as content; once the name of a call is out, what
follows belongs to its arguments.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from lorax_router.service.chat.deltas import (
    ChatDelta,
    ContentDelta,
    ToolArgumentsDelta,
    ToolCallStart,
)
from lorax_router.service.chat.grammars import CallWords
from lorax_router.service.chat.json_calls import JsonCall, Reading
from lorax_router.service.chat.tools import FunctionTool

NewId = Callable[[], str]


def new_call_id() -> str:
    """Return an id as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


class ToolCallParser(ABC):
    """Finds the tool calls of one sequence; made anew for each.

    Args:
        tools: those that the request offers.
        new_id: gives each call its id.
    """

    # Texts that stand for the beginning or the end of something. Where they are special tokens
    # the parser needs them in the text.
    markers: ClassVar[frozenset[str]] = frozenset()
    # What a call begins with; empty: nothing but its own form.
    begin_marker: ClassVar[str] = ""
    # Where that is so: what an answer that is no call begins with, as a regular expression.
    other_begin: ClassVar[str] = ""

    def __init__(self, tools: Sequence[FunctionTool], new_id: NewId | None = None) -> None:
        self.tools = tools
        self._new_id = new_id or self.default_id

    @abstractmethod
    def feed(self, text: str) -> list[ChatDelta]:
        """Take in more of the text; return what is certain by now."""

    @abstractmethod
    def finish(self) -> list[ChatDelta]:
        """Return the rest: no more text comes."""

    @staticmethod
    def default_id() -> str:
        """Return a new id."""
        return new_call_id()

    @classmethod
    def grammar(cls, tools: Sequence[FunctionTool], words: CallWords) -> str | None:  # noqa: ARG003
        """Return a Lark grammar of calls of these tools that this parser parses; None: it has none.

        Its first rule is ``calls``.
        """
        return None


class ScanningParser(ToolCallParser):
    """A parser with a buffer, whose states each read as much as can be decided.

    A state returns whether there may be more to read for the one that follows it.
    """

    def __init__(self, tools: Sequence[FunctionTool], new_id: NewId | None = None) -> None:
        super().__init__(tools, new_id)
        self._text = ""
        # What was read, and what of it was given out or is part of a call's form.
        self._at = 0
        self._given = 0
        self._num_calls = 0
        # Whether some content stands between here and the last call, or the beginning.
        self._in_content = False
        self._deltas: list[ChatDelta] = []
        self._state: Callable[[], bool] = self._content

    def feed(self, text: str) -> list[ChatDelta]:
        """Take in more of the text; return what is certain by now."""
        self._text = self._text[self._given :] + text
        self._at -= self._given
        self._given = 0
        while self._state():
            pass
        return self._taken()

    def finish(self) -> list[ChatDelta]:
        """Return the rest: no more text comes."""
        self._end()
        self._at = len(self._text)
        # Space behind a call is part of its form.
        is_space = not self._text[self._given :].strip()
        if self._in_content or not self._num_calls or not is_space:
            self._give(self._at)
        return self._taken()

    @abstractmethod
    def _content(self) -> bool:
        """Read what stands outside of calls."""

    def _end(self) -> None:
        """Say what is certain once no more text comes; what is not given is content then."""

    def _taken(self) -> list[ChatDelta]:
        taken, self._deltas = self._deltas, []
        return taken

    def _give(self, end: int) -> None:
        """Give out the text up to ``end`` as content."""
        if end > self._given:
            self._deltas.append(ContentDelta(self._text[self._given : end]))
            self._in_content = True
            self._given = end

    def _give_between_calls(self, end: int) -> None:
        """Give out content up to ``end``; space before or behind a call waits for what follows."""
        if self._in_content or self._text[self._given : end].strip():
            self._give(end)

    def _no_call(self) -> bool:
        """What looked like a call is content, as far as it was read."""
        self._give(self._at)
        self._state = self._content
        return True

    def _called(self, name: str, call_id: str | None = None) -> None:
        """A call has started; what was read up to here is part of its form."""
        self._deltas.append(ToolCallStart(self._num_calls, call_id or self._new_id(), name))
        self._num_calls += 1
        self._in_content = False

    def _argued(self, text: str) -> None:
        if text:
            self._deltas.append(ToolArgumentsDelta(self._num_calls - 1, text))

    def _find_marker(self, marker: str, then: Callable[[], bool]) -> bool:
        """Give out content up to a marker; read on behind it if it is there."""
        found = self._text.find(marker, self._at)
        if found < 0:
            self._at = len(self._text) - partial_length(self._text, marker, self._at)
            self._give_between_calls(self._at)
            return False
        self._give_between_calls(found)
        self._at = found + len(marker)
        self._state = then
        return True

    def _space(self) -> bool:
        """Read space; return whether something else stands there now."""
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._at < len(self._text)

    def _awaits(self, *markers: str) -> bool:
        """Whether the text that is left may become one of the markers and is none yet."""
        left = self._text[self._at :]
        return any(len(left) < len(each) and each.startswith(left) for each in markers)

    def _takes(self, marker: str) -> bool:
        """Read a marker if it stands here."""
        if not self._text.startswith(marker, self._at):
            return False
        self._at += len(marker)
        return True


def partial_length(text: str, marker: str, start: int = 0) -> int:
    """Return how many characters at the end of a text may become a marker."""
    longest = min(len(marker) - 1, len(text) - start)
    return next((size for size in range(longest, 0, -1) if text.endswith(marker[:size])), 0)


class JsonCallParser(ScanningParser):
    """A scanning parser whose calls are JSON objects."""

    # What the arguments may be called.
    argument_keys: ClassVar[frozenset[str]] = frozenset({"arguments"})
    # What ends a call that was never closed.
    end_marker: ClassVar[str] = ""

    def __init__(self, tools: Sequence[FunctionTool], new_id: NewId | None = None) -> None:
        super().__init__(tools, new_id)
        self._call = self._new_call()

    def _new_call(self) -> JsonCall:
        return JsonCall(self.argument_keys, end_marker=self.end_marker)

    def _begin_call(self) -> bool:
        self._call = self._new_call()
        self._state = self._in_call
        return True

    def _in_call(self) -> bool:
        call = self._call
        in_tail, has_started = call.is_tail, call.has_started
        self._at = call.read(self._text, self._at)
        self._report(has_started)
        if call.has_started and (not in_tail or call.reading is Reading.DONE):
            self._given = self._at
        if call.reading is Reading.MORE:
            return not call.waits
        if not call.has_started:
            return self._no_call()
        # Of an object that was broken off behind its arguments.
        self._give_between_calls(self._at)
        self._state = self._after_call
        return True

    @abstractmethod
    def _after_call(self) -> bool:
        """Read what stands behind a call."""

    def _end(self) -> None:
        call = self._call
        if self._state != self._in_call:
            return
        has_started = call.has_started
        if call.end(self._text[self._at :]):
            self._report(has_started)
            self._given = len(self._text)

    def _report(self, had_started: bool) -> None:
        if self._call.has_started and not had_started:
            self._called(self._call.name)
        self._argued(self._call.arguments())
