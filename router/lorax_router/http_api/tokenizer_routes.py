"""The tokenizer's routes: LoRAX's ``/tokenize``, and both of vLLM's."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import ValidationError
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.json_body import Body, parse_body, read_body
from lorax_router.http_api.lorax.encode import spans_json
from lorax_router.http_api.lorax.schemas import TokenizeAnswerToken
from lorax_router.http_api.openapi import ERRORS, json_body
from lorax_router.http_api.responses import JSON, json_response
from lorax_router.http_api.tokenizer_bodies import (
    DetokenizeAnswer,
    DetokenizeBody,
    TokenIdsAnswer,
    TokenizeBody,
)
from lorax_router.service.inference import InferenceService
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.service.prompts.tokenization import Tokenization


class TokenizerRoutes:
    """Handlers of ``/tokenize`` and ``/detokenize``."""

    def __init__(
        self,
        service: InferenceService,
        tokenization: Tokenization,
        metrics: Metrics,
        *,
        max_body_bytes: int,
    ) -> None:
        self._service = service
        self._tokenization = tokenization
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    def router(self) -> APIRouter:
        """The routes with their documentation."""
        router = APIRouter(tags=["Tokenization"])
        router.post(
            "/tokenize",
            summary="Tokenize a text or a chat",
            operation_id="tokenize",
            responses={200: {"model": list[TokenizeAnswerToken] | TokenIdsAnswer}, **ERRORS},
            openapi_extra=json_body(TokenizeBody),
        )(self.tokenize)
        router.post(
            "/detokenize",
            summary="Make a text of token ids",
            operation_id="detokenize",
            responses={200: {"model": DetokenizeAnswer}, **ERRORS},
            openapi_extra=json_body(DetokenizeBody),
        )(self.detokenize)
        return router

    async def tokenize(self, request: Request) -> Response:
        """Answer with an array of tokens (LoRAX's body), or with ids (vLLM's)."""
        body = await self._body(request, TokenizeBody)
        body.check()
        if body.inputs is None:
            return await self._ids(body)
        spans = await self._tokenization.spans(
            body.inputs, add_special_tokens=body.add_special_tokens is not False
        )
        # A long text has many tokens: their answer is written off the event loop, too.
        answer = await self._tokenization.pool.run(spans_json, spans)
        return Response(answer, media_type=JSON)

    async def detokenize(self, request: Request) -> Response:
        """Answer with the text of token ids."""
        body = await self._body(request, DetokenizeBody)
        return json_response({"prompt": await self._tokenization.text(body.tokens)})

    async def _ids(self, body: TokenizeBody) -> Response:
        try:
            ids = await self._tokenization.ids(body.to_prompt())
        except ValidationError as error:
            name = "`messages`" if body.prompt is None else "`prompt`"
            raise ValidationError(str(error).replace("`inputs`", name)) from error
        strings = await self._tokenization.strings(ids) if body.return_token_strs else None
        document = {
            "count": len(ids),
            "max_model_len": self._tokenization.limits.max_total_tokens,
            "tokens": ids,
            "token_strs": strings,
        }
        return json_response(document)

    async def _body(self, request: Request, model: type[Body]) -> Body:
        self._service.start_request(caller_of(request))
        body = parse_body(model, await read_body(request, self._max_body_bytes))
        self._metrics.unknown_fields(body.num_unknown_fields())
        return body
