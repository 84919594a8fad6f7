"""One call through several adapters: the same texts for each, an answer or an error of its own for each."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from lorax_contract.errors import LoraxError, ValidationError
from lorax_router.http_api.json_text import Json
from lorax_router.http_api.responses import error_document, public_error
from lorax_router.service.requests import GenerateRequest, Prompt, TextPrompt

MAX_ADAPTERS = 256
# Of one call, texts times adapters.
MAX_REQUESTS = 2048

Found = TypeVar("Found")


def fanned(
    adapters: Sequence[str], source: str | None, requests: Sequence[GenerateRequest]
) -> list[GenerateRequest]:
    """Return requests that go through each adapter, whose texts are tokenized once; raises ValidationError.

    They have the same parameters, which name no adapter; ``source`` is where those of ``adapters`` lie, unless they do.
    """
    _check(adapters, requests)
    call = secrets.token_hex(16)
    parameters = requests[0].parameters
    if parameters.adapter_source is None and source:
        parameters = replace(parameters, adapter_source=source.lower())
    return [
        replace(each, prompt=_shared(each.prompt, f"{call}-{number}"), parameters=parameters)
        for number, each in enumerate(requests)
    ]


def answers_of(
    adapters: Sequence[str],
    found: Sequence[Found | LoraxError],
    answer: Callable[[str, Found], Json],
    fault: Callable[[LoraxError], Json] = lambda error: error_document(public_error(error)),
) -> list[Json]:
    """Return what is said of each adapter: the answer of its requests, or its error."""

    def said(adapter: str, each: Found | LoraxError) -> Json:
        if isinstance(each, LoraxError):
            return fault(each)
        try:
            return answer(adapter, each)
        except LoraxError as error:
            return fault(error)

    return [
        {"adapter_id": adapter, **said(adapter, each)}
        for adapter, each in zip(adapters, found, strict=True)
    ]


def _check(adapters: Sequence[str], requests: Sequence[GenerateRequest]) -> None:
    if not adapters or "" in adapters:
        raise ValidationError("`adapters` must name an adapter or more; leave it out to name none")
    if len(adapters) > MAX_ADAPTERS:
        raise ValidationError(
            f"`adapters` takes at most {MAX_ADAPTERS} adapters, got {len(adapters)}"
        )
    if len(adapters) * len(requests) > MAX_REQUESTS:
        raise ValidationError(
            f"`adapters`: {len(requests)} texts through {len(adapters)} adapters are more than "
            f"{MAX_REQUESTS}; send them in several calls"
        )
    parameters = requests[0].parameters
    if parameters.adapter_id is not None or parameters.merged_adapters is not None:
        raise ValidationError("`adapters` and another field name adapters; send one of them")


def _shared(prompt: Prompt, name: str) -> Prompt:
    return replace(prompt, shared=name) if isinstance(prompt, TextPrompt) else prompt
