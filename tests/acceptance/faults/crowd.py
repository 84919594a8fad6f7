"""A hundred streams of every kind at once, and what each of them got."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

PATH = "/v1/chat/completions"
ADAPTERS = ("", "pirate", "sentiment", "json-only")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_TOPICS = ("the sea", "a train", "seven cats", "rain in May", "an old clock", "two brothers")


@dataclass(slots=True)
class Heard:
    """What one client heard of its request, by choice."""

    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    # Why it ended early; "": it did not.
    error: str = ""
    # Seconds until the first chunk, and the longest that one was behind the one before.
    first_s: float = 0.0
    worst_gap_s: float = 0.0

    def equals(self, other: Heard, tolerance: float = 1e-3) -> bool:
        """Whether both are whole and the same; log-probabilities but for rounding."""
        if self.error or (self.texts, self.finishes) != (other.texts, other.finishes):
            return False
        if not self.finishes or self.logprobs.keys() != other.logprobs.keys():
            return False
        return all(
            len(mine) == len(other.logprobs[index])
            and all(abs(a - b) <= tolerance for a, b in zip(mine, other.logprobs[index]))
            for index, mine in self.logprobs.items()
        )


def requests(num: int, *, most: int = 24) -> list[dict[str, Any]]:
    """Return bodies for chat completions: of four one has a schema, one a seed and log-probabilities.

    Some ask for two answers; the adapters take turns.
    """
    return [_request(number, most) for number in range(num)]


def _request(number: int, most: int) -> dict[str, Any]:
    topic = _TOPICS[number % len(_TOPICS)]
    body: dict[str, Any] = {
        "model": ADAPTERS[number // 4 % len(ADAPTERS)],
        "messages": [{"role": "user", "content": f"{number}. Tell me about {topic}."}],
        "max_tokens": most - number % 5,
        "stream": True,
    }
    if number % 4 == 1:
        schema = {"name": "person", "schema": SCHEMA}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if number % 4 == 2:
        body |= {"seed": number, "temperature": 0.8, "logprobs": True}
    else:
        body["temperature"] = 0.0
    if number % 10 == 3:
        body |= {"n": 2, "temperature": 0.7, "seed": number}
    return body


async def listen(
    http: httpx.AsyncClient,
    body: dict[str, Any],
    headers: dict[str, str] | None = None,
    heard: Heard | None = None,
) -> Heard:
    """Send a chat and read its stream to the end, or ask for vectors, labels or scores; what comes is in ``heard`` at once, if it is given."""
    heard, begun = heard or Heard(), time.perf_counter()
    last = begun
    try:
        if "messages" not in body:
            await _ask_numbers(http, body, headers, heard)
            heard.first_s = time.perf_counter() - begun
            return heard
        async with http.stream("POST", PATH, json=body, headers=headers) as response:
            if response.status_code != 200:
                heard.error = f"{response.status_code} {(await response.aread())[:600]!r}"
                return heard
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line == "data: [DONE]":
                    continue
                now = time.perf_counter()
                if last == begun:
                    heard.first_s = now - begun
                heard.worst_gap_s = max(heard.worst_gap_s, now - last)
                last = now
                _take(heard, json.loads(line[5:]))
    except httpx.HTTPError as error:
        heard.error = f"{type(error).__name__}: {error}"
    return heard


async def _ask_numbers(
    http: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str] | None, heard: Heard
) -> None:
    """Ask for vectors, labels or scores, which come as a whole; of each the share of its largest number."""
    path = (
        "/v1/score" if "text_1" in body else "/v1/embeddings" if "pooling" in body else "/classify"
    )
    response = await http.post(path, json=body, headers=headers)
    if response.status_code != 200:
        heard.error = f"{response.status_code} {response.content[:600]!r}"
        return
    for each in response.json()["data"]:
        numbers = each.get("embedding") or each.get("probs") or [each["score"]]
        largest = max(abs(number) for number in numbers) if len(numbers) > 1 else 1.0
        heard.logprobs[each["index"]] = [number / largest for number in numbers]
        heard.texts[each["index"]], heard.finishes[each["index"]] = "", "made"


def _take(heard: Heard, event: dict[str, Any]) -> None:
    if "error" in event:
        heard.error = str(event["error"])
    for choice in event.get("choices", ()):
        index = choice["index"]
        delta = choice["delta"]
        text = delta.get("content") or ""
        for call in delta.get("tool_calls") or ():
            text += f"{call['function'].get('name') or ''}{call['function'].get('arguments') or ''}"
        heard.texts[index] = heard.texts.get(index, "") + text
        if choice.get("logprobs"):
            values = [each["logprob"] for each in choice["logprobs"]["content"]]
            heard.logprobs.setdefault(index, []).extend(values)
        if choice.get("finish_reason"):
            heard.finishes[index] = choice["finish_reason"]


def converse(
    url: str,
    bodies: Sequence[dict[str, Any]],
    meanwhile: Callable[[], Awaitable[None]] | None = None,
    headers: dict[str, str] | None = None,
) -> list[Heard]:
    """Send all requests at once, do something meanwhile, and return what each one heard."""

    async def scene() -> list[Heard]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
            tasks = [asyncio.create_task(listen(http, body, headers)) for body in bodies]
            if meanwhile is not None:
                await meanwhile()
            return list(await asyncio.gather(*tasks))

    return asyncio.run(scene())
