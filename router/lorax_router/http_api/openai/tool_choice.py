"""The tools of a chat request and which of them must be called, in all forms that OpenAI has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lorax_contract.errors import ValidationError
from lorax_router.service.chat.offers import OfferedTools, checked_tools, offered
from lorax_router.service.chat.tools import ToolChoice

_MODES = ("none", "auto", "required")


def offered_tools(
    tools: Sequence[dict[str, Any]],
    choice: Any,
    *,
    is_single: bool = False,
    within: str = "function.",
) -> OfferedTools:
    """Return what a request offers; raises ValidationError.

    Args:
        tools: definitions of the type ``function``.
        choice: ``none``, ``auto``, ``required``, a named function or ``allowed_tools``. TGI's
            clients name the function by its name alone, or leave the ``type`` out.
        is_single: whether at most one may be called.
        within: where the client has name and parameters of a tool.
    """
    definitions = checked_tools(tools, within)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        definitions, choice = _allowed(definitions, choice.get("allowed_tools", choice))
    if isinstance(choice, str) and choice not in _MODES and choice in _names(definitions):
        choice = {"function": {"name": choice}}
    if (name := _name_of(choice)) is not None:
        return offered(definitions, ToolChoice(mode="named", name=name))
    mode: Literal["none", "auto", "required"] = choice or "auto"
    return offered(definitions, ToolChoice(mode=mode, is_single=is_single))


def _name_of(choice: Any) -> str | None:
    """The one function that a choice names; None: it names none. Raises ValidationError."""
    if choice is None or choice in _MODES:
        return None
    if isinstance(choice, dict) and choice.get("type", "function") == "function":
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            return name
    raise ValidationError(
        f"`tool_choice` must be one of {', '.join(_MODES)}, or name a function of `tools`"
    )


def _names(definitions: list[dict[str, Any]]) -> set[str]:
    return {each["function"]["name"] for each in definitions}


def _allowed(definitions: list[dict[str, Any]], allowed: Any) -> tuple[list[dict[str, Any]], str]:
    mode = allowed.get("mode", "auto") if isinstance(allowed, dict) else None
    listed = allowed.get("tools") if isinstance(allowed, dict) else None
    if mode not in ("auto", "required") or not isinstance(listed, list):
        raise ValidationError("`tool_choice.allowed_tools` must have `mode` and `tools`")
    names = {_name_of(each) for each in listed}
    chosen = [each for each in definitions if each["function"]["name"] in names]
    if len(chosen) != len(names):
        raise ValidationError("`tool_choice.allowed_tools` names a tool that is not among `tools`")
    return chosen, mode
