"""Clients that stream one answer after another, and when each token came: a process of its own.

Run as ``python -m tests.acceptance.faults.honest URL NUM_STREAMS``, the API key in HONEST_KEY; prints one
JSON object when its input ends. Its clock is the machine's, so that times compare with another
process's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[3]
NUM_TOKENS = 320
# One that came of what was computed before belongs to no window yet.
_EDGE_S = 0.05


@dataclass(slots=True)
class Streams:
    """When tokens came, by request, and what did not work, in words."""

    times: list[list[float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def intervals(self, windows: list[tuple[float, float]]) -> list[float]:
        """Return the seconds between tokens of which both came within one of the windows."""
        pairs = [pair for each in self.times for pair in itertools.pairwise(each)]
        return [
            later - earlier
            for earlier, later in pairs
            if any(start + _EDGE_S <= earlier and later <= end for start, end in windows)
        ]


class Clients:
    """Stream until they are told that it is enough."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key
        self._found = Streams()
        self._is_enough = False

    async def run(self, num_streams: int) -> Streams:
        """Stream until standard input ends."""
        headers = {"Authorization": f"Bearer {self._key}"}
        async with httpx.AsyncClient(base_url=self._url, headers=headers, timeout=60) as http:
            tasks = [asyncio.create_task(self._repeat(http, each)) for each in range(num_streams)]
            await asyncio.to_thread(sys.stdin.read)
            self._is_enough = True
            await asyncio.gather(*tasks)
        return self._found

    async def _repeat(self, http: httpx.AsyncClient, number: int) -> None:
        while not self._is_enough and len(self._found.failures) < 10:
            times: list[float] = []
            self._found.times.append(times)
            try:
                await self._stream(http, number, times)
            except (httpx.HTTPError, ValueError) as error:
                self._found.failures.append(f"{type(error).__name__}: {error}")

    async def _stream(self, http: httpx.AsyncClient, number: int, times: list[float]) -> None:
        parameters = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True}
        body = {"inputs": f"{number}. The sea is", "parameters": parameters}
        async with http.stream("POST", "/generate_stream", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    if "token" not in json.loads(line[5:]):
                        raise ValueError(line)
                    times.append(time.perf_counter())
                if self._is_enough:
                    return
        if len(times) != NUM_TOKENS:
            raise ValueError(f"{len(times)} of {NUM_TOKENS} tokens came")


@contextmanager
def streaming(url: str, key: str, num_streams: int) -> Iterator[Streams]:
    """Let clients stream meanwhile; what they heard is there when the context has ended."""
    heard = Streams()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.acceptance.faults.honest", url, str(num_streams)],
        cwd=ROOT, env=os.environ | {"HONEST_KEY": key}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield heard
        document = json.loads(process.communicate(timeout=120)[0])
        heard.times, heard.failures = document["times"], document["failures"]
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    found = asyncio.run(Clients(sys.argv[1], os.environ["HONEST_KEY"]).run(int(sys.argv[2])))
    print(json.dumps({"times": found.times, "failures": found.failures}))
