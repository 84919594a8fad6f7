"""What clients see of a server that stops: over HTTP and gRPC, with fronts and without."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.helpers.fake_shard_server import serve
from tests.helpers.grpc_calls import Refusal, refusal_of, refused
from tests.helpers.http_app import TEMPLATE, events
from tests.helpers.in_loop import in_loop
from tests.helpers.router_process import RouterProcess, config_of, started

from lorax_contract.exit_codes import ExitCode
from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxStub
from lorax_router.shards.fake.shard import FakeModel, FakeShard

NUM_TOKENS = 40
# Every dialect's request, and the status with which its SDKs try again later.
REFUSED: dict[str, tuple[dict[str, Any], int]] = {
    "/generate": ({"inputs": "w1"}, 503),
    "/generate_stream": ({"inputs": "w1"}, 503),
    "/v1/completions": ({"model": "fake/model", "prompt": "w1"}, 503),
    "/v1/chat/completions": (
        {"model": "fake/model", "messages": [{"role": "user", "content": "w1"}]},
        503,
    ),
    "/v1/messages": (
        {
            "model": "fake/model", "max_tokens": 4,
            "messages": [{"role": "user", "content": "w1"}],
        },
        529,
    ),
}  # fmt: skip
fronts = pytest.mark.parametrize("http_workers", [0, 2])


@dataclass
class Streams:
    """A router with a client of each kind, and a stream of each that has begun."""

    router: RouterProcess
    http: httpx.AsyncClient
    channel: grpc.aio.Channel
    by_http: AsyncIterator[str]
    by_grpc: AsyncIterator[Any]
    first: str

    def signal(self) -> None:
        self.router.process.send_signal(signal.SIGTERM)

    async def http_events(self) -> list[dict[str, Any]]:
        return events("\n".join([self.first, *[line async for line in self.by_http]]))

    async def grpc_chunks(self) -> list[Any]:
        return [each async for each in self.by_grpc]

    async def is_serving(self) -> tuple[bool, bool]:
        """What the health says over HTTP, and over gRPC."""
        answer = await self.http.get("/health")
        assert answer.status_code in (200, 503)
        stub = health_pb2_grpc.HealthStub(self.channel)
        found = await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
        serving = health_pb2.HealthCheckResponse.SERVING
        return answer.status_code == 200, found.status == serving

    async def until_draining(self) -> None:
        while any(await self.is_serving()):
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def streaming(folder: Any, num_tokens: int, **config: Any) -> AsyncIterator[Streams]:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    model = FakeModel(vocab_size=900, eos_token_ids=frozenset())
    shard = FakeShard(model, num_blocks=2000, block_size=4, step_delay_s=0.03)
    body = {
        "inputs": "w1 w2",
        "parameters": {"max_new_tokens": num_tokens, "ignore_eos_token": True},
    }
    parameters = pb.Parameters(max_new_tokens=num_tokens, ignore_eos_token=True)
    async with (
        serve([shard], folder),
        started(config_of(folder, grpc_port=0, **config), folder) as router,
    ):
        ready = await router.ready()
        async with (
            httpx.AsyncClient(base_url=ready["url"], timeout=60) as http,
            grpc.aio.insecure_channel(f"127.0.0.1:{ready['ports']['grpc_port']}") as channel,
            http.stream("POST", "/generate_stream", json=body) as answer,
        ):
            lines = answer.aiter_lines()
            asked = pb.GenerateRequest(text="w1 w2", parameters=parameters)
            chunks = LoraxStub(channel).GenerateStream(asked, timeout=120).__aiter__()
            await anext(chunks)
            yield Streams(router, http, channel, lines, chunks, await anext(lines))


async def grpc_refusal(streams: Streams) -> Refusal:
    return await refused(LoraxStub(streams.channel).Generate(pb.GenerateRequest(text="w1")))


@fronts
@in_loop
async def test_at_sigterm_new_work_is_refused_and_what_runs_ends_whole(tmp_path, http_workers):
    async with streaming(tmp_path, NUM_TOKENS, http_workers=http_workers) as streams:
        assert await streams.is_serving() == (True, True)
        streams.signal()
        await streams.until_draining()
        for path, (body, status) in REFUSED.items():
            answer = await streams.http.post(path, json=body)
            assert answer.status_code == status, path
            assert int(answer.headers["retry-after"]) >= 1, path
        found = await grpc_refusal(streams)
        assert (found.code, found.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
        assert found.retry_s
        told = await streams.http_events()
        assert len(told) == NUM_TOKENS
        assert told[-1]["generated_text"]
        chunks = await streams.grpc_chunks()
        assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
        code, _ = await streams.router.ended()
        assert code == ExitCode.OK


@fronts
@in_loop
async def test_past_the_grace_period_streams_end_with_a_marked_error(tmp_path, http_workers):
    config = {"http_workers": http_workers, "grace_period_s": 0.3}
    async with streaming(tmp_path, 3000, **config) as streams:
        streams.signal()
        told = await streams.http_events()
        assert told[-1]["error_type"] == "shutting_down"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await streams.grpc_chunks()
        assert refusal_of(raised.value).reason == "SHUTTING_DOWN"
        code, log = await streams.router.ended()
        assert code == ExitCode.OK
        assert any("grace period" in line["message"] for line in log)


@fronts
@in_loop
async def test_a_second_signal_ends_it_at_once(tmp_path, http_workers):
    config = {"http_workers": http_workers, "grace_period_s": 3600.0}
    async with streaming(tmp_path, 3000, **config) as streams:
        children = psutil.Process(streams.router.process.pid).children()
        streams.signal()
        await streams.until_draining()
        streams.signal()
        code, log = await streams.router.ended()
        assert code == ExitCode.INTERRUPTED
        assert any("again: ending at once" in line["message"] for line in log)
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, 30)
        assert alive == []
