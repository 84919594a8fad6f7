"""A router with the real engine loop and the real adapter directory over one FakeShard."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.types import ASGIApp
from tests.helpers.http_app import until, word_tokenizer

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterRef,
    FetchedAdapter,
    LoadReport,
)
from lorax_contract.config import RouterConfig
from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind
from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.ports import ShardClient
from lorax_router.core.scheduler import Scheduler
from lorax_router.service.adapters.catalog import AdapterCatalog, AdapterSelection
from lorax_router.service.adapters.directory import AdapterDirectory
from lorax_router.service.adapters.management import AdapterManager
from lorax_router.service.engine.loop import EngineLoop
from lorax_router.service.generation_stream import GenerationStream
from lorax_router.service.prompts.chat_template import ChatTemplate
from lorax_router.service.prompts.language import Language
from lorax_router.service.requests import GenerateParameters, GenerateRequest, TextPrompt
from lorax_router.service.results import GenerateResult
from lorax_router.shards.fake.shard import FakeModel, FakeShard
from lorax_router.startup import Parts, assemble, size

MIB = 1 << 20
# What adapters of these names classify.
HEADS = {
    "judge": HeadFacts(pooling=Pooling.LAST, labels=("bad", "fair", "good")),
    "tagger": HeadFacts(pooling=Pooling.EACH, labels=("O", "B-A", "I-A", "B-B")),
    "ranker": HeadFacts(pooling=Pooling.LAST, labels=("score",), scores=ScoreKind.ANY_OF),
}


def fetched(content: str, **facts: Any) -> FetchedAdapter:
    """An adapter with a content by name."""
    values: dict[str, Any] = {
        "version": "1",
        "part": AdapterPart(f"content of {content}", f"files of {content}"),
        "disk_bytes": MIB,
        "device_bytes": MIB,
        "max_rank": 8,
        "valid_s": 300.0,
    }
    return FetchedAdapter(**{**values, **facts})


def ref(name: str, source: str = "local") -> AdapterRef:
    """A name."""
    return AdapterRef.of(source, name)


def selection(name: str, token: str | None = None) -> AdapterSelection:
    """A selection for one adapter."""
    return AdapterSelection(refs=(ref(name),), token=token)


class DirectExecutor:
    """Carries orders out by the shard's own calls."""

    def __init__(self, shard: ShardClient) -> None:
        self.shard = shard

    async def prepare(self, handle: AdapterHandle) -> LoadReport:
        content = AdapterContent(parts=(AdapterPart(f"content {handle}", "files"),))
        return await self.shard.prepare_adapter(handle, content)

    async def release(self, handle: AdapterHandle) -> None:
        await self.shard.release_adapter(handle)

    def no_numbers(self, handle: AdapterHandle) -> None:
        pass

    def shards_lost(self) -> None:
        pass

    def numbers(self, handle: AdapterHandle) -> None:
        pass


class Sources:
    """What names lead to: themselves, unless ``contents`` says otherwise."""

    def __init__(self) -> None:
        self.contents: dict[str, FetchedAdapter | Exception | asyncio.Future[FetchedAdapter]] = {}
        # All that was asked, in its order.
        self.queries: list[AdapterQuery] = []

    def __call__(self, query: AdapterQuery) -> Any:
        self.queries.append(query)
        answer = self.contents.get(
            query.ref.id, fetched(query.ref.id, head=HEADS.get(query.ref.id))
        )
        if isinstance(answer, Exception):
            raise answer
        return answer


