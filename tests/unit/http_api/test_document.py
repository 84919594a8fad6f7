"""The OpenAPI document and the page that shows it: true, and from this process alone."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.helpers.http_app import World, limits

# Of LoRAX's document: what the same thing is called.
LORAX_SCHEMAS = {
    "GenerateRequest", "CompatGenerateRequest", "GenerateParameters", "AdapterParameters",
    "GenerateResponse", "Details", "BestOfSequence", "PrefillToken", "Token", "AlternativeToken",
    "FinishReason", "StreamResponse", "StreamDetails", "ErrorResponse", "Info", "TokenizeRequest",
    "SimpleToken",
}  # fmt: skip
ROUTES = {
    "/": {"get", "post"}, "/invocations": {"post"}, "/generate": {"post"},
    "/generate_stream": {"post"}, "/health": {"get"}, "/ping": {"get"}, "/startup": {"get"},
    "/info": {"get"}, "/metrics": {"get"}, "/tokenize": {"post"}, "/detokenize": {"post"},
    "/v1/completions": {"post"}, "/v1/chat/completions": {"post"}, "/v1/models": {"get"},
    "/v1/embeddings": {"post"}, "/embed": {"post"}, "/classify": {"post"},
    "/classify_batch": {"post"}, "/predict": {"post"}, "/rerank": {"post"}, "/v1/rerank": {"post"},
    "/v2/rerank": {"post"}, "/score": {"post"}, "/v1/score": {"post"},
    "/similarity": {"post"}, "/embed_all": {"post"}, "/embed_sparse": {"post"},
    "/embeddings": {"post"}, "/decode": {"post"},
    "/v1/models/{model}": {"get"}, "/v1/responses": {"post"}, "/v1/messages": {"post"},
    "/v1/messages/count_tokens": {"post"},
}  # fmt: skip


def get(path: str, **settings: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with World(**settings).client() as client:
            return await client.get(path)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def document() -> Any:
    bounds = limits(max_best_of=3, max_stop_sequences=5)
    return get("/api-doc/openapi.json", bounds=bounds).json()


def nodes(tree: Any) -> list[dict[str, Any]]:
    children = tree.values() if isinstance(tree, dict) else tree
    found = [tree] if isinstance(tree, dict) else []
    return found + [
        node for each in children if isinstance(each, dict | list) for node in nodes(each)
    ]


def operations(document: Any) -> list[tuple[str, Any]]:
    return [
        (f"{verb} {path}", told)
        for path, verbs in document["paths"].items()
        for verb, told in verbs.items()
    ]


def test_the_document_has_every_route(document):
    assert {path: set(verbs) for path, verbs in document["paths"].items()} == ROUTES


def test_what_the_document_names_it_defines_and_the_other_way_round(document):
    named = {each["$ref"].rpartition("/")[2] for each in nodes(document) if "$ref" in each}
    assert named == set(document["components"]["schemas"])


def test_what_lorax_has_too_has_lorax_s_name(document):
    schemas = document["components"]["schemas"]
    assert set(schemas) >= LORAX_SCHEMAS
    assert all(schema.get("title", name) == name for name, schema in schemas.items())
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/GenerateRequest"}


def test_bounds_are_lorax_s_and_this_server_s(document):
    fields = document["components"]["schemas"]["GenerateParameters"]["properties"]
    assert fields["top_p"]["exclusiveMinimum"] == 0.0
    assert fields["top_p"]["maximum"] == 1.0
    assert fields["temperature"]["minimum"] == 0.0
    assert fields["best_of"]["maximum"] == 3
    assert fields["stop"]["maxItems"] == 5
    assert fields["adapter_source"]["enum"] == ["hub", "local", "s3", None]
    assert fields["repetition_penalty"]["examples"] == [1.03]
    prompt = document["components"]["schemas"]["GenerateRequest"]["properties"]["inputs"]
    assert prompt["minLength"] == 1


def test_every_route_tells_the_statuses_that_it_can_answer_with(document):
    anywhere = {"200", "400", "408", "429", "500"}
    for name, told in operations(document):
        of_bodies = {"413", "415", "503"} | ({"404"} if " /v1/" in name else {"422", "424"})
        expected = anywhere | of_bodies if "post" in name else anywhere
        assert set(told["responses"]) >= expected, name
        for status, response in told["responses"].items():
            if status != "200":
                shape = response["content"]["application/json"]["schema"]
                # What fails before a route is reached has LoRAX's shape.
                own = {"ErrorResponse"} | ({"OpenAIErrorResponse"} if " /v1/" in name else set())
                if " /v1/messages" in name:
                    own = {"ErrorResponse", "AnthropicErrorResponse"}
                if " /v1/models" in name:
                    own |= {"AnthropicErrorResponse"}
                for each in shape.get("anyOf", [shape]):
                    assert each["$ref"].rpartition("/")[2] in own, (name, status)


@pytest.mark.parametrize("path", ["/generate_stream", "/", "/invocations"])
def test_event_streams_are_told_as_such(document, path):
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    schema = content["text/event-stream"]["schema"]["properties"]["data"]["contentSchema"]
    assert [each["$ref"].rpartition("/")[2] for each in schema["oneOf"]] == [
        "StreamResponse", "ErrorResponse",
    ]  # fmt: skip
    assert ("application/json" in content) == (path != "/generate_stream")


def test_probes_answer_with_nothing(document):
    for path in ("/health", "/ping", "/startup"):
        assert "content" not in document["paths"][path]["get"]["responses"]["200"]


def test_the_document_is_the_same_each_time_and_under_both_names():
    async def run() -> list[Any]:
        async with World().client() as client:
            paths = ("/api-doc/openapi.json", "/openapi.json", "/api-doc/openapi.json")
            return [(await client.get(path)).json() for path in paths]

    first, *others = asyncio.run(run())
    assert others == [first, first]


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
def test_the_page_and_all_that_it_loads_come_from_this_process(path):
    async def run() -> tuple[str, list[httpx.Response]]:
        async with World().client() as client:
            page = (await client.get(path)).text
            loaded = re.findall(r"(?:src|href)=\"([^\"]+)\"", page)
            return page, [await client.get(each) for each in loaded]

    page, loaded = asyncio.run(run())
    assert "//" not in re.sub(r"<!--.*?-->", "", page).replace("</", "")
    assert len(loaded) == 3
    assert {each.status_code for each in loaded} == {200}
    assert "openapi.json" in page
    # Swagger UI would have others look at the document, from the reader's browser.
    assert re.search(r"\"validatorUrl\": null", page)


MIGRATION = Path(__file__).parents[3] / "docs" / "migration.md"
SERVED = {"the same", "new", "works", "OpenAI's"}


def promised(title: str) -> dict[str, str]:
    """What a table of the migration page says of each name."""
    section = MIGRATION.read_text().partition(f"### {title}")[2].partition("\n#")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.MULTILINE)
    return {name: here for names, here in rows for name in re.findall(r"`([^`]+)`", names)}


def test_what_the_migration_page_promises_of_lorax_s_routes_is_in_the_document(document):
    served = {*ROUTES, "/docs", "/api-doc/openapi.json"}
    promises = {
        name.removeprefix("GET ").removeprefix("POST "): here
        for name, here in promised("Routes").items()
    }
    assert served <= {path for path, here in promises.items() if here in SERVED}
    assert not served & {path for path, here in promises.items() if here == "later"}


def test_what_the_migration_page_promises_of_fields_is_taken(document):
    fields = document["components"]["schemas"]["GenerateParameters"]["properties"]
    found = promised("Fields of `parameters`")
    assert set(fields) <= set(found)
    assert {name for name, here in found.items() if here in SERVED} <= set(fields)
