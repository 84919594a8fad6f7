"""What the OpenAPI document needs beyond what FastAPI finds by itself.

Routes read their bodies themselves (bounded, strict), so their shapes are told here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lorax_router.http_api.lorax.schemas import ErrorAnswer

_REF = "#/components/schemas/{model}"

# Answers that every route with a body can give.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "The body is not JSON",
        413: "The body is too large",
        415: "The content type is not JSON",
        422: "A value is out of bounds or of the wrong type",
        424: "The request failed in a shard",
        429: "The server is overloaded",
        500: "The output is incomplete, or an unexpected error",
        503: "The server is shutting down",
    }.items()
}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The request body of a route that parses ``model`` itself."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def add_body_schemas(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Make the document of ``app`` define the bodies that ``json_body`` names."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        document = build()
        _, shared = models_json_schema(
            [(model, "validation") for model in bodies], ref_template=_REF
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(shared["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]
