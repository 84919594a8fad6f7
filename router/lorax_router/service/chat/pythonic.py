"""Calls in Python's syntax: ``[f(a=1), g(b="x")]`` (Llama 3.2 and 4, and others)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from lorax_router.service.chat.grammars import CallWords, json_rule, require_plain, text
from lorax_router.service.chat.python_values import keyword_arguments
from lorax_router.service.chat.tool_parser import NewId, ScanningParser
from lorax_router.service.chat.tool_schemas import object_schema
from lorax_router.service.chat.tools import FunctionTool

_BEGIN, _END = "<|python_start|>", "<|python_end|>"
_NAME = re.compile(r"[\w.-]+")
_MAX_NAME = 256
# What the schema of an argument may refer to.
_DEFINITIONS = ("$defs", "definitions")
_SIGNS = re.compile(r"""["'()\[\]{}]""")


class PythonicParser(ScanningParser):
    """Calls are what the answer begins with; each comes out once it is whole.

    Nothing but its form tells a call from a list, so it must name a tool of the request.
    """

    markers = frozenset({_BEGIN, _END})
    other_begin = r"[^\[\s]"

    def __init__(self, tools: Sequence[FunctionTool], new_id: NewId | None = None) -> None:
        super().__init__(tools, new_id)
        self._names = {tool.name for tool in tools}
        self._state = self._open

    def _content(self) -> bool:
        self._at = len(self._text)
        self._give_between_calls(self._at)
        return False

    def _open(self) -> bool:
        if not self._space() or self._awaits(_BEGIN):
            return False
        self._takes(_BEGIN)
        self._state = self._list
        return True

    def _list(self) -> bool:
        if not self._space():
            return False
        self._state = self._name
        return self._takes("[") or self._no_call()

    def _name(self) -> bool:
        if not self._space():
            return False
        found = _NAME.match(self._text, self._at)
        if found is None or len(found[0]) > _MAX_NAME:
            return self._no_call()
        if found.end() == len(self._text):
            return False
        if found[0] not in self._names or self._text[found.end()] != "(":
            return self._no_call()
        self._called_name = found[0]
        self._at = found.end() + 1
        # Of the arguments: what was read, and what is open in it.
        self._arguments: list[str] = []
        self._depth, self._quote = 0, ""
        self._state = self._in_arguments
        return True

    def _in_arguments(self) -> bool:
        """Read up to the next quote or bracket."""
        if self._quote:
            return self._in_string()
        found = _SIGNS.search(self._text, self._at)
        if found is None:
            return self._keep(len(self._text), then=False)
        sign = found[0]
        if sign == ")" and not self._depth:
            self._keep(found.start())
            self._at += 1
            return self._whole_call()
        if sign in "'\"":
            if not self._is_whole_quote(sign, found.start()):
                return self._keep(found.start(), then=False)
            triple = sign * 3
            is_triple = self._text.startswith(triple, found.start())
            self._quote = triple if is_triple else sign
            return self._keep(found.start() + len(self._quote))
        self._depth += 1 if sign in "([{" else -1
        if self._depth < 0:
            return self._no_call()
        return self._keep(found.end())

    def _is_whole_quote(self, sign: str, at: int) -> bool:
        """Whether it shows whether three of them stand there."""
        left = self._text[at : at + 3]
        return len(left) == 3 or bool(left.strip(sign))

    def _in_string(self) -> bool:
        ends = re.compile(rf"\\|{self._quote}")
        found = ends.search(self._text, self._at)
        if found is None:
            # A part of three quotes may be there.
            end = max(self._at, len(self._text) - len(self._quote) + 1)
            return self._keep(end, then=False)
        if found[0] == "\\":
            if found.end() == len(self._text):
                return self._keep(found.start(), then=False)
            return self._keep(found.end() + 1)
        self._quote = ""
        return self._keep(found.end())

    def _keep(self, end: int, *, then: bool = True) -> bool:
        self._arguments.append(self._text[self._at : end])
        self._at = end
        return then

    def _whole_call(self) -> bool:
        try:
            values = keyword_arguments("".join(self._arguments))
            arguments = json.dumps(values, ensure_ascii=False, allow_nan=False)
        except (ValueError, OverflowError):
            return self._no_call()
        self._called(self._called_name)
        self._argued(arguments)
        self._given = self._at
        self._state = self._after_call
        return True

    def _after_call(self) -> bool:
        if not self._space():
            return False
        if self._takes(","):
            self._state = self._name
            return True
        if not self._takes("]"):
            return self._no_call()
        self._given = self._at
        self._state = self._after_list
        return True

    def _after_list(self) -> bool:
        if not self._space() or self._awaits(_END):
            return False
        if self._takes(_END):
            self._given = self._at
        self._state = self._content
        return True

    def _end(self) -> None:
        if self._state == self._after_list:
            self._given = len(self._text)

    @classmethod
    def grammar(cls, tools: Sequence[FunctionTool], words: CallWords) -> str:
        """See ToolCallParser; a value is written as JSON, which the parser reads too."""
        require_plain(tools, _NAME, str.isidentifier)
        several = words.several('", "')
        names = [f"call_{number}" for number in range(len(tools))]
        rules = [f'calls: "[" {several} "]"', f"call: {' | '.join(names)}"]
        for name, tool in zip(names, tools):
            rules.append(f'{name}: {text(tool.name + "(")} {name}_0 ")"')
            rules.extend(_argument_rules(name, tool))
        return "\n".join(rules)


def _argument_rules(rule: str, tool: FunctionTool) -> list[str]:
    """Return rules of keyword arguments in the order of the schema, of which some may be missing.

    Rule ``r_i`` is the arguments from the i-th on where none stands before them, ``r_i_more``
    the same behind another one.
    """
    whole = object_schema(tool)
    properties = whole.get("properties") or {}
    required = whole.get("required") or ()
    shared = {key: whole[key] for key in _DEFINITIONS if key in whole}
    rules = []
    for number, (name, schema) in enumerate(properties.items()):
        this, following = f"{rule}_{number}", f"{rule}_{number + 1}"
        value = f"{text(name + '=')} {this}_value {following}_more"
        is_required = name in required
        plain = schema if isinstance(schema, dict) else {}
        rules.append(f"{this}: {value}" + ("" if is_required else f" | {following}"))
        rules.append(f'{this}_more: ", " {value}' + ("" if is_required else f" | {following}_more"))
        rules.append(json_rule(f"{this}_value", {**plain, **shared}, is_lenient=not tool.strict))
    last = f"{rule}_{len(properties)}"
    return [*rules, f'{last}: ""', f'{last}_more: ""']
