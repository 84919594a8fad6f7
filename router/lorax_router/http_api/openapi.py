"""What the OpenAPI document needs beyond what FastAPI finds by itself.

Routes read their bodies themselves (bounded, strict) and write bytes, so their shapes are told
here. Where a thing is the same as LoRAX's, it has LoRAX's name in the document.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lorax_router.http_api.lorax.schemas import ErrorAnswer

Responses = dict[int | str, dict[str, Any]]

EVENT_STREAM = "text/event-stream"
_REF = "#/components/schemas/{model}"
# Names of LoRAX that do not follow from ours by the endings below.
_LORAX_NAMES = {
    "ParametersBody": "GenerateParameters",
    "MergedAdaptersBody": "AdapterParameters",
    "StreamEvent": "StreamResponse",
    "InfoAnswer": "Info",
    "TokenizeAnswerToken": "SimpleToken",
}
_RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds after which it is worth another try.",
        "schema": {"type": "integer", "minimum": 0},
    }
}


def errors(texts: Mapping[int, str]) -> Responses:
    """Return the responses of these statuses, each with LoRAX's shape of an error."""
    return {
        status: {
            "model": ErrorAnswer,
            "description": text,
            **({"headers": _RETRY_AFTER} if status in (429, 503) else {}),
        }
        for status, text in texts.items()
    }


# Answers that a request to any route can get.
ANYWHERE = errors(
    {
        400: "The request is not HTTP, or its head is too long",
        408: "The request did not come in time",
        429: "The server is overloaded, or has no connection left",
        500: "An unexpected error",
    }
)
# Answers that every route with a body can give.
ERRORS = {
    **ANYWHERE,
    **errors(
        {
            400: "The body is not JSON, or the request is not HTTP",
            413: "The body is too large",
            415: "The content type is not JSON",
            422: "A value is out of bounds or of the wrong type",
            424: "The request failed in a shard, or its adapter could not be had",
            429: "The server is overloaded",
            500: "The output is incomplete, or an unexpected error",
            503: "The server is shutting down",
        }
    ),
}


def reference(model: type[BaseModel]) -> dict[str, str]:
    """Return the reference to a model that ``add_schemas`` defines."""
    return {"$ref": _REF.format(model=model.__name__)}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The request body of a route that parses ``model`` itself."""
    content = {"application/json": {"schema": reference(model)}}
    return {"requestBody": {"required": True, "content": content}}


def event_stream(model: type[BaseModel], error: type[BaseModel] = ErrorAnswer) -> dict[str, Any]:
    """The content of a stream whose events hold ``model``, or an error as the last one.

    Told as OpenAPI 3.2 tells it: the schema is that of an event, which is JSON in its ``data``.
    """
    held = {"oneOf": [reference(model), reference(error)]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": held}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {EVENT_STREAM: {"schema": event}}


def add_schemas(
    app: FastAPI,
    bodies: Sequence[type[BaseModel]],
    answers: Sequence[type[BaseModel]] = (),
    limits: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> None:
    """Complete the document of ``app``.

    ``bodies`` and ``answers`` are the models that ``json_body`` and ``event_stream`` name; ``limits``
    are keywords of this server's own by model and field.
    """
    build = app.openapi
    finished: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not finished:
            document = build()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for mode, models in (("serialization", answers), ("validation", bodies)):
                _, shared = models_json_schema(
                    [(model, mode) for model in models],  # type: ignore[misc]
                    ref_template=_REF,
                )
                schemas.update(shared.get("$defs", {}))
            for model, fields in (limits or {}).items():
                for field, keywords in fields.items():
                    schemas[model]["properties"][field].update(keywords)
            finished.update(_renamed(document))
        return finished

    app.openapi = openapi  # type: ignore[method-assign]


def add_keys(app: FastAPI, open_paths: Container[str]) -> None:
    """Make the document of ``app`` say that calls need a key, but for GETs of some paths."""
    build = app.openapi
    finished: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not finished:
            document = build()
            document["components"]["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    if method == "get" and path in open_paths:
                        continue
                    operation["security"] = [{"bearer": []}, {"x-api-key": []}]
                    for status, text in (
                        ("401", "The API key is missing or not known"),
                        ("403", "The caller may not do that"),
                    ):
                        # In the envelope of whatever goes wrong there.
                        answers = operation["responses"]
                        answers.setdefault(
                            status, {"description": text, "content": answers["500"]["content"]}
                        )
            finished.update(document)
        return finished

    app.openapi = openapi  # type: ignore[method-assign]


def public_name(name: str) -> str:
    """Return what the document calls a model."""
    if (published := _LORAX_NAMES.get(name)) is not None:
        return published
    return re.sub(r"Body$", "Request", re.sub(r"Answer$", "Response", name))


def _renamed(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document["components"]["schemas"]
    document["components"]["schemas"] = {
        public_name(name): {**schema, "title": public_name(name)}
        for name, schema in schemas.items()
    }
    prefix = _REF.format(model="")
    pending: list[Any] = [document]
    while pending:
        node = pending.pop()
        children = node.values() if isinstance(node, dict) else node
        if isinstance(node, dict) and str(node.get("$ref", "")).startswith(prefix):
            node["$ref"] = prefix + public_name(node["$ref"].removeprefix(prefix))
        pending += [each for each in children if isinstance(each, dict | list)]
    return document
