"""Calls in tags of their own: ``<function=f><parameter=a>1</parameter></function>`` (Qwen3-Coder)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_contract.errors import ValidationError
from lorax_router.service.chat.grammars import CallWords, json_rule, require_plain, text
from lorax_router.service.chat.tool_parser import NewId, ScanningParser, partial_length
from lorax_router.service.chat.tool_schemas import object_schema
from lorax_router.service.chat.tools import FunctionTool

_BEGIN, _END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NAME = re.compile(r"([^<>\s]{1,256})>")
_PLAIN = re.compile(r"[^<>\s]{1,256}")
_MAX_NAME = 256
_NO_SCHEMAS: Mapping[str, Any] = {}
# What the schema of a parameter may refer to.
_DEFINITIONS = ("$defs", "definitions")


class QwenCoderParser(ScanningParser):
    """Values are texts, or JSON where the tool's schema takes no texts; those come out whole."""

    begin_marker = _BEGIN
    markers = frozenset({_BEGIN, _END})

    def __init__(self, tools: Sequence[FunctionTool], new_id: NewId | None = None) -> None:
        super().__init__(tools, new_id)
        self._schemas = {tool.name: _properties(tool) for tool in tools}
        self._function = self._parameter = ""
        self._values: dict[str, None] = {}

    def _content(self) -> bool:
        return self._find_marker(_BEGIN, self._open)

    def _open(self) -> bool:
        if not self._space() or self._awaits(_FUNCTION):
            return False
        if not self._takes(_FUNCTION):
            return self._no_call()
        self._state = self._function_name
        return True

    def _name(self) -> str | None:
        """Read a name and its bracket; None while it is not whole, empty for what is none."""
        found = _NAME.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
            return found[1]
        left = self._text[self._at :]
        may_become = len(left) <= _MAX_NAME and not re.search(r"[<>\s]", left)
        return None if may_become else ""

    def _function_name(self) -> bool:
        name = self._name()
        if name is None:
            return False
        if not name:
            return self._no_call()
        self._function, self._values = name, {}
        self._called(name)
        self._argued("{")
        self._given = self._at
        self._state = self._in_function
        return True

    def _in_function(self) -> bool:
        if not self._space() or self._awaits(_PARAMETER, _FUNCTION_END, _END):
            return False
        if self._takes(_PARAMETER):
            self._state = self._parameter_name
            return True
        self._takes(_FUNCTION_END)
        return self._close()

    def _parameter_name(self) -> bool:
        name = self._name()
        if name is None:
            return False
        if not name or name in self._values:
            return self._close()
        self._parameter = name
        comma = ", " if self._values else ""
        self._argued(f"{comma}{json.dumps(name)}: ")
        self._values[name] = None
        self._given = self._at
        schema = self._schemas.get(self._function, _NO_SCHEMAS).get(name)
        self._state = self._begin_text if _takes_text(schema) else self._json_value
        return True

    def _json_value(self) -> bool:
        end = self._text.find(_PARAMETER_END, self._at)
        if end < 0:
            return False
        self._argued(_as_json(self._text[self._at : end].strip()))
        return self._end_of_value(end)

    def _begin_text(self) -> bool:
        """The newlines next to the tags are part of the form."""
        if self._at == len(self._text):
            return False
        self._takes("\n")
        self._given = self._at
        self._argued('"')
        self._state = self._in_text
        return True

    def _in_text(self) -> bool:
        end = self._text.find(_PARAMETER_END, self._at)
        is_whole = end >= 0
        if not is_whole:
            end = len(self._text) - partial_length(self._text, _PARAMETER_END, self._at)
        # Of the last newline it shows later whether it is the tag's.
        written = self._text[self._at : end].removesuffix("\n")
        self._argued(json.dumps(written, ensure_ascii=False)[1:-1])
        self._at = self._given = self._at + len(written)
        if is_whole:
            self._argued('"')
            return self._end_of_value(end)
        return False

    def _end_of_value(self, end: int) -> bool:
        self._at = self._given = end + len(_PARAMETER_END)
        self._state = self._in_function
        return True

    def _close(self) -> bool:
        self._argued("}")
        self._state = self._after_call
        # What is no part of the form is content.
        if self._text.endswith(_FUNCTION_END, 0, self._at):
            self._given = self._at
        return True

    def _after_call(self) -> bool:
        if not self._space() or self._awaits(_END):
            return False
        if self._takes(_END):
            self._given = self._at
        self._state = self._content
        return True

    def _end(self) -> None:
        if self._state in (self._json_value, self._in_text):
            # As unfinished as the model left it.
            rest = self._text[self._at :]
            is_text = self._state == self._in_text
            self._argued(json.dumps(rest, ensure_ascii=False)[1:-1] if is_text else rest)
            self._given = len(self._text)
        elif self._state in (self._in_function, self._parameter_name):
            self._argued("}")
        elif self._state == self._after_call and _END.startswith(self._text[self._at :]):
            self._given = len(self._text)

    @classmethod
    def grammar(cls, tools: Sequence[FunctionTool], words: CallWords) -> str:
        """See ToolCallParser."""
        require_plain(tools, _PLAIN, _PLAIN.fullmatch)
        end = words.literal(_END)
        names = [f"call_{number}" for number in range(len(tools))]
        rules = [
            "calls: " + words.several('"\\n"'),
            f'call: {words.begin} "\\n" ({" | ".join(names)}) "{_FUNCTION_END}\\n" {end}',
            # Up to the first tag that ends it.
            r"text_value[lazy]: /(.|\n)*<\/parameter>/",
        ]
        for name, tool in zip(names, tools):
            rules.extend(_call_rules(name, tool))
        return "\n".join(rules)


