"""Who may call, what each may do and see, and what others learn of it: nothing."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.adapter_world import fetched
from tests.helpers.http_app import events, until
from tests.helpers.in_loop import in_loop
from tests.helpers.tenants import (
    ADMIN_KEY,
    METRICS_KEY,
    NAMES,
    bearer,
    key_of,
    keys_file,
    tenant_world,
)

from lorax_contract.adapters import AdapterQuery, AdapterUnavailableError, FetchedAdapter, Reason
from lorax_contract.errors import UnauthenticatedError
from lorax_contract.keys import hash_of
from lorax_router.http_api.refusals import refusal

VERBS = ["load", "unload", "pin", "unpin", "reload"]


class PrivateHub:
    """A hub on which each tenant has one adapter, which its own token opens."""

    def __init__(self, world: Any) -> None:
        self.tokens = {f"{name}/secret": f"hf_{name}" for name in NAMES}
        self.asked: list[AdapterQuery] = []
        world.shard.on_fetch = self.fetch

    def fetch(self, query: AdapterQuery) -> FetchedAdapter:
        self.asked.append(query)
        wanted = self.tokens.get(query.ref.id)
        if wanted is None and query.ref.id != "public/one":
            raise AdapterUnavailableError(Reason.NOT_FOUND, "it is not there for you")
        if wanted is not None and query.token != wanted:
            raise AdapterUnavailableError(Reason.NOT_FOUND, "it is not there for you")
        return fetched(query.ref.id, access="public" if wanted is None else "token")


# --- who may call -----------------------------------------------------------------


@in_loop
async def test_probes_are_open_and_everything_else_asks_for_a_key(tmp_path: Path) -> None:
    async with tenant_world(tmp_path, {"ant": {}}) as (world, callers):
        for path in ("/", "/health", "/ping", "/startup"):
            assert (await world.client.get(path)).status_code == 200
            assert (await world.client.head(path)).status_code == 200
        closed = ["/metrics", "/info", "/docs", "/docs/", "/api-doc/openapi.json", "/openapi.json",
                  "/v1/adapters", "/v1/models", "/v1/models/x", "/nowhere"]  # fmt: skip
        for path in closed:
            answer = await world.client.get(path)
            assert (path, answer.status_code) == (path, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert (await callers["admin"].get(path)).status_code in (200, 404)
        for path in ("/", "/generate", "/generate_stream", "/tokenize", "/detokenize",
                     "/v1/adapters/load", "/v1/load_lora_adapter"):  # fmt: skip
            # Before the body is looked at.
            assert (await world.client.post(path, content=b"{")).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {ADMIN_KEY}"},
        {"authorization": ADMIN_KEY},
        {"authorization": f"Bearer {ADMIN_KEY}x"},
        {"authorization": f"Bearer {hash_of(ADMIN_KEY)}"},
        {"x-api-key": ADMIN_KEY[:-1]},
        {"authorization": "Bearer sk-é".encode()},
    ],
)
def test_what_is_no_key_is_refused(headers: dict[str, str], tmp_path: Path) -> None:
    @in_loop
    async def scene() -> None:
        async with tenant_world(tmp_path, {"ant": {}}) as (world, _):
            assert (await world.client.get("/info", headers=headers)).status_code == 401

    scene()


@in_loop
async def test_a_key_comes_as_openai_or_as_anthropic_send_it(tmp_path: Path) -> None:
    async with tenant_world(tmp_path, {"ant": {}}) as (world, _):
        key = key_of("ant")
        for headers in (bearer(key), {"x-api-key": key}, {"Authorization": f"bearer {key}"},
                        {"x-api-key": key, **bearer("hf_a_token_of_the_hub")}):  # fmt: skip
            assert (await world.client.get("/info", headers=headers)).status_code == 200


def test_each_dialect_has_its_own_envelope() -> None:
    def body(path: str, *headers: tuple[bytes, bytes]) -> Any:
        import json

        scope = {"type": "http", "path": path, "headers": headers}
        response = refusal(scope, UnauthenticatedError("no key"))
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        return json.loads(bytes(response.body))

    assert body("/generate") == {"error": "no key", "error_type": "unauthenticated"}
    assert body("/v1/adapters")["error_type"] == "unauthenticated"
    assert body("/v1/adapters/load")["error_type"] == "unauthenticated"
    assert body("/v1/chat/completions")["error"]["code"] == "invalid_api_key"
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        assert body(path)["type"] == "error"
        assert body(path)["error"] == {"type": "authentication_error", "message": "no key"}
    assert body("/v1/models")["error"]["code"] == "invalid_api_key"
    version = (b"anthropic-version", b"2023-06-01")
    for path in ("/v1/models", "/v1/models/x"):
        assert body(path, version)["error"]["type"] == "authentication_error"


@in_loop
async def test_preflights_of_pages_pass_without_a_key(tmp_path: Path) -> None:
    config = {"cors_allow_origin": ["https://page.example"]}
    async with tenant_world(tmp_path, {"ant": {}}, **config) as (world, _):
        asked = {
            "origin": "https://page.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-api-key",
        }
        answer = await world.client.options("/generate", headers=asked)
        assert answer.status_code == 200
        refused = await world.client.get("/info", headers={"origin": "https://page.example"})
        # A page can read why.
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"


@in_loop
async def test_metrics_are_for_the_scrape_key_and_for_admins(tmp_path: Path) -> None:
    tenants = {"ant": {}, "bee": {"metrics": True}}
    async with tenant_world(tmp_path, tenants) as (_, callers):
        statuses = {name: (await each.get("/metrics")).status_code
                    for name, each in callers.items()}  # fmt: skip
        assert statuses == {"ant": 403, "bee": 200, "admin": 200, "metrics": 200}
        for path in ("/info", "/v1/adapters", "/v1/models"):
            assert (await callers["metrics"].get(path)).status_code == 403
        assert (await callers["metrics"].use(None)).status_code == 403


@in_loop
async def test_with_a_scrape_key_alone_the_metrics_are_closed_and_the_rest_is_open() -> None:
    from tests.helpers.adapter_world import adapter_world

    async with adapter_world(metrics_key_hashes=[hash_of(METRICS_KEY)]) as world:
        assert (await world.client.get("/info")).status_code == 200
        assert (await world.client.get("/metrics")).status_code == 401
        headers = bearer(METRICS_KEY)
        assert (await world.client.get("/metrics", headers=headers)).status_code == 200


@in_loop
async def test_the_document_says_that_keys_are_needed(tmp_path: Path) -> None:
    async with tenant_world(tmp_path, {"ant": {}}) as (_, callers):
        document = (await callers["ant"].get("/api-doc/openapi.json")).json()
        assert set(document["components"]["securitySchemes"]) == {"bearer", "x-api-key"}
        assert "security" not in document["paths"]["/health"]["get"]
        generate = document["paths"]["/generate"]["post"]
        assert generate["security"]
        for path, envelopes in (
            ("/generate", {"ErrorResponse"}),
            ("/v1/adapters/load", {"ErrorResponse"}),
            ("/v1/completions", {"OpenAIErrorResponse"}),
            ("/v1/load_lora_adapter", {"OpenAIErrorResponse"}),
            ("/v1/messages", {"AnthropicErrorResponse"}),
            ("/v1/models", {"OpenAIErrorResponse", "AnthropicErrorResponse"}),
        ):
            for operation in document["paths"][path].values():
                for status in ("401", "403"):
                    schema = operation["responses"][status]["content"]["application/json"]["schema"]
                    named = {each["$ref"] for each in schema.get("anyOf", [schema])}
                    assert named == {f"#/components/schemas/{each}" for each in envelopes}, path
        assert "/v1/adapters/load" in document["paths"]


# --- what they may do -------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_managing_where_clients_ask_takes_an_admin_key(verb: str, tmp_path: Path) -> None:
    @in_loop
    async def scene() -> None:
        tenants = {"ant": {}, "bee": {"admin": True}}
        async with tenant_world(tmp_path, tenants) as (world, callers):
            await world.post("load", adapter_id="x")
            answer = await callers["ant"].manage(verb, "x", "local")
            assert (answer.status_code, answer.json()["error_type"]) == (403, "forbidden")
            for name in ("bee", "admin"):
                await world.post("load", adapter_id="x")
                assert (await callers[name].manage(verb, "x", "local")).status_code == 200

    scene()


@in_loop
async def test_vllms_endpoints_take_an_admin_key(tmp_path: Path) -> None:
    async with tenant_world(tmp_path, {"ant": {}}, default_adapter_source="local") as (_, callers):
        sent = {"lora_name": "mine", "lora_path": "x"}
        assert (await callers["ant"].post("/v1/load_lora_adapter", **sent)).status_code == 403
        assert (await callers["admin"].post("/v1/load_lora_adapter", **sent)).status_code == 200
        assert "mine" in await callers["ant"].models()
        gone = {"lora_name": "mine"}
        assert (await callers["ant"].post("/v1/unload_lora_adapter", **gone)).status_code == 403
        assert (await callers["admin"].post("/v1/unload_lora_adapter", **gone)).status_code == 200


@in_loop
async def test_a_tenant_keeps_as_many_adapters_as_its_quota_of_pins_says(tmp_path: Path) -> None:
    async with tenant_world(tmp_path, {"ant": {"pins": 1}, "bee": {"pins": 1}, "cat": {}}) as (
        world,
        callers,
    ):
        for name in ("x", "y"):
            await world.post("load", adapter_id=name)
        ant, bee = callers["ant"], callers["bee"]
        assert (await ant.manage("pin", "x", "local")).status_code == 200
        assert (await ant.manage("pin", "x", "local")).status_code == 200
        refused = await ant.manage("pin", "y", "local")
        assert refused.status_code == 429
        assert "the quota of 1 pin is used up" in refused.json()["error"]
        assert (await bee.manage("pin", "x", "local")).status_code == 200
        assert (await callers["cat"].manage("pin", "y", "local")).status_code == 403
        # What one lets go stays for the other.
        assert (await ant.manage("unpin", "x", "local")).json()["pinned"] is True
        assert (await bee.manage("unpin", "x", "local")).json()["pinned"] is False
        assert (await ant.manage("pin", "y", "local")).status_code == 200
        assert (await ant.manage("unload", "y", "local")).status_code == 403


# --- what they may see ------------------------------------------------------------


@in_loop
async def test_seven_tenants_have_their_private_adapters_to_themselves(tmp_path: Path) -> None:
    tenants = {name: {"admin": name in NAMES[::2], "pins": 7} for name in NAMES}
    async with tenant_world(tmp_path, tenants) as (world, callers):
        hub = PrivateHub(world)
        assert (await callers["ant"].use("public/one")).status_code == 200
        for name in NAMES:
            mine = f"{name}/secret"
            assert (await callers[name].use(mine)).status_code == 422
            assert (await callers[name].use(mine, api_token=f"hf_{name}")).status_code == 200
        assert {query.token for query in hub.asked} == {None, *hub.tokens.values()}
        for name in NAMES:
            mine = f"{name}/secret"
            others = {each for each in hub.tokens if each != mine}
            absent_name = "nobody/knows"
            assert await callers[name].listed() == {"public/one", mine}
            assert await callers[name].models() == {"fake", "public/one", mine}
            for other in others:
                used = await callers[name].use(other, api_token=f"hf_{name}")
                absent = await callers[name].use(absent_name, api_token=f"hf_{name}")
                assert (used.status_code, used.json()) == (absent.status_code, absent.json())
                assert (await callers[name].get(f"/v1/models/{other}")).status_code == 404
                for verb in VERBS[1:]:
                    answer = await callers[name].manage(verb, other, api_token=f"hf_{name}")
                    unknown = await callers[name].manage(verb, absent_name, api_token=f"hf_{name}")
                    assert answer.status_code == unknown.status_code != 200
                    assert answer.text.replace(other, absent_name) == unknown.text
        assert await callers["admin"].listed() == {"public/one"}
        scraped = (await callers["metrics"].get("/metrics")).text
        assert not any(each in scraped for each in hub.tokens)


@in_loop
async def test_a_key_is_no_token_of_the_hub(tmp_path: Path) -> None:
    async with tenant_world(tmp_path, {"ant": {}}) as (world, callers):
        hub = PrivateHub(world)
        await callers["ant"].use("public/one")
        await callers["admin"].manage("load", "public/one")
        both = {"x-api-key": key_of("ant"), **bearer("hf_ant")}
        body = {"inputs": "w1", "parameters": {"adapter_id": "ant/secret", "adapter_source": "hub"}}
        assert (await world.client.post("/generate", json=body, headers=both)).status_code == 422
        sent = {"adapter_id": "public/one", "adapter_source": "hub"}
        await world.admin.post("/v1/adapters/load", json=sent, headers=bearer(ADMIN_KEY))
        assert {query.token for query in hub.asked} == {None}
        assert len(hub.asked) == 4


@in_loop
async def test_a_tenants_own_token_opens_what_its_requests_name(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("ANTS_TOKEN", "hf_ant")
    async with tenant_world(tmp_path, {"ant": {"api_token_env": "ANTS_TOKEN"}, "bee": {}}) as (
        world,
        callers,
    ):
        PrivateHub(world)
        assert (await callers["ant"].use("ant/secret")).status_code == 200
        assert await callers["ant"].listed() == {"ant/secret"}
        assert (await callers["bee"].use("ant/secret")).status_code == 422
        assert await callers["bee"].listed() == set()


BOUNDED = {"ant": {"adapters": ["ant-*", "hub:ant/*"]}, "bee": {"admin": True, "adapters": ["bee-*"]},
           "cat": {}}  # fmt: skip


@in_loop
async def test_out_of_its_bounds_no_adapter_exists_for_a_tenant(tmp_path: Path) -> None:
    config = {"adapter_aliases": ["ant-alias=local:x", "other-alias=local:x"]}
    async with tenant_world(tmp_path, BOUNDED, **config) as (world, callers):
        for name in ("ant-one", "bee-one", "other"):
            assert (await callers["cat"].use(name, "local")).status_code == 200
        for name in ("ant-alias", "other-alias"):
            assert (await callers["cat"].use(name, None)).status_code == 200  # type: ignore[arg-type]
        before = len(world.shard.queries)
        ant, bee = callers["ant"], callers["bee"]
        assert (await ant.use("ant-one", "local")).status_code == 200
        assert await ant.listed() == {"ant-one", "ant-alias"}
        assert await ant.models() == {"fake", "local:ant-one", "ant-alias"}
        assert await bee.listed() == {"bee-one"}
        assert await bee.models() == {"fake", "local:bee-one"}
        there, absent = "bee-one", "bee-not"
        for source in ("local", "hub", "s3", "alias", None):
            for exists, lacks in ((there, absent), ("other-alias", "other-thing")):
                one = await ant.use(exists, source)  # type: ignore[arg-type]
                two = await ant.use(lacks, source)  # type: ignore[arg-type]
                assert one.status_code == two.status_code == 422
                assert one.text.replace(exists, lacks) == two.text
        assert (await ant.get("/v1/models/other-alias")).status_code == 404
        merged = {"ids": ["ant-one", "bee-one"], "weights": [1.0, 1.0]}
        answer = await ant.use(None, "local", merged_adapters=merged)
        assert answer.status_code == 422
        for verb in VERBS[1:]:
            assert (await bee.manage(verb, "ant-one", "local")).status_code == 404
        assert (await bee.manage("load", "ant-one", "local")).status_code == 422
        # Nor by a name of its own making.
        named = await bee.manage("load", "ant-one", "local", alias="bee-sees")
        assert named.status_code == 422
        for path in ("bee-x/../ant-one", "./bee-x/../../ant-one"):
            assert (await bee.use(path, "local")).status_code == 422
        # Nobody was asked about any of it.
        assert len(world.shard.queries) == before


@in_loop
async def test_no_page_of_a_list_tells_of_what_is_out_of_bounds(tmp_path: Path) -> None:
    import base64

    async with tenant_world(tmp_path, BOUNDED) as (world, callers):
        names = [f"a-hidden-{number:04}" for number in range(1200)] + ["ant-1", "ant-2", "ant-3"]
        for name in names:
            world.parts.adapters._catalog.names.answered(
                _local(name), None, fetched(name, valid_s=9999.0)
            )
        cursor, seen = "", []
        for _ in range(10):
            answer = (await callers["ant"].get(f"/v1/adapters?limit=2{cursor}")).json()
            seen += [each["adapter_id"] for each in answer["adapters"]]
            if (following := answer["next_cursor"]) is None:
                break
            assert b"hidden" not in base64.b64decode(following + "==", b"-_")
            cursor = f"&cursor={following}"
        assert seen == ["ant-1", "ant-2", "ant-3"]


def _local(name: str) -> Any:
    from tests.helpers.adapter_world import ref

    return ref(name)


# --- what they may take -----------------------------------------------------------


@in_loop
async def test_requests_beyond_the_quota_are_429_with_when_to_come_again(tmp_path: Path) -> None:
    async with tenant_world(tmp_path, {"ant": {"requests_per_minute": 2}, "bee": {}}) as (
        world,
        callers,
    ):
        assert (await callers["ant"].use(None)).status_code == 200
        assert (await callers["ant"].post("/tokenize", inputs="w1")).status_code == 200
        for path in ("/generate", "/generate_stream", "/tokenize"):
            answer = await callers["ant"].post(path, inputs="w1")
            assert answer.status_code == 429
            assert answer.json()["error_type"] == "quota"
            assert "2 requests a minute" in answer.json()["error"]
            assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert (await callers["bee"].use(None)).status_code == 200
        # Lists cost nothing.
        assert await callers["ant"].listed() == set()
        assert world.parts.service._permits.idle.is_set()


@in_loop
async def test_a_stream_that_is_left_has_cost_what_was_generated(tmp_path: Path) -> None:
    async with tenant_world(tmp_path, {"ant": {"tokens_per_minute": 60}}) as (world, callers):
        world.shard.step_delay_s = 0.001
        ant = world.parts.keys.caller([key_of("ant")])
        from dataclasses import replace

        request = replace(world.request(None, 100), caller=ant)
        stream = await world.parts.service.generate_stream(request)
        for _ in range(10):
            await anext(stream)
        await stream.aclose()
        bucket = world.parts.service.meters.of(ant)._buckets["tokens"]
        assert bucket is not None
        # The prompt has a start token, too.
        assert bucket._level == 60 - 3 - 10
        # What runs is not stopped; what comes then waits.
        whole = await callers["ant"].use(None, max_new_tokens=90)
        assert whole.status_code == 200
        refused = await callers["ant"].use(None)
        assert refused.status_code == 429
        assert "60 tokens a minute" in refused.json()["error"]


@in_loop
async def test_sources_are_asked_for_a_tenant_as_often_as_its_quota_says(tmp_path: Path) -> None:
    async with tenant_world(tmp_path, {"ant": {"fetches_per_minute": 2}, "bee": {}}) as (
        world,
        callers,
    ):
        statuses = [(await callers["ant"].use(each, "local")).status_code for each in "aabbc"]
        assert statuses == [200, 200, 200, 200, 429]
        assert len(world.shard.queries) == 2
        assert (await callers["bee"].use("c", "local")).status_code == 200
        # It is there now, and nobody has to be asked.
        assert (await callers["ant"].use("c", "local")).status_code == 200


@in_loop
async def test_keys_are_read_again_while_requests_run(tmp_path: Path) -> None:
    async with tenant_world(tmp_path, {"ant": {}}) as (world, callers):
        world.shard.step_delay_s = 0.002
        running = asyncio.create_task(callers["ant"].use(None, max_new_tokens=50))
        await until(lambda: world.parts.engine.stats().num_running)
        keys_file(tmp_path / "keys.json", bee={}, a_longer_name={})
        world.parts.keys.check()
        assert (await running).status_code == 200
        assert (await callers["ant"].use(None)).status_code == 401
        headers = bearer(key_of("bee"))
        assert (await world.client.get("/info", headers=headers)).status_code == 200


# --- what is written down ---------------------------------------------------------


@in_loop
async def test_no_log_has_a_key_a_prompt_or_an_output(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    async with tenant_world(tmp_path, {"ant": {"requests_per_minute": 8}}) as (world, callers):
        canary, secret = "zzcanaryzz", key_of("ant")
        ant = callers["ant"]
        for params in ({}, {"details": True}, {"max_new_tokens": 0}, {"stop": [canary]},
                       {"max_new_tokens": 10**6}, {"apply_chat_template": True},
                       {"adapter_id": "x"}, {"truncate": 0}, {}):  # fmt: skip
            values = {"max_new_tokens": 2, **params}
            for path in ("/generate", "/generate_stream"):
                answer = await ant.post(path, inputs=f"{canary} w1", parameters=values)
                if path == "/generate_stream" and answer.status_code == 200:
                    events(answer.text)
        await world.client.post("/generate", content=f'{{"inputs": "{canary}'.encode(),
                                headers={**bearer(secret), "content-type": "application/json"})  # fmt: skip
        logged = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
        assert "request ended" in logged
        assert "'tenant': 'ant'" in logged
        assert canary not in logged
        assert secret not in logged
        assert hash_of(secret) not in logged
