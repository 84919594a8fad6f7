"""The messages of a chat as this server can take them: text, and calls of tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorax_contract.errors import ValidationError

# OpenAI's newer name for what templates call system.
_ROLES = {
    "assistant": "assistant",
    "developer": "system",
    "system": "system",
    "tool": "tool",
    "user": "user",
}
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def checked_messages(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages for a template; raises ValidationError that names the message.

    Absent values are left out, since templates ask whether something is there.
    """
    if not given:
        raise ValidationError("`messages` must not be empty")
    return [_message(f"messages.{number}", each) for number, each in enumerate(given)]


def _message(place: str, given: Mapping[str, Any]) -> dict[str, Any]:
    role = given.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValidationError(f"`{place}.role` must be one of {', '.join(_ROLES)}, got {role!r}")
    message = {name: value for name, value in given.items() if value is not None}
    message["role"] = _ROLES[role]
    calls = _tool_calls(place, message)
    content = message.get("content")
    if content is None and not calls:
        raise ValidationError(f"`{place}.content` must be there")
    # Templates add it to other texts.
    message["content"] = "" if content is None else _content(f"{place}.content", content)
    if role == "tool" and not isinstance(message.get("tool_call_id", ""), str):
        raise ValidationError(f"`{place}.tool_call_id` must be a text")
    return message


def _content(place: str, content: Any) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValidationError(f"`{place}` must be a text or a list of parts")
    return [_part(f"{place}.{number}", each) for number, each in enumerate(content)]


def _part(place: str, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    name = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise ValidationError(f"`{place}` is of the type {kind!r}; this model takes text only")
    text = part.get(name)
    if not isinstance(text, str):
        raise ValidationError(f"`{place}.{name}` must be a text")
    return {"type": "text", "text": text}


def _tool_calls(place: str, message: Mapping[str, Any]) -> Any:
    calls = message.get("tool_calls")
    if calls is None:
        return None
    if message["role"] != "assistant" or not isinstance(calls, list):
        raise ValidationError(f"`{place}.tool_calls` must be a list, of an assistant's message")
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValidationError(
                f"`{place}.tool_calls.{number}.function` must have a `name` and `arguments`"
            )
    return calls
