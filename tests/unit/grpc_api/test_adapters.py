"""Adapters over gRPC: used by name, listed, and managed by nobody who comes through this port."""

from __future__ import annotations

from typing import Any

import pytest
from tests.helpers.adapter_world import adapter_world, fetched
from tests.helpers.grpc_calls import grpc_served, refused
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_proto import lorax_pb2 as pb

MIB = 1 << 20


def request(adapter_id: str, source: str = "local", **fields: Any) -> pb.GenerateRequest:
    adapter = pb.Adapter(id=adapter_id, source=source, **fields)
    return pb.GenerateRequest(
        text="w1", parameters=pb.Parameters(adapter=adapter, max_new_tokens=2)
    )


@in_loop
async def test_an_adapter_is_used_by_name_and_its_way_here_is_told():
    async with adapter_world() as world, grpc_served(world.parts.servicer) as served:
        answer = await served.stub.Generate(request("a"), timeout=30)
        assert answer.timings.adapter_s
        assert [query.ref.id for query in world.shard.queries] == ["a"]
        assert (await world.list())["a"]["uses"] == 1
        chunks = [each async for each in served.stub.GenerateStream(request("b"), timeout=30)]
        assert chunks[-1].timings.adapter_s


@in_loop
async def test_adapters_are_merged_for_one_request():
    async with adapter_world() as world, grpc_served(world.parts.servicer) as served:
        parts = [pb.WeightedAdapter(id=name, weight=0.5) for name in ("a", "b")]
        merge = pb.AdapterMerge(adapters=parts, source="local", strategy="LINEAR")
        asked = pb.GenerateRequest(text="w1", parameters=pb.Parameters(merge=merge))
        assert (await served.stub.Generate(asked, timeout=30)).sequences
        assert sorted(query.ref.id for query in world.shard.queries) == ["a", "b"]


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (AdapterUnavailableError(Reason.NOT_FOUND, "no adapter a"), "NOT_FOUND", "ADAPTER_NOT_FOUND"),
        # Hidden or not there: the same.
        (AdapterUnavailableError(Reason.NO_ACCESS, "no adapter a"), "NOT_FOUND", "ADAPTER_NOT_FOUND"),
        (AdapterUnavailableError(Reason.REFUSED, "no rank"), "INVALID_ARGUMENT", "VALIDATION"),
        (AdapterUnavailableError(Reason.TRANSIENT, "down", retry_after_s=2.5), "UNAVAILABLE",
         "ADAPTER_UNAVAILABLE"),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_be_had_is_said_in_words(error, code, reason):
    @in_loop
    async def scene():
        async with adapter_world() as world, grpc_served(world.parts.servicer) as served:
            world.sources.contents["a"] = error
            found = await refused(served.stub.Generate(request("a"), timeout=30))
            assert (found.code, found.reason) == (code, reason)
            assert error.text in found.text
            assert found.retry_s == error.retry_after_s

    scene()


@in_loop
async def test_the_token_is_the_bearers_unless_the_adapter_brings_one():
    async with adapter_world() as world, grpc_served(world.parts.servicer) as served:
        metadata = (("authorization", "Bearer from-header"),)
        for name, own in (("o/a", ""), ("o/b", "from-field")):
            asked = request(name, "hub", api_token=own)
            await served.stub.Generate(asked, metadata=metadata, timeout=30)
        assert [query.token for query in world.shard.queries] == ["from-header", "from-field"]


@in_loop
async def test_the_list_says_all_that_the_list_over_http_says():
    async with adapter_world() as world, grpc_served(world.parts.servicer) as served:
        world.sources.contents["b"] = fetched("b", warnings=("odd",))
        world.sources.contents["c"] = AdapterUnavailableError(Reason.TRANSIENT, "down")
        for name in "abc":
            await world.post("load", adapter_id=name, pin=name == "a")
        ours: dict[str, pb.AdapterInfo] = {}
        token, pages = "", 0
        while token or not pages:
            asked = pb.ListAdaptersRequest(page_size=2, page_token=token)
            page = await served.stub.ListAdapters(asked, timeout=30)
            ours |= {each.id: each for each in page.adapters}
            token, pages = page.next_page_token, pages + 1
        assert pages == 2
        for name, theirs in (await world.list()).items():
            info = ours[name]
            assert (info.source, info.state, info.pinned, info.uses) == (
                theirs["adapter_source"], theirs["state"], theirs["pinned"], theirs["uses"],
            )  # fmt: skip
            assert info.content_digest == (theirs["content_digest"] or "")
            assert info.bytes.disk == theirs["bytes"]["disk"]
            assert list(info.warnings) == theirs["warnings"]
            assert info.HasField("failure") == (theirs["failure"] is not None)
            assert info.HasField("last_used") == (theirs["last_used"] is not None)
        asked = pb.ListAdaptersRequest(state="failed")
        found = await served.stub.ListAdapters(asked, timeout=30)
        assert [(each.id, each.failure.text) for each in found.adapters] == [("c", "down")]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (pb.ListAdaptersRequest(page_size=0), "page_size"),
        (pb.ListAdaptersRequest(page_token="?"), "page_token"),
        (pb.ListAdaptersRequest(source="ftp"), "adapter.source"),
        (pb.ListAdaptersRequest(state="odd"), "state"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(asked, field):
    @in_loop
    async def scene():
        async with adapter_world() as world, grpc_served(world.parts.servicer) as served:
            found = await refused(served.stub.ListAdapters(asked, timeout=30))
            assert (found.code, found.field) == ("INVALID_ARGUMENT", field)

    scene()


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer x"),)])
def test_adapters_are_managed_elsewhere(metadata):
    @in_loop
    async def scene():
        async with adapter_world() as world, grpc_served(world.parts.servicer) as served:
            adapter = pb.Adapter(id="a", source="local")
            stub = served.stub
            calls = [
                stub.LoadAdapter(pb.LoadAdapterRequest(adapter=adapter), metadata=metadata),
                stub.UnloadAdapter(pb.UnloadAdapterRequest(adapter=adapter), metadata=metadata),
            ]
            for call in calls:
                found = await refused(call)
                assert (found.code, found.reason) == ("PERMISSION_DENIED", "FORBIDDEN")
                assert "--admin-port" in found.text
            assert world.shard.queries == []

    scene()
