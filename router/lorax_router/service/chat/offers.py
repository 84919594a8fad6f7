"""The tools that one request offers, checked, and which of them must be called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorax_contract.errors import ValidationError
from lorax_router.service.chat.tools import ToolChoice

_MAX_TOOLS = 128
# What a tool may have beside its name, of which type, and that in words.
_PARTS: tuple[tuple[str, type, str], ...] = (
    ("description", str, "a text"),
    ("parameters", dict, "a JSON schema"),
    ("strict", bool, "true or false"),
)

Definition = dict[str, Any]


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """What the model may call in one answer."""

    # As chat templates take them; empty: none are offered.
    definitions: list[Definition]
    choice: ToolChoice


def checked_tools(definitions: Sequence[Definition], within: str = "function.") -> list[Definition]:
    """Return definitions of the type ``function``, each of another name; or ValidationError.

    ``within`` is where the client has name and parameters of a tool.
    """
    if len(definitions) > _MAX_TOOLS:
        raise ValidationError(f"`tools` takes at most {_MAX_TOOLS} tools, got {len(definitions)}")
    names = set()
    for number, tool in enumerate(definitions):
        place, function = f"tools.{number}.{within}", tool["function"]
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise ValidationError(f"`{place}name` must be a text that is not empty")
        if name in names:
            raise ValidationError(f"`{place}name` {name!r} is the name of another tool, too")
        for field, kind, what in _PARTS:
            if not isinstance(function.get(field), kind | None):
                raise ValidationError(f"`{place}{field}` must be {what}")
        names.add(name)
    return list(definitions)


def offered(definitions: Sequence[Definition], choice: ToolChoice) -> OfferedTools:
    """Return what the model is told of checked tools by a choice; raises ValidationError."""
    if choice.mode == "named":
        named = [each for each in definitions if each["function"]["name"] == choice.name]
        if not named:
            raise ValidationError(
                f"`tool_choice` names {choice.name!r}, which is not among `tools`"
            )
        return OfferedTools(named, replace(choice, is_single=True))
    if choice.mode == "none":
        # The model is not told of them: then it calls none.
        return OfferedTools([], choice)
    if choice.mode == "required" and not definitions:
        raise ValidationError("`tool_choice` is `required`, but there are no `tools`")
    return OfferedTools(list(definitions), choice)
