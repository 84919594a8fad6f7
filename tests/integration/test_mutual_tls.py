"""TCP between router and shards: who shows no certificate of their authority is nobody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from tests.helpers.certificates import Authority
from tests.helpers.server import free_ports
from tests.helpers.toy_paged_model import make_engine

from lorax_contract.config import ConfigError, RouterConfig, ShardConfig
from lorax_contract.errors import ShardUnavailableError, StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_proto.mutual_tls import MutualTls
from lorax_router.shards.connecting import connect
from lorax_router.shards.grpc_client import CallTimeouts
from lorax_shard.rpc.queue import CommandQueue
from lorax_shard.rpc.server import ShardServer

TIMEOUTS = CallTimeouts(info_s=5.0, health_s=5.0, reconnect_s=0.0)


def config_of(uris: list[str], rank: int, tls: Path | None) -> ShardConfig:
    return ShardConfig(
        model_dir="toy", model_id="toy", rank=rank, world_size=len(uris), rendezvous="unused",
        shard_uris=uris, block_size=4, shard_tls_dir=None if tls is None else str(tls),
    )  # fmt: skip


@contextlib.asynccontextmanager
async def shards(tls: Path | None, world_size: int = 1) -> AsyncIterator[str]:
    """Ranks of the toy model at ports of the loopback; gives the address of the first."""
    uris = [f"127.0.0.1:{port}" for port in free_ports(world_size)]
    async with contextlib.AsyncExitStack() as stack:
        for rank in range(world_size):
            commands = CommandQueue(1)
            server = ShardServer(config_of(uris, rank, tls), make_engine(), commands)
            await server.start()
            stack.push_async_callback(commands.close, 5.0)
            stack.push_async_callback(server.stop, 1.0)
        yield uris[0]


async def answers(uri: str, tls: Path | None) -> int:
    """Connect as a router and return how many ranks there are."""
    own = MutualTls.read(None if tls is None else str(tls))
    group = await connect(uri, TIMEOUTS, own)
    try:
        return len((await group.info()).shard_uris)
    finally:
        await group.close()


@pytest.fixture
def authority() -> Authority:
    return Authority("ours")


def test_all_ranks_answer_a_router_of_the_same_authority(
    authority: Authority, tmp_path: Path
) -> None:
    of_shards, of_router = (
        authority.write(tmp_path / "s", "s"),
        authority.write(tmp_path / "r", "r"),
    )

    async def scenario() -> int:
        async with shards(of_shards, world_size=2) as uri:
            return await answers(uri, of_router)

    assert asyncio.run(scenario()) == 2


@pytest.mark.parametrize("who", ["plain", "stranger", "no certificate"])
def test_nobody_else_is_heard(who: str, authority: Authority, tmp_path: Path) -> None:
    of_shards = authority.write(tmp_path / "s", "s")
    stranger = Authority("theirs").write(tmp_path / "x", "x")
    # Believes the shard, and shows what another authority signed.
    (stranger / "ca.pem").write_bytes((of_shards / "ca.pem").read_bytes())

    async def scenario() -> None:
        async with shards(of_shards) as uri:
            if who == "no certificate":
                trusted = grpc.ssl_channel_credentials((of_shards / "ca.pem").read_bytes())
                async with grpc.aio.secure_channel(uri, trusted) as channel:
                    call = channel.unary_unary("/generate.v1.LoraxService/Info")
                    await call(b"", timeout=5.0)
            await answers(uri, None if who == "plain" else stranger)

    with pytest.raises((ShardUnavailableError, grpc.aio.AioRpcError)) as caught:
        asyncio.run(scenario())
    if isinstance(caught.value, grpc.aio.AioRpcError):
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("tls", [True, False])
def test_a_router_does_not_talk_to_a_shard_of_somebody_else(
    tls: bool, authority: Authority, tmp_path: Path
) -> None:
    own = authority.write(tmp_path / "r", "r")
    theirs = Authority("theirs").write(tmp_path / "x", "x") if tls else None

    async def scenario() -> None:
        async with shards(theirs) as uri:
            await answers(uri, own)

    with pytest.raises(ShardUnavailableError):
        asyncio.run(scenario())


@pytest.mark.parametrize("spoilt", ["ca.pem", "cert.pem", "key.pem", "other key", "missing"])
def test_files_that_cannot_be_used_are_named(
    spoilt: str, authority: Authority, tmp_path: Path
) -> None:
    folder = authority.write(tmp_path / "s", "s")
    if spoilt == "other key":
        other = authority.write(tmp_path / "o", "o")
        (folder / "key.pem").write_bytes((other / "key.pem").read_bytes())
    elif spoilt == "missing":
        (folder / "key.pem").unlink()
    else:
        (folder / spoilt).write_text("this is no PEM")
    with pytest.raises(
        StartupError, match=r"shard_tls_dir: .* must hold ca\.pem, cert\.pem"
    ) as caught:
        MutualTls.read(str(folder))
    assert caught.value.exit_code is ExitCode.BAD_CONFIG


@pytest.mark.parametrize(
    "uri", ["10.0.0.7:9000", "0.0.0.0:9000", "[::]:9000", "shard:9000", "dns:///x:1"]
)
def test_an_address_that_others_reach_needs_certificates(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set shard_tls_dir to a folder"):
        config_of([uri], 0, None)
    with pytest.raises(ConfigError, match="set shard_tls_dir to a folder"):
        RouterConfig(model_id="m", tokenizer_dir="t", shard_uri=uri)
    assert config_of([uri], 0, tmp_path).shard_tls_dir == str(tmp_path)


@pytest.mark.parametrize("uri", ["unix:/run/x", "127.0.0.1:9000", "localhost:1", "[::1]:9000"])
def test_an_address_of_this_machine_needs_none(uri: str) -> None:
    assert config_of([uri], 0, None).shard_uris == [uri]