@dataclass
class AdapterWorld:
    """All parts, and short ways to use them."""

    parts: Parts
    shard: FakeShard
    sources: Sources
    client: httpx.AsyncClient
    admin: httpx.AsyncClient

    @property
    def catalog(self) -> AdapterCatalog:
        return self.parts.adapters._catalog

    @property
    def table(self) -> Any:
        return self.parts.engine._scheduler.adapters

    def request(
        self, adapter: str | None, num: int = 3, token: str | None = None, **params: Any
    ) -> GenerateRequest:
        values = {"adapter_source": "local", "ignore_eos_token": True, **params}
        parameters = GenerateParameters(
            adapter_id=adapter, max_new_tokens=num, api_token=token, **values
        )
        return GenerateRequest(prompt=TextPrompt("w1 w2"), parameters=parameters)

    async def generate(self, adapter: str | None, num: int = 3, **params: Any) -> GenerateResult:
        return await self.parts.service.generate(self.request(adapter, num, **params))

    def task(self, adapter: str | None, num: int = 3, **params: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(self.generate(adapter, num, **params))

    async def stream(self, adapter: str | None, num: int = 100) -> GenerationStream:
        """A stream that has its first token."""
        stream = await self.parts.service.generate_stream(self.request(adapter, num))
        await anext(stream)
        return stream

    async def finish(self, stream: GenerationStream) -> int:
        """Read a stream to its end and return how many tokens it had."""
        async for _ in stream:
            pass
        return stream.num_generated

    def handle(self, name: str, source: str = "local") -> AdapterHandle:
        """What a name leads to now."""
        return self.catalog.require(ref(name, source), None)[2].handle

    def state(self, handle: AdapterHandle) -> str:
        return self.table[handle].state.value if handle in self.table else "gone"

    async def gone(self, handle: AdapterHandle) -> None:
        """Wait until a handle is retired and freed."""
        await until(lambda: handle not in self.table and handle not in self.catalog.by_handle)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        """Manage an adapter, as the operator does."""
        body = {"adapter_source": "local", **body}
        return await self.admin.post(f"/v1/adapters/{path}", json=body)

    async def list(self) -> dict[str, dict[str, Any]]:
        """The list over HTTP, by id."""
        answer = await self.client.get("/v1/adapters")
        assert answer.status_code == 200
        return {each["adapter_id"]: each for each in answer.json()["adapters"]}

    async def metrics(self) -> dict[str, float]:
        """All samples over HTTP."""
        lines = (await self.client.get("/metrics")).text.splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}


def client_of(app: ASGIApp) -> httpx.AsyncClient:
    """A client that calls an application directly, without a socket."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@contextlib.asynccontextmanager
async def adapter_world(
    shard: FakeShard | None = None, template: str | None = None, **config: Any
) -> AsyncIterator[AdapterWorld]:
    """Assemble everything as the process does; at the end nothing may be left inside.

    ``template`` is the model's chat template.
    """
    model = FakeModel(vocab_size=900, eos_token_ids=frozenset())
    shard = shard or FakeShard(model, num_blocks=400)
    sources = Sources()
    shard.on_fetch = sources
    values = {"model_id": "fake", "tokenizer_dir": "", "shard_uri": "", "max_total_tokens": 200}
    settings = RouterConfig(**{**values, "adapter_cycle_time_s": 0.05, **config})
    language = Language(word_tokenizer(), None if template is None else ChatTemplate(template))
    info, budgets = await size(settings, shard)
    parts = assemble(settings, shard, language, info, budgets)
    running = asyncio.create_task(parts.engine.run())
    try:
        async with client_of(parts.app) as client, client_of(parts.admin_app) as admin:
            yield AdapterWorld(parts, shard, sources, client, admin)
        parts.engine._scheduler.check()
        assert all(entry.num_leases == 0 for entry in parts.adapters._catalog.by_handle.values())
        assert all(record.is_idle for record in parts.engine._scheduler.adapters.snapshot())
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await parts.prompts.close()
        parts.adapters.registry.close()
    assert not shard.violations


@contextlib.asynccontextmanager
async def directory_with(
    shard: FakeShard, *, max_active: int = 4, **bounds: int
) -> AsyncIterator[tuple[AdapterDirectory, AdapterManager]]:
    """A directory with bounds of its own over a running engine, and nothing around it."""
    await shard.info()
    table = AdapterTable(max_resident=max_active)
    scheduler = Scheduler(
        num_blocks=64, block_size=4, max_step_tokens=64, max_rows=8, adapters=table
    )
    directory = AdapterDirectory(shard, **bounds)
    engine = EngineLoop(shard, scheduler, adapters=directory)
    directory.attach(engine)
    running = asyncio.create_task(engine.run())
    try:
        yield directory, AdapterManager(directory, shard)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