def _properties(tool: FunctionTool) -> Mapping[str, Any]:
    properties = tool.parameters.get("properties")
    return properties if isinstance(properties, Mapping) else _NO_SCHEMAS


def _call_rules(rule: str, tool: FunctionTool) -> list[str]:
    whole = object_schema(tool)
    properties = whole.get("properties") or {}
    required = whole.get("required") or ()
    shared = {key: whole[key] for key in _DEFINITIONS if key in whole}
    parts, rules = [], []
    for number, (name, schema) in enumerate(properties.items()):
        part = f"{rule}_{number}"
        parts.append(part if name in required else f"{part}?")
        begin = text(f"{_PARAMETER}{name}>\n")
        plain = schema if isinstance(schema, dict) else {}
        if choices := _texts_of(schema):
            texts = " | ".join(text(each) for each in choices)
            value = f'({texts}) "\\n{_PARAMETER_END}"'
        elif _takes_text(schema):
            value = "text_value"
        else:
            value = f'{part}_value "\\n{_PARAMETER_END}"'
            rules.append(
                json_rule(f"{part}_value", {**plain, **shared}, is_lenient=not tool.strict)
            )
        rules.append(f'{part}: {begin} {value} "\\n"')
    begin = text(f"{_FUNCTION}{tool.name}>\n")
    return [f"{rule}: {begin} {' '.join(parts)}", *rules]


def _texts_of(schema: object) -> list[str]:
    """Return the texts that a value may be, if they are counted; raises ValidationError."""
    choices = _choices(schema)
    if not all(isinstance(each, str) for each in choices):
        return []
    if any(_PARAMETER_END in each for each in choices):
        raise ValidationError(f"`tools`: a value with {_PARAMETER_END} cannot be written")
    return choices


def _choices(schema: object) -> list[Any]:
    if isinstance(schema, Mapping) and "const" in schema:
        return [schema["const"]]
    return _listed(schema, "enum")


def _listed(schema: object, key: str) -> list[Any]:
    value = schema.get(key) if isinstance(schema, Mapping) else None
    return value if isinstance(value, list) else []


def _takes_text(schema: object) -> bool:
    """Whether a text may be a value as it is."""
    # Not by calling itself: how deep a client's schema nests is checked where calls are forced.
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        kind = each.get("type") if isinstance(each, Mapping) else None
        kinds = [kind] if isinstance(kind, str) else _listed(each, "type")
        if choices := _choices(each):
            takes = any(isinstance(choice, str) for choice in choices)
        elif kinds:
            takes = "string" in kinds
        else:
            members = _listed(each, "anyOf")
            waiting.extend(members)
            takes = not members
        if takes:
            return True
    return False


def _as_json(text: str) -> str:
    """Return a value that is to be JSON: as it is, what Python calls it, or a text after all."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        named = {"True": "true", "False": "false", "None": "null"}
        return named.get(text) or json.dumps(text, ensure_ascii=False)
    return text
