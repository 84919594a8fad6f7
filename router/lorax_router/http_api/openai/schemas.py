"""Shapes of OpenAI's answers, under the names of its own document, for our OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from lorax_router.http_api.openapi import ANYWHERE, Responses


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    # The field that is at fault, by its name in the body.
    param: str | None
    # vLLM's routes give the status.
    code: str | int | None


class OpenAIErrorResponse(BaseModel):
    """The body of every error."""

    error: Error


# Answers that every route with a body can give. What the connection answers, before there is a
# path, has the shape that it has everywhere.
ERRORS: Responses = {
    408: ANYWHERE[408],
    **{
        status: {"model": OpenAIErrorResponse, "description": text}
        for status, text in {
            400: "The body is not JSON, or a value is out of bounds or of the wrong type",
            404: "There is no such model",
            413: "The body is too large",
            415: "The content type is not JSON",
            429: "The server is overloaded",
            500: "The request failed in a shard, or an unexpected error",
            503: "The adapter cannot be had now, or the server is shutting down",
        }.items()
    },
}


class Model(BaseModel):
    """A model that requests can name: the base, or an adapter on it."""

    id: str
    object: Literal["model"]
    # Unix time at which the server came to know it.
    created: int
    owned_by: str
    # What the id stands for: the model, or the adapter's own id at its source.
    root: str
    # The base that an adapter is for; null: it is a base itself.
    parent: str | None
    # Most tokens of a prompt and its output.
    max_model_len: int


class ListModelsResponse(BaseModel):
    """The base under all its names, then the adapters that the caller may use."""

    object: Literal["list"]
    data: list[Model]


class CachedTokens(BaseModel):
    """Tokens of a prompt that were computed before."""

    cached_tokens: int


class Usage(BaseModel):
    """What an answer took, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobsAnswer(BaseModel):
    """The logprobs of tokens in columns; nothing precedes the first token of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionAnswerChoice(BaseModel):
    """One of the answers, or a part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobsAnswer | None
    finish_reason: Literal["stop", "length"] | None
    # The stop sequence or the id of the stop token that ended it.
    stop_reason: str | int | None


class Completion(BaseModel):
    """Completions, or a part of streamed ones."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    # What it was made by: seeds repeat their answers as long as it is the same.
    system_fingerprint: str
    choices: list[CompletionAnswerChoice]
    usage: Usage | None = None


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"]
    index: int
    # Numbers, or base64 of float32.
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """What vectors took, in tokens."""

    prompt_tokens: int
    total_tokens: int


class CreateEmbeddingResponse(BaseModel):
    """The vectors of all texts, in their order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class AdapterEmbeddings(CreateEmbeddingResponse):
    """The same through one of several adapters."""

    adapter_id: str


class AdapterError(OpenAIErrorResponse):
    """What is wrong with one of several adapters, or with a text for it."""

    adapter_id: str


class TopLogprob(BaseModel):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The logprobs of the tokens of an answer."""

    content: list[TokenLogprob]


class CalledFunction(BaseModel):
    """A function and its arguments, JSON as text."""

    name: str
    arguments: str


class ToolCallAnswer(BaseModel):
    """A tool that the model calls."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    # What it thought before, where the model's format tells it apart.
    reasoning_content: str | None = None
    tool_calls: list[ToolCallAnswer] | None = None


ChatFinishReason = Literal["stop", "length", "tool_calls"]


class ChatAnswerChoice(BaseModel):
    """One of the answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: str | int | None


class ChatCompletion(BaseModel):
    """Answers of the assistant."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    # What it was made by: seeds repeat their answers as long as it is the same.
    system_fingerprint: str
    choices: list[ChatAnswerChoice]
    usage: Usage


class FunctionDelta(BaseModel):
    """More of a call."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """A call that begins, or more of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDeltaAnswer(BaseModel):
    """More of what the assistant says."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """More of one of the answers."""

    index: int
    delta: ChatDeltaAnswer
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: str | int | None = None


class ChatCompletionChunk(BaseModel):
    """A part of streamed answers."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    # What it was made by: seeds repeat their answers as long as it is the same.
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
