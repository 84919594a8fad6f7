"""A client that offers requests at its own pace, whatever becomes of them, and costs little itself.

Requests are bytes that were made before; connections are kept and used again, as clients' pools do.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Booked:
    """What became of requests: the seconds that each took, by its status; 0: no answer came."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    num_offered: int = 0
    # Of the answers that were whole.
    num_tokens: int = 0
    num_without_retry: int = 0
    wall_s: float = 0.0
    # Processor time of the client's own.
    cpu_s: float = 0.0
    # How much later than planned requests were sent.
    lags_s: list[float] = field(default_factory=list)

    @property
    def refused_s(self) -> list[float]:
        """The seconds of each refusal, in order."""
        return sorted(self.seconds.get(429, []) + self.seconds.get(503, []))

    def statuses(self) -> Counter[int]:
        """How many had which status."""
        return Counter({status: len(each) for status, each in self.seconds.items()})


def share(ordered: Sequence[float], part: float) -> float:
    """Return the value that so much of an ordered list does not exceed; 0 of an empty one."""
    return ordered[min(math.ceil(part * len(ordered)), len(ordered)) - 1] if ordered else 0.0


def arrivals(per_s: float, seconds: float, seed: int) -> Iterator[float]:
    """Yield the times of a Poisson process, the same for the same seed."""
    draw, at = random.Random(seed), 0.0
    while (at := at + draw.expovariate(per_s)) < seconds:
        yield at


class _Wire(asyncio.Protocol):
    """One connection with one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[bytes] | None = None
        self._heard = b""
        self._missing: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    @property
    def is_closing(self) -> bool:
        """Whether no more can be asked."""
        return self.transport is None or self.transport.is_closing()

    def close(self) -> None:
        """Hang up."""
        if self.transport is not None:
            self.transport.close()

    def ask(self, data: bytes) -> asyncio.Future[bytes]:
        """Send a request; the answer is there as a whole, or empty if the connection ended."""
        assert self.transport is not None
        self._heard, self._missing = b"", None
        self._answer = asyncio.get_running_loop().create_future()
        if self.is_closing:
            self._answer.set_result(b"")
        else:
            self.transport.write(data)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._heard += data
        if self._missing is None and (end := self._heard.find(b"\r\n\r\n")) >= 0:
            head = self._heard[:end].lower()
            _, _, length = head.partition(b"content-length:")
            self._missing = end + 4 + int(length.split(b"\r\n")[0])
        if self._missing is not None and len(self._heard) >= self._missing:
            self._over(self._heard)

    def connection_lost(self, error: Exception | None) -> None:
        self._over(b"")

    def _over(self, answer: bytes) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)


class Flood:
    """Sends requests to one server and books what comes back.

    Args:
        port: of the loopback interface.
        requests: as they go over the wire, and the tokens that each asks for, taken in turns.
    """

    def __init__(self, port: int, requests: Sequence[tuple[bytes, int]]) -> None:
        self._port, self._requests = port, requests
        self._free: list[_Wire] = []
        self._num_sent = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def closed(self, at_once: int, seconds: float, ramp_s: float = 0.0) -> Booked:
        """Keep so many requests going; counts what is answered after ``ramp_s``, for so long."""
        booked, begun, cpu = Booked(wall_s=seconds), time.perf_counter(), time.process_time()
        period = (begun + ramp_s, begun + ramp_s + seconds)

        async def caller() -> None:
            while time.perf_counter() < period[1]:
                await self._send(booked, period)

        await asyncio.gather(*(caller() for _ in range(at_once)))
        booked.cpu_s = time.process_time() - cpu
        return booked

    async def open(self, per_s: float, seconds: float, seed: int, ramp_s: float = 0.0) -> Booked:
        """Offer so many a second for ``ramp_s`` and so long; counts what is answered behind the ramp.

        What is not answered at the end goes on.
        """
        booked, begun, cpu = Booked(wall_s=seconds), time.perf_counter(), time.process_time()
        period = (begun + ramp_s, begun + ramp_s + seconds)
        for at in arrivals(per_s, ramp_s + seconds, seed):
            if (wait := begun + at - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            booked.lags_s.append(time.perf_counter() - begun - at)
            task = asyncio.create_task(self._send(booked, period))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.sleep(max(period[1] - time.perf_counter(), 0.0))
        booked.cpu_s = time.process_time() - cpu
        return booked

    async def one(self) -> Booked:
        """Send one request, and wait for its answer."""
        booked = Booked()
        await self._send(booked, (0.0, math.inf))
        return booked

    async def rest(self) -> None:
        """Return once all that was offered is answered."""
        await asyncio.gather(*self._tasks)

    async def _send(self, booked: Booked, period: tuple[float, float]) -> None:
        data, num_tokens = self._requests[self._num_sent % len(self._requests)]
        self._num_sent += 1
        booked.num_offered += 1
        start = time.perf_counter()
        wire = await self._wire()
        answer = b"" if wire is None else await wire.ask(data)
        if wire is not None and answer:
            self._free.append(wire)
        now = time.perf_counter()
        if period[0] <= now <= period[1]:
            _book(booked, answer, now - start, num_tokens)

    async def _wire(self) -> _Wire | None:
        while self._free:
            if not (wire := self._free.pop()).is_closing:
                return wire
        try:
            _, wire = await asyncio.get_running_loop().create_connection(
                _Wire, "127.0.0.1", self._port
            )
        except OSError:
            return None
        return wire

    def close(self) -> None:
        """Hang up."""
        for wire in self._free:
            wire.close()


def _book(booked: Booked, answer: bytes, seconds: float, num_tokens: int) -> None:
    status = int(answer[9:12]) if answer else 0
    booked.num_tokens += num_tokens if status == 200 else 0
    booked.seconds.setdefault(status, []).append(seconds)
    if status in (429, 503) and b"\r\nretry-after:" not in answer.lower():
        booked.num_without_retry += 1
