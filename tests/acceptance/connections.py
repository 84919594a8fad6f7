"""Clients that never read, never finish and never leave: what others see of them."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from tests.acceptance.crowd import Answer, ask_all, statuses
from tests.acceptance.harness import Point, Result
from tests.acceptance.memory import MemoryWatch
from tests.helpers.server import Server

# A new request is answered within this time once the server has room for it.
MAX_WAIT_S = 1.0
# Clients that do not read hold nobody up at the end either.
MAX_END_S = 15.0
# What the router may take beyond what it has when idle, for all that clients do here.
MAX_GROWN_MIB = 256
CHAT = {
    "inputs": "What is the capital of France?",
    "parameters": {"max_new_tokens": 1, "apply_chat_template": True},
}


def _connect(server: Server, receive_bytes: int | None = None) -> socket.socket:
    sock = socket.socket()
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(10.0)
    sock.connect(("127.0.0.1", server.port))
    return sock


def _head(path: str, *headers: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *headers)
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _num_running(server: Server) -> int:
    """Return how many requests the step sent last had, 0 once nothing runs."""
    text = server.get("/metrics")
    found = re.search(r"^lorax_batch_current_size ([0-9.]+)$", text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def _chat(server: Server) -> Answer:
    (answer,) = ask_all(server.url + "/generate", [CHAT], 30.0)
    return answer


def never_read(number: int, *options: str) -> Callable[[], Result]:
    """Return the measure of so many streams whose clients read nothing."""

    def measure() -> Result:
        with Server(*options) as server, ExitStack() as stack, MemoryWatch(server) as memory:
            for _ in range(3):
                _chat(server)
            body = {
                "inputs": "The sea is",
                "parameters": {
                    "max_new_tokens": 256, "ignore_eos_token": True, "return_k_alternatives": 256,
                },
            }  # fmt: skip
            data = json.dumps(body).encode()
            for _ in range(number):
                sock = stack.enter_context(contextlib.closing(_connect(server, 4096)))
                sock.sendall(_head("/generate_stream", f"Content-Length: {len(data)}") + data)
            # Nothing is said of how long 200 rows take, but that they end and then hold nothing.
            time.sleep(1.0)
            idle_s = _until_idle(server)
            answer = _chat(server)
            start = time.perf_counter()
            code = server.stop()
            ended_s = time.perf_counter() - start
        ok = (
            idle_s is not None and answer.status == 200 and answer.seconds <= MAX_WAIT_S
            and memory.grown <= MAX_GROWN_MIB and code == 0 and ended_s <= MAX_END_S
        )  # fmt: skip
        shown = "never" if idle_s is None else f"after {idle_s:.1f} s"
        figure = (
            f"idle {shown}, then a chat: {answer.status} in {answer.seconds:.2f} s; "
            f"+{memory.grown} MiB; "
            f"SIGTERM: exit code {code} after {ended_s:.1f} s"
        )
        return Result(ok, figure)

    return measure


def _until_idle(server: Server, patience_s: float = 300.0) -> float | None:
    """Return after how long no request runs any more; None: some still do."""
    start = time.perf_counter()
    while (seconds := time.perf_counter() - start) < patience_s:
        if _num_running(server) == 0:
            return seconds
        time.sleep(0.1)
    return None


HALF_OPEN: dict[str, bytes] = {
    "head": b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Never",
    "body": _head("/generate", "Content-Length: 1000") + b'{"inputs":',
    "chunk": _head("/generate", "Transfer-Encoding: chunked") + b"10\r\n{",
    "trailer": _head("/generate", "Transfer-Encoding: chunked") + b"0\r\nX-A: b\r\n",
}


def idle(number: int, *options: str) -> Callable[[], Result]:
    """Return the measure of so many idle connections and 200 half-open ones beside chats."""

    def measure() -> Result:
        with Server(*options) as server:
            for _ in range(5):
                _chat(server)
            quiet = statistics.median(_chat(server).seconds for _ in range(10))
            with ExitStack() as stack, MemoryWatch(server) as memory:
                num, refused = _open(server, stack, number)
                num_open = _num_connections(server)
                beside = [_chat(server) for _ in range(10)]
                # Whoever says nothing is let go by the server, sooner or later.
                left = num - refused
                deadline = time.perf_counter() + 180.0
                while left and time.perf_counter() < deadline:
                    time.sleep(1.0)
                    left = _num_connections(server)
        slowest = max(answer.seconds for answer in beside)
        ok = (
            all(answer.status == 200 for answer in beside)
            and slowest <= quiet + MAX_WAIT_S and memory.grown <= MAX_GROWN_MIB and not left
        )  # fmt: skip
        figure = (
            f"{num_open} open at once; chat {quiet * 1e3:.0f} ms quiet, beside them {statuses(beside)}; "
            f"{refused} refused; {left} open after the time-outs; +{memory.grown} MiB"
        )
        return Result(ok, figure)

    return measure


def _open(server: Server, stack: ExitStack, number: int) -> tuple[int, int]:
    """Open idle and half-open connections; return how many were tried, and how many refused."""
    kinds = [b""] * number + [each for each in HALF_OPEN.values() for _ in range(50)]
    refused = 0
    for start in kinds:
        try:
            sock = stack.enter_context(contextlib.closing(_connect(server)))
            sock.sendall(start)
        except OSError:
            refused += 1
    return len(kinds), refused


def _num_connections(server: Server) -> int:
    """Return how many connections to the server's port are established."""
    port = f":{server.port:04X}"
    with open("/proc/net/tcp", encoding="ascii") as table:
        rows = [line.split() for line in table][1:]
    return sum(row[1].endswith(port) and row[3] == "01" for row in rows)


