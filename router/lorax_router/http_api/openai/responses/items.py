"""Items of an input, and its tools, as the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorax_contract.errors import ValidationError
from lorax_router.http_api.openai.messages import checked_messages
from lorax_router.http_api.openai.responses.bodies import ResponsesBody
from lorax_router.http_api.openai.tool_choice import offered_tools
from lorax_router.service.chat.offers import OfferedTools
from lorax_router.service.requests import ChatPrompt

Message = dict[str, Any]


def input_prompt(body: ResponsesBody, tools: OfferedTools) -> ChatPrompt:
    """Return the prompt of a body; raises ValidationError that names what is wrong."""
    return ChatPrompt(
        messages=_messages(body),
        tools=tools.definitions or None,
        tool_choice=tools.choice,
        template_kwargs=body.template_kwargs,
    )


def function_tools(body: ResponsesBody) -> OfferedTools:
    """Return what a body offers; raises ValidationError."""
    definitions = []
    for number, tool in enumerate(body.tools or []):
        if tool.get("type") != "function":
            raise ValidationError(
                f"`tools.{number}.type` {str(tool.get('type'))[:50]!r} is not offered by this "
                "server, only function"
            )
        function = {name: tool[name] for name in _TOOL_FIELDS if tool.get(name) is not None}
        definitions.append({"type": "function", "function": function})
    is_single = body.parallel_tool_calls is False
    return offered_tools(definitions, body.tool_choice, is_single=is_single, within="")


_TOOL_FIELDS = ("name", "description", "parameters", "strict")


def _messages(body: ResponsesBody) -> list[Message]:
    messages: list[Message] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if not body.input:
        raise ValidationError("`input` must not be empty")
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    num_said = len(messages)
    for number, item in enumerate(body.input):
        _add(messages, f"input.{number}", item)
    if len(messages) == num_said:
        raise ValidationError("`input` must have a message or an output of a function")
    return messages


def _add(messages: list[Message], place: str, item: Mapping[str, Any]) -> None:
    kind = item.get("type", "message" if "role" in item else None)
    match kind:
        case "message":
            messages.append(_said(place, item))
        case "function_call":
            _call(messages, place, item)
        case "function_call_output":
            call_id = item.get("call_id")
            if not isinstance(call_id, str):
                raise ValidationError(f"`{place}.call_id` must be a text")
            said = {"role": "tool", "tool_call_id": call_id, "content": item.get("output")}
            messages.append(_checked(place, said, "output"))
        case "reasoning":
            # What the model thought before earlier answers; templates leave it out, too.
            pass
        case _:
            raise ValidationError(
                f"`{place}.type` {str(kind)[:50]!r} is not offered by this server"
            )


def _said(place: str, item: Mapping[str, Any]) -> Message:
    return _checked(place, {"role": item.get("role"), "content": item.get("content")}, "content")


def _call(messages: list[Message], place: str, item: Mapping[str, Any]) -> None:
    call_id, name, arguments = item.get("call_id"), item.get("name"), item.get("arguments")
    if not (isinstance(call_id, str) and isinstance(name, str) and isinstance(arguments, str)):
        raise ValidationError(f"`{place}` must have `call_id`, `name` and `arguments`, all texts")
    function = {"name": name, "arguments": arguments}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    calls = messages[-1].setdefault("tool_calls", [])
    calls.append({"id": call_id, "type": "function", "function": function})


def _checked(place: str, message: Message, content: str) -> Message:
    """Return a message for a template; errors name the item instead of the message."""
    try:
        return checked_messages([message])[0]
    except ValidationError as error:
        text = str(error).replace("messages.0.content", f"{place}.{content}")
        raise ValidationError(text.replace("messages.0", place)) from error
