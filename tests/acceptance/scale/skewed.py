"""Requests with many adapters, some of them far more popular than others, and what they cost."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.helpers.formula_adapters import write_formula_adapter

_GENERATE = "/generate_stream"


@dataclass(frozen=True, slots=True)
class Skew:
    """Traffic: adapter r is asked for as 1 / r; requests come by chance at a rate."""

    adapters: tuple[str, ...]
    rate: float
    seconds: float
    max_new_tokens: int
    seed: int = 1

    def arrivals(self) -> list[tuple[float, str]]:
        """Return when each request comes, and with which adapter."""
        draw = random.Random(self.seed)
        weights = [1 / rank for rank in range(1, len(self.adapters) + 1)]
        names = draw.sample(self.adapters, len(self.adapters))
        found, now = [], draw.expovariate(self.rate)
        while now < self.seconds:
            found.append((now, draw.choices(names, weights)[0]))
            now += draw.expovariate(self.rate)
        return found


@dataclass(slots=True)
class Answer:
    """What one client heard."""

    adapter: str = ""
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: str = ""
    # Why it is not whole; "": it is.
    error: str = ""
    seconds: float = 0.0


def write_adapters(model_dir: Path, root: Path, name: str, num: int, seed: int) -> tuple[str, ...]:
    """Write so many adapters, each with its own content, and return their names below the root."""
    folders = [
        write_formula_adapter(model_dir, root / f"{name}-{number}", rank=1, seed=seed + number)
        for number in range(num)
    ]
    return tuple(folder.name for folder in folders)


def body_of(adapter: str, number: int, max_new_tokens: int) -> dict[str, Any]:
    """Return a request; every fourth draws its tokens, from a seed."""
    parameters: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "ignore_eos_token": True, "details": True,
    }  # fmt: skip
    if number % 4 == 3:
        parameters |= {"do_sample": True, "temperature": 0.9, "seed": number}
    if adapter:
        parameters |= {"adapter_id": adapter, "adapter_source": "local"}
    return {"inputs": f"{number}. A story about number {number}:", "parameters": parameters}


async def ask(http: httpx.AsyncClient, body: dict[str, Any], url: str = "") -> Answer:
    """Send a request and read its stream to the end."""
    answer, begun = Answer(body["parameters"].get("adapter_id", "")), time.perf_counter()
    try:
        async with http.stream("POST", url + _GENERATE, json=body) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code} {(await response.aread())[:300]!r}"
                return answer
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    _take(answer, json.loads(line[5:]))
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    if not answer.finish and not answer.error:
        answer.error = "the stream ends before its end"
    answer.seconds = time.perf_counter() - begun
    return answer


def _take(answer: Answer, event: dict[str, Any]) -> None:
    if "token" not in event:
        answer.error = str(event)
        return
    answer.ids.append(event["token"]["id"])
    answer.text += event["token"]["text"]
    if details := event.get("details"):
        answer.finish = details["finish_reason"]


def client(url: str) -> httpx.AsyncClient:
    """Return a client without bounds of its own."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=200, limits=limits)


def send(url: str, skew: Skew) -> list[Answer]:
    """Send the traffic and return all answers."""

    async def scene() -> list[Answer]:
        begun = time.perf_counter()

        async def one(number: int, at: float, adapter: str) -> Answer:
            await asyncio.sleep(at - (time.perf_counter() - begun))
            return await ask(http, body_of(adapter, number, skew.max_new_tokens))

        async with client(url) as http:
            return list(await asyncio.gather(
                *(one(number, *each) for number, each in enumerate(skew.arrivals()))
            ))  # fmt: skip

    return asyncio.run(scene())


def seconds_each(url: str, max_new_tokens: int, num: int = 12) -> float:
    """Return what a request of the base model takes, one after the other."""

    async def scene() -> list[Answer]:
        async with client(url) as http:
            return [await ask(http, body_of("", 4 * n, max_new_tokens)) for n in range(num)]

    return sum(each.seconds for each in asyncio.run(scene())[2:]) / (num - 2)


def send_at_once(url: str, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """Send all requests at once and return their answers."""

    async def scene() -> list[Answer]:
        async with client(url) as http:
            return list(await asyncio.gather(*(ask(http, body) for body in bodies)))

    return asyncio.run(scene())


def tokens_per_s(urls: Sequence[str], adapters: Sequence[str], seconds: float) -> float:
    """Let a client for each adapter ask again and again, each at one of the addresses in turn."""

    async def scene() -> int:
        until, tokens = time.perf_counter() + seconds, 0

        async def one(http: httpx.AsyncClient, place: int, adapter: str) -> None:
            nonlocal tokens
            url = urls[place * len(urls) // len(adapters)]
            while time.perf_counter() < until:
                answer = await ask(http, body_of(adapter, place, 16), url)
                if answer.error:
                    raise RuntimeError(answer.error)
                tokens += len(answer.ids) if time.perf_counter() < until else 0

        async with client("") as http:
            await asyncio.gather(*(one(http, n, each) for n, each in enumerate(adapters)))
        return tokens

    return asyncio.run(scene()) / seconds


def loads(metrics: Sequence[str]) -> Counter[str]:
    """Return how often each server has brought an adapter to its device since it started."""
    found: Counter[str] = Counter()
    for url in metrics:
        with urllib.request.urlopen(url, timeout=20) as answer:
            text = answer.read().decode()
        for name in ("lorax_adapter_slots_held", "lorax_adapter_evictions"):
            for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE):
                found[url] += int(float(value))
    return found
