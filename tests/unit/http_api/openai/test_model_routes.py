"""`/v1/models`: what can be named, as OpenAI's SDK reads it."""

from __future__ import annotations

import pytest
from tests.helpers.adapter_world import adapter_world
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import AdapterQuery, AdapterUnavailableError, Reason


@in_loop
async def test_the_list_has_the_base_and_every_adapter():
    async with adapter_world(
        served_model_names=["shown"], adapter_aliases=["poet=local:a"], max_total_tokens=200
    ) as world:
        await world.generate("org/x", adapter_source="hub")
        document = (await world.client.get("/v1/models")).json()
        assert document["object"] == "list"
        created = [each.pop("created") for each in document["data"]]
        assert all(isinstance(each, int) for each in created)
        shared = {"object": "model", "owned_by": "lorax-py", "max_model_len": 200}
        assert document["data"] == [
            {"id": "shown", "root": "fake", "parent": None, **shared},
            {"id": "poet", "root": "a", "parent": "shown", **shared},
            {"id": "org/x", "root": "org/x", "parent": "shown", **shared},
        ]


@pytest.mark.parametrize(
    "path", ["org/x", "org%2Fx", "fake", "poet", "local:a/b", "local:a%2Fb", "s3://bucket/x"]
)
def test_a_model_is_told_by_its_id_slashes_and_all(path):
    @in_loop
    async def scene():
        async with adapter_world(adapter_aliases=["poet=local:a"]) as world:
            await world.generate("org/x", adapter_source="hub")
            await world.generate("a/b")
            await world.generate("bucket/x", adapter_source="s3")
            answer = await world.client.get(f"/v1/models/{path}")
            assert answer.status_code == 200
            assert answer.json()["id"] == path.replace("%2F", "/")

    scene()


@pytest.mark.parametrize("path", ["nobody", "org/nobody", "alias:nobody", "a%00b", ""])
def test_an_unknown_model_is_not_found_and_no_source_is_asked(path):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            answer = await world.client.get(f"/v1/models/{path}")
            assert answer.status_code == 404
            error = answer.json()["error"]
            assert (error["type"], error["param"], error["code"]) == (
                "invalid_request_error",
                "model",
                "model_not_found",
            )
            assert world.shard.queries == []

    scene()


@in_loop
async def test_a_private_adapter_is_there_for_those_whose_token_opens_it():
    async with adapter_world() as world:

        def source(query: AdapterQuery) -> object:
            from tests.helpers.adapter_world import fetched

            if query.token == "hers":
                return fetched("x", access="token")
            raise AdapterUnavailableError(Reason.NOT_FOUND, "is not on the hub")

        world.shard.on_fetch = source
        await world.generate("org/hers", adapter_source="hub", token="hers")
        for token, ids in (("hers", ["fake", "org/hers"]), ("mine", ["fake"])):
            headers = {"authorization": f"Bearer {token}"}
            listed = await world.client.get("/v1/models", headers=headers)
            assert [each["id"] for each in listed.json()["data"]] == ids
            one = await world.client.get("/v1/models/org/hers", headers=headers)
            assert one.status_code == (200 if token == "hers" else 404)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/org/x", 405, "method_not_allowed"),
    ],
)
def test_paths_that_are_not_there_are_told_in_the_dialects_envelope(method, path, status, code):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            answer = await world.client.request(method, path)
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == code
            native = await world.client.request(method, "/v1/adapters/nothing")
            assert isinstance(native.json()["error"], str)

    scene()


@in_loop
async def test_the_document_tells_of_them():
    async with adapter_world() as world:
        document = (await world.client.get("/openapi.json")).json()
        assert {"/v1/models", "/v1/models/{model}"} <= set(document["paths"])
        assert {"Model", "ListModelsResponse", "OpenAIErrorResponse"} <= set(
            document["components"]["schemas"]
        )
