"""A hostile client of the gRPC port of a real server: what others see of it, and what it costs.

The counterpart of ``connections``, which does this to HTTP. All is bounded in count and in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass

import grpc
from tests.acceptance.harness import Point, Result
from tests.acceptance.memory import MemoryWatch
from tests.helpers.http2_frames import (
    DATA,
    GOAWAY,
    HEADERS,
    PING,
    RST,
    SETTINGS,
    RawClient,
    asked,
    frame,
    opening,
    raw_client,
)
from tests.helpers.server import Server, free_port

from lorax_proto import lorax_pb2 as pb
from lorax_proto.lorax_pb2_grpc import LoraxStub

# A generation of one token beside the hostile client, at most; and the end of the server.
MAX_WAIT_S = 2.0
MAX_END_S = 15.0
# What the router may take beyond what it has when idle.
MAX_GROWN_MIB = 256
CLIENT_TIMEOUT_S = 5
PATIENCE_S = 120.0
NUM_CONNECTIONS = 8
# Per connection.
NUM_STREAMS = 25
_MESSAGE = 64 << 20
_CONTINUATION = 9
_CANCEL = struct.pack(">I", 8)


@dataclass
class Ground:
    """The server under attack, and a client of good manners."""

    port: int
    stub: LoraxStub

    async def chat(self) -> float:
        """Generate a token; return the seconds that it took."""
        request = pb.GenerateRequest(text="The sea", parameters=pb.Parameters(max_new_tokens=1))
        start = time.perf_counter()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    assert (await self.stub.Generate(request, timeout=60)).sequences
                except grpc.aio.AioRpcError as error:
                    # All places are taken, for as long as generations run.
                    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                        raise
                    await asyncio.sleep(0.1)
                    start = time.perf_counter()
                    continue
                return time.perf_counter() - start


async def _ended(client: RawClient) -> list[tuple[int, bytes]]:
    """Read to the end of a connection; raises TimeoutError when the server never ends it."""
    async with asyncio.timeout(PATIENCE_S):
        return await client.kinds_to_the_end()


async def slow_readers(ground: Ground) -> str:
    """200 streams on 8 connections that let the server send nothing; all are ended."""
    params = pb.Parameters(
        max_new_tokens=256, ignore_eos_token=True, return_tokens=True, num_alternatives=256
    )
    message = pb.GenerateRequest(text="The sea", parameters=params).SerializeToString()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(NUM_CONNECTIONS):
            client = await stack.enter_async_context(raw_client(ground.port, window=0))
            numbers = range(1, 2 * NUM_STREAMS, 2)
            client.send(*(asked(number, "GenerateStream", message) for number in numbers))
        beside = await ground.chat()
    return f"{NUM_CONNECTIONS * NUM_STREAMS} unread streams, then a token in {beside:.2f} s"


async def message_sizes(ground: Ground) -> str:
    """Messages that are too large, are said to be so, never end, or become so."""
    large = pb.GenerateRequest(text="w" * (3 << 20))
    codes = []
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
        try:
            await ground.stub.Generate(large, compression=compression, timeout=60)
        except grpc.aio.AioRpcError as error:
            codes.append(error.code().name)
    assert codes == ["RESOURCE_EXHAUSTED", "UNIMPLEMENTED"], codes
    sent = 0
    async with raw_client(ground.port) as client:
        head = b"\x00" + struct.pack(">I", _MESSAGE)
        client.send(opening(1, "/lorax.v1.Lorax/Generate"), frame(DATA, head, stream=1))
        refused = asyncio.ensure_future(_refused(client))
        while not refused.done() and sent < _MESSAGE:
            client.send(frame(DATA, bytes(16_384), stream=1))
            sent += 16_384
            await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            await refused
    assert sent < _MESSAGE, "nothing was refused before the end"
    beside = await _endless_headers(ground)
    assert beside <= MAX_WAIT_S, beside
    return f"{codes}, an endless message refused after {sent >> 10} kB, 64 MiB of metadata dropped"


async def _refused(client: RawClient) -> None:
    """Return when a call has ended, or all of them have."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while (await client.frame())[0] not in (RST, GOAWAY, HEADERS):
            pass


