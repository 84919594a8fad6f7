"""Shapes of Anthropic's answers and events, for our OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, RootModel

from lorax_router.http_api.openapi import ANYWHERE, Responses


class AnthropicError(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorResponse(BaseModel):
    """The body of every error, and the last event of a stream that fails."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str


class TextBlock(BaseModel):
    """A text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(BaseModel):
    """What the model thought before it spoke."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(BaseModel):
    """A tool that the model calls."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


ContentBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(BaseModel):
    """What an answer took, in tokens."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class AnthropicMessage(BaseModel):
    """An answer of the assistant."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None
    # The stop sequence that ended it.
    stop_sequence: str | None
    usage: MessageUsage


class CountedTokens(BaseModel):
    """How many tokens a prompt has."""

    input_tokens: int


class MessageStart(BaseModel):
    """The answer begins."""

    type: Literal["message_start"]
    message: AnthropicMessage


class Ping(BaseModel):
    """Nothing new."""

    type: Literal["ping"]


class ContentBlockStart(BaseModel):
    """A block begins."""

    type: Literal["content_block_start"]
    index: int
    content_block: ContentBlock


class TextDelta(BaseModel):
    """More of a text."""

    type: Literal["text_delta"]
    text: str


class ThinkingDelta(BaseModel):
    """More of what the model thinks."""

    type: Literal["thinking_delta"]
    thinking: str


class InputJsonDelta(BaseModel):
    """More of a call's arguments."""

    type: Literal["input_json_delta"]
    partial_json: str


class ContentBlockDelta(BaseModel):
    """A block has more."""

    type: Literal["content_block_delta"]
    index: int
    delta: Annotated[TextDelta | ThinkingDelta | InputJsonDelta, Field(discriminator="type")]


class ContentBlockStop(BaseModel):
    """A block ends."""

    type: Literal["content_block_stop"]
    index: int


class MessageEnding(BaseModel):
    """Why an answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(BaseModel):
    """The answer is whole."""

    type: Literal["message_delta"]
    delta: MessageEnding
    usage: MessageUsage


class MessageStop(BaseModel):
    """The stream ends."""

    type: Literal["message_stop"]


class AnthropicStreamEvent(
    RootModel[
        Annotated[
            MessageStart
            | Ping
            | ContentBlockStart
            | ContentBlockDelta
            | ContentBlockStop
            | MessageDelta
            | MessageStop,
            Field(discriminator="type"),
        ]
    ]
):
    """An event of a streamed answer; its name is its `type`."""


# Answers that every route can give. What the connection answers, before there is a path, has the
# shape that it has everywhere.
ERRORS: Responses = {
    408: ANYWHERE[408],
    429: ANYWHERE[429],
    **{
        status: {"model": AnthropicErrorResponse, "description": text}
        for status, text in {
            400: "The body is not JSON, or a value is out of bounds or of the wrong type",
            404: "There is no such model",
            413: "The body is too large",
            415: "The content type is not JSON",
            500: "The request failed in a shard, or an unexpected error",
            503: "The adapter cannot be had now",
            529: "The server is overloaded, or is shutting down",
        }.items()
    },
}
