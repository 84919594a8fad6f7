"""Keys in every dialect: one envelope each for who may not call, and nothing of others' adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.helpers.adapter_world import AdapterWorld, fetched
from tests.helpers.dialects import DIALECTS, LORAX, TGI, Dialect, fault_of
from tests.helpers.http_app import TEMPLATE
from tests.helpers.in_loop import in_loop
from tests.helpers.tenants import METRICS_KEY, bearer, key_of, tenant_world

from lorax_contract.adapters import AdapterQuery, AdapterUnavailableError, FetchedAdapter, Reason

VERSION = {"anthropic-version": "2023-06-01"}
TENANTS: dict[str, dict[str, Any]] = {"ant": {}, "bee": {}, "cat": {"adapters": ["cat-*"]}}
SETTINGS: dict[str, Any] = {"template": TEMPLATE, "default_adapter_source": "hub"}
# Of a tenant alone, which its token opens.
SECRET, ABSENT = "ant/secret", "ant/absent"


def private_hub(world: AdapterWorld) -> None:
    def fetch(query: AdapterQuery) -> FetchedAdapter:
        if query.ref.id != SECRET or query.token != "hf_ant":
            raise AdapterUnavailableError(Reason.NOT_FOUND, "it is not there for you")
        return fetched(query.ref.id, access="token")

    world.shard.on_fetch = fetch


def naming(dialect: Dialect, adapter: str, token: str) -> dict[str, Any]:
    """The fields by which a dialect asks for an adapter."""
    if dialect in (LORAX, TGI):
        named = {"adapter_id": adapter, "adapter_source": "hub", "api_token": token}
        return {"parameters": {"max_new_tokens": 2, **named}}
    return {"model": adapter, "api_token": token}


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda each: each.name)
def test_who_may_not_call_hears_so_in_the_dialect_before_the_body_is_read(
    dialect: Dialect, tmp_path: Path
) -> None:
    @in_loop
    async def scene() -> None:
        async with tenant_world(tmp_path, TENANTS, **SETTINGS) as (world, _):
            for stream in (False, True):
                path, body = dialect.asked({}, stream=stream)
                for headers, status in (
                    ({}, 401), (bearer("sk-of-nobody"), 401), ({"x-api-key": "sk-x"}, 401),
                    (bearer(METRICS_KEY), 403),
                ):  # fmt: skip
                    answer = await world.client.post(path, content=b"{", headers=headers)
                    assert answer.status_code == status
                    assert fault_of(path, answer).status == status
                for headers in (bearer(key_of("ant")), {"x-api-key": key_of("ant")}):
                    answer = await world.client.post(path, json=body, headers=headers)
                    assert answer.status_code == 200

    scene()


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda each: each.name)
def test_anothers_private_adapter_is_like_one_that_does_not_exist(
    dialect: Dialect, tmp_path: Path
) -> None:
    @in_loop
    async def scene() -> None:
        async with tenant_world(tmp_path, TENANTS, **SETTINGS) as (world, callers):
            private_hub(world)

            async def ask(tenant: str, adapter: str, *, stream: bool) -> Any:
                fields = naming(dialect, adapter, f"hf_{tenant}")
                path, body = dialect.asked(fields, stream=stream)
                return await callers[tenant].post(path, **body)

            for stream in (False, True):
                assert (await ask("ant", SECRET, stream=stream)).status_code == 200
                for tenant in ("bee", "cat"):
                    there = await ask(tenant, SECRET, stream=stream)
                    absent = await ask(tenant, ABSENT, stream=stream)
                    found = fault_of(dialect.path, there), fault_of(dialect.path, absent)
                    assert found[0].status == (422 if dialect in (LORAX, TGI) else 404)
                    assert found[0].status == found[1].status
                    assert found[0].text.replace(SECRET, ABSENT) == found[1].text

    scene()


@in_loop
async def test_anthropics_list_and_count_show_a_caller_what_it_may_use(tmp_path: Path) -> None:
    async with tenant_world(tmp_path, TENANTS, **SETTINGS) as (world, _):
        private_hub(world)
        sent = {"model": SECRET, "messages": [{"role": "user", "content": "w1"}]}
        count, use = "/v1/messages/count_tokens", {**sent, "api_token": "hf_ant", "max_tokens": 2}

        def headers(tenant: str) -> dict[str, str]:
            return {"x-api-key": key_of(tenant), **VERSION}

        async def listed(tenant: str) -> set[str]:
            answer = await world.client.get("/v1/models", headers=headers(tenant))
            return {each["id"] for each in answer.json()["data"]}

        answer = await world.client.post("/v1/messages", json=use, headers=headers("ant"))
        assert answer.status_code == 200
        assert await listed("ant") == {"fake", SECRET}
        assert await listed("bee") == await listed("cat") == {"fake"}
        for tenant in ("bee", "cat"):
            for name in (SECRET, ABSENT):
                path = f"/v1/models/{name}"
                answer = await world.client.get(path, headers=headers(tenant))
                assert (answer.status_code, answer.json()["type"]) == (404, "error")
                body = {**sent, "model": name, "api_token": f"hf_{tenant}"}
                answer = await world.client.post(count, json=body, headers=headers(tenant))
                assert answer.status_code == 404
        for headers_of_nobody in (VERSION, {**VERSION, "x-api-key": "sk-x"}):
            answer = await world.client.get("/v1/models", headers=headers_of_nobody)
            assert answer.json()["error"]["type"] == "authentication_error"
