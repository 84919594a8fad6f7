"""Outputs bound to JSON schemas, over the real model and a running server."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from decimal import Decimal
from typing import Any

import httpx
import jsonschema
from tests.acceptance.clients.bound_requests import DIALECTS, Dialect, Output, Wanted
from tests.acceptance.harness import Point, Result
from tests.acceptance.suites import ROOT
from tests.helpers.generated_schemas import Schemas
from tests.helpers.refused_schemas import REFUSED
from tests.helpers.server import Server

ADAPTERS = ROOT / "examples/adapters"
OPTIONS = ("--served-model-name", "base", "--adapter-local-root", str(ADAPTERS))
NUM_REQUESTS, SEED, AT_ONCE = 300, 9, 32
TIMEOUT_S = 900.0
# In no JSON of these schemas: between values is one line break at most, within texts none.
NEVER = "\n\n"
_STATUS_OF_REFUSAL = {400, 422}


def wanted_requests() -> tuple[list[tuple[str, Wanted]], Counter[str]]:
    """Return the requests with their dialects, and what their schemas are made of."""
    schemas, rng = Schemas(SEED), random.Random(SEED)
    names = list(DIALECTS)
    requests = []
    for number in range(NUM_REQUESTS):
        name = names[number % len(names)]
        dialect = DIALECTS[name]
        wanted = Wanted(
            schema=schemas.document(),
            adapter=rng.choice(("", "", "pirate", "json-only", "sentiment")),
            temperature=rng.choice((0.0, 0.7, 1.0, 1.3)),
            seed=number + 1,
            n=2 if dialect.has_n and rng.random() < 0.3 else 1,
            stop=(NEVER,) if dialect.has_stop and rng.random() < 0.3 else (),
            stream=rng.random() < 0.5,
        )
        requests.append((name, wanted))
    return requests, schemas.used


async def outputs_of(client: httpx.AsyncClient, dialect: Dialect, wanted: Wanted) -> list[Output]:
    """Send a request and read its answer; raises what went wrong."""
    answer = await client.post(dialect.path(wanted), json=dialect.body(wanted))
    if answer.status_code != 200:
        raise ValueError(f"status {answer.status_code}: {answer.text[:300]}")
    if not wanted.stream:
        return dialect.whole(answer.json())
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return dialect.streamed(json.loads(line) for line in lines if line != "[DONE]")


def fault_of(dialect: Dialect, wanted: Wanted, output: Output) -> str | None:
    """Return what is wrong with an output; None: it ended by itself and validates."""
    if output.reason != dialect.ended:
        return f"ended by {output.reason}"
    kind = jsonschema.Draft202012Validator
    try:
        # In decimal: 1.14 is a multiple of 0.01.
        schema, value = _in_decimal(json.dumps(wanted.schema)), _in_decimal(output.text)
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return None


def _in_decimal(text: str) -> Any:
    return json.loads(text, parse_float=Decimal)


async def _answered(url: str, requests: list[tuple[str, Wanted]]) -> tuple[int, list[str]]:
    """Send all, some at once; return how many outputs came and what is wrong with them."""
    gate, num_outputs = asyncio.Semaphore(AT_ONCE), 0
    faults = []

    async def one(client: httpx.AsyncClient, name: str, wanted: Wanted) -> None:
        nonlocal num_outputs
        dialect, shown = DIALECTS[name], f"{name}, {wanted}"
        async with gate:
            try:
                found = await outputs_of(client, dialect, wanted)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                faults.append(f"{error!r}: {shown}")
                return
        num_outputs += len(found)
        if len(found) != wanted.n:
            faults.append(f"{len(found)} outputs: {shown}")
        wrong = [(fault_of(dialect, wanted, each), each) for each in found]
        faults.extend(f"{fault}: {each.text[-200:]!r}: {shown}" for fault, each in wrong if fault)

    async with (
        httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client,
        asyncio.TaskGroup() as group,
    ):
        for name, wanted in requests:
            group.create_task(one(client, name, wanted))
    return num_outputs, faults


def point_generated() -> Result:
    """Generated schemas in every dialect: all outputs end by themselves and validate."""
    requests, used = wanted_requests()
    print("    " + ", ".join(f"{kind} {number}" for kind, number in used.most_common()))
    with Server(*OPTIONS) as server:
        started = time.perf_counter()
        num_outputs, faults = asyncio.run(_answered(server.url, requests))
        seconds = time.perf_counter() - started
    for fault in faults:
        print(f"    {fault[:1500]}", flush=True)
    figure = (
        f"{len(requests)} requests, {num_outputs} outputs in {seconds:.0f} s, {len(faults)} wrong"
    )
    return Result(not faults and num_outputs >= len(requests), figure)


async def _refusals(url: str) -> tuple[int, list[str]]:
    """Send what cannot be bound in every dialect; return how many, and what was not refused."""
    faults, num = [], 0
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        for number, (label, schema) in enumerate(REFUSED.items()):
            for place, (name, dialect) in enumerate(DIALECTS.items()):
                wanted = Wanted(schema=schema, stream=(number + place) % 2 == 1, max_tokens=8)
                answer = await client.post(dialect.path(wanted), json=dialect.body(wanted))
                num += 1
                if fault := _not_refused(answer):
                    faults.append(f"{label}, {name}, streamed {wanted.stream}: {fault}")
        usual = Wanted(schema={"enum": ["yes"]})
        for name, dialect in DIALECTS.items():
            for output in await outputs_of(client, dialect, usual):
                if fault := fault_of(dialect, usual, output):
                    faults.append(f"afterwards, {name}: {fault}")
    return num, faults


def _not_refused(answer: httpx.Response) -> str | None:
    text = answer.text[:300]
    if answer.status_code not in _STATUS_OF_REFUSAL:
        return f"status {answer.status_code}: {text}"
    error: Any = answer.json()["error"]
    words = error if isinstance(error, str) else error["message"]
    return None if len(words) > 20 and "`" in words else text


def point_refused() -> Result:
    """What a grammar cannot say, or nothing fits: refused in words, streamed or not."""
    with Server(*OPTIONS) as server:
        num, faults = asyncio.run(_refusals(server.url))
    for fault in faults:
        print(f"    {fault}", flush=True)
    figure = (
        f"{len(REFUSED)} schemas in {len(DIALECTS)} dialects: {num - len(faults)} of {num} refused"
    )
    return Result(not faults, figure)


POINTS = [
    Point("3g", f"{NUM_REQUESTS} generated schemas in every dialect: all end and validate", point_generated),
    Point("3r", "schemas that no grammar can be made of are refused in words", point_refused),
]  # fmt: skip
