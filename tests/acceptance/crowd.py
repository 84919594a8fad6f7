"""Many HTTP requests at once from one thread, each with its status, its words and its time."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; status 0: nothing did."""

    status: int
    text: str
    seconds: float


async def ask(url: str, body: dict[str, Any], timeout_s: float = 120.0) -> Answer:
    """POST a body over a connection of its own."""
    start = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            status, text = await _exchange(url, json.dumps(body).encode())
    except (OSError, TimeoutError, ValueError) as error:
        status, text = 0, f"{type(error).__name__}: {error}"
    return Answer(status, text, time.perf_counter() - start)


async def _exchange(url: str, data: bytes) -> tuple[int, str]:
    place = urlsplit(url)
    assert place.hostname is not None
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        head = (
            f"POST {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        answer = await reader.read(-1)
    finally:
        writer.close()
    first, _, rest = answer.partition(b"\r\n")
    return int(first.split()[1]), rest.partition(b"\r\n\r\n")[2].decode(errors="replace")


def ask_all(url: str, bodies: Sequence[dict[str, Any]], timeout_s: float = 120.0) -> list[Answer]:
    """POST all bodies at once; returns when all are answered."""

    async def work() -> list[Answer]:
        return await asyncio.gather(*(ask(url, body, timeout_s) for body in bodies))

    return asyncio.run(work())


def statuses(answers: Iterable[Answer]) -> str:
    """Return how many answers had which status, and how long the slowest took."""
    answers = list(answers)
    counts = Counter(answer.status for answer in answers)
    shown = ", ".join(f"{number} x {status}" for status, number in sorted(counts.items()))
    return f"{shown}, slowest {max((a.seconds for a in answers), default=0.0):.1f} s"
