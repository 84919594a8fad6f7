# ruff: noqa: N802 - the methods bear the names that the proto gives them.
"""The public service ``lorax.v1``: unpack, call, pack. What goes wrong is the boundary's affair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from lorax_contract.errors import LoraxError, ValidationError
from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxServicer
from lorax_router.grpc_api.boundary import PublicCall
from lorax_router.grpc_api.chunks import ChatChunks, ChunkMaker, TextChunks
from lorax_router.grpc_api.errors import CHAT_FIELDS
from lorax_router.grpc_api.requests import (
    adapter_parameters,
    chat_prompt,
    chat_request,
    generate_request,
    given,
    list_query,
)
from lorax_router.grpc_api.responses import (
    AnswerStyle,
    adapter_info,
    chat_response,
    chat_tokens_response,
    generate_response,
    info_response,
    tokenize_response,
)
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.management import AdapterManager
from lorax_router.service.adapters.selection import SelectionPolicy
from lorax_router.service.inference import InferenceService
from lorax_router.service.info import ServerInfo
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.service.prompts.tokenization import Tokenization
from lorax_router.service.requests import BASE_MODEL_ADAPTER_ID, GenerateRequest

SERVICE = pb.DESCRIPTOR.services_by_name["Lorax"].full_name
# Those that take a place, and whose requests are counted.
GENERATING = frozenset({"Generate", "GenerateStream", "Chat", "ChatStream"})
# Of a call whose deadline passes just now.
_LEAST_TIMEOUT_S = 1e-3


class PublicServicer(LoraxServicer):
    """The methods of the service; ``CallBoundary`` goes around them."""

    def __init__(
        self,
        service: InferenceService,
        manager: AdapterManager,
        selections: SelectionPolicy,
        metrics: Metrics,
        tokenization: Tokenization,
        info: ServerInfo,
    ) -> None:
        self.service = service
        self._manager = manager
        self._selections = selections
        self.metrics = metrics
        self._tokenization = tokenization
        self._info = info_response(info)

    # --- generation ---------------------------------------------------------------

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
            self.service.ledger.request_refused(error, call.caller, call.origin)
            raise

    # --- texts and tokens ---------------------------------------------------------

    async def Tokenize(self, request: pb.TokenizeRequest, call: PublicCall) -> pb.TokenizeResponse:
        """Answer with the tokens of a text, or of a chat as it is rendered."""
        self.service.check_open()
        self.service.start_request(call.caller)
        tokens = self._tokenization
        match request.WhichOneof("prompt"):
            case "text":
                is_special = given(request, "add_special_tokens", True)
                spans = await tokens.spans(request.text, add_special_tokens=is_special)
                # A long text has many tokens: their messages are made off the event loop, too.
                return await tokens.pool.run(tokenize_response, spans)
            case "chat":
                ids = await tokens.ids(chat_prompt(request.chat))
                strings = await tokens.strings(ids)
                return await tokens.pool.run(chat_tokens_response, ids, strings)
        raise ValidationError("`prompt` is missing: set `text` or `chat`")

    async def Detokenize(
        self, request: pb.DetokenizeRequest, call: PublicCall
    ) -> pb.DetokenizeResponse:
        """Answer with the text of token ids."""
        self.service.check_open()
        self.service.start_request(call.caller)
        return pb.DetokenizeResponse(text=await self._tokenization.text(request.ids))

    # --- the server ---------------------------------------------------------------

    async def Info(self, request: pb.InfoRequest, call: PublicCall) -> pb.InfoResponse:
        """Answer with the model and its limits."""
        return self._info

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, call: PublicCall
    ) -> pb.ListAdaptersResponse:
        """Answer with a page of the known adapters."""
        page = await self._manager.listing(list_query(request), call.bearer_token, call.caller)
        adapters = map(adapter_info, page["adapters"])
        return pb.ListAdaptersResponse(adapters=adapters, next_page_token=page["next_cursor"])

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, call: PublicCall
    ) -> pb.LoadAdapterResponse:
        """Answer when the adapter is there."""
        selection = self._managed(request.adapter, call)
        if request.alias:
            alias = self._selections.aliases.make(request.alias, selection)
            document = await self._manager.name(alias, call.caller, pin=request.pin)
        else:
            document = await self._manager.load(selection, call.caller, pin=request.pin)
        return pb.LoadAdapterResponse(adapter=adapter_info(document))

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, call: PublicCall
    ) -> pb.UnloadAdapterResponse:
        """Answer when its memory is free."""
        document = await self._manager.unload(self._managed(request.adapter, call), call.caller)
        return pb.UnloadAdapterResponse(
            freed=pb.TierBytes(**document["freed"]), shared_with=document["shared_with"]
        )

    def _managed(self, adapter: pb.Adapter, call: PublicCall) -> AdapterSelection:
        """Return the adapter that somebody manages who may; ForbiddenError, ValidationError."""
        # Without keys nobody is an operator here, wherever the listener is: HTTP's port for them is
        # on the loopback, too, but what lets clients in has no reason to lead there.
        call.caller.check_admin()
        self.service.check_open()
        if adapter.id in ("", BASE_MODEL_ADAPTER_ID):
            raise ValidationError("`adapter_id` must name an adapter")
        selection = self._selections.selection_of(adapter_parameters(adapter, call.bearer_token))
        assert selection is not None
        return selection


def _timed(domain: GenerateRequest, call: PublicCall) -> GenerateRequest:
    """Return a request that is to be answered before the deadline of its call."""
    seconds = call.timeout_s
    if seconds is None:
        return domain
    timeout_s = max(seconds, _LEAST_TIMEOUT_S)
    return replace(domain, parameters=replace(domain.parameters, timeout_s=timeout_s))
