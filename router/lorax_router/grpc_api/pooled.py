"""Embed and Classify: from messages to the service's values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from lorax_contract.errors import ValidationError
from lorax_contract.pooling import Pooling, ScoreKind
from lorax_contract.step import OutputKind
from lorax_proto import lorax_pb2 as pb
from lorax_router.grpc_api.errors import FIELDS
from lorax_router.grpc_api.requests import chosen_adapter, given
from lorax_router.grpc_api.responses import timings_of
from lorax_router.service.callers import Caller
from lorax_router.service.labels import entities_of, head_of, labels_of
from lorax_router.service.origin import Origin
from lorax_router.service.requests import (
    GenerateParameters,
    GenerateRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from lorax_router.service.results import GenerateResult
from lorax_router.service.vectors import vector_of

# What the service calls otherwise than these messages.
EMBED_FIELDS: Mapping[str, str] = MappingProxyType({**FIELDS, "truncate": "cut_to"})
CLASSIFY_FIELDS: Mapping[str, str] = MappingProxyType({**EMBED_FIELDS, "inputs": "text"})

_POOLINGS: Mapping[int, Pooling | None] = MappingProxyType(
    {
        pb.POOLING_UNSPECIFIED: None,
        pb.POOLING_LAST: Pooling.LAST,
        pb.POOLING_FIRST: Pooling.FIRST,
        pb.POOLING_MEAN: Pooling.MEAN,
        pb.POOLING_MAX: Pooling.MAX,
        pb.POOLING_MEAN_SQRT: Pooling.MEAN_SQRT,
        pb.POOLING_WEIGHTED_MEAN: Pooling.WEIGHTED_MEAN,
    }
)


def embed_request(
    request: pb.EmbedRequest, bearer_token: str | None, caller: Caller, origin: Origin
) -> GenerateRequest:
    """Return what an Embed call asks for; raises ValidationError."""
    prompt: Prompt
    match request.WhichOneof("prompt"):
        case "text":
            prompt = TextPrompt(request.text, given(request, "add_special_tokens", True))
        case "token_ids":
            prompt = TokenPrompt(list(request.token_ids.ids))
        case _:
            raise ValidationError("`prompt` is missing: set `text` or `token_ids`")
    if request.pooling not in _POOLINGS:
        raise ValidationError(f"`pooling` {request.pooling} is not known to this server")
    parameters = GenerateParameters(
        **_common(request, bearer_token),
        output=OutputKind.VECTOR,
        pooling=_POOLINGS[request.pooling],
        normalize=given(request, "normalize", None),
        dimensions=given(request, "dimensions", None),
        prompt_name=request.prompt_name or None,
    )
    return GenerateRequest(prompt=prompt, parameters=parameters, caller=caller, origin=origin)


def classify_request(
    request: pb.ClassifyRequest, bearer_token: str | None, caller: Caller, origin: Origin
) -> GenerateRequest:
    """Return what a Classify call asks for; raises ValidationError."""
    return GenerateRequest(
        prompt=TextPrompt(request.text, second=request.second_text or None),
        parameters=GenerateParameters(**_common(request, bearer_token), output=OutputKind.SCORES),
        caller=caller,
        origin=origin,
    )


def embed_response(result: GenerateResult, request_id: str) -> pb.EmbedResponse:
    """Return the answer to Embed."""
    return pb.EmbedResponse(
        request_id=request_id,
        values=vector_of(result),
        usage=_usage(result),
        timings=timings_of(result.timings, result.adapter),
    )


def classify_response(
    result: GenerateResult, request: pb.ClassifyRequest, request_id: str
) -> pb.ClassifyResponse:
    """Return the answer to Classify: labels of the text, or the entities in it."""
    response = pb.ClassifyResponse(
        request_id=request_id,
        usage=_usage(result),
        timings=timings_of(result.timings, result.adapter),
    )
    scale = ScoreKind.NUMBERS if request.raw_scores else None
    if head_of(result).classifies_tokens:
        for entity in entities_of(result, request.text, scale):
            response.entities.add(**asdict(entity))
    else:
        for label in labels_of(result, scale):
            response.labels.add(**label._asdict())
    return response


def _common(
    request: pb.EmbedRequest | pb.ClassifyRequest, bearer_token: str | None
) -> dict[str, Any]:
    adapter, token = chosen_adapter(request)
    return {
        **adapter,
        "api_token": token or bearer_token,
        "cut_to": given(request, "cut_to", None),
        "priority": given(request, "priority", None),
    }


def _usage(result: GenerateResult) -> pb.Usage:
    return pb.Usage(prompt_tokens=result.num_prompt_tokens, cached_tokens=result.num_cached_tokens)