def point_trailers() -> Result:
    """Trailers without end: 64 MiB of them at most."""
    with Server() as server, MemoryWatch(server) as memory:
        _chat(server)
        sent = 0
        with contextlib.closing(_connect(server)) as sock:
            sock.sendall(_head("/generate", "Transfer-Encoding: chunked") + b"0\r\n")
            piece = b"".join(b"X-%d: %s\r\n" % (i, b"y" * 1000) for i in range(64))
            try:
                while sent < 64 << 20:
                    sock.sendall(piece)
                    sent += len(piece)
            except OSError:
                pass
        answer = _chat(server)
    ok = answer.status == 200 and sent < 4 << 20 and memory.grown <= 64
    return Result(ok, f"cut after {sent / 1e6:.2f} MB; +{memory.grown} MiB; then {answer.status}")


def point_long_texts() -> Result:
    """1.9 MB to /tokenize, and a prompt far beyond the limit."""
    text = "word and another, " * (1_900_000 // 18)
    bodies = {
        "/tokenize": {"inputs": text},
        "/generate": {"inputs": text, "parameters": {"max_new_tokens": 4}},
    }
    with Server() as server, MemoryWatch(server) as memory:
        _chat(server)
        answers = {path: ask_all(server.url + path, [body])[0] for path, body in bodies.items()}
    for path, answer in answers.items():
        print(f"    {path}: {answer.status} {answer.text[:200]}", flush=True)
    ok = (
        all(400 <= answer.status < 500 for answer in answers.values())
        and max(answer.seconds for answer in answers.values()) <= MAX_WAIT_S
        and memory.grown <= 64
    )  # fmt: skip
    return Result(ok, f"{statuses(answers.values())}; +{memory.grown} MiB")


def points() -> Iterator[Point]:
    """Yield a point for each kind of client."""
    four = never_read(4, "--max-concurrent-requests", "4")
    yield Point("T10", "four streams that nobody reads, and room for four", four)
    yield Point("T10c", "200 streams that nobody reads", never_read(200))
    yield Point("T11", "trailers without end", point_trailers)
    yield Point("T12", "2,000 idle and 200 half-open connections", idle(2000))
    yield Point("T13", "texts far beyond the limit", point_long_texts)
