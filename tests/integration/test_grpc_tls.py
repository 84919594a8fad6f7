"""gRPC over TLS, as a router process serves it: keys, a new certificate, clients that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.helpers.certificates import write_pair
from tests.helpers.fake_shard_server import serve
from tests.helpers.grpc_calls import grpc_served, refused, servicer_of
from tests.helpers.http_app import World, limits, until
from tests.helpers.in_loop import in_loop
from tests.helpers.router_process import config_of, started
from tests.helpers.scripted_engine import ScriptedEngine, words
from tests.helpers.server import free_port
from tests.helpers.tenants import bearer, key_of, keys_file

from lorax_contract.exit_codes import ExitCode
from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxStub
from lorax_router.grpc_api.limits import CallLimits
from lorax_router.shards.fake.shard import FakeModel, FakeShard
from lorax_router.tls import TlsIdentity

REQUEST = pb.GenerateRequest(text="w1", parameters=pb.Parameters(max_new_tokens=2))
METADATA = tuple(bearer(key_of("ant")).items())


@contextlib.asynccontextmanager
async def trusting(chain: bytes, port: int) -> Any:
    """A client with a connection of its own that trusts one certificate."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 65_535),
        ("grpc.max_receive_message_length", -1),
    ]
    credentials = grpc.ssl_channel_credentials(chain)
    address = f"localhost:{port}"
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        yield LoraxStub(channel)


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_a_certificate_that_changes_is_served_to_new_connections_while_old_ones_last(
    tmp_path: Path,
) -> None:
    chain, private = write_pair(tmp_path, "one")
    port = free_port()

    async def scene() -> None:
        config = config_of(
            tmp_path, grpc_port=port, ssl_certfile=str(chain), ssl_keyfile=str(private),
            api_keys_file=str(keys_file(tmp_path / "keys.json", ant={})),
        )  # fmt: skip
        shard = FakeShard(FakeModel(vocab_size=900), num_blocks=200, block_size=4)
        async with serve([shard], tmp_path), started(config, tmp_path) as router:
            assert (await router.url()).startswith("https://")
            old = chain.read_bytes()
            async with trusting(old, port) as kept:
                assert (await kept.Generate(REQUEST, metadata=METADATA, timeout=30)).sequences
                without = await refused(kept.Generate(REQUEST, timeout=30))
                assert without.code == "UNAUTHENTICATED"
                write_pair(tmp_path, "two")
                async with asyncio.timeout(30):
                    while True:
                        async with trusting(chain.read_bytes(), port) as fresh:
                            call = fresh.Generate(REQUEST, metadata=METADATA, timeout=30)
                            if await code_of(call) is grpc.StatusCode.OK:
                                break
                # What is connected stays; who trusts the old one only does not connect any more.
                assert (await kept.Generate(REQUEST, metadata=METADATA, timeout=30)).sequences
                async with trusting(old, port) as late:
                    call = late.Generate(REQUEST, metadata=METADATA, timeout=30)
                    assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(f"localhost:{port}", options=options) as plain:
                call = LoraxStub(plain).Generate(REQUEST, metadata=METADATA, timeout=30)
                assert await code_of(call) is grpc.StatusCode.UNAVAILABLE
            router.process.send_signal(signal.SIGTERM)
            code, _ = await router.ended()
            assert code == ExitCode.OK

    asyncio.run(asyncio.wait_for(scene(), 120))


@pytest.mark.parametrize("together", [False, True])
def test_streams_that_nobody_reads_over_tls_are_ended_or_their_connection_cut(
    tmp_path: Path, together: bool
) -> None:
    """``together``: the bound is that of all clients, whose largest loses its connection."""
    chain, private = write_pair(tmp_path, "one")
    bounds = {"max_all_unread_bytes": 4 << 20, "max_unread_bytes": 64 << 20}

    def script(_: Any) -> Any:
        while True:
            yield next(words(" w", " w", num_alternatives=256))

    @in_loop
    async def scene() -> None:
        world = World(engine=ScriptedEngine(script), bounds=limits(max_total_tokens=10**6))
        set_here = bounds if together else {"max_unread_bytes": 1 << 18}
        calls = CallLimits(client_timeout_s=10_000.0, **set_here)
        identity = TlsIdentity(str(chain), str(private))
        async with (
            grpc_served(servicer_of(world), calls, tls=identity) as served,
            trusting(chain.read_bytes(), served.port) as stub,
            trusting(chain.read_bytes(), served.port) as other,
        ):
            unread = stub.GenerateStream(
                pb.GenerateRequest(text="w1", parameters=pb.Parameters(num_alternatives=256))
            )
            await until(lambda: world.engine.cancelled == [1], 30)
            await world.service.wait_idle()
            assert (await other.Info(pb.InfoRequest(), timeout=30)).version
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in unread:
                    pass
            code = "UNAVAILABLE" if together else "RESOURCE_EXHAUSTED"
            assert caught.value.code() is grpc.StatusCode[code]
            await until(lambda: served.server.boundary.unread.total == 0, 30)

    scene()
