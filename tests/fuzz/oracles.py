"""Plays traces and judges what came of them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
from tests.acceptance.faults.crowd import Heard, listen
from tests.acceptance.faults.server import events, processes
from tests.fuzz.traces import Shot, Trace
from tests.helpers.server import Server
from tests.soak.watch import PROGRAMS, left_behind, sampled

# A request that has no end by then hangs; a stream whose next token takes so long is slowed down.
HANG_S, SLOW_S = 60.0, 6.0
# What a program may hold beyond what it had after the first traces: caches are full by then.
MOST_GROWN_MIB, _NUM_FIRST = 192.0, 6
# Answers of a trace that are compared with those of the other server.
_NUM_COMPARED = 4
_BESIDE = {
    "model": "base", "max_tokens": 400, "temperature": 0.0, "stream": True, "ignore_eos": True,
    "messages": [{"role": "user", "content": "Tell me a very long story."}],
}  # fmt: skip


class Oracles:
    """Judges a server by what clients see of it.

    Args:
        server: the one that traces are played on.
        other: answers the same requests alone, and keeps no prefixes.
    """

    def __init__(self, server: Server, other: Server) -> None:
        self._server, self._other = server, other
        self._right: dict[str, Heard] = {}
        self._pids = self._running()
        self._num_played = 0
        # MiB of each program after the first traces.
        self._held: dict[str, float] = {}

    def judge(self, trace: Trace, draw: random.Random) -> str:
        """Play a trace; return the name of the oracle that is not content and why, or nothing."""
        heard, beside = asyncio.run(self._play(trace))
        for found in self._findings(trace, heard, beside, draw):
            return found
        return ""

    def _findings(
        self, trace: Trace, heard: list[Heard | None], beside: Heard, draw: random.Random
    ) -> Iterator[str]:
        if self._running() != self._pids or events(self._server, "shards_lost"):
            yield "crash: a process has ended"
        hung = [
            shot.body for shot, each in zip(trace.shots, heard) if each and "Timeout" in each.error
        ]
        if hung or "Timeout" in beside.error:
            yield f"hang: no end in {HANG_S:g} s: {hung[:1]}"
        if beside.worst_gap_s > SLOW_S:
            yield f"slow-down: a stream beside it stood still for {beside.worst_gap_s:.1f} s"
        yield from self._corrupt(trace, heard, draw)
        if faults := self._leaks():
            yield f"leak: {'; '.join(faults)}"

    # --- playing ------------------------------------------------------------------

    async def _play(self, trace: Trace) -> tuple[list[Heard | None], Heard]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self._server.url, timeout=HANG_S, limits=limits
        ) as http:
            seen = Heard()
            beside = asyncio.create_task(listen(http, _BESIDE, heard=seen))
            heard = await asyncio.gather(*(self._shoot(http, shot) for shot in trace.shots))
            # Whether it goes on is seen; how it ends is not.
            if not beside.done():
                beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)
        return heard, seen

    async def _shoot(self, http: httpx.AsyncClient, shot: Shot) -> Heard | None:
        """Send a request at its moment; None: its client left."""
        await asyncio.sleep(shot.at_s)
        asking = asyncio.create_task(listen(http, shot.body))
        await asyncio.wait({asking}, timeout=shot.leaves_after_s or HANG_S)
        if asking.done():
            return asking.result()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        return None if shot.leaves_after_s is not None else Heard(error="Timeout: no end")

    # --- judging ------------------------------------------------------------------

    def _running(self) -> set[int]:
        return {
            each.pid
            for program in ("lorax-shard", "lorax-router")
            for each in processes(self._server, program)
        }

    def _corrupt(
        self, trace: Trace, heard: list[Heard | None], draw: random.Random
    ) -> Iterator[str]:
        done = [(shot.body, each) for shot, each in zip(trace.shots, heard) if each is not None]
        for body, each in draw.sample(done, min(_NUM_COMPARED, len(done))):
            right = self._alone(body)
            is_same = each.equals(right) if not right.error else each.error[:3] == right.error[:3]
            if not is_same:
                yield f"corruption: {json.dumps(body)[:600]}: {each} instead of {right}"

    def _alone(self, body: dict[str, Any]) -> Heard:
        key = json.dumps(body, sort_keys=True)
        if key not in self._right:
            self._right[key] = asyncio.run(_listen_alone(self._other.url, body))
        return self._right[key]

    def _leaks(self) -> list[str]:
        """Return what is held when all is over; it may take a moment to let go."""
        for _ in range(20):
            if not (faults := left_behind(self._server)):
                return self._grown()
            time.sleep(0.25)
        return faults

    def _grown(self) -> list[str]:
        """Return the programs that hold far more than after the first traces."""
        self._num_played += 1
        now = {program: sampled(self._server, program)[0] for program in PROGRAMS}
        if self._num_played <= _NUM_FIRST:
            self._held = {each: max(now[each], self._held.get(each, 0.0)) for each in PROGRAMS}
        return [
            f"{each} holds {now[each] - self._held[each]:.0f} MiB more than after {_NUM_FIRST} traces"
            for each in PROGRAMS
            if now[each] - self._held[each] > MOST_GROWN_MIB
        ]


async def _listen_alone(url: str, body: dict[str, Any]) -> Heard:
    async with httpx.AsyncClient(base_url=url, timeout=HANG_S) as http:
        return await listen(http, body)
