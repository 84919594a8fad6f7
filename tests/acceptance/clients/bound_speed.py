"""What bound outputs cost those beside them, and whether they come as fast as those."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from tests.acceptance.harness import Point, Result
from tests.acceptance.suites import ROOT
from tests.helpers.server import Server

NUM_FREE, NUM_BOUND = 24, 8
# How many tokens the fastest row gets while tokens are counted, and each before that.
COUNTED, BEFORE = 150, 8
LEAST_SHARE, MOST_OF_STEP = 0.9, 0.1
TIMEOUT_S = 900.0
# None of them can end while tokens are counted.
_NAME = {"type": "string", "pattern": "^[A-Z][a-z]{1,10}$"}
_LONG: tuple[dict[str, Any], ...] = (
    {"type": "string", "minLength": 2000, "maxLength": 4000},
    {"type": "array", "items": {"type": "integer", "minimum": 10, "maximum": 99}, "minItems": 400},
    {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+-[0-9]+$"}, "minItems": 400},
    {
        "type": "array",
        "items": {
            "anyOf": [
                {"type": "object", "properties": {"name": _NAME, "kind": {"enum": ["a", "b"]}}},
                {"type": "object", "properties": {"id": {"type": "string", "format": "uuid"}}},
            ]
        },
        "minItems": 400,
    },
)


class Rows:
    """Counts the tokens of streams that run at the same time, between the same two instants."""

    def __init__(self, num: int) -> None:
        self.counts = [0] * num
        self._opened: list[int] | None = None
        self._fastest = 0
        self.done = asyncio.Event()
        self.counted: list[int] = []

    def add(self, row: int) -> None:
        """Count a token; the first instant is when each row has some, grammars compiled."""
        self.counts[row] += 1
        if self._opened is None:
            if min(self.counts) >= BEFORE:
                self._opened = [*self.counts]
        elif self.counts[row] - self._opened[row] >= COUNTED and not self.counted:
            self.counted = [now - then for now, then in zip(self.counts, self._opened, strict=True)]
            self.done.set()


async def _row(client: httpx.AsyncClient, rows: Rows, number: int, schema: Any) -> None:
    parameters: dict[str, Any] = {
        "max_new_tokens": 2000, "ignore_eos_token": True, "do_sample": True, "seed": number + 1,
    }  # fmt: skip
    if schema is not None:
        parameters["schema"] = json.dumps(schema)
    body = {"inputs": f"Write {number} things as JSON.", "parameters": parameters}
    async with client.stream("POST", "/generate_stream", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"status {answer.status_code}: {await answer.aread()!r}")
        async for line in answer.aiter_lines():
            if line.startswith("data:"):
                rows.add(number)
    raise RuntimeError(f"row {number} ended after {rows.counts[number]} tokens")


async def _count(url: str) -> Rows:
    # Each grammar is another one, and compiled for its row.
    schemas = [{**_LONG[i % len(_LONG)], "title": f"{i}"} for i in range(NUM_BOUND)]
    wanted = [*schemas, *[None] * NUM_FREE]
    rows = Rows(len(wanted))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        tasks = [
            asyncio.create_task(_row(client, rows, number, schema))
            for number, schema in enumerate(wanted)
        ]
        done = asyncio.create_task(rows.done.wait())
        try:
            ended, _ = await asyncio.wait([done, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            for task in (done, *tasks):
                task.cancel()
            await asyncio.gather(done, *tasks, return_exceptions=True)
    return rows


def point_share() -> Result:
    """Tokens of bound rows and of the free rows beside them, between the same two instants."""
    with Server() as server:
        counted = asyncio.run(_count(server.url)).counted
    bound, free = counted[:NUM_BOUND], counted[NUM_BOUND:]
    share = min(bound) / statistics.median(free)
    print(f"    bound {bound}, free {free}", flush=True)
    figure = (
        f"{NUM_BOUND} bound rows of {NUM_BOUND + NUM_FREE}: the slowest {min(bound)} tokens while "
        f"its mates had a median of {statistics.median(free):g}, {share:.2f}x"
    )
    return Result(share >= LEAST_SHARE, figure)


def point_masks() -> Result:
    """``bench/constraints.py``: the masks of 8 rows as a share of a step of 32."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "bench.constraints", "--out", str(path)]
        subprocess.run(command, cwd=ROOT, check=True)
        found = json.loads(path.read_text())
    figure = (
        f"8 masks {found['fill_8_s'] * 1e3:.2f} ms of a step of {found['step_s'] * 1e3:.1f} ms, "
        f"{found['fill_8_share']:.2%}, where it is slowest {found['fill_8_slowest_share']:.2%}; "
        f"accepting and filling {found['advance_8_share']:.2%}, masking the logits "
        f"{found['apply_8_share']:.2%}; a step with 8 bound takes {found['step_ratio']:.2f}x, its "
        f"processors {found['cpu_ratio']:.2f}x"
    )
    return Result(found["fill_8_slowest_share"] <= MOST_OF_STEP, figure)


POINTS = [
    Point("3m", "filling 8 masks beside 32 rows, a tenth of the median step", point_masks),
    Point("3t", "a bound row gets 0.9x the tokens of its batch mates", point_share),
]
