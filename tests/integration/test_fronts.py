"""Fronts as processes of a router: the same answers, and what happens when one of them ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import psutil
import pytest
from tests.helpers.certificates import write_pair
from tests.helpers.fake_shard_server import serve
from tests.helpers.http_app import TEMPLATE, events
from tests.helpers.in_loop import in_loop
from tests.helpers.router_process import RouterProcess, config_of, started
from tests.helpers.tenants import ADMIN_KEY, bearer, key_of, keys_file

from lorax_contract.exit_codes import ExitCode
from lorax_contract.keys import hash_of
from lorax_router.shards.fake.shard import FakeModel, FakeShard

# As ``metric`` looks for it.
DROPPED = r'lorax_request_failure\{err="dropped"\}'
LONG = {"inputs": "w1 w2", "parameters": {"max_new_tokens": 300, "ignore_eos_token": True}}


@contextlib.asynccontextmanager
async def routed(
    folder: Any, *, step_s: float = 0.0, **config: Any
) -> AsyncIterator[RouterProcess]:
    """A router in front of a FakeShard, with two fronts unless it is said otherwise."""
    model = FakeModel(vocab_size=900, eos_token_ids=frozenset())
    shard = FakeShard(model, num_blocks=2000, block_size=4, step_delay_s=step_s)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    values = {"http_workers": 2, **config}
    async with (
        serve([shard], folder),
        started(config_of(folder, **values), folder) as router,
    ):
        yield router


def fronts_of(router: RouterProcess) -> list[psutil.Process]:
    children = psutil.Process(router.process.pid).children()
    return [each for each in children if "lorax_router.fronts.main" in each.cmdline()]


async def metric(client: httpx.AsyncClient, name: str) -> float:
    """The sum of a series over its labels."""
    text = (await client.get("/metrics")).text
    found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


async def until(condition: Any, seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


CHAT = {"messages": [{"role": "user", "content": "w1 w2"}], "temperature": 0, "max_tokens": 9}
CALLS: list[tuple[str, str, Any]] = [
    ("POST", "/generate", {"inputs": "w1 w2", "parameters": {"max_new_tokens": 9, "details": True}}),
    ("POST", "/generate_stream", {"inputs": "w1", "parameters": {"max_new_tokens": 9}}),
    ("POST", "/", {"inputs": "w1", "parameters": {"max_new_tokens": 9}, "stream": True}),
    ("POST", "/generate", {"inputs": "w1", "parameters": {"max_new_tokens": -1}}),
    ("POST", "/generate", {"inputs": 5}),
    ("POST", "/v1/completions", {"prompt": ["w1", "w2 w3"], "temperature": 0, "logprobs": 2}),
    ("POST", "/v1/completions", {"prompt": "w1", "temperature": 0, "stream": True, "n": 2}),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("POST", "/v1/chat/completions", {**CHAT, "logit_bias": {str(10**30): 1.0}}),
    ("POST", "/v1/responses", {"input": "w1", "temperature": 0, "max_output_tokens": 5}),
    ("POST", "/v1/messages", {**CHAT, "model": "fake/model"}),
    ("POST", "/v1/messages", {**CHAT, "model": "fake/model", "stream": True}),
    ("POST", "/v1/messages", {**CHAT, "model": "nobody:s"}),
    ("POST", "/v1/messages/count_tokens", {"messages": CHAT["messages"], "model": "fake/model"}),
    ("POST", "/tokenize", {"inputs": "w1 w2"}),
    ("POST", "/tokenize", {"inputs": 5}),
    ("POST", "/v1/adapters/load", {"adapter_id": "a"}),
    ("GET", "/generate", None),
    ("GET", "/nowhere", None),
    ("GET", "/v1/nowhere", None),
    ("OPTIONS", "/generate", None),
    ("HEAD", "/health", None),
    *(("GET", path, None) for path in ("/health", "/info", "/docs", "/openapi.json", "/v1/adapters")),
]  # fmt: skip
# What is new in every answer.
_NEW = re.compile(
    r'"(id|item_id|last_used|created|created_at|completed_at|request_id)":\s*("[^"]*"|[\d.]+)'
    r"|msg_\w+|resp_\w+|req_\w+|cmpl-\w+"
)


def shown(answer: httpx.Response) -> tuple[int, str, dict[str, str]]:
    """An answer without what is new each time."""
    kept = {
        name: value
        for name, value in answer.headers.items()
        if not name.endswith(("-time", "-id", "date", "-token")) and name != "content-length"
    }
    return answer.status_code, _NEW.sub("", answer.text), kept


async def answers(router: RouterProcess) -> list[tuple[int, str, dict[str, str]]]:
    headers = {"origin": "https://page.example"}
    async with httpx.AsyncClient(
        base_url=await router.url(), timeout=30, headers=headers
    ) as client:
        return [shown(await client.request(*call[:2], json=call[2])) for call in CALLS]


@in_loop
async def test_every_call_is_answered_as_without_fronts(tmp_path):
    found = []
    for number in (0, 2):
        page = ["https://page.example"]
        async with routed(tmp_path, http_workers=number, cors_allow_origin=page) as router:
            found.append(await answers(router))
            assert len(fronts_of(router)) == number
    for call, without, with_fronts in zip(CALLS, *found, strict=True):
        assert with_fronts == without, call


@in_loop
async def test_a_client_that_leaves_ends_its_request(tmp_path):
    async with (
        routed(tmp_path, step_s=0.01) as router,
        httpx.AsyncClient(base_url=await router.url(), timeout=30) as client,
    ):
        async with client.stream("POST", "/generate_stream", json=LONG) as stream:
            await anext(stream.aiter_lines())
        await until(lambda: counted(client, DROPPED, 1))
        assert await metric(client, "lorax_request_count") == 1


async def counted(client: httpx.AsyncClient, name: str, number: int) -> bool:
    return await metric(client, name) >= number


@in_loop
async def test_the_end_of_a_front_is_that_of_its_streams_alone(tmp_path):
    async with (
        routed(tmp_path, step_s=0.01, max_concurrent_requests=4) as router,
        httpx.AsyncClient(base_url=await router.url(), timeout=30) as client,
    ):

        async def read() -> list[Any]:
            lines = []
            async with client.stream("POST", "/generate_stream", json=LONG) as stream:
                async for line in stream.aiter_lines():
                    lines.append(line)
            return events("\n".join(lines))

        # As many as there are permits, on as many connections, divided between the fronts.
        reading = [asyncio.create_task(read()) for _ in range(4)]
        await until(lambda: counted(client, "lorax_batch_current_size", 4))
        before = fronts_of(router)
        before[0].send_signal(signal.SIGKILL)
        results = await asyncio.gather(*reading, return_exceptions=True)
        whole = [each for each in results if isinstance(each, list) and len(each) == 300]
        broken = [each for each in results if isinstance(each, httpx.HTTPError)]
        assert (len(whole), len(broken)) == (2, 2)

        async def is_back() -> bool:
            now = {each.pid for each in fronts_of(router)}
            return len(now) == 2 and before[0].pid not in now

        await until(is_back)
        await until(lambda: counted(client, "lorax_front_restarts", 1))
        # All permits are back, and every connection is answered.
        again = await asyncio.gather(*(read() for _ in range(4)))
        assert [len(each) for each in again] == [300] * 4
        assert await metric(client, "lorax_request_failure") == 2
        assert await metric(client, "lorax_request_success") == 6
        router.process.send_signal(signal.SIGTERM)
        code, log = await router.ended()
        assert code == ExitCode.OK
        assert any("its requests are cancelled" in line["message"] for line in log)


@in_loop
async def test_streams_are_divided_evenly(tmp_path):
    async with routed(tmp_path, step_s=0.02) as router:
        url = await router.url()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(9):
                client = await stack.enter_async_context(httpx.AsyncClient(base_url=url))
                stream = client.stream("POST", "/generate_stream", json=LONG)
                await stack.enter_async_context(stream)
            text = (await client.get("/metrics")).text
            found = re.findall(r'lorax_front_connections\{front="(\d)"\} (\d+)', text)
            numbers = [int(number) for _, number in found]
            assert sum(numbers) == 10
            assert max(numbers) - min(numbers) <= 1
            assert len(fronts_of(router)) == 2
            assert len(re.findall(r"lorax_front_(cpu|resident)\w+\{", text)) == 4
        async with httpx.AsyncClient(base_url=url) as client:

            async def is_over() -> bool:
                return await metric(client, "lorax_front_connections") == 1

            await until(is_over)


@in_loop
async def test_a_crowd_that_comes_at_once_is_served_to_the_last(tmp_path):
    async with routed(tmp_path) as router:
        url = httpx.URL(await router.url())
        clients = []
        for _ in range(1200):
            # More than may be on their way to fronts that look elsewhere.
            client = socket.socket()
            client.setblocking(False)
            clients.append(client)
            with contextlib.suppress(BlockingIOError):
                client.connect((url.host, url.port))
        loop = asyncio.get_running_loop()
        for client in clients:
            await loop.sock_sendall(client, b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        async with asyncio.timeout(100):
            for client in clients:
                assert (await loop.sock_recv(client, 1000)).startswith(b"HTTP/1.1 200")
                client.close()


@in_loop
async def test_a_client_that_does_not_read_is_cut_and_its_request_ends(tmp_path):
    parameters = {"max_new_tokens": 7000, "ignore_eos_token": True, "return_k_alternatives": 20}
    body = json.dumps({"inputs": "w1", "parameters": parameters}).encode()
    async with (
        routed(tmp_path, max_total_tokens=7500, max_input_length=100) as router,
        httpx.AsyncClient(base_url=await router.url(), timeout=30) as client,
    ):
        url = client.base_url
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((url.host, url.port))
            head = (
                b"POST /generate_stream HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            )
            deaf.sendall(head + b"content-length: %d\r\n\r\n%b" % (len(body), body))
            await until(lambda: counted(client, DROPPED, 1))
        assert await metric(client, "lorax_request_success") == 0
        await until(lambda: counted(client, "lorax_kv_blocks_free", 2000))
        assert await metric(client, "lorax_front_restarts") == 0


@in_loop
async def test_a_stream_that_runs_ends_as_it_should_when_the_router_stops(tmp_path):
    async with (
        routed(tmp_path, step_s=0.02) as router,
        httpx.AsyncClient(base_url=await router.url(), timeout=30) as client,
        client.stream("POST", "/generate_stream", json={**LONG, "parameters": {"max_new_tokens": 40, "ignore_eos_token": True}}) as stream,
    ):  # fmt: skip
        lines = stream.aiter_lines()
        text = [await anext(lines)]
        # All processes get it, as a service manager sends it.
        for each in (*fronts_of(router), psutil.Process(router.process.pid)):
            each.send_signal(signal.SIGTERM)
        while (answer := await client.get("/health")).status_code == 200:
            await asyncio.sleep(0.01)
        refused = await client.post("/generate", json=LONG)
        assert (answer.status_code, refused.status_code) == (503, 503)
        assert refused.json()["error_type"] == "shutting_down"
        text += [line async for line in lines]
        assert len(events("\n".join(text))) == 40
        code, _ = await router.ended()
        assert code == ExitCode.OK


@in_loop
async def test_what_outlasts_the_grace_period_is_told(tmp_path):
    async with (
        routed(tmp_path, step_s=0.05, grace_period_s=0.2) as router,
        httpx.AsyncClient(base_url=await router.url(), timeout=30) as client,
        client.stream("POST", "/generate_stream", json=LONG) as stream,
    ):
        lines = stream.aiter_lines()
        text = [await anext(lines)]
        router.process.send_signal(signal.SIGTERM)
        text += [line async for line in lines]
        assert events("\n".join(text))[-1]["error_type"] == "shutting_down"
        code, _ = await router.ended()
        assert code == ExitCode.OK


@in_loop
async def test_fronts_end_with_their_router(tmp_path):
    async with routed(tmp_path) as router:
        await router.url()
        fronts = fronts_of(router)
        router.process.send_signal(signal.SIGKILL)
        _, alive = await asyncio.to_thread(psutil.wait_procs, fronts, 20)
        assert alive == []


@in_loop
async def test_a_name_that_an_admin_gives_means_the_same_everywhere_at_once(tmp_path):
    async with routed(tmp_path, admin_port=0) as router:
        ready = await router.ready()
        admin_url = next(each for each in ready["admin"] if each.startswith("http"))
        async with httpx.AsyncClient(base_url=admin_url, timeout=30) as admin:
            for turn in range(4):
                verb = "load" if turn % 2 == 0 else "unload"
                body = {"lora_name": "mine", "lora_path": "hub:some/adapter"}
                done = await admin.post(f"/v1/{verb}_lora_adapter", json=body)
                assert done.status_code == 200, done.text
                statuses = [await asked(ready["url"]) for _ in range(6)]
                # The name alone, without a source's slash, is an alias or nothing.
                assert statuses == [200 if turn % 2 == 0 else 404] * 6


async def asked(url: str) -> int:
    """The status of a request for the adapter, on a connection of its own."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        body = {"prompt": "w1", "model": "mine", "adapter_source": "alias", "max_tokens": 2}
        return (await client.post("/v1/completions", json=body)).status_code


