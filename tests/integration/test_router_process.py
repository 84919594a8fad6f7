"""The router as a process: ready, drain, exit codes; a FakeShard answers over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import ssl
import sys
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from tests.helpers.certificates import write_pair
from tests.helpers.fake_shard_server import serve
from tests.helpers.http_app import events
from tests.helpers.router_process import config_of, started
from tests.helpers.tenants import bearer, key_of, keys_file

from lorax_contract.exit_codes import ExitCode
from lorax_contract.keys import hash_of
from lorax_router.shards.fake.shard import FakeModel, FakeShard

BODY = {"inputs": "w1 w2", "parameters": {"max_new_tokens": 40, "ignore_eos_token": True}}


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 60))


def fake_shard(**options: Any) -> FakeShard:
    model = FakeModel(vocab_size=900, eos_token_ids=frozenset())
    return FakeShard(model, **{"num_blocks": 200, "block_size": 4, **options})


def test_it_serves_then_drains_on_sigterm(tmp_path):
    async def scene() -> None:
        shards = [fake_shard(step_delay_s=0.02, rank=rank, world_size=2) for rank in range(2)]
        async with (
            serve(shards, tmp_path),
            started(config_of(tmp_path, grpc_port=0), tmp_path) as router,
        ):
            url = await router.url()
            async with (
                httpx.AsyncClient(base_url=url, timeout=30) as client,
                client.stream("POST", "/generate_stream", json=BODY) as stream,
            ):
                lines = stream.aiter_lines()
                text = [await anext(lines)]
                router.process.send_signal(signal.SIGTERM)
                while (answer := await client.get("/health")).status_code == 200:
                    await asyncio.sleep(0.01)
                assert answer.status_code == 503
                refused = await client.post("/generate", json=BODY)
                assert refused.status_code == 503
                assert refused.json()["error_type"] == "shutting_down"
                text += [line async for line in lines]
            found = events("\n".join(text))
            assert len(found) == 40
            assert found[-1]["generated_text"]
            code, log = await router.ended()
            assert code == ExitCode.OK
            refused, line = [each for each in log if each["logger"] == "lorax_router.request"]
            assert line["generated_tokens"] == 40
            assert (refused["outcome"], refused["status"]) == ("shutting_down", "UNAVAILABLE")

    play(scene())


def test_what_outlasts_the_grace_period_is_ended_in_words(tmp_path):
    async def scene() -> None:
        config = config_of(tmp_path, grace_period_s=0.2)
        async with (
            serve([fake_shard(step_delay_s=0.05, num_blocks=500)], tmp_path),
            started(config, tmp_path) as router,
        ):
            body = {"inputs": "w1", "parameters": {"ignore_eos_token": True}}
            async with (
                httpx.AsyncClient(base_url=await router.url(), timeout=30) as client,
                client.stream("POST", "/generate_stream", json=body) as stream,
            ):
                lines = stream.aiter_lines()
                text = [await anext(lines)]
                router.process.send_signal(signal.SIGTERM)
                text += [line async for line in lines]
            assert events("\n".join(text))[-1]["error_type"] == "shutting_down"
            code, log = await router.ended()
            assert code == ExitCode.OK
            assert any("grace period" in line["message"] for line in log)

    play(scene())


@pytest.mark.parametrize("listener", ["unix", "port"])
def test_adapters_are_managed_apart_from_clients(tmp_path, listener):
    async def scene() -> None:
        config = config_of(tmp_path, admin_uds=str(tmp_path / "admin"), admin_port=0)
        async with serve([fake_shard()], tmp_path), started(config, tmp_path) as router:
            ready = await router.ready()
            unix, port = ready["admin"]
            assert unix == f"unix:{tmp_path}/admin"
            transport = None if listener == "port" else httpx.AsyncHTTPTransport(uds=unix[5:])
            base = port if listener == "port" else "http://localhost"
            async with (
                httpx.AsyncClient(base_url=ready["url"]) as client,
                httpx.AsyncClient(base_url=base, transport=transport) as admin,
            ):
                assert (await client.post("/v1/adapters/load", json={})).status_code == 403
                for path in ("/generate", "/info"):
                    assert (await admin.get(path)).status_code == 404
                assert (await admin.get("/v1/adapters")).status_code == 200
                answer = await admin.post("/v1/adapters/load", json={})
                assert answer.status_code == 422
                form = await admin.post("/v1/adapters/load", data={"adapter_id": "a"})
                assert form.status_code == 415
                page = {"origin": "https://page.example"}
                asked = await admin.post("/v1/adapters/load", json={}, headers=page)
                assert asked.status_code == 403
            router.process.send_signal(signal.SIGTERM)
            code, _ = await router.ended()
            assert code == ExitCode.OK
            assert not (tmp_path / "admin").exists()

    play(scene())


def test_clients_that_never_read_keep_no_place_and_do_not_hold_up_the_end(tmp_path):
    async def scene() -> None:
        config = config_of(tmp_path, max_concurrent_requests=4)
        async with (
            serve([fake_shard(num_blocks=500)], tmp_path),
            started(config, tmp_path) as router,
            contextlib.AsyncExitStack() as stack,
        ):
            url = await router.url()
            params = {"max_new_tokens": 300, "ignore_eos_token": True}
            body = json.dumps(
                {"inputs": "w1", "parameters": {**params, "return_k_alternatives": 256}}
            ).encode()
            request = (
                b"POST /generate_stream HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )
            address = urlsplit(url)
            for _ in range(4):
                client = stack.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect((address.hostname, address.port))
                client.sendall(request)
            async with httpx.AsyncClient(base_url=url, timeout=30) as http:
                while (answer := await http.post("/generate", json=BODY)).status_code != 200:
                    assert answer.status_code == 429
                    await asyncio.sleep(0.05)
                router.process.send_signal(signal.SIGTERM)
                code, log = await router.ended()
        assert code == ExitCode.OK
        assert not [line for line in log if line["level"] == "error" or "exception" in line]
        assert not any("grace period" in line["message"] for line in log)

    play(scene())


def test_a_shard_that_dies_ends_requests_in_words_and_the_router_with_its_code(tmp_path):
    async def scene() -> None:
        shard = fake_shard()
        shard.die(at_seq=5)
        async with serve([shard], tmp_path), started(config_of(tmp_path), tmp_path) as router:
            async with httpx.AsyncClient(base_url=await router.url(), timeout=30) as client:
                response = await client.post("/generate", json=BODY)
                assert response.status_code == 424
                assert response.json()["error_type"] == "generation"
                assert str(tmp_path) not in response.text
            code, _ = await router.ended()
            assert code == ExitCode.SHARD_UNREACHABLE

    play(scene())


@pytest.mark.parametrize("depth", [1, 2])
def test_a_shard_that_hangs_is_found_by_its_step_and_said_in_words(tmp_path, depth):
    async def scene() -> None:
        shard = fake_shard()
        config = config_of(tmp_path, step_timeout_s=0.3, plan_depth=depth)
        async with serve([shard], tmp_path), started(config, tmp_path) as router:
            async with httpx.AsyncClient(base_url=await router.url(), timeout=30) as client:
                assert (await client.post("/generate", json=BODY)).status_code == 200
                shard.hold()
                response = await client.post("/generate_stream", json=BODY)
                assert (response.status_code, response.json()["error_type"]) == (424, "generation")
            code, log = await router.ended()
            assert code == ExitCode.SHARD_UNREACHABLE
            errors = [line["message"] for line in log if line["level"] == "error"]
            assert any("no answer within 0.3 s" in message for message in errors)
            assert not any("never retrieved" in message for message in errors)

    play(scene())


def test_it_ends_with_its_launcher(tmp_path):
    async def scene() -> None:
        async with (
            serve([fake_shard()], tmp_path),
            started(config_of(tmp_path), tmp_path) as router,
        ):
            await router.url()
            router.process.stdin.close()
            assert await router.process.wait() == ExitCode.PARENT_GONE

    play(scene())


def test_a_signal_while_starting_ends_it(tmp_path):
    async def scene() -> None:
        shard = fake_shard()
        async with serve([shard], tmp_path):
            shard.hold()
            warming = asyncio.Event()

            async def warmup(spec: object, epoch: object = None) -> int:
                warming.set()
                return await asyncio.get_running_loop().create_future()

            shard.warmup = warmup
            async with started(config_of(tmp_path), tmp_path) as router:
                await warming.wait()
                router.process.send_signal(signal.SIGTERM)
                assert await router.url() == ""
                code, _ = await router.ended()
                assert code == ExitCode.INTERRUPTED

    play(scene())


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        ({"max_total_tokens": 900}, ExitCode.BAD_CONFIG, "does not fit the KV cache of 800 tokens"),
        ({"shard_uri": "unix:/nowhere/rank-0"}, ExitCode.SHARD_UNREACHABLE, "no shard answers"),
        ({"tokenizer_dir": "/nowhere"}, ExitCode.TOKENIZER_UNUSABLE, "tokenizer.json cannot be"),
        ({"hostname": "no.such.host.invalid"}, ExitCode.BAD_CONFIG, "cannot listen on"),
    ],
)
def test_what_prevents_a_start_is_said_in_one_line(tmp_path, overrides, code, words):
    async def scene() -> None:
        async with (
            serve([fake_shard()], tmp_path),
            started(config_of(tmp_path, **overrides), tmp_path) as router,
        ):
            assert await router.url() == ""
            exit_code, log = await router.ended()
            assert exit_code == code
            assert words in log[-1]["message"]
            assert log[-1]["hint"]

    play(scene())


def test_it_waits_for_a_shard_that_still_loads(tmp_path):
    async def scene() -> None:
        config = config_of(tmp_path, shard_wait_s=60.0)
        async with started(config, tmp_path) as router:
            ready = asyncio.create_task(router.url())
            done, _ = await asyncio.wait({ready}, timeout=1.5)
            assert not done
            async with serve([fake_shard()], tmp_path):
                assert (await ready).startswith("http://")
                router.process.send_signal(signal.SIGTERM)
                code, _ = await router.ended()
                assert code == ExitCode.OK

    play(scene())


@pytest.mark.parametrize("name", ["port", "grpc_port", "admin_port"])
def test_a_port_in_use_is_said_in_words(tmp_path, name):
    async def scene() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            async with (
                serve([fake_shard()], tmp_path),
                started(config_of(tmp_path, **{name: port}), tmp_path) as router,
            ):
                exit_code, log = await router.ended()
                assert exit_code == ExitCode.PORT_IN_USE
                assert f"127.0.0.1:{port}: another program listens there" in log[-1]["message"]

    play(scene())


@pytest.mark.parametrize("text", ["{", "{}", '{"model_id": "x", "nonsense": 1}'])
def test_a_bad_configuration_is_refused(tmp_path, text):
    async def scene() -> None:
        path = tmp_path / "bad.json"
        path.write_text(text)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "lorax_router.cli", "--config", str(path),
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, _ = await process.communicate()
        assert process.returncode == ExitCode.BAD_CONFIG
        assert json.loads(output)["level"] == "error"

    play(scene())


def test_help_needs_nothing_heavy():
    async def scene() -> None:
        code = (
            "import sys; from click.testing import CliRunner; from lorax_router.cli import main;"
            "assert CliRunner().invoke(main, ['--help']).exit_code == 0;"
            "assert not {'fastapi', 'grpc', 'tokenizers'} & set(sys.modules)"
        )
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
        assert await process.wait() == 0

    play(scene())


def test_the_router_never_imports_transformers_or_torch():
    async def scene() -> None:
        code = (
            "import sys, lorax_router.app;"
            "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
        )
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
        assert await process.wait() == 0

    play(scene())


def test_it_asks_for_keys_speaks_tls_and_tells_metrics_apart(tmp_path):
    key, scrape = "sk-of-a-client", "sk-of-a-scraper"
    chain, private = write_pair(tmp_path, "router")
    file = keys_file(tmp_path / "keys.json", ant={})

    async def scene() -> None:
        config = config_of(
            tmp_path,
            grpc_port=0,
            metrics_port=0,
            api_key_hashes=[hash_of(key)],
            metrics_key_hashes=[hash_of(scrape)],
            api_keys_file=str(file),
            ssl_certfile=str(chain),
            ssl_keyfile=str(private),
        )
        context = ssl.create_default_context(cafile=str(chain))
        async with serve([fake_shard()], tmp_path), started(config, tmp_path) as router:
            ready = await router.ready()
            async with httpx.AsyncClient(verify=context, timeout=30) as client:
                url, metrics = ready["url"], ready["metrics"]
                assert url.startswith("https://")
                assert (await client.get(f"{url}/health")).status_code == 200
                assert (await client.post(f"{url}/generate", json=BODY)).status_code == 401
                for good in (key, key_of("ant")):
                    headers = bearer(good)
                    answer = await client.post(f"{url}/generate", json=BODY, headers=headers)
                    assert answer.status_code == 200
                assert (await client.get(metrics)).status_code == 401
                scraped = await client.get(metrics, headers=bearer(scrape))
                assert 'lorax_tenant_request_count{tenant="ant"} 1.0' in scraped.text
                there = metrics.removesuffix("/metrics")
                assert (
                    await client.get(f"{there}/info", headers=bearer(scrape))
                ).status_code == 404
                # Replaced while it runs.
                keys_file(file, bee={})
                while (await client.get(f"{url}/info", headers=bearer(key_of("bee")))).is_error:
                    await asyncio.sleep(0.05)
                gone = await client.get(f"{url}/info", headers=bearer(key_of("ant")))
                assert gone.status_code == 401
            router.process.send_signal(signal.SIGTERM)
            code, log = await router.ended()
            assert code == ExitCode.OK
            assert not any(secret in json.dumps(log) for secret in (key, scrape, key_of("ant")))

    play(scene())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"api_keys_file": "nowhere.toml"}, "api_keys_file: nowhere.toml: it cannot be read"),
        ({"ssl_certfile": "nowhere.pem"}, "ssl_certfile: certificate or key cannot be read"),
    ],
)
def test_a_bad_file_of_keys_or_certificates_ends_it_at_once(tmp_path, fault, words):
    async def scene() -> None:
        # No shard is there, and none is waited for.
        async with started(config_of(tmp_path, **fault), tmp_path) as router:
            code, log = await router.ended()
            assert code == ExitCode.BAD_CONFIG
            assert words in log[-1]["message"]

    play(scene())
