"""Shapes of Responses and their events, for our OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["completed", "incomplete", "in_progress"]


class OutputText(BaseModel):
    """A text."""

    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]]
    logprobs: list[dict[str, Any]]


class ReasoningText(BaseModel):
    """What the model thought."""

    type: Literal["reasoning_text"]
    text: str


class OutputMessage(BaseModel):
    """What the assistant says."""

    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningItem(BaseModel):
    """What the model thought before it spoke."""

    type: Literal["reasoning"]
    id: str
    status: Status
    summary: list[dict[str, Any]]
    content: list[ReasoningText]
    encrypted_content: str | None


class FunctionToolCall(BaseModel):
    """A function that the model calls."""

    type: Literal["function_call"]
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


class ResponseUsage(BaseModel):
    """What an answer took, in tokens."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(BaseModel):
    """An answer, with what it was asked for."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[
        Annotated[OutputMessage | ReasoningItem | FunctionToolCall, Field(discriminator="type")]
    ]
    parallel_tool_calls: bool
    store: Literal[False]
    temperature: float
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    usage: ResponseUsage | None


class ResponseStreamEvent(BaseModel):
    """An event of a streamed answer; what it has besides depends on its type, which is its name."""

    model_config = ConfigDict(extra="allow")

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