async def _endless_headers(ground: Ground) -> float:
    """Send metadata without end, which the library reads and drops; return a token's seconds."""
    field = b"\x00\x04x-ab\x7f\xe9\x06" + b"y" * 1_000
    piece = frame(_CONTINUATION, field * 16, 0, 1)
    async with raw_client(ground.port) as client:
        client.send(frame(HEADERS, b"", 0, 1))
        for _ in range(_MESSAGE // len(piece)):
            client.send(piece)
            await client.drained()
        return await ground.chat()


async def many_streams(ground: Ground) -> str:
    """Streams beyond the bound of a connection are refused, and 20,000 that are reset hold nothing."""
    most, opened = 512, 1_000
    async with raw_client(ground.port) as client:
        while (await client.frame())[0] != SETTINGS:
            pass
        client.send(frame(SETTINGS, flags=1))
        client.send(*(opening(2 * n + 1, "/lorax.v1.Lorax/Generate") for n in range(opened)))
        refused = 0
        async with asyncio.timeout(PATIENCE_S):
            while refused < opened - most:
                refused += (await client.frame())[0] == RST
        beside = await ground.chat()
    num_reset = 20_000
    async with raw_client(ground.port) as client:
        reading = asyncio.ensure_future(client.kinds_to_the_end())
        for start in range(0, num_reset, 500):
            for number in range(start, start + 500):
                client.send(opening(2 * number + 1, "/lorax.v1.Lorax/Info"))
                client.send(frame(RST, _CANCEL, stream=2 * number + 1))
            await asyncio.sleep(0)
            if reading.done():
                break
        after = await ground.chat()
        reading.cancel()
    assert max(beside, after) <= MAX_WAIT_S, (beside, after)
    return f"{refused} of {opened} streams refused; {num_reset} reset; a token in {after:.2f} s"


async def floods(ground: Ground) -> str:
    """Pings, settings and empty frames without end: each connection is ended by the server."""
    kinds = {
        "pings": frame(PING, bytes(8)),
        "settings": frame(SETTINGS, struct.pack(">HI", 4, 65_535)),
    }
    ended = {}
    for name, flood in kinds.items():
        async with raw_client(ground.port) as client:
            sent = 0
            while sent < 200_000 and not client.is_closed:
                client.send(flood * 1_000)
                sent += 1_000
                await asyncio.sleep(0)
            # Nothing was read meanwhile.
            beside = await ground.chat()
            ended[name] = sent
            if name == "pings":
                await _ended(client)
        assert beside <= MAX_WAIT_S, (name, beside)
    return ", ".join(f"{number} {name}" for name, number in ended.items()) + ": others are served"


async def silence(ground: Ground) -> str:
    """Connections that shake no hands, and calls whose request never comes, are let go."""
    async with contextlib.AsyncExitStack() as stack:
        mute = [
            await stack.enter_async_context(raw_client(ground.port, greets=False))
            for _ in range(200)
        ]
        halves = [await stack.enter_async_context(raw_client(ground.port)) for _ in range(20)]
        for client in halves:
            client.send(*(opening(2 * n + 1, "/lorax.v1.Lorax/Generate") for n in range(10)))
        beside = await ground.chat()
        for client in mute:
            await _ended(client)
        async with asyncio.timeout(PATIENCE_S):
            for client in halves:
                ended = 0
                while ended < 10:
                    # Trailers, with which a call ends.
                    kind, _ = await client.frame()
                    ended += kind == HEADERS
    assert beside <= MAX_WAIT_S, beside
    return "200 mute connections closed, 200 calls without a request ended"


SCENES: tuple[Callable[[Ground], Coroutine[None, None, str]], ...] = (
    slow_readers, message_sizes, many_streams, floods, silence,
)  # fmt: skip


@contextlib.asynccontextmanager
async def _ground(port: int) -> AsyncIterator[Ground]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield Ground(port, LoraxStub(channel))


def point_hostile() -> Result:
    """All scenes against one server, which then ends in good order."""
    port = free_port()
    options = ("--grpc-port", str(port), "--client-timeout-s", str(CLIENT_TIMEOUT_S))
    figures, fine = [], True

    async def play(server: Server) -> None:
        nonlocal fine
        async with _ground(port) as ground:
            for _ in range(3):
                await ground.chat()
            for scene in SCENES:
                with MemoryWatch(server) as memory:
                    try:
                        figure, is_ok = await scene(ground), memory.grown <= MAX_GROWN_MIB
                    except (AssertionError, TimeoutError, OSError) as error:
                        figure, is_ok = f"{type(error).__name__} {error}"[:200], False
                fine = fine and is_ok
                figures.append(f"{scene.__name__}: {figure}, +{memory.grown} MiB")
                print(f"    {'ok' if is_ok else 'SHORT'} {figures[-1]}", flush=True)
            assert await ground.chat() <= MAX_WAIT_S

    with Server(*options) as server:
        asyncio.run(play(server))
        start = time.perf_counter()
        code = server.stop()
        seconds = time.perf_counter() - start
    fine = fine and code == 0 and seconds <= MAX_END_S
    return Result(fine, "; ".join([*figures, f"SIGTERM: exit code {code} after {seconds:.1f} s"]))


POINTS = [Point("7g", "a hostile client over gRPC: bounded as over HTTP", point_hostile)]
