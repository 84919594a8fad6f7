"""Makes of a client's messages what chat templates are given, by transformers' rules.

It runs where templates run: what it is given may be large, nested and odd.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorax_router.service.prompts.content_format import ContentFormat
from lorax_router.service.prompts.sandbox import RenderError

Message = dict[str, Any]

# Marks where the last message ends, to be cut off there; a template may trim its space.
END_OF_MESSAGE = "CONTINUE_FINAL_MESSAGE_TAG "

# Names that reasoning goes by; templates read the first, or the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def messages_for_template(
    messages: Sequence[object], content_format: ContentFormat
) -> list[Message]:
    """Return messages as templates take them; the client's own stay as they are.

    Fields that are null are left out, reasoning goes by all names that templates read,
    arguments of tool calls are objects, and a content is a text where no list is read.
    Raises RenderError.
    """
    return [_message(number, each, content_format) for number, each in enumerate(messages)]


def mark_end(messages: list[Message], template_text: str) -> str:
    """Mark where the last message ends; return its text. Raises RenderError."""
    last = messages[-1] if messages else {}
    text = last.get("content")
    if text is None:
        raise RenderError("the last message has no `content` to be continued")
    if "content" not in template_text:
        raise RenderError("it does not read `content`, so the last message cannot be continued")
    if isinstance(text, str):
        last["content"] = text + END_OF_MESSAGE
        return text
    for part in reversed(text if isinstance(text, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            said: str = part["text"]
            part["text"] = said + END_OF_MESSAGE
            return said
    raise RenderError("the last message has no text to be continued")


def cut_at_end(rendered: str, text: str) -> str:
    """Return what was rendered up to the end of the last message; raises RenderError."""
    mark = END_OF_MESSAGE.strip()
    if text.strip() not in rendered or mark not in rendered:
        raise RenderError(
            "it leaves out a part of the last message, which cannot be continued then"
        )
    end = rendered.rindex(mark)
    kept = rendered[:end]
    # A template that trimmed the mark would have trimmed the message's own space too.
    return kept if rendered.startswith(END_OF_MESSAGE, end) else kept.rstrip()


def _message(number: int, message: object, content_format: ContentFormat) -> Message:
    if not isinstance(message, Mapping):
        raise RenderError(f"message {number} is no object")
    made = _with_reasoning({key: value for key, value in message.items() if value is not None})
    content = made.get("content")
    if isinstance(content, list):
        as_text = content_format == "string"
        made["content"] = "\n".join(map(_text_of, content)) if as_text else _copied(content)
    if isinstance(made.get("tool_calls"), list):
        made["tool_calls"] = [_tool_call(each) for each in made["tool_calls"]]
    return made


def _with_reasoning(message: Message) -> Message:
    for name in _REASONING:
        if name in message:
            reasoning = message[name]
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _copied(parts: Sequence[Any]) -> list[Any]:
    return [dict(part) if isinstance(part, dict) else part for part in parts]


def _text_of(part: Any) -> str:
    for text in _texts_of(part):
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise RenderError(f"it takes texts only, and a part of a content is of type {str(kind)[:50]!r}")


def _texts_of(part: Any) -> Iterator[Any]:
    if isinstance(part, dict):
        yield part.get("text")
        yield part.get("refusal")
    yield part


def _tool_call(call: Any) -> Any:
    """Return a tool call whose arguments are an object; no JSON stays the text that it is."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments = function["arguments"]
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        parsed = arguments
    return {**call, "function": {**function, "arguments": parsed}}
