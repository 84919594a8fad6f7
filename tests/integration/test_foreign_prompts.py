"""A router whose adapters bring templates and tokenizers made to stop it: it serves on.

The router is a real process over a FakeShard; what its adapters bring comes from the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.helpers.adapter_world import fetched
from tests.helpers.fake_shard_server import serve
from tests.helpers.http_app import events, until, word_tokenizer
from tests.helpers.in_loop import in_loop
from tests.helpers.router_process import RouterProcess, config_of, started

from lorax_contract.adapters import AdapterQuery, FetchedAdapter
from lorax_contract.exit_codes import ExitCode
from lorax_router.shards.fake.shard import FakeModel, FakeShard

MIB = 1 << 20
# What the router and its processes may gain while adapters do their worst.
MAX_GROWN = 400 * MIB
MAX_GROWN_BY_TOKENIZERS = 900 * MIB
TEMPLATES = {
    "folded": "{{ 9**(9**9) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "greedy": "{% set x = 'a' * 1000000000 %}{{ x | length }}",
    "long": "{{ 'a' * 20000000 }}",
    "brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "ifs": "{% if 1 %}" * 400 + "{% endif %}" * 400,
}


class Serving:
    """The running router, the files of its adapters, and a client."""

    def __init__(self, router: RouterProcess, shard: FakeShard, client: httpx.AsyncClient) -> None:
        self.router = router
        self.shard = shard
        self._client = client

    async def ask(self, adapter: str | None = None, *, chat: bool = False) -> httpx.Response:
        parameters = {"max_new_tokens": 2, "ignore_eos_token": True, "apply_chat_template": chat}
        if adapter is not None:
            parameters |= {"adapter_id": adapter, "adapter_source": "local"}
        body = {"inputs": "w1 w2", "parameters": parameters}
        return await self._client.post("/generate", json=body)

    async def said(self, adapter: str, *, stream: bool) -> tuple[str, str]:
        """Return content and reasoning of a chat's answer."""
        body = {
            "model": f"local:{adapter}" if adapter else "", "stream": stream, "max_tokens": 3,
            "messages": [{"role": "user", "content": "w1"}], "ignore_eos": True,
        }  # fmt: skip
        answer = await self._client.post("/v1/chat/completions", json=body)
        if not stream:
            message = answer.json()["choices"][0]["message"]
            return message["content"], message.get("reasoning_content", "")
        deltas = [
            each["choices"][0]["delta"] for each in events(answer.text.replace("data: [DONE]", ""))
        ]
        names = ("content", "reasoning_content")
        content, reasoning = ("".join(d.get(name) or "" for d in deltas) for name in names)
        return content, reasoning

    async def health(self) -> int:
        return (await self._client.get("/health")).status_code

    def used(self) -> int:
        """Bytes of the router and all that it started."""
        process = psutil.Process(self.router.process.pid)
        total = 0
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += each.memory_info().rss
        return total


@contextlib.asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Serving]:
    shard = FakeShard(
        FakeModel(vocab_size=900, eos_token_ids=frozenset()),
        num_blocks=200,
        block_size=4,
    )

    def found(query: AdapterQuery) -> FetchedAdapter:
        key = f"files of {query.ref.id}"
        files = tuple(shard.texts[key]) if key in shard.texts else ()
        return fetched(query.ref.id, text_files=files)

    shard.on_fetch = found
    (folder / "chat_template.jinja").write_text("<user> {{ messages[0].content }} <assistant>")
    async with (
        serve([shard], folder),
        started(config_of(folder, validation_workers=2), folder) as router,
        httpx.AsyncClient(base_url=await router.url(), timeout=120) as client,
    ):
        yield Serving(router, shard, client)
        children = psutil.Process(router.process.pid).children(recursive=True)
        router.process.send_signal(signal.SIGTERM)
        code, log = await router.ended()
        assert code == ExitCode.OK
        _, left = psutil.wait_procs(children, timeout=10)
        assert left == []
        assert not [line for line in log if "exception" in line or line["level"] == "error"]
        assert len([line for line in log if line["level"] == "warning"]) < 40


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@in_loop
async def test_no_template_stops_the_router(tmp_path: Path, chat: bool) -> None:
    async with serving(tmp_path) as world:
        for name, text in TEMPLATES.items():
            world.shard.texts[f"files of {name}"] = {"chat_template.jinja": text.encode()}
        assert (await world.ask(chat=True)).status_code == 200
        before = largest = world.used()
        attacks: list[tuple[str, asyncio.Task[Any]]] = [
            (name, asyncio.create_task(world.ask(name, chat=chat)))
            for name in TEMPLATES
            for _ in range(3)
        ]
        while not all(task.done() for _, task in attacks):
            # Others are served all the while.
            answers = await asyncio.gather(world.ask(), world.ask(chat=True), world.health())
            assert [answers[0].status_code, answers[1].status_code, answers[2]] == [200] * 3
            largest = max(largest, world.used())
            await asyncio.sleep(0.02)
        print(f"memory grew by {(largest - before) >> 20} MiB at most")
        assert largest - before < MAX_GROWN
        for name, task in attacks:
            answer = task.result()
            if not chat:
                assert answer.status_code == 200, name
                continue
            assert answer.status_code == 422, (name, answer.text)
            assert answer.json()["error_type"] == "template_error"
            assert f"the chat template of adapter local:{name}" in answer.json()["error"]
        # The adapters themselves still serve.
        assert (await world.ask("folded")).status_code == 200


