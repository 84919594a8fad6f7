"""vLLM's two routes by which adapters get and lose a name, with its answers."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_contract.errors import (
    AdapterNotLoadedError,
    LoraxError,
    ValidationError,
)
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.json_body import Body, StrictBody, parse_body, read_body
from lorax_router.http_api.openai.errors import OpenAIRoute, envelope, error_status
from lorax_router.http_api.openai.schemas import ERRORS
from lorax_router.http_api.openapi import json_body
from lorax_router.http_api.responses import json_response
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.management import AdapterManager
from lorax_router.service.adapters.selection import SelectionPolicy
from lorax_router.service.inference import InferenceService
from lorax_router.service.metrics.recorder import Metrics

_TEXT = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "It is done"}
_ABSENT = (Reason.NOT_FOUND, Reason.NO_ACCESS, Reason.OFFLINE)


class LoadLoRAAdapterRequest(StrictBody):
    """An adapter that gets a name."""

    lora_name: str = ""
    """What requests will send as their model."""
    lora_path: str = ""
    """A folder below `--adapter-local-root`, an `s3://` prefix, or an id of the hub."""
    load_inplace: bool = False
    """Let a name that there is stand for this adapter from now on."""
    lora_int_id: int | None = None
    """Taken, and not used."""
    is_3d_lora_weight: bool = False
    """Taken, and not used: the weights say it."""


class UnloadLoRAAdapterRequest(StrictBody):
    """A name that is taken back."""

    lora_name: str = ""
    lora_int_id: int | None = None
    """Taken, and not used."""


class _LoraRoute(OpenAIRoute):
    """A route whose errors have vLLM's types, and the status as their code."""

    def response_of(self, error: LoraxError, request: Request) -> Response:
        """Return the response of an error."""
        status, kind = _shown(error)
        document = envelope(error)
        document["error"].update(type=kind, param=None, code=status)
        return json_response(document, status)


class LoraRoutes:
    """Handlers of ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``."""

    def __init__(
        self,
        service: InferenceService,
        manager: AdapterManager,
        selections: SelectionPolicy,
        metrics: Metrics,
        *,
        max_body_bytes: int,
    ) -> None:
        self._service = service
        self._manager = manager
        self._selections = selections
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    def router(self, *, has_keys: bool = True) -> APIRouter:
        """The routes with their documentation, for those who may manage.

        Without keys where clients ask (``has_keys``) nobody may, and the document is silent.
        """
        router = APIRouter(tags=["adapters"], route_class=_LoraRoute, include_in_schema=has_keys)
        router.post(
            "/v1/load_lora_adapter",
            summary="Have an adapter ready under a name",
            operation_id="load_lora_adapter",
            responses={200: _TEXT, **ERRORS},
            openapi_extra=json_body(LoadLoRAAdapterRequest),
        )(self.load)
        router.post(
            "/v1/unload_lora_adapter",
            summary="Take a name back, and free what it alone led to",
            operation_id="unload_lora_adapter",
            responses={200: _TEXT, **ERRORS},
            openapi_extra=json_body(UnloadLoRAAdapterRequest),
        )(self.unload)
        return router

    async def load(self, request: Request) -> Response:
        """Answer when the adapter is there."""
        body = await self._body(request, LoadLoRAAdapterRequest)
        if not body.lora_name or not body.lora_path:
            raise ValidationError("`lora_name` and `lora_path` must both be given")
        if self._selections.refusal is not None:
            raise ValidationError(f"`lora_path`: {self._selections.refusal}")
        ref = AdapterRef.parse(body.lora_path, self._selections.default_source)
        target = AdapterSelection(refs=(ref,))
        alias = self._selections.aliases.make(body.lora_name, target)
        await self._manager.name(alias, caller_of(request), in_place=body.load_inplace)
        return _done(body.lora_name, "added")

    async def unload(self, request: Request) -> Response:
        """Answer when what nobody else needs is free."""
        body = await self._body(request, UnloadLoRAAdapterRequest)
        if not body.lora_name:
            raise ValidationError("`lora_name` must be given")
        alias = self._selections.aliases.find(body.lora_name)
        if alias is None or not caller_of(request).sees(alias.ref):
            raise AdapterNotLoadedError(f"the lora adapter '{body.lora_name}' cannot be found")
        await self._manager.unload(alias.selection, caller_of(request))
        return _done(body.lora_name, "removed")

    async def _body(self, request: Request, model: type[Body]) -> Body:
        caller_of(request).check_admin()
        self._service.check_open()
        body = parse_body(model, await read_body(request, self._max_body_bytes))
        self._metrics.unknown_fields(body.num_unknown_fields())
        return body


def _done(name: str, what: str) -> Response:
    return PlainTextResponse(f"Success: LoRA adapter '{name}' {what} successfully.")


def _shown(error: LoraxError) -> tuple[int, str]:
    """Return an error's status and what vLLM calls its kind."""
    status = error_status(error)
    if isinstance(error, AdapterUnavailableError) and error.reason in _ABSENT:
        status = 404
    if status == 404:
        return status, "NotFoundError"
    if isinstance(error, ValidationError):
        return status, "InvalidUserInput"
    return status, "InternalServerError" if status >= 500 else "BadRequestError"
