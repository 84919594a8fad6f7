"""Prompts, outputs and secrets in what a whole server writes: its launcher, router and shards."""

from __future__ import annotations

import asyncio

import grpc
import httpx
from tests.acceptance.harness import Point, Result
from tests.acceptance.suites import ROOT
from tests.helpers.marked_requests import MARK, ask_grpc, ask_http
from tests.helpers.server import Server, free_port
from tests.helpers.tenants import ADMIN_KEY, bearer

from lorax_proto.lorax_pb2_grpc import LoraxStub

BOUND_S = 900.0


async def _ask(url: str, port: int) -> tuple[int, int]:
    headers = bearer(ADMIN_KEY)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as client:
        num_http = await ask_http(client, "base")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        return num_http, await ask_grpc(LoraxStub(channel), tuple(headers.items()))


def _scan(level: str) -> Result:
    port = free_port()
    options = (
        "--served-model-name", "base", "--grpc-port", str(port), "--log-level", level,
        "--adapter-local-root", str(ROOT / "examples/adapters"), "--admin-api-key", ADMIN_KEY,
    )  # fmt: skip
    with Server(*options) as server:
        num_http, num_grpc = asyncio.run(asyncio.wait_for(_ask(server.url, port), BOUND_S))
        code = server.stop()
        lines = list(server.lines)
    told = [line for line in lines if MARK in line or ADMIN_KEY in line]
    for line in told[:10]:
        print(f"    told: {line[:300]}", flush=True)
    figure = (
        f"{level}: {num_http} answers over HTTP and {num_grpc} over gRPC, refusals beside them; "
        f"{len(lines)} lines, {len(told)} of them tell; exit code {code}"
    )
    ok = not told and num_http > 30 and num_grpc > 5 and len(lines) > num_http and code == 0
    return Result(ok, figure)


def point_logs() -> Result:
    """At the level of the day, and at that of who looks for an error."""
    results = [_scan(level) for level in ("info", "debug")]
    return Result(all(each.ok for each in results), "; ".join(each.figure for each in results))


POINTS = [Point("7l", "no log line has a prompt, an output or a key", point_logs)]
