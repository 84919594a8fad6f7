"""The client: sends a workload's requests to a server and notes when each token comes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from lorax_bench.apis import AnswerError, Piece, ServerApi
from lorax_bench.records import Record
from lorax_bench.requests import BenchRequest, Workload
from lorax_bench.sse import EventReader

_END = b"[DONE]"
# Of an error's text: what groups it with its like, without a server's whole page.
_MAX_ERROR = 200

SHORT = "the answer ended before all tokens that were asked for had come"
BROKEN = "the connection broke in the middle of the answer"
UNREADABLE = "an event of the stream is no JSON object"


class RefusedError(Exception):
    """The server did not answer as asked; the text says how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server that is asked, and how."""

    url: str
    api: ServerApi
    timeout_s: float = 600.0
    """How long a request may take, from its first byte to the last of its answer."""
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What goes along with each request."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


async def drive(
    target: Target, workload: Workload, *, ended: Callable[[Record], None] = lambda record: None
) -> list[Record]:
    """Send all requests of a workload and return what became of each, in their order.

    ``ended`` is told of each as it ends. No failure of a request stops the others.
    """
    timeout = aiohttp.ClientTimeout(total=target.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    records: dict[int, Record] = {}
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=target.headers
    ) as session:
        start = time.perf_counter()
        client = _Client(session, target, start)

        async def work(requests: Iterator[tuple[int, BenchRequest]]) -> None:
            for number, request in requests:
                records[number] = await client.send(number, request)
                ended(records[number])

        # Those who share one iterator take the next request in its order.
        queue = iter(enumerate(workload.requests))
        shares = [queue] * workload.concurrency if workload.concurrency else [
            iter([each]) for each in queue
        ]  # fmt: skip
        async with asyncio.TaskGroup() as group:
            for share in shares:
                group.create_task(work(share))
    return [records[number] for number in range(len(workload.requests))]


class _Client:
    """Sends single requests; its clock starts with the run."""

    def __init__(self, session: aiohttp.ClientSession, target: Target, start: float) -> None:
        self._session, self._target, self._start = session, target, start
        self._url = target.url.rstrip("/") + target.api.path

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def send(self, number: int, request: BenchRequest) -> Record:
        """Send one request when it is due and read its answer to the end."""
        body = json.dumps(self._target.api.body(request)).encode()
        if (early := request.at_s - self._now()) > 0:
            await asyncio.sleep(early)
        record = Record(
            request=number, adapter=request.adapter, sent_s=self._now(),
            prompt_tokens=len(request.prompt_ids),
        )  # fmt: skip
        try:
            async for piece in self._pieces(body):
                self._book(record, piece)
            if record.num_tokens < request.max_tokens and not self._target.api.may_end_early:
                record.error = SHORT
            elif not record.num_tokens:
                record.error = "the answer has no token"
        except (RefusedError, AnswerError) as error:
            record.error = str(error)[:_MAX_ERROR]
        except TimeoutError:
            record.error = f"no end of the answer within {self._target.timeout_s:g} s"
        except aiohttp.ClientConnectorError as error:
            record.error = f"no connection to the server: {error.strerror or error}"
        except aiohttp.ClientError:
            record.error = BROKEN
        return record

    def _book(self, record: Record, piece: Piece) -> None:
        num = piece.num_tokens if piece.total is None else piece.total - record.num_tokens
        record.token_times_s += [self._now()] * num
        record.token_ids += piece.token_ids
        if piece.text:
            record.texts.append(piece.text)
        if piece.prompt_tokens is not None:
            record.prompt_tokens = piece.prompt_tokens

    async def _pieces(self, body: bytes) -> AsyncIterator[Piece]:
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._url, data=body, headers=headers) as response:
            if response.status != 200:
                raise RefusedError(_refusal(response.status, await response.read()))
            async for event in _events(response.content):
                yield self._target.api.read(event)


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the documents of a stream, up to the event that says it is the end."""
    reader = EventReader()
    async for part in content.iter_any():
        for data in reader.feed(part):
            if data == _END:
                return
            yield _document(data)
    for data in reader.close():
        if data != _END:
            yield _document(data)


def _document(data: bytes) -> Mapping[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        raise RefusedError(UNREADABLE) from None
    if not isinstance(event, dict):
        raise RefusedError(UNREADABLE)
    return event


def _refusal(status: int, body: bytes) -> str:
    """Return the words of an answer that is no stream."""
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    text: object = body.decode(errors="replace").strip()
    if isinstance(document, dict):
        error = document.get("error", document.get("detail", document))
        text = error.get("message", error) if isinstance(error, dict) else error
    return f"HTTP {status}: {text}"
