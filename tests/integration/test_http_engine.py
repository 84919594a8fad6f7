"""HTTP to FakeShard through the real engine loop: right tokens, nothing lost, blocks come back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.types import ASGIApp
from tests.helpers.http_app import events, until, word_tokenizer

from lorax_contract.config import RouterConfig
from lorax_contract.errors import ShardUnavailableError
from lorax_contract.step import RequestId, RequestSpec, SamplingParams, StoppingParams
from lorax_router.http_api.connection import ConnectionLimits
from lorax_router.http_api.listeners import bind, url_of
from lorax_router.http_api.server import HttpServer
from lorax_router.service.engine.loop import EngineLoop
from lorax_router.service.prompts.chat_template import ChatTemplate
from lorax_router.service.prompts.language import Language
from lorax_router.shards.fake.shard import FakeModel, FakeShard, expected_tokens
from lorax_router.startup import assemble, size


@dataclass
class Router:
    """A router over one FakeShard."""

    url: str
    shard: FakeShard
    engine: EngineLoop
    app: ASGIApp
    client: httpx.AsyncClient

    async def generate(self, inputs: str, **params: object) -> httpx.Response:
        body = {"inputs": inputs, "parameters": {"details": True, **params}}
        return await self.client.post("/generate", json=body)


@contextlib.asynccontextmanager
async def router(
    shard: FakeShard,
    *,
    template: ChatTemplate | None = None,
    limits: ConnectionLimits | None = None,
    **options: object,
) -> AsyncIterator[Router]:
    """Assemble everything as the process does, and serve it."""
    values = {"model_id": "fake", "tokenizer_dir": "", "shard_uri": "", **options}
    config = RouterConfig(**values)
    language = Language(word_tokenizer(), template)
    info, budgets = await size(config, shard)
    parts = assemble(config, shard, language, info, budgets)
    with bind("127.0.0.1", 0) as listener:
        server = HttpServer(parts.app, listener, limits)
        running = [asyncio.create_task(parts.engine.run()), asyncio.create_task(server.run())]
        await server.wait_started()
        url = url_of(listener)
        try:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                yield Router(url, shard, parts.engine, parts.app, client)
        finally:
            server.stop()
            running[0].cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await parts.prompts.close()
    assert not shard.violations


def play(scene) -> None:
    asyncio.run(asyncio.wait_for(scene, 60))


def ids_of(prompt: str) -> list[int]:
    return word_tokenizer().encode(prompt).ids


def expected(model: FakeModel, prompt: str, num: int) -> list[int]:
    spec = RequestSpec(
        request_id=RequestId(0),
        prompt_ids=ids_of(prompt),
        sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=num, ignore_eos=True),
    )
    return expected_tokens(spec, model)


def test_many_requests_at_once_get_their_own_tokens_also_when_the_pool_is_tiny():
    """Forces chunking and preemption: 40 requests, 12 blocks of 4 tokens, 16 tokens a step."""

    async def scene() -> None:
        model = FakeModel(vocab_size=900, eos_token_ids=frozenset())
        shard = FakeShard(model, num_blocks=12, block_size=4)
        async with router(shard, max_batch_prefill_tokens=16, max_batch_size=8) as served:
            prompts = [" ".join(f"w{i * 7 + j}" for j in range(1 + i % 11)) for i in range(40)]
            lengths = [1 + i % 30 for i in range(40)]
            answers = await asyncio.gather(
                *(
                    served.generate(prompt, max_new_tokens=num, ignore_eos_token=True)
                    for prompt, num in zip(prompts, lengths, strict=True)
                )
            )
            for prompt, num, answer in zip(prompts, lengths, answers, strict=True):
                details = answer.json()["details"]
                assert [t["id"] for t in details["tokens"]] == expected(model, prompt, num)
                # W27: the prompt's length is the request's own, however it was computed.
                assert details["prompt_tokens"] == len(ids_of(prompt))
            stats = served.engine.stats()
            assert stats.num_preemptions > 0
            assert stats.num_free_blocks == stats.num_blocks == 12

    play(scene())


def test_w6_a_request_that_needs_every_block_is_served_and_one_that_needs_more_never_enters():
    """LoRAX keeps one block for itself, and such a request blocks its queue for ever."""

    async def scene() -> None:
        shard = FakeShard(
            FakeModel(vocab_size=900, eos_token_ids=frozenset()), num_blocks=8, block_size=4
        )
        async with router(shard) as served:
            info = (await served.client.get("/info")).json()
            assert info["max_total_tokens"] == info["max_batch_total_tokens"] == 32
            whole = await served.generate("w1", max_new_tokens=30, ignore_eos_token=True)
            assert whole.json()["details"]["generated_tokens"] == 30
            more = await served.generate("w1", max_new_tokens=31)
            assert (more.status_code, more.json()["error_type"]) == (422, "validation")
            assert (await served.generate("w1", max_new_tokens=1)).status_code == 200

    play(scene())


def test_a_client_that_leaves_in_mid_stream_gives_its_blocks_back():
    async def scene() -> None:
        shard = FakeShard(
            FakeModel(vocab_size=900, eos_token_ids=frozenset()),
            num_blocks=600,
            block_size=4,
            step_delay_s=0.002,
        )
        async with router(shard) as served:
            address = urlsplit(served.url)
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            body = json.dumps({"inputs": "w1 w2", "parameters": {"ignore_eos_token": True}})
            head = "POST /generate_stream HTTP/1.1\r\nhost: x\r\ncontent-type: application/json"
            writer.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
            await reader.readuntil(b"data: ")
            steps = len(shard.steps)
            writer.transport.abort()
            await until(lambda: served.engine.stats().num_free_blocks == 600)
            assert served.engine.stats().num_running == 0
            # Far from the 2,300 steps that it asked for.
            assert len(shard.steps) < steps + 200

    play(scene())


def test_w4_w5_a_bad_row_fails_alone():
    """In LoRAX it fails all that run with it, and can end the server."""

    async def scene() -> None:
        model = FakeModel(vocab_size=900, eos_token_ids=frozenset())
        shard = FakeShard(model, num_blocks=100, block_size=4)
        shard.fail_row(RequestId(2), "made of nothing", from_seq=3)
        async with router(shard) as served:
            answers = await asyncio.gather(
                *(served.generate(f"w{i}", max_new_tokens=8) for i in range(4))
            )
            assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 424]
            (bad,) = [answer for answer in answers if answer.status_code == 424]
            assert "made of nothing" in bad.json()["error"]
            # Clients that send again what failed are told that it would fail again.
            assert bad.headers["x-should-retry"] == "false"

    play(scene())


def test_a_lost_shard_fails_requests_in_words_and_health():
    async def scene() -> None:
        shard = FakeShard(FakeModel(vocab_size=900), num_blocks=100, block_size=4)
        shard.fail_step(3, ShardUnavailableError("unix:/secret is gone"))
        async with router(shard) as served:
            body = {"inputs": "w1", "parameters": {"ignore_eos_token": True}}
            response = await served.client.post("/generate_stream", json=body)
            last = events(response.text)[-1]
            assert last["error_type"] == "generation"
            assert "secret" not in last["error"]
            assert (await served.client.get("/health")).status_code == 503
            assert (await served.client.post("/generate", json=body)).status_code == 503

    play(scene())


def test_finish_reasons_and_the_whole_stream_agree():
    async def scene() -> None:
        model = FakeModel(vocab_size=900, eos_token_ids=frozenset(range(0, 900, 9)))
        shard = FakeShard(model, num_blocks=100, block_size=4)
        async with router(shard) as served:
            for place in range(12):
                body = {
                    "inputs": f"w{place}",
                    "parameters": {"max_new_tokens": 20, "details": True},
                }
                stream = events((await served.client.post("/generate_stream", json=body)).text)
                whole = (await served.client.post("/generate", json=body)).json()
                assert stream[-1]["generated_text"] == whole["generated_text"]
                tokens = whole["details"]["tokens"]
                assert [event["token"] for event in stream] == tokens
                is_eos = tokens[-1]["id"] % 9 == 0
                assert whole["details"]["finish_reason"] == ("eos_token" if is_eos else "length")

    play(scene())


@pytest.mark.parametrize("num", [1, 5])
def test_stopping_params_reach_the_shard(num):
    async def scene() -> None:
        model = FakeModel(vocab_size=900, eos_token_ids=frozenset())
        shard = FakeShard(model, num_blocks=100, block_size=4)
        async with router(shard) as served:
            await served.generate("w1", max_new_tokens=num, stop=["x"], stop_token_ids=[5])
        (row,) = [row for plan in shard.steps for row in plan.new_rows]
        assert row.spec.stopping == StoppingParams(
            max_new_tokens=num, stop_sequences=("x",), stop_token_ids=(5,)
        )

    play(scene())


@pytest.mark.parametrize(("options", "required"), [({}, 2), ({"max_total_tokens": 40}, 40)])
def test_the_warm_up_requires_only_a_length_that_was_asked_for(options, required):
    class NotingShard(FakeShard):
        async def warmup(self, spec, epoch=None):
            self.spec = spec
            return await super().warmup(spec, epoch)

    async def scene() -> None:
        shard = NotingShard(num_blocks=16, block_size=4)
        config = RouterConfig(model_id="fake", tokenizer_dir="", shard_uri="", **options)
        _, budgets = await size(config, shard)
        assert shard.spec.required_tokens == required
        assert shard.spec.max_total_tokens >= required
        assert budgets.lengths.max_total_tokens == (64 if not options else 40)

    play(scene())


@pytest.mark.parametrize(
    ("generates", "options", "expected"),
    [
        (True, {}, 512),
        (False, {}, 1024),
        (False, {"max_batch_prefill_tokens": 300}, 300),
        (True, {"max_batch_prefill_tokens": 300}, 300),
    ],
)
def test_steps_are_larger_where_nobody_waits_for_tokens(generates, options, expected):
    async def scene() -> None:
        shard = FakeShard(num_blocks=16, block_size=4, facts={"generates": generates})
        config = RouterConfig(model_id="fake", tokenizer_dir="", shard_uri="", **options)
        _, budgets = await size(config, shard)
        assert budgets.max_step_tokens == expected

    play(scene())


def test_the_dtype_is_told_in_torch_s_name_as_lorax_tells_it():
    async def scene() -> None:
        async with router(FakeShard(num_blocks=16, block_size=4)) as served:
            info = (await served.client.get("/info")).json()
            assert info["model_dtype"] == "torch.float32"

    play(scene())


def test_a_text_far_too_long_is_refused_by_its_length():
    async def scene() -> None:
        async with router(FakeShard(num_blocks=16, block_size=4)) as served:
            answer = await served.generate("w" * 100_000)
            assert answer.status_code == 422
            assert "characters, got 100000" in answer.json()["error"]

    play(scene())
