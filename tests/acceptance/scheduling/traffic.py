"""Timed requests to a running server, and each of their tokens with the time at which it came."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

# Ids that stand for text in the default model's vocabulary, below its special tokens' neighbours.
_FIRST_ID, _LAST_ID = 300, 40_000
_LIMITS = httpx.Limits(max_connections=None)


@dataclass(slots=True, kw_only=True)
class Job:
    """One request. Times are seconds since the run began; those that never came are missing."""

    at: float
    client: int
    model: str
    num_prompt: int
    num_output: int
    key: str = ""
    priority: int | None = None
    sent_at: float = 0.0
    token_times: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def wait_s(self) -> float:
        """Until the first token; for ever where none came."""
        return self.token_times[0] - self.sent_at if self.token_times else float("inf")

    def body(self, draw: random.Random) -> dict[str, Any]:
        """Return what is posted: a prompt of chance, so that nothing of it is cached."""
        ids = [draw.randrange(_FIRST_ID, _LAST_ID) for _ in range(self.num_prompt)]
        body: dict[str, Any] = {
            "model": self.model, "prompt": ids, "max_tokens": self.num_output,
            "temperature": 0.0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }  # fmt: skip
        return body | ({} if self.priority is None else {"priority": self.priority})


class Traffic:
    """Sends jobs to one server and books what comes back."""

    def __init__(self, url: str, *, seed: int = 7) -> None:
        self._url = f"{url}/v1/completions"
        self._draw = random.Random(seed)

    def run(self, jobs: Sequence[Job], until_s: float | None = None) -> float:
        """Send each job at its time; what is not over at ``until_s`` is broken off.

        Returns the seconds that it took.
        """
        return asyncio.run(self._run(jobs, until_s))

    def run_closed(self, jobs: Sequence[Job], at_once: int) -> float:
        """Send the jobs in order, so many at once, whatever their times; returns the seconds."""
        return asyncio.run(self._run_closed(list(jobs), at_once))

    async def _run(self, jobs: Sequence[Job], until_s: float | None) -> float:
        begun = time.perf_counter()
        async with httpx.AsyncClient(limits=_LIMITS, timeout=None) as client:
            tasks = [asyncio.create_task(self._one(client, job, begun)) for job in jobs]
            await asyncio.wait(tasks, timeout=until_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return time.perf_counter() - begun

    async def _run_closed(self, jobs: list[Job], at_once: int) -> float:
        begun = time.perf_counter()
        left = iter(jobs)

        async def caller() -> None:
            for job in left:
                await self._send(client, job, begun)

        async with httpx.AsyncClient(limits=_LIMITS, timeout=None) as client:
            await asyncio.gather(*(caller() for _ in range(at_once)))
        return time.perf_counter() - begun

    async def _one(self, client: httpx.AsyncClient, job: Job, begun: float) -> None:
        await asyncio.sleep(begun + job.at - time.perf_counter())
        await self._send(client, job, begun)

    async def _send(self, client: httpx.AsyncClient, job: Job, begun: float) -> None:
        headers = {"Authorization": f"Bearer {job.key}"} if job.key else {}
        job.sent_at = time.perf_counter() - begun
        try:
            body = job.body(self._draw)
            async with client.stream("POST", self._url, json=body, headers=headers) as answer:
                if answer.status_code != 200:
                    job.error = (await answer.aread()).decode()
                    return
                async for event in _events(answer):
                    _book(job, event, time.perf_counter() - begun)
        except httpx.HTTPError as error:
            job.error = f"{type(error).__name__}: {error}"


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def _book(job: Job, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        job.error = json.dumps(event["error"])
        return
    num_new = event["usage"]["completion_tokens"] - len(job.token_times)
    job.token_times += [now] * num_new


def failed(jobs: Sequence[Job]) -> list[str]:
    """Return the words of those that failed, each once."""
    return sorted({job.error for job in jobs if job.error})
