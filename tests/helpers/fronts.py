"""A front and its core in one event loop, with messages as bytes between them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, cast

import httpx
from tests.helpers.http_app import World, until

from lorax_contract.config import RouterConfig
from lorax_router.fronts.desk import CoreParts, FrontDesk
from lorax_router.fronts.front import Front
from lorax_router.fronts.link import Link
from lorax_router.fronts.messages import AskCall, decode_up
from lorax_router.fronts.plan import FrontPlan
from lorax_router.fronts.remote import RemoteCounts
from lorax_router.service.adapters.aliases import AliasBook
from lorax_router.service.keys.store import KeyStore


class MemoryLink:
    """One direction of a link: messages arrive in order, a moment later; implements Link's sending."""

    def __init__(self, take: Callable[[memoryview], None]) -> None:
        self._take = take
        self._messages: deque[bytes] = deque()
        self.sent: list[bytes] = []

    def send(self, message: bytes) -> None:
        self.sent.append(message)
        if not self._messages:
            asyncio.get_running_loop().call_soon(self._deliver)
        self._messages.append(message)

    def _deliver(self) -> None:
        while self._messages:
            self._take(memoryview(self._messages.popleft()))


class FrontPair:
    """Both ends, over the parts of a core; made inside a running loop."""

    def __init__(
        self, parts: CoreParts, config: RouterConfig, keys: KeyStore | None = None, **facts: Any
    ) -> None:
        values = {
            "config": config,
            "number": 1,
            "max_connections": 10,
            "model_device_type": "cpu",
            "adapter_refusal": None,
            "max_total_tokens": 30,
            **facts,
        }
        self.front = Front(FrontPlan.from_line(FrontPlan(**values).to_line()), keys or KeyStore())
        self.down = MemoryLink(self.front.take)
        self.desk = FrontDesk(parts, self.down.send, lambda: None, lambda count: None)
        self.up = MemoryLink(self.desk.take)
        self.front.link = cast("Link", self.up)
        self.desk.open()

    @property
    def service(self) -> Any:
        """The front's own GenerationService."""
        return self.front._service

    @property
    def counts(self) -> RemoteCounts:
        """The front's own RequestCounts."""
        return RemoteCounts(self.up.send)

    def num_forwarded(self, paths: Sequence[str]) -> int:
        """How many POSTs to some paths the front had the core answer."""
        messages = [decode_up(each) for each in self.up.sent]
        calls = [each for each in messages if isinstance(each, AskCall) and each.method == "POST"]
        return sum(each.path in paths for each in calls)

    def client(self) -> httpx.AsyncClient:
        """A client that calls the front's application directly, without a socket."""
        transport = httpx.ASGITransport(app=self.front.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://router")


def front_of(world: World) -> FrontPair:
    """A front of a world."""
    parts = CoreParts(
        service=world.service, counts=world.service.ledger, app=world.app, aliases=AliasBook()
    )
    cors = world.cors
    config = RouterConfig(
        model_id=world.model_id,
        tokenizer_dir="",
        shard_uri="",
        max_body_bytes=world.max_body_bytes,
        max_concurrent_requests=world.max_concurrent_requests,
        cors_allow_origin=cors.origins,
        cors_allow_header=cors.headers,
        cors_allow_method=cors.methods,
        cors_expose_header=cors.exposed_headers,
        cors_allow_credentials=cors.credentials,
    )
    return FrontPair(
        parts,
        config,
        adapter_refusal="none are served",
        max_total_tokens=world.bounds.max_total_tokens,
    )


@contextlib.asynccontextmanager
async def closing(pair: FrontPair) -> AsyncIterator[FrontPair]:
    """End what a front asked for at the end, as when its process is gone.

    What was asked for and is over by then has left nothing on either side.
    """
    try:
        yield pair
        await until(lambda: not pair.desk._work)
        assert not pair.desk._calls
        assert not pair.service._asked
        assert not pair.service._streams
    finally:
        await pair.desk.close()
