"""What the routes of all dialects but LoRAX's do alike: read a body, name the model, answer or stream."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import LoraxError, ValidationError
from lorax_contract.pooling import HeadFacts
from lorax_router.http_api.admission import becoming_one, read_admitted
from lorax_router.http_api.disconnect import while_present
from lorax_router.http_api.json_body import StrictBody, bearer_token
from lorax_router.http_api.model_body import ModelBody
from lorax_router.http_api.sse import EventWriter, TokenEvents
from lorax_router.http_api.terms_headers import with_terms
from lorax_router.http_api.timeout_header import timeout_of
from lorax_router.service.batch import BatchStream, generate_apart, generate_each
from lorax_router.service.generation import GenerationService, RequestCounts
from lorax_router.service.models import Models
from lorax_router.service.requests import GenerateParameters, GenerateRequest
from lorax_router.service.results import GenerateResult

SomeBody = TypeVar("SomeBody", bound=StrictBody)


class Calls:
    """The way from a body to the inference service, for all routes of these dialects."""

    def __init__(
        self,
        service: GenerationService,
        models: Models,
        counts: RequestCounts,
        *,
        max_body_bytes: int,
        max_concurrent_requests: int | None = None,
    ) -> None:
        """``max_concurrent_requests``: so many fit into the house; None: whoever is asked knows."""
        self._service = service
        self.models = models
        self._counts = counts
        self._max_body_bytes = max_body_bytes
        self._max_concurrent_requests = max_concurrent_requests

    async def read(self, request: Request, model: type[SomeBody]) -> SomeBody:
        """Read the body of a request that can be served; what fails here is counted here."""
        return await read_admitted(self._counts, request, model, self._max_body_bytes)

    def becoming_one(self, request: Request) -> AbstractContextManager[None]:
        """Within, a body becomes requests of the service's; one that does not is counted here."""
        return becoming_one(self._counts, request)

    def named(
        self, request: Request, body: ModelBody, parameters: GenerateParameters
    ) -> GenerateParameters:
        """Return the parameters with the adapter that the body names, and the head's timeout."""
        model, source = body.model, body.adapter_source
        fields = self.models.resolve(model, source)
        adapter_id, adapter_source = fields.adapter_id, fields.adapter_source
        if body.adapter_id:
            if adapter_id is not None:
                raise ValidationError("`model` and `adapter_id` name an adapter each; send one")
            adapter_id, adapter_source = body.adapter_id, source and source.lower()
        return replace(
            with_terms(request, parameters),
            adapter_id=adapter_id,
            adapter_source=adapter_source,
            api_token=body.api_token or bearer_token(request),
            timeout_s=timeout_of(request),
        )

    async def generate(
        self,
        request: Request,
        body: ModelBody,
        requests: Sequence[GenerateRequest],
        at_once: int | None = None,
    ) -> list[GenerateResult]:
        """Return all answers; raises ClientGoneError. ``at_once`` is generate_each's."""
        with self.models.asked_for(body.model):
            return await self.answer(request, requests, at_once)

    async def answer(
        self, request: Request, requests: Sequence[GenerateRequest], at_once: int | None = None
    ) -> list[GenerateResult]:
        """The same where no field of the body is called ``model``."""
        answers = generate_each(self._service, requests, self._fitting(at_once))
        return await while_present(request.receive, answers)

    async def answer_apart(
        self,
        request: Request,
        requests: Sequence[GenerateRequest],
        adapters: Sequence[str],
        at_once: int,
    ) -> list[list[GenerateResult] | LoraxError]:
        """Return the answers through each adapter, or what is wrong with it; raises ClientGoneError."""
        most = self._fitting(at_once) or at_once
        answers = generate_apart(self._service, requests, adapters, most)
        return await while_present(request.receive, answers)

    def _fitting(self, at_once: int | None) -> int | None:
        """Return how many requests of a call may be in the house: others have to fit beside them."""
        most = self._max_concurrent_requests
        if at_once is None or most is None:
            return at_once
        return min(at_once, max(1, most * 4 // 5))

    def stream(
        self,
        body: ModelBody,
        requests: Sequence[GenerateRequest],
        writer: EventWriter[BatchStream],
        headers: dict[str, str] | None = None,
    ) -> Response:
        """Return the response that streams all answers."""
        return TokenEvents(partial(self._open, body, requests), writer, headers or {})

    async def count_tokens(self, request: Request, body: ModelBody, wanted: GenerateRequest) -> int:
        """Return how many tokens a prompt has; raises ClientGoneError."""
        with self.models.asked_for(body.model):
            return await while_present(request.receive, self._service.count_tokens(wanted))

    async def head_of(
        self, request: Request, body: ModelBody, wanted: GenerateRequest
    ) -> HeadFacts | None:
        """Return the head that would classify a text; raises ClientGoneError."""
        with self.models.asked_for(body.model):
            return await while_present(request.receive, self._service.head_of(wanted))

    async def _open(self, body: ModelBody, requests: Sequence[GenerateRequest]) -> BatchStream:
        with self.models.asked_for(body.model):
            return await BatchStream.open(self._service, requests)
