"""Calls in tags: ``<tool_call>{"name": ..., "arguments": ...}</tool_call>`` (Hermes, Qwen)."""

from __future__ import annotations

from collections.abc import Sequence

from lorax_router.service.chat.grammars import CallWords, call_rule
from lorax_router.service.chat.tool_parser import JsonCallParser
from lorax_router.service.chat.tools import FunctionTool

_BEGIN, _END = "<tool_call>", "</tool_call>"


class HermesParser(JsonCallParser):
    """Several calls have a tag each, or are a list in one."""

    markers = frozenset({_BEGIN, _END})
    begin_marker = _BEGIN
    argument_keys = frozenset({"arguments", "parameters"})
    end_marker = _END
    _in_list = False

    def _content(self) -> bool:
        return self._find_marker(_BEGIN, self._open)

    def _open(self) -> bool:
        if not self._space():
            return False
        self._in_list = self._takes("[")
        if self._in_list or self._text[self._at] == "{":
            return self._begin_call()
        return self._no_call()

    def _after_call(self) -> bool:
        if not self._space():
            return False
        if self._in_list and self._takes(","):
            return self._begin_call()
        if self._in_list and self._takes("]"):
            self._in_list = False
            return True
        if self._awaits(_END):
            return False
        if self._takes(_END):
            self._given = self._at
        self._state = self._content
        return True

    def _end(self) -> None:
        super()._end()
        if self._state == self._after_call and _END.startswith(self._text[self._at :]):
            self._given = len(self._text)

    @classmethod
    def grammar(cls, tools: Sequence[FunctionTool], words: CallWords) -> str:
        """See ToolCallParser."""
        call = f'call: {words.begin} "\\n" object "\\n" {words.literal(_END)}'
        return "\n".join(
            ["calls: " + words.several('"\\n"'), call, call_rule("object", tools, "arguments")]
        )
