"""One long prompt among streams: how long these wait for their tokens, and it for its first one.

The streams' time between tokens without the prompt, with it, and the prompt's first token alone are
measured on one server, one after the other, in several rounds.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
import urllib.request
from collections.abc import Iterator
from statistics import median

import numpy as np
from tests.acceptance.harness import Point, Result
from tests.helpers.server import Server

NUM_STREAMS, NUM_LONG = 8, 4000
ROUNDS = 3
# Tokens of each stream before the prompt comes and behind it, and the most that it may have altogether.
CALM, MOST = 80, 3000
BETWEEN, FIRST_TOKEN = 2.0, 2.5
_IDS = range(1000, 40_000)


def _prompt(num: int) -> list[int]:
    """Return token ids that no prompt had before."""
    return random.choices(_IDS, k=num)


def _token_times(url: str, prompt: list[int], num_tokens: int) -> Iterator[float]:
    """Yield when each token of an answer came; closing it cancels the request."""
    body = {"model": "base", "prompt": prompt, "max_tokens": num_tokens, "stream": True}
    body |= {"temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if line.startswith(b"data: {"):
                yield time.perf_counter()


def first_token_s(url: str, num_prompt: int) -> float:
    """Return how long the first token of a prompt takes."""
    begun = time.perf_counter()
    times = _token_times(url, _prompt(num_prompt), 2)
    first = next(times)
    list(times)
    return first - begun


class Streams:
    """Answers that are read side by side until they are told to stop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._times: list[list[float]] = [[] for _ in range(NUM_STREAMS)]
        self._threads = [
            threading.Thread(target=self._read, args=(times,), daemon=True) for times in self._times
        ]

    def _read(self, times: list[float]) -> None:
        for each in _token_times(self._url, _prompt(32), MOST):
            with self._changed:
                times.append(each)
                self._changed.notify_all()
            if self._stop.is_set():
                return

    def start(self) -> None:
        """Ask."""
        for thread in self._threads:
            thread.start()

    def wait_for(self, num_tokens: int) -> None:
        """Return when each has so many tokens more than it had."""
        with self._changed:
            goals = [len(times) + num_tokens for times in self._times]
            if not self._changed.wait_for(lambda: self._have(goals), timeout=600):
                raise RuntimeError("streams stand still")

    def _have(self, goals: list[int]) -> bool:
        return all(len(times) >= goal for times, goal in zip(self._times, goals, strict=True))

    def gaps_ms(self, since: float, until: float) -> list[float]:
        """Return the times between tokens that came within a time."""
        with self._changed:
            return [
                1e3 * (later - earlier)
                for times in self._times
                for earlier, later in itertools.pairwise(times)
                if since <= earlier and later <= until
            ]

    def stop(self) -> None:
        """Cancel all."""
        self._stop.set()
        for thread in self._threads:
            thread.join()


def measure_round(url: str) -> tuple[float, float]:
    """Return both ratios of one round, and print what they are made of."""
    alone_s = first_token_s(url, NUM_LONG)
    streams = Streams(url)
    streams.start()
    streams.wait_for(10)
    begun = time.perf_counter()
    streams.wait_for(CALM)
    asked = time.perf_counter()
    beside_s = first_token_s(url, NUM_LONG)
    done = asked + beside_s
    # Contexts grow meanwhile: without the prompt is before it and behind it.
    streams.wait_for(CALM)
    ended = time.perf_counter()
    streams.stop()
    before = streams.gaps_ms(begun, asked) + streams.gaps_ms(done, ended)
    during = streams.gaps_ms(asked, done)
    p99 = [float(np.quantile(gaps, 0.99)) for gaps in (before, during)]
    print(
        f"    between tokens p50 {median(before):.1f} -> {median(during):.1f}, p99 {p99[0]:.1f} -> "
        f"{p99[1]:.1f}, largest {max(before):.1f} -> {max(during):.1f} ms ({len(during)} of them); "
        f"first token {alone_s:.2f} -> {beside_s:.2f} s",
        flush=True,
    )
    return p99[1] / p99[0], beside_s / alone_s


def point_interactive() -> Result:
    """Medians of the rounds are within both bounds."""
    with Server("--prefix-caching", "false", "--served-model-name", "base") as server:
        # What steps cost is learned as they run, and the first ones are slow.
        first_token_s(server.url, NUM_LONG)
        rounds = [measure_round(server.url) for _ in range(ROUNDS)]
    between, first = ([each[index] for each in rounds] for index in (0, 1))
    ok = median(between) <= BETWEEN and median(first) <= FIRST_TOKEN
    return Result(
        ok,
        f"p99 between tokens x{median(between):.2f} ({_spread(between)}) of at most {BETWEEN:g}; the "
        f"prompt's first token x{median(first):.2f} ({_spread(first)}) of at most {FIRST_TOKEN:g}",
    )


def _spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


POINTS = [Point("5", "a long prompt of 4,000 tokens among 8 streams", point_interactive)]
