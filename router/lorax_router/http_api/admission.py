"""The bodies of requests that generate: read where there is room, and counted where not."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from lorax_contract.errors import LoraxError
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.json_body import Body, parse_body, read_body
from lorax_router.http_api.model_body import ModelBody
from lorax_router.service.generation import GenerationService, RequestCounts


async def read_admitted(
    service: GenerationService,
    counts: RequestCounts,
    request: Request,
    model: type[Body],
    max_body_bytes: int,
) -> Body:
    """Read the body of a request that can be served; what fails here is counted here."""
    tenant = caller_of(request).tenant
    try:
        # Known before there is a body: nobody sends 2 MB to hear that there is no place.
        await service.ask_room(caller_of(request))
        body = parse_body(model, await read_body(request, max_body_bytes))
        if isinstance(body, ModelBody):
            body.check_refused()
    except LoraxError as error:
        counts.request_refused(error, tenant)
        raise
    except ClientDisconnect:
        counts.request_refused(asyncio.CancelledError())
        raise
    counts.unknown_fields(body.num_unknown_fields())
    return body
