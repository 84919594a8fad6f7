"""The ingress as a process over routers as processes: killed, stopped, stalled, started anew."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tests.helpers.http_app import events
from tests.helpers.ingress_process import (
    LONG,
    IngressProcess,
    in_time,
    ingress,
    router,
    sample,
    streamed,
)
from tests.helpers.router_process import RouterProcess
from tests.helpers.tenants import ADMIN_KEY, bearer, key_of, keys_file

from lorax_contract.exit_codes import ExitCode
from lorax_contract.keys import hash_of
from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxStub

CHAT = {"messages": [{"role": "user", "content": "w1 w2"}], "temperature": 0, "max_tokens": 30}


@contextlib.asynccontextmanager
async def pair(
    folder: Path, silence_s: str = "10", **config: Any
) -> AsyncIterator[tuple[IngressProcess, dict[str, RouterProcess]]]:
    """An ingress over two routers."""
    async with (
        router(folder, "a", **config) as one, router(folder, "b", **config) as two,
        ingress(folder, "a", "b", silence_s=silence_s) as made,
    ):  # fmt: skip
        await made.url()
        yield made, {"a": one, "b": two}


async def text_of(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@in_time
async def test_all_dialects_pass_through_and_calls_are_answered(folder: Path) -> None:
    async with router(folder, "a"), router(folder, "b"), ingress(folder, "a", "b") as made:
        url = await made.url()
        async with made.client(url) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/info")).json()["model_id"] == "fake/model"
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == "fake/model"
            tokens = await text_of(client, "/tokenize", {"inputs": "w1 w2"})
            assert len(tokens["tokens"] if isinstance(tokens, dict) else tokens) >= 2
            said = await text_of(client, "/v1/chat/completions", CHAT)
            again = await text_of(client, "/v1/chat/completions", CHAT)
            assert said["choices"] == again["choices"]
            answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
            parts = events(answer.text.replace("data: [DONE]", ""))
            whole = "".join(
                part["choices"][0]["delta"].get("content") or "" for part in parts
                if part["choices"]
            )  # fmt: skip
            assert whole == said["choices"][0]["message"]["content"]
            refused = await client.post("/generate", json={"inputs": ""})
            assert refused.status_code == 422
            assert await sample(client, "lorax_ingress_routed_total") >= 3


@in_time
async def test_streams_outlive_the_router_that_writes_them(folder: Path) -> None:
    async with pair(folder) as (made, routers), made.client(await made.url()) as client:
        expected = await streamed(client)
        begun = [asyncio.Event() for _ in range(8)]
        reading = [asyncio.create_task(streamed(client, each)) for each in begun]
        await asyncio.gather(*(each.wait() for each in begun))
        routers["a"].process.kill()
        assert await asyncio.gather(*reading) == [expected] * 8
        assert 1 <= await sample(client, "lorax_ingress_resumed_total") < 8
        assert await sample(client, "lorax_ingress_replicas_lost_total") == 1


async def one_stream(
    client: httpx.AsyncClient,
) -> tuple[asyncio.Task[list[int]], str]:
    """A stream that has begun, and which router writes it."""
    before, begun = await routed(client), asyncio.Event()
    reading = asyncio.create_task(streamed(client, begun))
    await begun.wait()
    after = await routed(client)
    return reading, next(name for name in "ab" if after[name] > before[name])


async def routed(client: httpx.AsyncClient) -> dict[str, float]:
    """Requests that each router had."""
    text, found = (await client.get("/metrics")).text, dict.fromkeys("ab", 0.0)
    for name, value in re.findall(
        r'^lorax_ingress_routed_total.*replica="(.)".* (\S+)$', text, re.MULTILINE
    ):
        found[name] += float(value)
    return found


@in_time
async def test_a_router_that_is_told_to_end_fails_nobody(folder: Path) -> None:
    """New requests go elsewhere at once, and so do streams that outlast its patience."""
    async with (
        pair(folder, grace_period_s=0.2) as (made, routers),
        made.client(await made.url()) as client,
    ):
        expected = await streamed(client)
        reading, name = await one_stream(client)
        routers[name].process.send_signal(signal.SIGTERM)
        assert [await streamed(client), await reading] == [expected] * 2
        assert (await routers[name].ended())[0] == 0
        assert await sample(client, "lorax_ingress_resumed_total") >= 1


@in_time
async def test_a_router_that_stands_still_is_left(folder: Path) -> None:
    async with (
        pair(folder, silence_s="1") as (made, routers),
        made.client(await made.url()) as client,
    ):
        expected = await streamed(client)
        reading, name = await one_stream(client)
        routers[name].process.send_signal(signal.SIGSTOP)
        assert await reading == expected
        assert await sample(client, "lorax_ingress_resumed_total") == 1


@in_time
async def test_keys_are_asked_for_and_what_manages_reaches_all(folder: Path) -> None:
    keys = str(keys_file(folder / "keys.json", acme={}))
    config = {"api_keys_file": keys, "admin_key_hashes": [hash_of(ADMIN_KEY)]}
    async with (
        router(folder, "a", **config) as one, router(folder, "b", **config) as two,
        ingress(folder, "a", "b", api_keys_file=keys) as made,
    ):  # fmt: skip
        url = await made.url()
        async with made.client(url) as client, made.client(url, ADMIN_KEY) as admin:
            assert (await client.post("/generate", json=LONG)).status_code == 401
            body = {"lora_name": "poet", "lora_path": "org/poet"}
            assert (await client.post("/v1/load_lora_adapter", json=body)).status_code == 401
            answer = await admin.post("/v1/load_lora_adapter", json=body)
            assert answer.status_code == 200, answer.text
        for each in (one, two):
            async with made.client(each.address, key_of("acme")) as client:
                models = (await client.get("/v1/models")).json()["data"]
                assert "poet" in [model["id"] for model in models]
        async with made.client(url, key_of("acme")) as client:
            said = await text_of(client, "/v1/chat/completions", {**CHAT, "model": "poet"})
            assert said["model"] == "poet"


@in_time
async def test_the_grpc_service_is_served_too(folder: Path) -> None:
    """With keys: those that generate are the ingress' own; who manages, the servers know."""
    keys = str(keys_file(folder / "keys.json", acme={}))
    config = {"api_keys_file": keys, "admin_key_hashes": [hash_of(ADMIN_KEY)]}
    long = pb.GenerateRequest(
        text="w1 w2",
        parameters=pb.Parameters(max_new_tokens=200, ignore_eos_token=True, return_tokens=True),
    )
    async with (
        router(folder, "a", **config) as one, router(folder, "b", **config) as two,
        ingress(folder, "a", "b", api_keys_file=keys, grpc_port="0") as made,
    ):  # fmt: skip
        await made.url()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{made.grpc_port}") as channel:
            stub = LoraxStub(channel)
            nobody, acme, admin = (
                tuple(bearer(each).items()) for each in ("unknown", key_of("acme"), ADMIN_KEY)
            )
            load = pb.LoadAdapterRequest(
                adapter=pb.Adapter(id="org/poet", source="hub"), alias="poet"
            )
            for metadata, code in ((nobody, "UNAUTHENTICATED"), (acme, "PERMISSION_DENIED")):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.LoadAdapter(load, metadata=metadata)
                assert caught.value.code().name == code
            with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
                await stub.Generate(long, metadata=nobody)
            await stub.LoadAdapter(load, metadata=admin)
            for each in (one, two):
                async with made.client(each.address, key_of("acme")) as client:
                    models = (await client.get("/v1/models")).json()["data"]
                    assert "poet" in [model["id"] for model in models]
            expected = await stub.Generate(long, metadata=acme)
            begun, streams = asyncio.Event(), []

            async def read() -> list[int]:
                ids = []
                async for chunk in stub.GenerateStream(long, metadata=acme):
                    ids += [token.id for token in chunk.tokens]
                    begun.set()
                return ids

            streams = [asyncio.create_task(read()) for _ in range(6)]
            await begun.wait()
            one.process.kill()
            wanted = [token.id for token in expected.sequences[0].tokens]
            assert await asyncio.gather(*streams) == [wanted] * 6
            # Calls that are open when it ends are answered.
            last = asyncio.create_task(read())
            begun.clear()
            await begun.wait()
            made.process.send_signal(signal.SIGTERM)
            assert await last == wanted
        assert await made.end() == 0


@in_time
async def test_a_port_for_grpc_that_is_taken_is_said(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with router(folder, "a"), ingress(folder, "a", grpc_port=str(port)) as made:
            assert await made.process.wait() == ExitCode.BAD_CONFIG
            await made._reading
            assert any(f"cannot listen on 127.0.0.1:{port}" in str(each) for each in made.log)


def test_what_is_no_place_is_said(tmp_path: Path) -> None:
    async def scene() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "lorax_ingress.cli", "--port=0", "--replica=nowhere",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, _ = await process.communicate()
        assert "'nowhere' is no address" in output.decode()
        assert process.returncode == ExitCode.BAD_CONFIG

    asyncio.run(asyncio.wait_for(scene(), 60))
