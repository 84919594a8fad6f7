"""OpenAI's envelope: the status that its SDKs expect, the field by the client's own name."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from lorax_contract import errors
from lorax_contract.adapters import AdapterUnavailableError, Reason, refused
from lorax_contract.errors import LoraxError
from lorax_router.http_api.openai.errors import (
    OpenAIRoute,
    envelope,
    error_status,
    http_error_response,
    openai_error_response,
)

INVALID = "invalid_request_error"


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.ValidationError("`seed` is odd"), 400, INVALID, None),
        (errors.BadRequestError("no JSON"), 400, INVALID, None),
        (errors.TemplateError("none"), 400, INVALID, None),
        (refused("its peft_type is not served"), 400, INVALID, None),
        (errors.ForbiddenError("not here"), 403, INVALID, "insufficient_permissions"),
        (errors.ModelNotFoundError("no such model"), 404, INVALID, "model_not_found"),
        (errors.AdapterNotLoadedError("not loaded"), 404, INVALID, "not_found"),
        (errors.SlowRequestError("late"), 408, INVALID, "request_timeout"),
        (errors.PayloadTooLargeError("large"), 413, INVALID, "request_too_large"),
        (errors.UnsupportedMediaTypeError("xml"), 415, INVALID, "unsupported_media_type"),
        (errors.OverloadedError(), 429, "rate_limit_error", "rate_limit_exceeded"),
        (errors.GenerationError("boom"), 500, "server_error", "generation"),
        (errors.IncompleteGenerationError(), 500, "server_error", "incomplete_generation"),
        (errors.ShardUnavailableError("gone"), 500, "server_error", "generation"),
        (errors.ShuttingDownError(), 503, "server_error", "service_unavailable"),
        (
            AdapterUnavailableError(Reason.TRANSIENT, "the hub is down"),
            503, "server_error", "service_unavailable",
        ),
        (LoraxError(public=""), 500, "server_error", "internal"),
    ],
)  # fmt: skip
def test_every_error_has_its_status_type_and_code(
    error: LoraxError, status: int, kind: str, code: str | None
) -> None:
    response = openai_error_response(error)
    assert response.status_code == error_status(error) == status
    shown = envelope(error)["error"]
    assert (shown["type"], shown["code"]) == (kind, code)
    assert shown["message"]
    assert set(shown) == {"message", "type", "param", "code"}


def test_no_error_of_the_tree_is_a_422_or_a_424() -> None:
    """The SDK has an exception for 422 that nobody catches, and none for 424."""

    def kinds(cls: type[LoraxError]) -> set[type[LoraxError]]:
        return {cls}.union(*(kinds(each) for each in cls.__subclasses__()))

    of_the_tree = {cls for cls in kinds(LoraxError) if cls.__module__ == errors.__name__}
    for cls in of_the_tree - {errors.StartupError}:
        assert error_status(cls("words")) in {
            400,
            401,
            403,
            404,
            408,
            409,
            413,
            415,
            429,
            500,
            503,
            504,
        }
    for reason in Reason:
        assert error_status(AdapterUnavailableError(reason, "words")) in {400, 503}


def test_fields_are_named_as_the_client_named_them() -> None:
    error = errors.ValidationError("`max_new_tokens` and `min_new_tokens` contradict each other")
    assert envelope(error)["error"] == {
        "message": "`max_tokens` and `min_tokens` contradict each other",
        "type": INVALID,
        "param": "max_tokens",
        "code": None,
    }
    own = {"max_new_tokens": "max_completion_tokens", "inputs": "messages"}
    shown = envelope(errors.ValidationError("`max_new_tokens` is too large"), own)["error"]
    assert (shown["message"], shown["param"]) == (
        "`max_completion_tokens` is too large",
        "max_completion_tokens",
    )
    shown = envelope(errors.ValidationError("`inputs.0.role`: unknown"), own)["error"]
    assert shown["param"] == "messages.0.role"


def test_what_is_no_fault_of_a_field_names_none() -> None:
    assert envelope(errors.ValidationError("it is too long"))["error"]["param"] is None
    assert envelope(errors.OverloadedError("`seed`"))["error"]["param"] is None
    assert envelope(errors.ModelNotFoundError("`seed`"))["error"]["param"] == "model"


def test_what_went_on_between_router_and_shard_stays_inside() -> None:
    shown = envelope(errors.ShardUnavailableError("unix:/run/secret"))["error"]
    assert "secret" not in shown["message"]


def test_when_to_come_again_is_told() -> None:
    assert openai_error_response(errors.OverloadedError()).headers["retry-after"] == "1"
    later = AdapterUnavailableError(Reason.TRANSIENT, "down", retry_after_s=7.2)
    assert openai_error_response(later).headers["retry-after"] == "7"
    for_good = AdapterUnavailableError(Reason.REFUSED, "no", retry_after_s=7.2)
    for error in (errors.ValidationError("x"), for_good):
        assert "retry-after" not in openai_error_response(error).headers


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (errors.ValidationError("`seed` is odd"), 400, "`seed` is odd"),
        (ValueError("a secret"), 500, "Internal error"),
    ],
)
def test_a_route_of_the_dialect_answers_in_its_envelope(
    error: Exception, status: int, message: str
) -> None:
    router = APIRouter(route_class=OpenAIRoute)

    @router.get("/v1/thing")
    async def fail() -> None:
        raise error

    app = FastAPI()
    app.include_router(router)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            return await client.get("/v1/thing")

    answer = asyncio.run(ask())
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == message


def test_every_answer_of_the_dialect_names_itself_as_its_sdk_reads_it() -> None:
    router = APIRouter(route_class=OpenAIRoute)

    @router.get("/v1/thing")
    async def answer() -> dict[str, str]:
        return {}

    app = FastAPI()
    app.include_router(router)

    async def ask() -> list[str]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            return [(await client.get("/v1/thing")).headers["x-request-id"] for _ in range(2)]

    refused = openai_error_response(errors.ValidationError("x")).headers["x-request-id"]
    unrouted = http_error_response(404, "x", {}).headers["x-request-id"]
    ids = [*asyncio.run(ask()), refused, unrouted]
    assert all(each.startswith("req_") for each in ids)
    assert len(set(ids)) == len(ids)
