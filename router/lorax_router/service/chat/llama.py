"""Calls as bare JSON: ``{"name": ..., "parameters": ...}`` (Llama 3.1 and later)."""

from __future__ import annotations

from collections.abc import Sequence

from lorax_router.service.chat.grammars import CallWords, call_rule
from lorax_router.service.chat.json_calls import JsonCall
from lorax_router.service.chat.tool_parser import JsonCallParser, NewId
from lorax_router.service.chat.tools import FunctionTool

_TAG = "<|python_tag|>"


class LlamaJsonParser(JsonCallParser):
    """Calls are what the answer begins with, or what follows a tag; several have ``;`` between.

    Nothing but its form tells a call from other JSON, so it must name a tool of the request.
    """

    markers = frozenset({_TAG})
    argument_keys = frozenset({"parameters", "arguments"})
    other_begin = r"[^{\s]"

    def __init__(self, tools: Sequence[FunctionTool], new_id: NewId | None = None) -> None:
        self._names = {tool.name for tool in tools}
        super().__init__(tools, new_id)
        self._state = self._open

    def _new_call(self) -> JsonCall:
        return JsonCall(self.argument_keys, names=self._names)

    def _content(self) -> bool:
        return self._find_marker(_TAG, self._open)

    def _open(self) -> bool:
        if not self._space():
            return False
        if self._text[self._at] == "{":
            return self._begin_call()
        # The tag may be what the answer begins with.
        self._state = self._content
        return True

    def _after_call(self) -> bool:
        if not self._space():
            return False
        if self._takes(";"):
            return self._begin_call()
        self._state = self._content
        return True

    def _end(self) -> None:
        super()._end()
        if self._num_calls and self._text[self._given :].strip() == ";":
            self._given = len(self._text)

    @classmethod
    def grammar(cls, tools: Sequence[FunctionTool], words: CallWords) -> str:
        """See ToolCallParser."""
        return "\n".join(
            ["calls: " + words.several('"; "'), call_rule("call", tools, "parameters")]
        )
