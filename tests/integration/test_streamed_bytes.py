"""What is streamed, over sockets: chunks that are written at once, past the application's layers."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from tests.helpers.http_app import TEMPLATE, until
from tests.integration.test_http_engine import Router, play, router

from lorax_router.http_api.connection import ConnectionLimits
from lorax_router.http_api.openai.completions import CompletionEvents
from lorax_router.service.prompts.chat_template import ChatTemplate
from lorax_router.shards.fake.shard import FakeModel, FakeShard

CHAT = {"messages": [{"role": "user", "content": "w1 w2 w3"}], "max_tokens": 9, "temperature": 0}
COMPLETION = {"prompt": "w1 w2", "max_tokens": 9, "temperature": 0}
USAGE = {"include_usage": True, "continuous_usage_stats": True}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate_stream", {"inputs": "w1", "parameters": {"max_new_tokens": 9, "details": True}}),
    ("/generate_stream", {"inputs": "w2", "parameters": {"return_k_alternatives": 2}}),
    ("/v1/completions", COMPLETION),
    ("/v1/completions", {**COMPLETION, "echo": True, "logprobs": 2}),
    ("/v1/completions", {**COMPLETION, "echo": True, "stop": ["9", "t3"]}),
    ("/v1/completions", {**COMPLETION, "stream_options": USAGE}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {**CHAT, "stop": ["9", "t3"], "stream_options": USAGE}),
    ("/v1/messages", CHAT),
    ("/v1/responses", {"input": "w1 w2", "max_output_tokens": 9, "temperature": 0}),
]


def same_of_each(text: str) -> str:
    """A stream without what no two have alike."""
    text = re.sub(r"[0-9a-f]{32}", "ID", text)
    return re.sub(r'"(created|created_at|completed_at)":\d+', "", text)


def shard(**values: Any) -> FakeShard:
    model = FakeModel(vocab_size=900, eos_token_ids=frozenset(), **values)
    return FakeShard(model, num_blocks=2_000, block_size=16)


async def through_layers(served: Router, path: str, body: dict[str, Any]) -> str:
    """What the application says by itself, chunk by chunk through all its layers."""
    transport = httpx.ASGITransport(app=served.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        return (await client.post(path, json=body)).text


@pytest.mark.parametrize(("path", "body"), BODIES, ids=[path for path, _ in BODIES])
def test_a_stream_says_the_same_written_at_once_and_through_all_layers(path, body):
    async def scene() -> None:
        async with router(shard(), template=ChatTemplate(TEMPLATE)) as served:
            wanted = {"model": "fake", "stream": True, **body}
            over_socket = (await served.client.post(path, json=wanted)).text
            assert over_socket.count("data: ") > 4
            by_layers = await through_layers(served, path, wanted)
            assert same_of_each(over_socket) == same_of_each(by_layers)

    play(scene())


def test_a_fault_in_writing_a_chunk_ends_that_stream_in_words_and_no_other(monkeypatch):
    async def scene() -> None:
        async with router(shard()) as served:
            wanted = {"model": "fake", "stream": True, **COMPLETION, "max_tokens": 40}
            monkeypatch.setattr(CompletionEvents, "chunk", failing_at_the_third())
            failed, sound = await asyncio.gather(
                served.client.post("/v1/completions", json=wanted),
                served.generate("w1", max_new_tokens=40, ignore_eos_token=True),
            )
            assert failed.text.count("data: ") == 3
            last = json.loads(failed.text.strip().split("data: ")[-1])
            assert last["error"]["type"] == "server_error"
            assert len(sound.json()["details"]["tokens"]) == 40
            await until(lambda: not served.engine.stats().num_running)

    play(scene())


def failing_at_the_third() -> Any:
    """As a dialect with a fault of its own."""
    original, calls = CompletionEvents.chunk, []

    def chunk(self: CompletionEvents, *arguments: Any) -> bytes:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyError("a fault")
        return original(self, *arguments)

    return chunk


def test_a_client_that_reads_nothing_of_what_is_written_at_once_is_cut_and_its_row_leaves():
    async def scene() -> None:
        limits = ConnectionLimits(max_unread_bytes=4_096)
        # More in all than a system keeps for a client.
        verbose = shard(text_of=lambda token: f" t{token}" * 4_000)
        async with router(verbose, limits=limits) as served:
            where = urlsplit(served.url)
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, (where.hostname, where.port))
                parameters = {"max_new_tokens": 2_000, "ignore_eos_token": True}
                body = json.dumps({"inputs": "w1", "parameters": parameters}).encode()
                head = (
                    b"POST /generate_stream HTTP/1.1\r\nhost: x\r\n"
                    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
                )
                await loop.sock_sendall(client, head % len(body) + body)
                await until(lambda: served.engine.stats().num_running)
                await until(lambda: not served.engine.stats().num_running)
                assert len(served.shard.steps) < 2_000
            # Others are served as ever.
            answer = await served.generate("w1", max_new_tokens=3, ignore_eos_token=True)
            assert len(answer.json()["details"]["tokens"]) == 3

    play(scene())
