# ruff: noqa: N802 - the methods bear the names that the proto gives them.
"""The public service ``lorax.v1``: unpack, call, pack. What goes wrong is the boundary's affair."""

from __future__ import annotations

from lorax_contract.errors import ValidationError
from lorax_proto import lorax_pb2 as pb
from lorax_router.grpc_api.auth import Asker
from lorax_router.grpc_api.generating import GeneratingServicer
from lorax_router.grpc_api.requests import (
    adapter_parameters,
    chat_prompt,
    given,
    list_query,
)
from lorax_router.grpc_api.responses import (
    adapter_info,
    chat_tokens_response,
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
from lorax_router.service.requests import BASE_MODEL_ADAPTER_ID


class PublicServicer(GeneratingServicer):
    """The methods of the service; ``CallBoundary`` goes around them, and a link around some."""

    def __init__(
        self,
        service: InferenceService,
        manager: AdapterManager,
        selections: SelectionPolicy,
        metrics: Metrics,
        tokenization: Tokenization,
        info: ServerInfo,
    ) -> None:
        super().__init__(service, service.ledger, service)
        self._inference = service
        self._manager = manager
        self._selections = selections
        self.metrics = metrics
        self._tokenization = tokenization
        self._info = info_response(info)

    # --- texts and tokens ---------------------------------------------------------

    async def Tokenize(self, request: pb.TokenizeRequest, call: Asker) -> pb.TokenizeResponse:
        """Answer with the tokens of a text, or of a chat as it is rendered."""
        self._inference.check_open()
        self._inference.start_request(call.caller)
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

    async def Detokenize(self, request: pb.DetokenizeRequest, call: Asker) -> pb.DetokenizeResponse:
        """Answer with the text of token ids."""
        self._inference.check_open()
        self._inference.start_request(call.caller)
        return pb.DetokenizeResponse(text=await self._tokenization.text(request.ids))

    # --- the server ---------------------------------------------------------------

    async def Info(self, request: pb.InfoRequest, call: Asker) -> pb.InfoResponse:
        """Answer with the model and its limits."""
        return self._info

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, call: Asker
    ) -> pb.ListAdaptersResponse:
        """Answer with a page of the known adapters."""
        page = await self._manager.pages.listing(
            list_query(request), call.bearer_token, call.caller
        )
        adapters = map(adapter_info, page["adapters"])
        return pb.ListAdaptersResponse(adapters=adapters, next_page_token=page["next_cursor"])

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, call: Asker
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
        self, request: pb.UnloadAdapterRequest, call: Asker
    ) -> pb.UnloadAdapterResponse:
        """Answer when its memory is free."""
        document = await self._manager.unload(self._managed(request.adapter, call), call.caller)
        return pb.UnloadAdapterResponse(
            freed=pb.TierBytes(**document["freed"]), shared_with=document["shared_with"]
        )

    def _managed(self, adapter: pb.Adapter, call: Asker) -> AdapterSelection:
        """Return the adapter that somebody manages who may; ForbiddenError, ValidationError."""
        # Without keys nobody is an operator here, wherever the listener is: HTTP's port for them is
        # on the loopback, too, but what lets clients in has no reason to lead there.
        call.caller.check_admin()
        self._inference.check_open()
        if adapter.id in ("", BASE_MODEL_ADAPTER_ID):
            raise ValidationError("`adapter_id` must name an adapter")
        selection = self._selections.selection_of(adapter_parameters(adapter, call.bearer_token))
        assert selection is not None
        return selection
