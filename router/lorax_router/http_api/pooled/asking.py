"""How routes ask for what is made of a text, each in a request of its own."""

from __future__ import annotations

from starlette.requests import Request

from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.origins import origin_of
from lorax_router.service.requests import GenerateParameters, GenerateRequest, Prompt, TextPrompt

# Of one call: others have to fit beside it.
AT_ONCE = 64


def pooled_request(
    request: Request, given: str | Prompt, parameters: GenerateParameters, second: str | None = None
) -> GenerateRequest:
    """Return what asks for one text, for a pair of them, or for a prompt that is made already."""
    prompt = TextPrompt(given, second=second) if isinstance(given, str) else given
    return GenerateRequest(
        prompt=prompt,
        parameters=parameters,
        caller=caller_of(request),
        origin=origin_of(request),
    )
