# ruff: noqa: N802 - the methods bear the names that the proto gives them.
"""The methods of the public service that generate, whoever does it: this process or many replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from lorax_contract.errors import LoraxError
from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxServicer
from lorax_router.grpc_api.boundary import PublicCall
from lorax_router.grpc_api.chunks import ChatChunks, ChunkMaker, TextChunks
from lorax_router.grpc_api.errors import CHAT_FIELDS
from lorax_router.grpc_api.pooled import (
    CLASSIFY_FIELDS,
    EMBED_FIELDS,
    classify_request,
    classify_response,
    embed_request,
    embed_response,
)
from lorax_router.grpc_api.requests import chat_request, generate_request
from lorax_router.grpc_api.responses import AnswerStyle, chat_response, generate_response
from lorax_router.service.callers import Caller
from lorax_router.service.generation import GenerationService, RequestCounts
from lorax_router.service.requests import GenerateRequest

SERVICE = pb.DESCRIPTOR.services_by_name["Lorax"].full_name
# Those that take a place, and whose requests are counted.
GENERATING = frozenset({"Generate", "GenerateStream", "Chat", "ChatStream", "Embed", "Classify"})
# Of a call whose deadline passes just now.
_LEAST_TIMEOUT_S = 1e-3


class ServiceDoor(Protocol):
    """Says whether anybody is let in."""

    def check_room(self, caller: Caller) -> None:
        """Raise what a request would get at once, whatever is in it."""

    async def health(self) -> None:
        """Raise UnhealthyError or ShuttingDownError unless requests can be served."""


class GeneratingServicer(LoraxServicer):
    """Generates and streams; ``CallBoundary`` goes around its methods.

    Args:
        service: does the work.
        counts: hears of what does not become a request of the service's.
        door: says whether anybody is let in.
    """

    # Methods that another process answers, which finds out who calls.
    passed_on: frozenset[str] = frozenset()

    def __init__(
        self, service: GenerationService, counts: RequestCounts, door: ServiceDoor
    ) -> None:
        self.service = service
        self.counts = counts
        self.door = door

    async def Generate(self, request: pb.GenerateRequest, call: PublicCall) -> pb.GenerateResponse:
        """Answer with whole texts."""
        with self._counted(call):
            domain = generate_request(request, call.bearer_token, call.caller, call.origin)
        style = AnswerStyle(request.parameters, domain)
        result = await self.service.generate(_timed(domain, call))
        return generate_response(result, style, call.request_id)

    async def GenerateStream(self, request: pb.GenerateRequest, call: PublicCall) -> None:
        """Send chunks."""
        with self._counted(call):
            domain = generate_request(request, call.bearer_token, call.caller, call.origin)
        style = AnswerStyle(request.parameters, domain)
        await self._stream(domain, style, TextChunks, call)

    async def Chat(self, request: pb.ChatRequest, call: PublicCall) -> pb.ChatResponse:
        """Answer with whole messages."""
        call.names = CHAT_FIELDS
        with self._counted(call):
            domain = chat_request(request, call.bearer_token, call.caller, call.origin)
        style = AnswerStyle(request.parameters, domain)
        result = await self.service.generate(_timed(domain, call))
        return chat_response(result, style, call.request_id)

    async def ChatStream(self, request: pb.ChatRequest, call: PublicCall) -> None:
        """Send parts of messages."""
        call.names = CHAT_FIELDS
        with self._counted(call):
            domain = chat_request(request, call.bearer_token, call.caller, call.origin)
        style = AnswerStyle(request.parameters, domain)
        await self._stream(domain, style, ChatChunks, call)

    async def Embed(self, request: pb.EmbedRequest, call: PublicCall) -> pb.EmbedResponse:
        """Answer with a vector."""
        call.names = EMBED_FIELDS
        with self._counted(call):
            domain = embed_request(request, call.bearer_token, call.caller, call.origin)
        result = await self.service.generate(_timed(domain, call))
        return embed_response(result, call.request_id)

    async def Classify(self, request: pb.ClassifyRequest, call: PublicCall) -> pb.ClassifyResponse:
        """Answer with labels, or entities."""
        call.names = CLASSIFY_FIELDS
        with self._counted(call):
            domain = classify_request(request, call.bearer_token, call.caller, call.origin)
        result = await self.service.generate(_timed(domain, call))
        return classify_response(result, request, call.request_id)

    async def _stream(
        self,
        domain: GenerateRequest,
        style: AnswerStyle,
        make: type[ChunkMaker],
        call: PublicCall,
    ) -> None:
        async with await self.service.generate_stream(_timed(domain, call)) as stream:
            chunks = make(stream, style, call.request_id)
            async for sequence, chunk in stream:
                if (message := chunks.chunk(sequence, chunk)) is not None:
                    call.send(message)

    @contextmanager
    def _counted(self, call: PublicCall) -> Iterator[None]:
        """Within, a request becomes one of the service's; one that does not is counted here."""
        try:
            yield
        except LoraxError as error:
            self.counts.request_refused(error, call.caller, call.origin)
            raise


def _timed(domain: GenerateRequest, call: PublicCall) -> GenerateRequest:
    """Return a request that is to be answered before the deadline of its call."""
    seconds = call.timeout_s
    if seconds is None:
        return domain
    timeout_s = max(seconds, _LEAST_TIMEOUT_S)
    return replace(domain, parameters=replace(domain.parameters, timeout_s=timeout_s))
