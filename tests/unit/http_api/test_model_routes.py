"""`/v1/models`: what can be named, as OpenAI's SDK reads it."""

from __future__ import annotations

from datetime import datetime

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


# --- as Anthropic's SDKs ask ------------------------------------------------------

VERSION = {"anthropic-version": "2023-06-01"}


@in_loop
async def test_with_anthropics_version_a_model_is_told_as_its_sdk_reads_it():
    async with adapter_world(adapter_aliases=["poet=local:a"], max_total_tokens=200) as world:
        answer = await world.client.get("/v1/models/poet", headers=VERSION)
        assert answer.headers["request-id"].startswith("req_")
        model = answer.json()
        assert datetime.fromisoformat(model.pop("created_at")).tzinfo is not None
        assert model == {
            "type": "model", "id": "poet", "display_name": "poet", "lifecycle": "active",
            "max_input_tokens": 200, "max_tokens": 200, "capabilities": None,
            "deprecated_at": None, "line": None, "retires_at": None,
        }  # fmt: skip
        absent = await world.client.get("/v1/models/nobody", headers=VERSION)
        assert (absent.status_code, absent.json()["error"]["type"]) == (404, "not_found_error")


@in_loop
async def test_anthropics_list_comes_in_pages_in_both_directions():
    names = [f"a{number:02}" for number in range(6)]
    aliases = [f"{name}=local:{name}" for name in names]
    async with adapter_world(adapter_aliases=aliases) as world:

        async def page(**query):
            answer = await world.client.get("/v1/models", params=query, headers=VERSION)
            assert answer.status_code == 200, answer.text
            return answer.json()

        seen, after = [], {}
        while True:
            found = await page(limit=3, **after)
            seen += [each["id"] for each in found["data"]]
            assert found["first_id"] == found["data"][0]["id"]
            if not found["has_more"]:
                break
            after = {"after_id": found["last_id"]}
        assert seen == ["fake", *names]
        back = await page(limit=2, before_id="a02")
        assert ([each["id"] for each in back["data"]], back["has_more"]) == (["a00", "a01"], True)
        assert [each["id"] for each in (await page())["data"]] == seen
        assert (await page(after_id=seen[-1])) == {
            "data": [], "has_more": False, "first_id": None, "last_id": None,
        }  # fmt: skip


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "limit=x", "limit=-1", f"limit={'9' * 30}", "after_id=nobody",
     "before_id=nobody", "after_id=fake&before_id=fake"],
)  # fmt: skip
def test_a_page_that_is_none_is_refused_in_anthropics_envelope(query):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            answer = await world.client.get(f"/v1/models?{query}", headers=VERSION)
            assert answer.status_code == 400
            assert answer.json()["error"]["type"] == "invalid_request_error"
            # OpenAI's list has no pages.
            assert (await world.client.get(f"/v1/models?{query}")).status_code == 200

    scene()
