"""One command's measurements: warm up, run in turns, keep what came."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lorax_bench.document import MeasuredRun, measured
from lorax_bench.drive import drive
from lorax_bench.memory import PeakMemory
from lorax_bench.records import Record
from lorax_bench.requests import BenchRequest, Workload
from lorax_bench.shapes import FIRST_ID
from lorax_bench.systems import AskedSystem

# Of the requests before the first run: prompts and answers of so many tokens.
_WARM_PROMPT, _WARM_ANSWER, _WARM_REQUESTS = 16, 4, 8

Told = Callable[[Record], None]


class NoAnswerError(Exception):
    """The server answered nothing of the first requests; the text says what it said instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One of the runs that take turns: its name, and the workload of each round."""

    name: str
    workload: Callable[[int], Workload]
    rate: float | None = None


Watch = Callable[[str, Workload], contextlib.AbstractContextManager[Told]]


@contextlib.contextmanager
def unwatched(*_: object) -> Iterator[Told]:
    """Tell nobody how a run goes."""
    yield lambda record: None


def warm_up(system: AskedSystem, num_adapters: int) -> None:
    """Ask for the base model and for each adapter, so that no run pays for what is lazy."""
    rng = random.Random(system.name)
    adapters = [None] * _WARM_REQUESTS + list(range(num_adapters))
    requests = tuple(
        BenchRequest(
            prompt_ids=tuple(rng.randint(FIRST_ID, system.last_id) for _ in range(_WARM_PROMPT)),
            max_tokens=_WARM_ANSWER, adapter=adapter,
        )
        for adapter in adapters
    )  # fmt: skip
    load = Workload(
        name="warm-up", requests=requests, concurrency=_WARM_REQUESTS, num_adapters=num_adapters
    )
    records = asyncio.run(drive(system.target, load))
    if all(record.error is not None for record in records):
        raise NoAnswerError(f"{system.name} answered no request: {records[0].error}")


def run_once(
    system: AskedSystem, variant: Variant, number: int, watch: Watch = unwatched
) -> MeasuredRun:
    """Run one round of a variant."""
    workload = variant.workload(number)
    memory = PeakMemory(system.pid) if system.pid is not None else None
    title = f"{variant.name or workload.name}, round {number}"
    with memory or contextlib.nullcontext(), watch(title, workload) as told:
        records = asyncio.run(drive(system.target, workload, ended=told))
    return measured(
        system.name, workload, records, variant=variant.name, round=number, rate=variant.rate,
        peak_memory_bytes=memory.peak_bytes if memory else None,
    )  # fmt: skip


def take_turns(
    system: AskedSystem, variants: Sequence[Variant], rounds: int, *, warm_rounds: int = 0,
    watch: Watch = unwatched,
) -> list[MeasuredRun]:  # fmt: skip
    """Run each variant once a round; the first ``warm_rounds`` are thrown away.

    Each round has prompts of its own, so that no cache of prefixes has seen them.
    """
    runs = [
        run_once(system, variant, number, watch)
        for number in range(warm_rounds + rounds)
        for variant in variants
    ]
    return runs[warm_rounds * len(variants) :]
