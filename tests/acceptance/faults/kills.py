"""Shards that are killed or hang under a hundred streams: each stream is what it would have been."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from statistics import median
from typing import Any

from tests.acceptance.faults.crowd import Heard, converse, requests
from tests.acceptance.faults.server import (
    events,
    faulty_server,
    processes,
    start_times,
    until_healthy,
)
from tests.acceptance.harness import Result
from tests.helpers.server import Server

NUM_STREAMS = 100
# A pause may be so many times as long as what a start and the tokens to compute again take.
MOST_PAUSE = 1.2
Harm = Callable[[Server], None]


def kill(server: Server) -> None:
    """End one rank at once."""
    random.choice(processes(server, "lorax-shard")).send_signal(signal.SIGKILL)


def stop(server: Server) -> None:
    """Let one rank stand still."""
    random.choice(processes(server, "lorax-shard")).send_signal(signal.SIGSTOP)


def after(server: Server, harm: Harm, seconds: float) -> Callable[[], Awaitable[None]]:
    """Return what does harm after so many seconds."""

    async def wait_and_harm() -> None:
        await asyncio.sleep(seconds)
        await asyncio.to_thread(harm, server)

    return wait_and_harm


class Rounds:
    """Rounds of the same requests, of which the first one is left alone."""

    def __init__(self, server: Server, bodies: Sequence[dict[str, Any]]) -> None:
        self._server, self._bodies = server, bodies
        begun = time.perf_counter()
        self._alone = converse(server.url, bodies)
        self.alone_s = time.perf_counter() - begun
        if errors := [each.error for each in self._alone if each.error]:
            raise AssertionError(f"undisturbed, {len(errors)} requests fail: {errors[0]}")
        self.num_streams = self.num_wrong = 0
        self.pauses_s: list[float] = []

    def play(self, harm: Harm, after_s: float) -> None:
        """Send the requests once more and do harm meanwhile."""
        heard = converse(self._server.url, self._bodies, after(self._server, harm, after_s))
        wrong = [
            number for number, each in enumerate(heard) if not each.equals(self._alone[number])
        ]
        for number in wrong[:3]:
            _show(self._bodies[number], heard[number], self._alone[number])
        self.num_streams += len(heard)
        self.num_wrong += len(wrong)
        self.pauses_s.append(max(each.worst_gap_s for each in heard))
        until_healthy(self._server)

    def __str__(self) -> str:
        return (
            f"{self.num_streams} streams, {self.num_wrong} not as undisturbed; pauses "
            f"{median(self.pauses_s):.1f} s, at most {max(self.pauses_s):.1f}"
        )


def _show(body: dict[str, Any], heard: Heard, alone: Heard) -> None:
    print(f"    {body}\n      disturbed   {heard}\n      undisturbed {alone}", flush=True)


def _start_s(server: Server) -> float:
    """Return the seconds that a shard took to start, its warm-up included."""
    by_name = start_times(server)
    shards = [each for name, each in by_name.items() if name.startswith("shard")]
    loading = max(each["until_s"] - each["from_s"] for each in shards)
    return loading + by_name["router"]["parts"]["warm-up of the shards"]


def _tokens_per_s(server: Server) -> float:
    """Return how many tokens of prompts a second the server computes, many at once."""
    bodies = [
        {
            "model": "base", "max_tokens": 1, "stream": True, "temperature": 0.0,
            "messages": [{"role": "user", "content": f"{number} " + "a b c d e f g h " * 12}],
        }
        for number in range(64)
    ]  # fmt: skip
    begun = time.perf_counter()
    converse(server.url, bodies)
    seconds = time.perf_counter() - begun
    answer = server.post("/v1/chat/completions", bodies[0] | {"stream": False})
    return len(bodies) * answer["usage"]["prompt_tokens"] / seconds


def _most_again(server: Server, bodies: Sequence[dict[str, Any]]) -> int:
    """Return how many tokens are to be computed again at most, if all streams are nearly done."""
    num = 0
    for body in bodies:
        asked = {name: body[name] for name in ("model", "messages")}
        answer = server.post("/v1/chat/completions", asked | {"max_tokens": 1})
        num += body.get("n", 1) * (answer["usage"]["prompt_tokens"] + body["max_tokens"])
    return num


def _point(num_rounds: int, harm: Harm, *options: str, most: int, extra_s: float = 0.0) -> Result:
    """Do harm in each of some rounds; ``extra_s``: what it takes until it is noticed."""
    draw = random.Random(13)
    bodies = requests(NUM_STREAMS, most=most)
    with faulty_server(*options) as server:
        bound_s = _start_s(server) + _most_again(server, bodies) / _tokens_per_s(server)
        rounds = Rounds(server, bodies)
        for number in range(num_rounds):
            rounds.play(harm, draw.uniform(0.0, rounds.alone_s))
            print(f"    round {number}: pause {rounds.pauses_s[-1]:.1f} s", flush=True)
        num_back = len(events(server, "shards_back"))
        code = server.stop()
    worst = (max(rounds.pauses_s) - extra_s) / bound_s
    figure = (
        f"{rounds}, {worst:.2f}x of a start and the tokens again ({bound_s:.1f} s); shards came back "
        f"{num_back} times; exit code {code}"
    )
    ok = not rounds.num_wrong and worst <= MOST_PAUSE and num_back >= num_rounds and code == 0
    return Result(ok, figure)


def point_kills() -> Result:
    """20 rounds, outputs of at most 24 tokens."""
    return _point(20, kill, most=24)


def point_long_kills() -> Result:
    """Longer outputs."""
    return _point(4, kill, most=120)


def point_hangs() -> Result:
    """It takes half a minute to be sure, and a moment to end those that stand still."""
    return _point(3, stop, most=24, extra_s=33.0)


def point_ranks() -> Result:
    """Two ranks, either of which is killed."""
    return _point(5, kill, "--num-shard", "2", most=24)
