"""Errors as rich status: a code, a text, and details that programs read (google.rpc).

Every error has ErrorInfo, whose reason is the error's type. What is worth another try has
RetryInfo, a value that is at fault BadRequest with the field's name. Texts of the service name
fields as the service knows them; a client reads them by the names of its messages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_contract.errors import ErrorKind, GenerationError, LoraxError, ShardError

DOMAIN = "lorax-py"
REQUEST_ID = "x-request-id"
# What clients with a retry policy read, in milliseconds.
_PUSHBACK = "grpc-retry-pushback-ms"

# The service's names of fields that are called otherwise here.
FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "adapter_id": "adapter.id",
        "adapter_source": "adapter.source",
        "api_token": "adapter.api_token",
        "cursor": "page_token",
        "decoder_input_details": "return_prompt_tokens",
        "inputs": "prompt",
        "limit": "page_size",
        "merged_adapters": "merge",
        "merged_adapters.ids": "merge.adapters",
        "merged_adapters.majority_sign_method": "merge.majority_sign",
        "merged_adapters.merge_strategy": "merge.strategy",
        "merged_adapters.weights": "merge.adapters",
        "next_cursor": "next_page_token",
        "response_format": "constraint",
        "structured_outputs": "constraint",
        "structured_outputs.choice": "constraint.choice",
        "structured_outputs.grammar": "constraint.grammar",
        "structured_outputs.json": "constraint.json_schema",
        "structured_outputs.regex": "constraint.regex",
        "return_k_alternatives": "num_alternatives",
        "revision": "adapter.revision",
        "tokens": "ids",
    }
)
# The same of requests with messages.
CHAT_FIELDS: Mapping[str, str] = MappingProxyType({**FIELDS, "inputs": "messages"})
_FIELD = re.compile(r"`([a-z]\w*(?:\.\w+)*)`")
# Of a text: metadata holds 8 kB, and a status has its text several times, encoded.
_MAX_TEXT_BYTES = 1_000
# There is no such adapter for this caller, and no later try of theirs would find one. Whether it
# is hidden or does not exist makes no difference.
_ABSENT = (Reason.NOT_FOUND, Reason.NO_ACCESS)


class SlowReaderError(LoraxError):
    """A client does not read what it asked for."""

    kind = ErrorKind(408, "RESOURCE_EXHAUSTED", "slow_reader")


def rich_status(
    error: LoraxError, request_id: str, names: Mapping[str, str] = FIELDS
) -> grpc.Status:
    """Return the status of an error, with its details; ``names`` are those of its request's fields."""
    if isinstance(error, ShardError):
        # What went on between router and shard stays inside.
        error = GenerationError(str(error), public="a shard failed")
    code, reason = _code_and_reason(error)
    text, field = _in_words_of(names, error.public)
    text = _clipped(text)
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if (seconds := _retry_after_s(error)) is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(seconds * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if code is grpc.StatusCode.INVALID_ARGUMENT and field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    return rpc_status.to_status(
        status_pb2.Status(code=code.value[0], message=text, details=map(_packed, details))
    )


def pushback(error: LoraxError) -> tuple[tuple[str, str], ...]:
    """Return the trailer by which gRPC's own retries wait as long as they are told to."""
    seconds = _retry_after_s(error)
    return () if seconds is None else ((_PUSHBACK, str(round(seconds * 1000))),)


def _code_and_reason(error: LoraxError) -> tuple[grpc.StatusCode, str]:
    if isinstance(error, AdapterUnavailableError):
        if error.reason in _ABSENT:
            return grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND"
        if not error.reason.permanent:
            return grpc.StatusCode.UNAVAILABLE, "ADAPTER_UNAVAILABLE"
    return grpc.StatusCode[error.kind.grpc_status], error.kind.error_type.upper()


def _retry_after_s(error: LoraxError) -> float | None:
    if isinstance(error, AdapterUnavailableError) and not error.reason.permanent:
        return error.retry_after_s
    return error.kind.retry_after_s


def _in_words_of(names: Mapping[str, str], text: str) -> tuple[str, str]:
    """Return a text with its fields renamed, and the first of them."""
    fields: list[str] = []

    def renamed(match: re.Match[str]) -> str:
        head, dot, rest = match[1].partition(".")
        fields.append(names.get(match[1]) or names.get(head, head) + dot + rest)
        return f"`{fields[-1]}`"

    text = _FIELD.sub(renamed, text).replace("GET /v1/adapters", "ListAdapters")
    return text, fields[0] if fields else ""


def _clipped(text: str) -> str:
    raw = text.encode(errors="replace")
    if len(raw) <= _MAX_TEXT_BYTES:
        return raw.decode()
    return raw[:_MAX_TEXT_BYTES].decode(errors="ignore") + "…"


def _packed(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
