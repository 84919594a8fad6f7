"""vLLM's two endpoints: its bodies, its answers, its errors."""

from __future__ import annotations

from typing import Any

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, fetched
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import AdapterUnavailableError, Reason, refused


async def load(world: AdapterWorld, name: str = "poet", path: str = "/a", **fields: Any) -> Any:
    body = {"lora_name": name, "lora_path": path, **fields}
    return await world.admin.post("/v1/load_lora_adapter", json=body)


async def unload(world: AdapterWorld, name: str = "poet", **fields: Any) -> Any:
    return await world.admin.post("/v1/unload_lora_adapter", json={"lora_name": name, **fields})


@in_loop
async def test_an_adapter_gets_a_name_serves_by_it_and_loses_it():
    async with adapter_world() as world:
        answer = await load(world, lora_int_id=7)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain")
        assert answer.text == "Success: LoRA adapter 'poet' added successfully."
        result = await world.generate("poet", adapter_source=None)
        assert result.adapter.label == "poet"
        assert (await world.client.get("/v1/models/poet")).json()["root"] == "/a"
        answer = await unload(world, lora_int_id=7)
        assert answer.status_code == 200
        assert answer.text == "Success: LoRA adapter 'poet' removed successfully."
        assert await world.list() == {}
        assert (await world.client.get("/v1/models/poet")).status_code == 404


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/adapters/x", "local:/adapters/x"),
        ("s3://bucket/x", "s3:s3://bucket/x"),
        ("org/x", "hub:org/x"),
        ("org/x@v1", "hub:org/x@v1"),
        ("local:x", "local:x"),
    ],
)
def test_a_path_is_a_folder_a_prefix_or_an_id(path, found):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            assert (await load(world, path=path)).status_code == 200
            assert (await world.list())["poet"]["alias_of"] == found

    scene()


@in_loop
async def test_a_name_that_is_there_is_given_anew_only_in_place():
    async with adapter_world() as world:
        await load(world)
        answer = await load(world, path="/b")
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("InvalidUserInput", 400)
        assert "has already been loaded" in error["message"]
        assert (await world.list())["poet"]["alias_of"] == "local:/a"
        assert (await load(world, path="/b", load_inplace=True)).status_code == 200
        # What it stood for before may still be retiring.
        listed = (await world.client.get("/v1/adapters")).json()["adapters"]
        assert listed[0]["alias_of"] == "local:/b"


@in_loop
async def test_of_two_who_give_one_name_at_once_one_gets_it():
    import asyncio

    async with adapter_world() as world:
        slow: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        world.sources.contents["/a"] = world.sources.contents["/b"] = slow
        both = [asyncio.create_task(load(world, path=path)) for path in ("/a", "/b")]
        while len(world.shard.queries) < 2:
            await asyncio.sleep(0)
        slow.set_result(fetched("x"))
        assert sorted([(await each).status_code for each in both]) == [200, 400]


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({}, 400, "InvalidUserInput"),
        ({"lora_name": "poet"}, 400, "InvalidUserInput"),
        ({"lora_name": "", "lora_path": "/a"}, 400, "InvalidUserInput"),
        ({"lora_name": "fake", "lora_path": "/a"}, 400, "InvalidUserInput"),
        ({"lora_name": 5, "lora_path": "/a"}, 400, "InvalidUserInput"),
        ({"lora_name": "poet", "lora_path": "alias:bard"}, 400, "InvalidUserInput"),
        ({"lora_name": "poet", "lora_path": "a\nb"}, 400, "BadRequestError"),
        ({"lora_name": "poet", "lora_path": "/refused"}, 400, "BadRequestError"),
        ({"lora_name": "poet", "lora_path": "/none"}, 404, "NotFoundError"),
        ({"lora_name": "poet", "lora_path": "/slow"}, 503, "InternalServerError"),
    ],
)
def test_what_cannot_be_done_is_told_as_vllm_tells_it(body, status, kind):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            world.sources.contents = {
                "/refused": refused("its peft_type is not served"),
                "/none": AdapterUnavailableError(Reason.NOT_FOUND, "is no folder"),
                "/slow": AdapterUnavailableError(Reason.TRANSIENT, "the disk is slow"),
            }
            answer = await world.admin.post("/v1/load_lora_adapter", json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (status, kind, status)
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
            assert (await world.client.get("/v1/models")).json()["data"][1:] == []

    scene()


@pytest.mark.parametrize(
    ("name", "status", "kind"),
    [("", 400, "InvalidUserInput"), ("poet", 404, "NotFoundError"), ("a", 404, "NotFoundError")],
)
def test_a_name_that_nobody_gave_cannot_be_taken_back(name, status, kind):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            # An id is no name of this kind.
            await world.generate("a")
            answer = await unload(world, name)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (status, kind)

    scene()


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_where_clients_ask_they_are_told_where_to_go(verb):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            body = {"lora_name": "poet", "lora_path": "/a"}
            answer = await world.client.post(f"/v1/{verb}_lora_adapter", json=body)
            assert answer.status_code == 403
            assert "--admin-port" in answer.json()["error"]["message"]
            assert world.shard.queries == []

    scene()


@in_loop
async def test_a_server_without_adapters_takes_none():
    async with adapter_world(adapter_refusal="an adapter is part of the weights") as world:
        answer = await load(world)
        assert answer.status_code == 400
        assert "part of the weights" in answer.json()["error"]["message"]


@in_loop
async def test_the_operators_document_tells_of_them():
    async with adapter_world() as world:
        document = (await world.admin.get("/openapi.json")).json()
        assert {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"} <= set(document["paths"])
        assert "LoadLoRAAdapterRequest" in document["components"]["schemas"]
