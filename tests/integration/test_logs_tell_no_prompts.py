"""Prompts, outputs and secrets are in no line that a served run writes, whatever goes wrong."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import grpc
import httpx
import pytest
from tests.helpers.fake_shard_server import serve
from tests.helpers.http_app import TEMPLATE
from tests.helpers.marked_requests import MARK, ask_grpc, ask_http
from tests.helpers.router_process import config_of, started
from tests.helpers.server import free_port
from tests.helpers.tenants import bearer, key_of, keys_file

from lorax_contract.exit_codes import ExitCode
from lorax_proto.lorax_pb2_grpc import LoraxStub
from lorax_router.shards.fake.shard import FakeModel, FakeShard


@pytest.mark.parametrize("level", ["info", "debug"])
def test_no_line_of_a_served_run_has_a_prompt_an_output_or_a_secret(
    tmp_path: Path, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        model = FakeModel(
            vocab_size=900, eos_token_ids=frozenset(), text_of=lambda _: f" {MARK} says"
        )
        shard = FakeShard(model, num_blocks=400, block_size=4)
        port = free_port()
        config = config_of(
            tmp_path, chat_template=TEMPLATE, log_level=level, grpc_port=port,
            max_total_tokens=400, api_keys_file=str(keys_file(tmp_path / "keys.json", ant={})),
        )  # fmt: skip
        async with serve([shard], tmp_path), started(config, tmp_path) as router:
            url, key = await router.url(), key_of("ant")
            async with httpx.AsyncClient(base_url=url, headers=bearer(key), timeout=60) as client:
                num_http = await ask_http(client, "fake/model")
                refused = await client.get("/info", headers=bearer(f"sk-{MARK}"))
                assert refused.status_code == 401
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                metadata = tuple(bearer(key).items())
                num_grpc = await ask_grpc(LoraxStub(channel), metadata)
            router.process.send_signal(signal.SIGTERM)
            code, log = await router.ended()
        assert code == ExitCode.OK
        assert num_http > 30
        assert num_grpc > 5
        lines = [json.dumps(line) for line in log]
        assert sum("request ended" in line for line in lines) > num_http + num_grpc
        told = [line[:400] for line in lines if MARK in line or key in line]
        assert not told
        # Nor do errors of our own hide among the refusals.
        assert not [line for line in log if line["level"] == "error" or "exception" in line]

    asyncio.run(asyncio.wait_for(scene(), 120))
    assert MARK not in caplog.text
