"""Calls behind ``[TOOL_CALLS]``: a list of objects, or ``name[ARGS]{...}`` (Mistral)."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Sequence

from lorax_router.service.chat.grammars import (
    CallWords,
    call_rule,
    json_rule,
    require_plain,
    text,
)
from lorax_router.service.chat.json_calls import JsonValue, Reading
from lorax_router.service.chat.tool_parser import JsonCallParser
from lorax_router.service.chat.tool_schemas import object_schema
from lorax_router.service.chat.tools import FunctionTool

_CALLS, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = re.compile(r"[\w.-]+")
_MAX_NAME = 256
_ID_SIGNS = string.ascii_letters + string.digits


class MistralParser(JsonCallParser):
    """Reads the older form, a list, and the newer, names with their arguments."""

    begin_marker = _CALLS
    markers = frozenset({_CALLS, _ID, _ARGUMENTS})

    @staticmethod
    def default_id() -> str:
        """Return a new id; the templates take nine letters and digits only."""
        return "".join(secrets.choice(_ID_SIGNS) for _ in range(9))

    def _content(self) -> bool:
        return self._find_marker(_CALLS, self._open)

    def _open(self) -> bool:
        if not self._space():
            return False
        self._in_list = self._takes("[")
        if self._in_list or self._text[self._at] == "{":
            return self._begin_call()
        self._state = self._name
        return True

    def _after_call(self) -> bool:
        if not self._space():
            return False
        if self._in_list and self._takes(","):
            return self._begin_call()
        if self._in_list and self._takes("]"):
            self._given = self._at
        self._state = self._content
        return True

    def _name(self) -> bool:
        """Read a name and, where it has one, the id that the model gave the call."""
        found = _NAME.match(self._text, self._at)
        if found is None or len(found[0]) > _MAX_NAME:
            return self._no_call()
        if found.end() == len(self._text):
            return False
        self._called_name, self._given_id = found[0], ""
        self._at = found.end()
        self._state = self._behind_name
        return True

    def _behind_name(self) -> bool:
        if self._awaits(_ID, _ARGUMENTS) or not self._space():
            return False
        if self._takes(_ID):
            self._state = self._call_id
            return True
        self._takes(_ARGUMENTS)
        self._state = self._begin_arguments
        return True

    def _call_id(self) -> bool:
        found = _NAME.match(self._text, self._at)
        if found is not None and len(found[0]) > _MAX_NAME:
            return self._no_call()
        end = self._at if found is None else found.end()
        if end == len(self._text):
            return False
        self._given_id = self._text[self._at : end]
        self._at = end
        self._state = self._behind_name
        return True

    def _begin_arguments(self) -> bool:
        if not self._space():
            return False
        if self._text[self._at] != "{":
            return self._no_call()
        self._called(self._called_name, self._given_id)
        self._value = JsonValue()
        self._state = self._in_arguments
        return True

    def _in_arguments(self) -> bool:
        end, reading = self._value.read(self._text, self._at)
        self._argued(self._text[self._at : end])
        self._at = self._given = end
        if reading is not Reading.DONE:
            return False
        self._state = self._content
        return True

    def _end(self) -> None:
        super()._end()
        if self._state == self._in_arguments:
            self._argued(self._text[self._at :])
            self._given = len(self._text)
        elif self._state == self._after_call:
            # Of a list that was broken off.
            self._given = self._at

    @classmethod
    def grammar(cls, tools: Sequence[FunctionTool], words: CallWords) -> str:
        """See ToolCallParser."""
        several = words.several('", "')
        calls = f'calls: {words.begin} "[" {several} "]"'
        return "\n".join([calls, call_rule("call", tools, "arguments")])


class MistralArgumentsParser(MistralParser):
    """The same calls; where they are forced, in the newer form."""

    @classmethod
    def grammar(cls, tools: Sequence[FunctionTool], words: CallWords) -> str:
        """See ToolCallParser."""
        require_plain(tools, _NAME)
        behind = words.literal(_ARGUMENTS)
        names = [f"call_{number}" for number in range(len(tools))]
        rules = ["calls: " + words.several(""), f"call: {' | '.join(names)}"]
        for name, tool in zip(names, tools):
            rules.append(f"{name}: {words.begin} {text(tool.name)} {behind} {name}_arguments")
            schema = object_schema(tool)
            rules.append(json_rule(f"{name}_arguments", schema, is_lenient=not tool.strict))
        return "\n".join(rules)
