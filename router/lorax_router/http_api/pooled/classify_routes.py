"""``/classify``, ``/classify_batch`` and ``/predict``: what a classification head says of texts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import ValidationError
from lorax_contract.step import OutputKind
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.disconnect import ClientGoneError
from lorax_router.http_api.fan_out import answers_of, fanned
from lorax_router.http_api.json_text import Json
from lorax_router.http_api.openapi import ERRORS, json_body
from lorax_router.http_api.pooled.asking import AT_ONCE, pooled_request
from lorax_router.http_api.pooled.bodies import (
    ClassifyBatchBody,
    ClassifyBody,
    LabelBody,
    PredictBody,
)
from lorax_router.http_api.pooled.schemas import (
    AdapterFault,
    AdapterLabels,
    ClassificationAnswer,
    EntityAnswer,
    LabelAnswer,
)
from lorax_router.http_api.responses import json_response
from lorax_router.service.labels import entities_of, head_of, labels_of, scores_of, text_head
from lorax_router.service.requests import GenerateRequest
from lorax_router.service.results import GenerateResult

_Answer = list[EntityAnswer] | list[LabelAnswer]


class ClassifyRoutes:
    """Handlers of the routes that classify texts."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def router(self) -> APIRouter:
        """The routes with their documentation."""
        router = APIRouter(tags=["classification"])
        router.post(
            "/classify",
            summary="Name the entities of a text, or its labels",
            operation_id="classify",
            responses={
                200: {"model": _Answer | ClassificationAnswer | list[AdapterLabels | AdapterFault]},
                **ERRORS,
            },
            openapi_extra=json_body(ClassifyBody),
        )(self.classify)
        router.post(
            "/classify_batch",
            summary="Name the entities of several texts, or their labels",
            operation_id="classify_batch",
            responses={200: {"model": list[_Answer]}, **ERRORS},
            openapi_extra=json_body(ClassifyBatchBody),
        )(self.classify_batch)
        router.post(
            "/predict",
            summary="Tell the labels of a text, of a pair, or of several",
            operation_id="predict",
            responses={200: {"model": list[LabelAnswer] | list[list[LabelAnswer]]}, **ERRORS},
            openapi_extra=json_body(PredictBody),
        )(self.predict)
        return router

    async def classify(self, request: Request) -> Response:
        """Answer with what the head says of a text; of vLLM's body in vLLM's shape."""
        body = await self._calls.read(request, ClassifyBody)
        with self._calls.becoming_one(request):
            texts = body.texts
            requests = self._requests(request, body, [(text, None) for text in texts])
            adapters = body.adapters
            if adapters is not None:
                requests = fanned(adapters, body.adapter_source, requests)
        try:
            if adapters is not None:
                found = await self._calls.answer_apart(request, requests, adapters, AT_ONCE)
                said = answers_of(adapters, found, partial(self._of_adapter, body))
                return json_response(said)
            results = await self._calls.generate(request, body, requests, AT_ONCE)
        except ClientGoneError:
            return Response()
        if body.input is None:
            answer = _said(body, results[0], texts[0])
            return json_response(answer, headers=mean_times(results))
        return json_response(self._vllm_document(body, body.model, results))

    async def classify_batch(self, request: Request) -> Response:
        """Answer with what the head says of each text, in their order."""
        body = await self._calls.read(request, ClassifyBatchBody)
        with self._calls.becoming_one(request):
            texts = body.texts
            requests = self._requests(request, body, [(text, None) for text in texts])
        try:
            results = await self._calls.generate(request, body, requests, AT_ONCE)
        except ClientGoneError:
            return Response()
        answers = zip(results, texts, strict=True)
        said = [_said(body, result, text) for result, text in answers]
        return json_response(said, headers=mean_times(results))

    async def predict(self, request: Request) -> Response:
        """Answer with all labels of texts as a whole, best first."""
        body = await self._calls.read(request, PredictBody)
        with self._calls.becoming_one(request):
            requests = self._requests(request, body, body.pairs)
        try:
            results = await self._calls.generate(request, body, requests, AT_ONCE)
        except ClientGoneError:
            return Response()
        answers = [_labels(body, result) for result in results]
        return json_response(answers if body.is_batch else answers[0])

    def _requests(
        self, request: Request, body: LabelBody, texts: Sequence[tuple[str, str | None]]
    ) -> list[GenerateRequest]:
        body.check_labels()
        parameters = body.asked(self._calls, request, OutputKind.SCORES)
        return [pooled_request(request, text, parameters, second=second) for text, second in texts]

    def _of_adapter(self, body: ClassifyBody, adapter: str, results: list[GenerateResult]) -> Json:
        """Return the answer for one of several adapters."""
        if body.inputs is None:
            return self._vllm_document(body, adapter, results)
        kind = "entities" if head_of(results[0]).classifies_tokens else "labels"
        return {kind: _said(body, results[0], body.inputs)}

    def _vllm_document(
        self, body: LabelBody, model: str | None, results: Sequence[GenerateResult]
    ) -> Json:
        return {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": self._calls.models.shown(model),
            "data": [
                {"index": index, **_classified(body, result)}
                for index, result in enumerate(results)
            ],
            "usage": usage_of(sum(result.num_prompt_tokens for result in results)),
        }


def _said(body: LabelBody, result: GenerateResult, text: str) -> list[Json]:
    """Return what a head says of a text: entities of one for tokens, else labels."""
    if not head_of(result).classifies_tokens:
        return _labels(body, result)
    if body.most is not None:
        raise ValidationError(
            "`top_k` is for labels of whole texts, and this classification head is one for tokens; "
            "leave it out"
        )
    return [asdict(entity) for entity in entities_of(result, text, body.scale)]


def mean_times(results: Sequence[GenerateResult]) -> dict[str, str]:
    """LoRAX's headers of times in whole milliseconds, of several texts their means."""
    timings = [result.timings for result in results]
    seconds = {
        "x-compute-time": fmean(each.total_s for each in timings),
        "x-validation-time": fmean(each.validation_s for each in timings),
        "x-queue-time": fmean(each.queue_s for each in timings),
        "x-inference-time": fmean(each.inference_s for each in timings),
    }
    return {name: str(round(value * 1e3)) for name, value in seconds.items()}


def usage_of(num_tokens: int) -> Json:
    """Return what so many tokens are called that nothing was generated after."""
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}


def _labels(body: LabelBody, result: GenerateResult) -> list[Json]:
    return [label._asdict() for label in labels_of(result, body.scale)[: body.most]]


def _classified(body: LabelBody, result: GenerateResult) -> Json:
    head = text_head(head_of(result))
    scores = scores_of(result, body.scale)
    label = head.labels[int(scores.argmax())]
    return {"label": label, "probs": scores.tolist(), "num_classes": len(head.labels)}
