"""API keys in a call's metadata: who may call, use, see and manage what."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world
from tests.helpers.grpc_calls import Served, grpc_served, refused
from tests.helpers.in_loop import in_loop

from lorax_contract.keys import hash_of
from lorax_proto import lorax_pb2 as pb
from lorax_router.service.keys.store import KeyStore

TENANTS = {
    "acme": {"keys": ["acme-key"], "adapters": ["acme-*"], "requests_per_minute": 3},
    "other": {"keys": ["other-key"], "adapters": ["other-*"]},
}


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def request(adapter: str = "", source: str = "local", **fields: Any) -> pb.GenerateRequest:
    made = pb.GenerateRequest(text="w1", parameters=pb.Parameters(max_new_tokens=1))
    if adapter:
        made.parameters.adapter.CopyFrom(pb.Adapter(id=adapter, source=source, **fields))
    return made


@contextlib.asynccontextmanager
async def keyed(tmp_path: Path) -> AsyncIterator[tuple[AdapterWorld, Served]]:
    hashed = {
        name: {**tenant, "keys": [f"sha256:{hash_of(each)}" for each in tenant["keys"]]}
        for name, tenant in TENANTS.items()
    }
    path = tmp_path / "tenants.json"
    path.write_text(json.dumps({"tenants": hashed}))
    keys = KeyStore(
        admin_keys=[hash_of("admin-key")], metrics_keys=[hash_of("metrics-key")], path=str(path)
    )
    async with adapter_world() as world, grpc_served(world.parts.servicer, keys=keys) as served:
        yield world, served


@pytest.mark.parametrize(
    ("metadata", "code", "reason"),
    [
        ((), "UNAUTHENTICATED", "UNAUTHENTICATED"),
        (bearer("wrong"), "UNAUTHENTICATED", "UNAUTHENTICATED"),
        ((("x-api-key", "wrong"),), "UNAUTHENTICATED", "UNAUTHENTICATED"),
        (bearer("metrics-key"), "PERMISSION_DENIED", "FORBIDDEN"),
    ],
)
def test_a_call_without_a_key_that_is_known_is_refused_unread(tmp_path, metadata, code, reason):
    @in_loop
    async def scene():
        async with keyed(tmp_path) as (world, served):
            stub, adapter = served.stub, pb.Adapter(id="acme-a", source="local")
            calls = [
                stub.Generate(request("acme-a"), metadata=metadata),
                stub.GenerateStream(request("acme-a"), metadata=metadata),
                stub.Info(pb.InfoRequest(), metadata=metadata),
                stub.Tokenize(pb.TokenizeRequest(text="w1"), metadata=metadata),
                stub.ListAdapters(pb.ListAdaptersRequest(), metadata=metadata),
                stub.LoadAdapter(pb.LoadAdapterRequest(adapter=adapter), metadata=metadata),
                # A request that never comes: the key is looked at before.
                served.channel.stream_unary("/lorax.v1.Lorax/Generate")(metadata=metadata),
            ]
            for call in calls:
                found = await refused(call)
                assert (found.code, found.reason) == (code, reason)
            assert world.shard.queries == []

    scene()


@in_loop
async def test_a_key_is_never_told_to_a_source(tmp_path_factory):
    async with keyed(tmp_path_factory.mktemp("keys")) as (world, served):
        for own in ("", "hub-token"):
            asked = request(f"acme-{own}x", "hub", api_token=own)
            await served.stub.Generate(asked, metadata=bearer("acme-key"), timeout=30)
        assert [query.token for query in world.shard.queries] == [None, "hub-token"]


def test_what_a_tenant_may_not_use_is_like_what_does_not_exist(tmp_path):
    @in_loop
    async def scene():
        async with keyed(tmp_path) as (world, served):
            await served.stub.Generate(request("other-a"), metadata=bearer("other-key"), timeout=30)
            asked_before = len(world.shard.queries)
            found = [
                await refused(
                    served.stub.Generate(request(name), metadata=bearer("acme-key"), timeout=30)
                )
                for name in ("other-a", "other-b")
            ]
            assert {each.code for each in found} == {"NOT_FOUND"}
            texts = [each.text.replace("other-b", "other-a") for each in found]
            assert texts[0] == texts[1]
            assert len(world.shard.queries) == asked_before
            listed = await served.stub.ListAdapters(
                pb.ListAdaptersRequest(), metadata=bearer("acme-key"), timeout=30
            )
            assert not listed.adapters
            listed = await served.stub.ListAdapters(
                pb.ListAdaptersRequest(), metadata=bearer("other-key"), timeout=30
            )
            assert [each.id for each in listed.adapters] == ["other-a"]

    scene()


def test_admins_manage_and_others_do_not(tmp_path):
    @in_loop
    async def scene():
        async with keyed(tmp_path) as (_, served):
            stub = served.stub
            load = pb.LoadAdapterRequest(
                adapter=pb.Adapter(id="acme-a", source="local"), pin=True, alias="mine"
            )
            unload = pb.UnloadAdapterRequest(adapter=pb.Adapter(id="mine", source="alias"))
            for key in ("acme-key", "other-key"):
                for call in (stub.LoadAdapter(load, metadata=bearer(key)),
                             stub.UnloadAdapter(unload, metadata=bearer(key))):  # fmt: skip
                    found = await refused(call)
                    assert found.code == "PERMISSION_DENIED"
                    assert "admin key" in found.text
            admin = bearer("admin-key")
            loaded = await stub.LoadAdapter(load, metadata=admin, timeout=30)
            assert (loaded.adapter.id, loaded.adapter.alias_of) == ("mine", "local:acme-a")
            assert (loaded.adapter.state, loaded.adapter.pinned) == ("resident", True)
            answer = await stub.UnloadAdapter(unload, metadata=admin, timeout=30)
            assert answer.freed.disk > 0
            empty = pb.LoadAdapterRequest(adapter=pb.Adapter())
            found = await refused(stub.LoadAdapter(empty, metadata=admin))
            assert (found.code, found.field) == ("INVALID_ARGUMENT", "adapter.id")

    scene()


def test_a_quota_that_is_used_up_says_until_when(tmp_path):
    @in_loop
    async def scene():
        async with keyed(tmp_path) as (_, served):
            for _ in range(3):
                await served.stub.Generate(request(), metadata=bearer("acme-key"), timeout=30)
            found = await refused(
                served.stub.Generate(request(), metadata=bearer("acme-key"), timeout=30)
            )
            assert (found.code, found.reason) == ("RESOURCE_EXHAUSTED", "QUOTA")
            assert found.retry_s >= 1
            answer = served.stub.Generate(request(), metadata=bearer("other-key"), timeout=30)
            assert (await answer).sequences

    scene()
