"""TLS for HTTP and gRPC: one certificate, read again when its files change."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.helpers.adapter_world import adapter_world
from tests.helpers.certificates import write_pair
from tests.helpers.http_app import World, serving, until
from tests.helpers.in_loop import in_loop
from tests.helpers.scripted_engine import ScriptedEngine
from tests.unit.http_api.test_slow_clients import endless, post, world_of

from lorax_contract.config import ConfigError, RouterConfig
from lorax_router.grpc_api.server import GrpcServer
from lorax_router.http_api.connection import ConnectionLimits
from lorax_router.tls import TlsIdentity


def trusting(chain: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(chain))


def secure(url: str) -> str:
    return url.replace("http://", "https://")


async def subject_of(url: str) -> str:
    """Whom the certificate of a server names, whoever signed it."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, _, port = url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    from cryptography import x509

    return x509.load_der_x509_certificate(der).subject.rfc4514_string()


@in_loop
async def test_http_speaks_tls_and_takes_a_new_certificate_without_a_break(tmp_path: Path) -> None:
    chain, key = write_pair(tmp_path, "one")
    identity = TlsIdentity(str(chain), str(key))
    old = trusting(chain)
    async with serving(World().app, tls=identity.context) as (url, _):
        async with httpx.AsyncClient(verify=old, base_url=secure(url)) as kept:
            assert (await kept.get("/health")).status_code == 200
            body = {"inputs": "w1", "parameters": {"max_new_tokens": 2}}
            assert "data:" in (await kept.post("/generate_stream", json=body)).text
            write_pair(tmp_path, "two")
            identity.check()
            # What is connected stays.
            assert (await kept.get("/health")).status_code == 200
            assert await subject_of(url) == "CN=two"
        async with httpx.AsyncClient(verify=trusting(chain), base_url=secure(url)) as fresh:
            assert (await fresh.get("/health")).status_code == 200
        async with httpx.AsyncClient(base_url=url) as plain:
            with pytest.raises(httpx.HTTPError):
                await plain.get("/health")


@in_loop
async def test_half_a_certificate_keeps_the_old_one_and_says_so(
    tmp_path: Path, caplog: Any
) -> None:
    chain, key = write_pair(tmp_path, "one")
    identity = TlsIdentity(str(chain), str(key))
    caplog.set_level(logging.INFO)
    before = key.read_bytes()
    async with serving(World().app, tls=identity.context) as (url, _):
        (tmp_path / "other").mkdir()
        _, foreign = write_pair(tmp_path / "other", "two")
        for wrong in (foreign.read_bytes(), b"", b"no pem"):
            key.write_bytes(wrong)
            identity.check()
            assert await subject_of(url) == "CN=one"
        key.unlink()
        identity.check()
        assert await subject_of(url) == "CN=one"
        assert caplog.text.count("the certificate stays as it was") == 4
        key.write_bytes(before)
        identity.check()
        assert "the certificate was read again" in caplog.text


@in_loop
async def test_who_never_shakes_hands_is_let_go(tmp_path: Path) -> None:
    chain, key = write_pair(tmp_path, "one")
    identity = TlsIdentity(str(chain), str(key))
    limits = ConnectionLimits(client_timeout_s=0.2)
    async with serving(World().app, tls=identity.context, limits=limits) as (url, _):
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await reader.read() == b""
        writer.close()


def test_a_key_with_a_password_is_read_with_it(tmp_path: Path) -> None:
    chain, key = write_pair(tmp_path, "one", password="correct horse")
    TlsIdentity(str(chain), str(key), "correct horse")
    for wrong in (None, "battery"):
        with pytest.raises(ConfigError, match="LORAX_SSL_KEYFILE_PASSWORD must hold it") as caught:
            TlsIdentity(str(chain), str(key), wrong)
        assert "battery" not in str(caught.value)


def test_a_configuration_names_the_files_and_the_environment_the_password(tmp_path: Path) -> None:
    chain, key = write_pair(tmp_path, "one", password="correct horse")
    both = tmp_path / "both.pem"
    both.write_bytes(chain.read_bytes() + key.read_bytes())
    base: dict[str, Any] = {"model_id": "m", "tokenizer_dir": "", "shard_uri": ""}
    assert TlsIdentity.of(RouterConfig(**base)) is None
    config = RouterConfig(**base, ssl_certfile=str(both))
    secret = {"LORAX_SSL_KEYFILE_PASSWORD": "correct horse"}
    identity = TlsIdentity.of(config, secret)
    assert identity is not None and identity.has_password
    with pytest.raises(ConfigError, match="ssl_keyfile"):
        RouterConfig(**base, ssl_keyfile=str(key))
    with pytest.raises(ConfigError, match="cannot be read"):
        TlsIdentity(str(tmp_path / "nowhere"), None)


@in_loop
async def test_grpc_speaks_tls_and_takes_a_new_certificate(tmp_path: Path) -> None:
    chain, key = write_pair(tmp_path, "one")
    identity = TlsIdentity(str(chain), str(key))

    async def health(port: int) -> int:
        credentials = grpc.ssl_channel_credentials(chain.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
            return int(answer.status)

    async with adapter_world() as world:
        server = GrpcServer(world.parts.servicer, tls=identity)
        port = server.bind("127.0.0.1", 0)
        await server.start()
        try:
            assert await health(port) == health_pb2.HealthCheckResponse.SERVING
            write_pair(tmp_path, "two")
            identity.check()
            # The client trusts the new one only.
            assert await health(port) == health_pb2.HealthCheckResponse.SERVING
        finally:
            await server.stop(0)


def test_a_stream_that_is_not_read_over_tls_is_cut_and_its_place_is_free(tmp_path: Path) -> None:
    chain, key = write_pair(tmp_path, "one")
    identity = TlsIdentity(str(chain), str(key))
    bounds = ConnectionLimits(client_timeout_s=10_000.0, max_unread_bytes=1 << 16)

    async def scene() -> None:
        world = world_of(ScriptedEngine(endless), max_concurrent_requests=1)
        async with serving(world.app, limits=bounds, tls=identity.context) as (url, server):
            host, _, port = url.removeprefix("http://").partition(":")
            reader, writer = await asyncio.open_connection(
                host, int(port), ssl=trusting(chain), server_hostname="localhost", limit=1024
            )
            writer.write(post("/generate_stream", return_k_alternatives=256))
            # Its buffers fill up, and it takes nothing more.
            await until(lambda: world.engine.cancelled == [1], seconds=30)
            await world.service.wait_idle()
            await until(lambda: not len(server.connections))
            writer.transport.abort()
            del reader

    # On the event loop that the router runs on.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scene(), 60))