@in_loop
async def test_callers_are_known_by_their_keys(tmp_path):
    path = keys_file(tmp_path / "keys.json", ant={"requests_per_minute": 2})
    config = {"api_keys_file": str(path), "admin_key_hashes": [hash_of(ADMIN_KEY)]}
    short = {"inputs": "w1", "parameters": {"max_new_tokens": 2}}
    async with (
        routed(tmp_path, **config) as router,
        httpx.AsyncClient(base_url=await router.url(), timeout=30) as client,
    ):
        for headers in ({}, bearer("sk-nobody")):
            for call in (
                ("/generate", short),
                ("/v1/completions", {"prompt": "w1"}),
                ("/tokenize", short),
            ):
                answer = await client.post(call[0], json=call[1], headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/health")).status_code == 200
        statuses = []
        for _ in range(3):
            async with httpx.AsyncClient(base_url=str(client.base_url)) as other:
                answer = await other.post("/generate", json=short, headers=bearer(key_of("ant")))
                statuses.append(answer.status_code)
        # One account, whichever front is asked.
        assert statuses == [200, 200, 429]
        assert int(answer.headers["retry-after"]) > 1
        path.write_text(json.dumps({"tenants": {"bee": {"keys": [key_of("bee")]}}}))

        async def is_read() -> bool:
            async with httpx.AsyncClient(base_url=str(client.base_url)) as other:
                answer = await other.post("/generate", json=short, headers=bearer(key_of("bee")))
                return answer.status_code == 200

        await until(is_read)


@in_loop
async def test_clients_speak_tls_with_the_fronts(tmp_path):
    chain, key = write_pair(tmp_path, "router")
    files = {"ssl_certfile": str(chain), "ssl_keyfile": str(key)}
    async with routed(tmp_path, **files) as router:
        url = await router.url()
        assert url.startswith("https://")
        async with httpx.AsyncClient(base_url=url, verify=False, timeout=30) as client:
            answer = await client.post("/generate", json={"inputs": "w1"})
            assert answer.status_code == 200
            assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("size", [100, 3_000_000])
@in_loop
async def test_a_body_that_is_too_large_is_refused_in_either_process(tmp_path, size):
    async with (
        routed(tmp_path) as router,
        httpx.AsyncClient(base_url=await router.url(), timeout=30) as client,
    ):
        for path in ("/generate", "/tokenize"):
            answer = await client.post(path, json={"inputs": "w" * size})
            assert (answer.status_code == 413) == (size > 2_000_000)


@in_loop
async def test_the_playground_is_served_through_fronts(tmp_path: Any) -> None:
    keys = {"api_keys_file": str(keys_file(tmp_path / "keys.json", ant={}))}
    async with (
        routed(tmp_path, playground=True, **keys) as router,
        httpx.AsyncClient(base_url=(await router.ready())["url"]) as client,
    ):
        page = await client.get("/playground")
        assert page.status_code == 200
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert (await client.get("/playground/app.js")).status_code == 200
        assert (await client.get("/playground/live")).status_code == 401
        live = await client.get("/playground/live", headers=bearer(key_of("ant")))
        assert live.json()["caller"]["tenant"] == "ant"
