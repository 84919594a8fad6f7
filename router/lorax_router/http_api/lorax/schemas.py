"""Shapes of the answers, for the OpenAPI document only; ``encode`` writes the bytes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel
from typing_extensions import TypeAliasType

from lorax_router.service.adapters.listing import STATES

# A name of its own in the OpenAPI document, as LoRAX has it.
FinishReason = TypeAliasType("FinishReason", Literal["length", "eos_token", "stop_sequence"])


class ErrorAnswer(BaseModel):
    """What went wrong."""

    error: str
    error_type: str


class AlternativeToken(BaseModel):
    """A token that could have been chosen."""

    id: int
    text: str
    logprob: float


class Token(BaseModel):
    """A generated token."""

    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool
    alternative_tokens: list[AlternativeToken] | None = None


class PrefillToken(BaseModel):
    """A token of the prompt; the first one has no logprob."""

    id: int
    text: str
    logprob: float | None


class BestOfSequence(BaseModel):
    """A sequence that was generated beside the best one."""

    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]


class Details(BaseModel):
    """How a text came about."""

    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateAnswer(BaseModel):
    """A generated text."""

    generated_text: str
    details: Details | None = None


class FannedAnswer(GenerateAnswer):
    """A text that one of several adapters generated."""

    adapter_id: str


class StreamDetails(BaseModel):
    """How a streamed text came about."""

    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int
    seed: int | None


class StreamEvent(BaseModel):
    """One streamed token; the last one carries the whole text."""

    token: Token
    generated_text: str | None
    details: StreamDetails | None


class TokenizeAnswerToken(BaseModel):
    """A token and the characters it stands for."""

    id: int
    text: str
    start: int | None
    stop: int | None
    special: bool | None = None


class TierBytes(BaseModel):
    """Bytes in each tier; on the device those of the fullest rank."""

    device: int
    host: int
    disk: int


class AdapterFailure(BaseModel):
    """Why an adapter could not be had when it was last asked for."""

    reason: str
    text: str


class AdapterAnswer(BaseModel):
    """An adapter and where it stands."""

    adapter_id: str
    adapter_source: str
    revision: str | None
    # What an alias, a name of the operator's choosing, stands for.
    alias_of: str | None
    version: str | None
    content_digest: str | None
    rank: int | None
    state: Literal[STATES]  # type: ignore[valid-type]
    pinned: bool
    bytes: TierBytes
    waiting: int
    running: int
    uses: int
    last_used: float | None
    # What is served and may still surprise, in words.
    warnings: list[str]
    failure: AdapterFailure | None


class AdapterList(BaseModel):
    """Known adapters by name, then merges, then what was replaced and is still in use."""

    adapters: list[AdapterAnswer]
    # What to send as `cursor` for the next page; null: this was the last. A page with a filter
    # may hold fewer lines than asked for, and still not be the last.
    next_cursor: str | None


class ReloadAnswer(AdapterAnswer):
    """An adapter after its source was asked."""

    changed: bool


class UnloadAnswer(BaseModel):
    """An adapter that was unloaded, and what that freed."""

    adapter_id: str
    adapter_source: str
    revision: str | None
    state: Literal["unloaded"]
    freed: TierBytes
    shared_with: list[str]


class MemoryAnswer(BaseModel):
    """Bytes by what they are for, a table for each rank; the fullest bounds the KV cache."""

    fullest_rank: int
    ranks: list[dict[str, int]]


class BackendsAnswer(BaseModel):
    """What computes attention, products, what lies between them, and adapters, by name."""

    attention: str
    linear: str
    elementwise: str
    lora: str | None


class InfoAnswer(BaseModel):
    """What this server serves, and within which limits."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    waiting_served_ratio: float
    max_batch_total_tokens: int
    max_waiting_tokens: int
    validation_workers: int
    eager_prefill: bool
    version: str
    sha: str | None
    docker_label: str | None
    request_logger_url: str | None
    # Beside what LoRAX tells: what the base model is mainly for; of generate, embed and classify, those that the base model does; and
    # what its classification head tells apart.
    task: str
    model_type: dict[str, dict[str, Any]] | None
    max_client_batch_size: int
    auto_truncate: bool
    tasks: list[str]
    labels: list[str] | None
    memory: MemoryAnswer | None
    backends: BackendsAnswer
