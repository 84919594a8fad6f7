"""The tokenizer's routes: LoRAX's ``/tokenize``, both of vLLM's, and both of TEI's."""

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
    DecodeBody,
    DetokenizeAnswer,
    DetokenizeBody,
    TokenIdsAnswer,
    TokenizeBody,
)
from lorax_router.service.inference import InferenceService
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.service.prompts.tokenization import Tokenization

_Answer = list[TokenizeAnswerToken] | list[list[TokenizeAnswerToken]] | TokenIdsAnswer


class TokenizerRoutes:
    """Handlers of ``/tokenize``, ``/detokenize`` and ``/decode``."""

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
            responses={200: {"model": _Answer}, **ERRORS},
            openapi_extra=json_body(TokenizeBody),
        )(self.tokenize)
        router.post(
            "/detokenize",
            summary="Make a text of token ids",
            operation_id="detokenize",
            responses={200: {"model": DetokenizeAnswer}, **ERRORS},
            openapi_extra=json_body(DetokenizeBody),
        )(self.detokenize)
        router.post(
            "/decode",
            summary="Make texts of token ids",
            operation_id="decode",
            responses={200: {"model": list[str]}, **ERRORS},
            openapi_extra=json_body(DecodeBody),
        )(self.decode)
        return router

    async def tokenize(self, request: Request) -> Response:
        """Answer with an array of tokens (LoRAX's body), or with ids (vLLM's)."""
        body = await self._body(request, TokenizeBody)
        body.check()
        if body.inputs is None:
            return await self._ids(body)
        adds = body.add_special_tokens is not False
        if isinstance(body.inputs, list):
            return await self._listed(body.inputs, adds)
        spans = await self._tokenization.spans(body.inputs, add_special_tokens=adds)
        # A long text has many tokens: their answer is written off the event loop, too.
        answer = await self._tokenization.pool.run(spans_json, spans)
        return Response(answer, media_type=JSON)

    async def detokenize(self, request: Request) -> Response:
        """Answer with the text of token ids."""
        body = await self._body(request, DetokenizeBody)
        return json_response({"prompt": await self._tokenization.text(body.tokens)})

    async def decode(self, request: Request) -> Response:
        """Answer with the texts of token ids, as TEI does."""
        body = await self._body(request, DecodeBody)
        texts = [
            await self._tokenization.text(
                ids, name="ids", skip_special_tokens=body.skip_special_tokens
            )
            for ids in body.rows
        ]
        return json_response(texts)

    async def _listed(self, texts: list[str], adds: bool) -> Response:
        """Answer with the tokens of each text, as TEI does."""
        answers = []
        for text in texts:
            spans = await self._tokenization.spans(text, add_special_tokens=adds)
            special = self._tokenization.special_tokens
            answers.append(await self._tokenization.pool.run(spans_json, spans, special))
        return Response(b"[" + b",".join(answers) + b"]", media_type=JSON)

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
