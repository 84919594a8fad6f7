"""Pieces of Lark grammars, as llguidance reads them, of which parsers make theirs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorax_contract.errors import ValidationError
from lorax_router.service.chat.tool_schemas import object_schema, rebased
from lorax_router.service.chat.tools import FunctionTool

# As models are taught to write JSON: one space, and none that could go on for ever.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


# Calls in one answer that must be calls: some models would not end by themselves.
MAX_CALLS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CallWords:
    """How calls are put together in one grammar.

    Args:
        begin: what stands for the marker that a call begins with.
        is_single: exactly one call.
        special_tokens: ids of markers that are special tokens.
    """

    begin: str = ""
    is_single: bool = False
    special_tokens: Mapping[str, int] = field(default_factory=dict)

    def literal(self, marker: str) -> str:
        """Return what stands for a marker: its token where it is a special one, else its text."""
        return literal(marker, self.special_tokens)

    def several(self, separator: str) -> str:
        """Return what stands for one ``call``, or more with something between them."""
        return "call" if self.is_single else f"call ({separator} call){{0,{MAX_CALLS - 1}}}"


def literal(marker: str, special_tokens: Mapping[str, int]) -> str:
    """Return what stands for a marker: its token where it is a special one, else its text."""
    token_id = special_tokens.get(marker)
    return text(marker) if token_id is None else f"<[{token_id}]>"


def text(written: str) -> str:
    """Return what stands for a text."""
    return json.dumps(written, ensure_ascii=False)


def json_rule(name: str, schema: Mapping[str, Any], *, is_lenient: bool) -> str:
    """Return a rule of JSON of a schema; ``is_lenient``: keywords that are unknown are left out."""
    options = {**_SPACING, "lenient": is_lenient}
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': options})}"


def call_rule(name: str, tools: Sequence[FunctionTool], arguments_key: str) -> str:
    """Return a rule of a JSON object that calls one of the tools."""
    calls, definitions = [], {}
    for number, tool in enumerate(tools):
        place = f"#/$defs/tool_{number}"
        definitions[f"tool_{number}"] = rebased(object_schema(tool), place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, arguments_key: {"$ref": place}},
                "required": ["name", arguments_key],
                "additionalProperties": False,
            }
        )
    is_lenient = not any(tool.strict for tool in tools)
    return json_rule(name, {"anyOf": calls, "$defs": definitions}, is_lenient=is_lenient)


def require_plain(
    tools: Sequence[FunctionTool],
    names: re.Pattern[str],
    is_argument: Callable[[str], object] = bool,
) -> None:
    """Raise ValidationError for names that the form of a call has no place for."""
    for tool in tools:
        if not names.fullmatch(tool.name):
            raise ValidationError(f"`tools`: {tool.name!r} is no name that this model can call")
        properties = object_schema(tool).get("properties") or {}
        if odd := next((each for each in properties if not is_argument(each)), None):
            raise ValidationError(
                f"`tools`: {odd!r} of {tool.name!r} is no name of an argument that this model "
                "can write"
            )
