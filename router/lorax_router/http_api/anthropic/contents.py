"""Anthropic's messages and tools as chat templates take them: text, calls of tools, their results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorax_contract.errors import ValidationError
from lorax_router.http_api.anthropic.bodies import PromptBody
from lorax_router.http_api.openai.tool_choice import offered_tools
from lorax_router.service.chat.offers import OfferedTools
from lorax_router.service.requests import ChatPrompt

Message = dict[str, Any]

_ROLES = ("user", "assistant")
# What a tool has by the same name as in chats.
_SAME = ("name", "description", "strict")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_prompt(body: PromptBody, tools: OfferedTools) -> ChatPrompt:
    """Return the prompt of a body; raises ValidationError that names what is wrong."""
    if not body.messages:
        raise ValidationError("`messages` must not be empty")
    messages: list[Message] = []
    if body.system:
        messages.append({"role": "system", "content": _joined(_texts("system", body.system))})
    said = _Conversation()
    for number, each in enumerate(body.messages):
        said.add(f"messages.{number}", each, is_last=number == len(body.messages) - 1)
    messages += said.messages
    continues = said.messages[-1]["role"] == "assistant"
    if continues and said.messages[-1].get("tool_calls"):
        raise ValidationError(
            "`messages` must not end with a `tool_use`: its `tool_result` has to follow"
        )
    return ChatPrompt(
        messages=messages,
        tools=tools.definitions or None,
        tool_choice=tools.choice,
        template_kwargs=body.template_kwargs,
        add_generation_prompt=not continues,
        continue_final_message=continues,
    )


def tools_of_body(body: PromptBody) -> OfferedTools:
    """Return what a body offers; raises ValidationError."""
    definitions = [_tool(f"tools.{n}", each) for n, each in enumerate(body.tools or [])]
    given = body.tool_choice
    if given is None:
        return offered_tools(definitions, None, within="")
    is_single = given.get("disable_parallel_tool_use") is True
    kind = given.get("type")
    if kind == "tool" and isinstance(given.get("name"), str):
        choice: Any = {"type": "function", "function": {"name": given["name"]}}
        return offered_tools(definitions, choice, within="")
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise ValidationError(
            f"`tool_choice.type` must be one of {', '.join(_CHOICES)}, or tool with a `name`"
        )
    if kind == "any" and not definitions:
        raise ValidationError("`tool_choice.type` is any, but there are no `tools`")
    return offered_tools(definitions, _CHOICES[kind], is_single=is_single, within="")


def _tool(place: str, given: Mapping[str, Any]) -> dict[str, Any]:
    kind, schema = given.get("type"), given.get("input_schema")
    if kind not in (None, "custom"):
        raise ValidationError(
            f"`{place}.type` {str(kind)[:50]!r} is not offered by this server, only tools of the "
            "client's own"
        )
    if not isinstance(schema, dict):
        raise ValidationError(f"`{place}.input_schema` must be a JSON schema")
    function = {name: given[name] for name in _SAME if given.get(name) is not None}
    return {"type": "function", "function": {**function, "parameters": schema}}


class _Conversation:
    """Messages as templates take them; what one speaker says in turn is one message."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._names: dict[str, str] = {}

    def add(self, place: str, given: Mapping[str, Any], *, is_last: bool) -> None:
        """Take in a message; raises ValidationError."""
        role, content = given.get("role"), given.get("content")
        if not isinstance(role, str) or role not in _ROLES:
            raise ValidationError(
                f"`{place}.role` must be one of {', '.join(_ROLES)}, got {role!r}"
            )
        if not content and isinstance(content, str | list):
            if is_last and role == "assistant" and self.messages:
                return
            raise ValidationError(f"`{place}.content` must not be empty")
        read = self._of_user if role == "user" else self._of_assistant
        for message in read(f"{place}.content", content):
            self._join(message)

    def _of_user(self, place: str, content: Any) -> Iterator[Message]:
        for where, block in _blocks(place, content):
            if block.get("type") == "tool_result":
                yield self._result(where, block)
            else:
                yield {"role": "user", "content": [_text(where, block)]}

    def _of_assistant(self, place: str, content: Any) -> Iterator[Message]:
        message: Message = {"role": "assistant", "content": []}
        for where, block in _blocks(place, content):
            match block.get("type"):
                case "tool_use":
                    message.setdefault("tool_calls", []).append(self._call(where, block))
                case "thinking":
                    thought = block.get("thinking")
                    if not isinstance(thought, str):
                        raise ValidationError(f"`{where}.thinking` must be a text")
                    message["reasoning_content"] = message.get("reasoning_content", "") + thought
                case "redacted_thinking":
                    pass
                case _:
                    message["content"].append(_text(where, block))
        yield message

    def _call(self, place: str, block: Mapping[str, Any]) -> dict[str, Any]:
        call_id, name, arguments = block.get("id"), block.get("name"), block.get("input", {})
        if not isinstance(call_id, str) or not isinstance(name, str):
            raise ValidationError(f"`{place}` must have an `id` and a `name`")
        if not isinstance(arguments, dict):
            raise ValidationError(f"`{place}.input` must be an object")
        self._names[call_id] = name
        function = {"name": name, "arguments": arguments}
        return {"id": call_id, "type": "function", "function": function}

    def _result(self, place: str, block: Mapping[str, Any]) -> Message:
        call_id = block.get("tool_use_id")
        if not isinstance(call_id, str) or call_id not in self._names:
            raise ValidationError(
                f"`{place}.tool_use_id` must be the `id` of a `tool_use` of an earlier message"
            )
        content = block.get("content")
        parts = [] if not content else _texts(f"{place}.content", content)
        if block.get("is_error") is True:
            # Templates know of no failures but what is said of them.
            parts = [{"type": "text", "text": "Error:"}, *parts]
        return {
            "role": "tool",
            "tool_call_id": call_id,
            "name": self._names[call_id],
            "content": _joined(parts),
        }

    def _join(self, message: Message) -> None:
        last = self.messages[-1] if self.messages else None
        message["content"] = _joined(message["content"])
        if last is None or last["role"] != message["role"] or message["role"] == "tool":
            self.messages.append(message)
            return
        texts = [each["content"] for each in (last, message) if each["content"]]
        last["content"] = "\n".join(texts)
        if calls := message.get("tool_calls"):
            last["tool_calls"] = [*last.get("tool_calls", []), *calls]
        if thought := message.get("reasoning_content"):
            last["reasoning_content"] = last.get("reasoning_content", "") + thought


def _blocks(place: str, content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(content, str):
        yield place, {"type": "text", "text": content}
        return
    if not isinstance(content, list):
        raise ValidationError(f"`{place}` must be a text or a list of blocks")
    for number, block in enumerate(content):
        if not isinstance(block, dict):
            raise ValidationError(f"`{place}.{number}` must be a block, which is an object")
        yield f"{place}.{number}", block


def _text(place: str, block: Mapping[str, Any]) -> dict[str, str]:
    kind, text = block.get("type"), block.get("text")
    if kind != "text":
        raise ValidationError(
            f"`{place}` is of the type {str(kind)[:50]!r}; this model takes text only"
        )
    if not isinstance(text, str):
        raise ValidationError(f"`{place}.text` must be a text")
    return {"type": "text", "text": text}


def _texts(place: str, content: Any) -> list[dict[str, str]]:
    return [_text(where, block) for where, block in _blocks(place, content)]


def _joined(parts: str | Sequence[Mapping[str, str]]) -> str:
    return parts if isinstance(parts, str) else "\n".join(each["text"] for each in parts)
