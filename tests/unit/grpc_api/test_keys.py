"""Keys in the metadata of calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.helpers.in_loop import in_loop
from tests.helpers.tenants import ADMIN_KEY, METRICS_KEY, key_of, tenant_world

from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxStub
from lorax_router.grpc_api.server import GrpcServer

OK, REFUSED = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED


@asynccontextmanager
async def served(
    tmp_path: Path, tenants: dict[str, Any]
) -> AsyncIterator[tuple[Any, grpc.aio.Channel]]:
    async with tenant_world(tmp_path, tenants) as (world, _):
        server = GrpcServer(world.parts.servicer, keys=world.parts.keys)
        port = server.bind("127.0.0.1", 0)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield world, channel
        finally:
            await server.stop(0)


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return OK


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


@in_loop
async def test_calls_need_a_key_and_probes_do_not(tmp_path: Path) -> None:
    async with served(tmp_path, {"ant": {}}) as (_, channel):
        stub, key = LoraxStub(channel), key_of("ant")
        for metadata, code in (
            ((), REFUSED),
            (bearer("sk-of-nobody"), REFUSED),
            (bearer(key), OK),
            ((("x-api-key", key),), OK),
            (bearer(METRICS_KEY), grpc.StatusCode.PERMISSION_DENIED),
        ):
            assert await code_of(stub.Info(pb.InfoRequest(), metadata=metadata)) is code
            text = pb.GenerateRequest(text="w1", parameters={"max_new_tokens": 2})
            assert await code_of(stub.Generate(text, metadata=metadata)) is code
        health = health_pb2_grpc.HealthStub(channel)
        assert await code_of(health.Check(health_pb2.HealthCheckRequest())) is OK
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        for metadata, code in (((), REFUSED), (bearer(key), OK)):
            stream = reflection.ServerReflectionInfo(iter([ask]), metadata=metadata)
            assert await code_of(stream.read()) is code


@in_loop
async def test_tenants_have_bounds_and_quotas_over_grpc_too(tmp_path: Path) -> None:
    tenants = {"ant": {"adapters": ["ant-*"], "requests_per_minute": 4}, "bee": {}}
    async with served(tmp_path, tenants) as (world, channel):
        stub = LoraxStub(channel)

        def use(tenant: str, adapter: str) -> Any:
            params = {"max_new_tokens": 2, "adapter": {"id": adapter, "source": "local"}}
            request = pb.GenerateRequest(text="w1", parameters=params)
            return code_of(stub.Generate(request, metadata=bearer(key_of(tenant))))

        assert await use("bee", "bee-one") is OK
        assert await use("ant", "ant-one") is OK
        assert await use("ant", "bee-one") is await use("ant", "bee-not") is not OK
        listed = await stub.ListAdapters(pb.ListAdaptersRequest(), metadata=bearer(key_of("ant")))
        assert {each.id for each in listed.adapters} == {"ant-one"}
        load = pb.LoadAdapterRequest(adapter={"id": "x", "source": "local"})
        refused = grpc.StatusCode.PERMISSION_DENIED
        assert await code_of(stub.LoadAdapter(load, metadata=bearer(key_of("ant")))) is refused
        assert await code_of(stub.LoadAdapter(load, metadata=bearer(ADMIN_KEY))) is OK
        assert await use("ant", "ant-one") is OK
        with pytest.raises(grpc.aio.AioRpcError, match="4 requests a minute") as caught:
            await stub.Generate(pb.GenerateRequest(text="w1"), metadata=bearer(key_of("ant")))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert {query.token for query in world.shard.queries} == {None}