@in_loop
async def test_a_template_that_never_ends_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as world:
        world.shard.texts["files of loops"] = {"chat_template.jinja": TEMPLATES["loops"].encode()}
        before = len(psutil.Process(world.router.process.pid).children())
        task = asyncio.create_task(world.ask("loops", chat=True))
        await until(lambda: len(psutil.Process(world.router.process.pid).children()) > before)
    # Its client is told as ever, or that the server ends; it is not left without an answer.
    assert (await task).status_code in (422, 503)


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_answers_are_read_by_the_template_that_made_their_prompt(
    tmp_path: Path, stream: bool
) -> None:
    thinks = "{# </think> #}<user> {{ messages[0].content }} <assistant> <think>"
    async with serving(tmp_path) as world:
        world.shard.texts["files of thinks"] = {"chat_template.jinja": thinks.encode()}
        read = {name: await world.said(name, stream=stream) for name in ("", "other", "thinks")}
        assert {name: bool(content) for name, (content, _) in read.items()} == {
            "": True, "other": True, "thinks": False
        }  # fmt: skip
        assert {name: bool(reasoning) for name, (_, reasoning) in read.items()} == {
            "": False, "other": False, "thinks": True
        }  # fmt: skip


class CountedTexts(dict[str, dict[str, bytes]]):
    """Files of adapters; counts how often some are asked for."""

    num_asked = 0

    def get(self, *asked: Any) -> Any:
        self.num_asked += 1
        return super().get(*asked)


def large_tokenizer(**changes: Any) -> bytes:
    """A tokenizer of 2 MB."""
    document = json.loads(word_tokenizer().to_str())
    document["model"]["vocab"] |= {f"a word of its own {n:08}": 2000 + n for n in range(50_000)}
    return json.dumps({**document, **changes}).encode()


@in_loop
async def test_no_tokenizer_stops_the_router(tmp_path: Path) -> None:
    replace = {"type": "Replace", "pattern": {"String": "w"}, "content": "w" * 1000}
    growing = {"type": "Sequence", "normalizers": [replace] * 3}
    async with serving(tmp_path) as world:
        texts = CountedTexts({"files of own": {"tokenizer.json": large_tokenizer()}})
        texts["files of grows"] = {"tokenizer.json": large_tokenizer(normalizer=growing)}
        world.shard.texts = texts
        assert (await world.ask()).status_code == 200
        before = largest = world.used()
        first = [asyncio.create_task(world.ask("own")) for _ in range(50)]
        grows = [asyncio.create_task(world.ask("grows")) for _ in range(3)]
        while not all(task.done() for task in [*first, *grows]):
            answers = await asyncio.gather(world.ask(), world.health())
            assert [answers[0].status_code, answers[1]] == [200] * 2
            largest = max(largest, world.used())
            await asyncio.sleep(0.02)
        assert [task.result().status_code for task in first] == [200] * 50
        # Once each, and again where the process that held both had ended.
        assert texts.num_asked <= 2 + len(grows)
        for task in grows:
            assert task.result().status_code == 422, task.result().text
            assert "tokenizer" in task.result().json()["error"]
        print(f"memory grew by {(largest - before) >> 20} MiB at most")
        assert largest - before < MAX_GROWN_BY_TOKENIZERS
