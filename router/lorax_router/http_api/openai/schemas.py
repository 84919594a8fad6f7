"""Shapes of OpenAI's answers, under the names of its own document, for our OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from lorax_router.http_api.openapi import ANYWHERE, Responses


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    # The field that is at fault, by its name in the body.
    param: str | None
    # vLLM's routes give the status.
    code: str | int | None


class OpenAIErrorResponse(BaseModel):
    """The body of every error."""

    error: Error


# Answers that every route with a body can give. What the connection answers, before there is a
# path, has the shape that it has everywhere.
ERRORS: Responses = {
    408: ANYWHERE[408],
    **{
        status: {"model": OpenAIErrorResponse, "description": text}
        for status, text in {
            400: "The body is not JSON, or a value is out of bounds or of the wrong type",
            404: "There is no such model",
            413: "The body is too large",
            415: "The content type is not JSON",
            429: "The server is overloaded",
            500: "The request failed in a shard, or an unexpected error",
            503: "The adapter cannot be had now, or the server is shutting down",
        }.items()
    },
}


class Model(BaseModel):
    """A model that requests can name: the base, or an adapter on it."""

    id: str
    object: Literal["model"]
    # Unix time at which the server came to know it.
    created: int
    owned_by: str
    # What the id stands for: the model, or the adapter's own id at its source.
    root: str
    # The base that an adapter is for; null: it is a base itself.
    parent: str | None
    # Most tokens of a prompt and its output.
    max_model_len: int


class ListModelsResponse(BaseModel):
    """The base under all its names, then the adapters that the caller may use."""

    object: Literal["list"]
    data: list[Model]
