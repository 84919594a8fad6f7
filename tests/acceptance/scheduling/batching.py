"""How prompts and decodes share steps: time to the first token against time between tokens."""

from __future__ import annotations

import itertools
import json
import threading
import time
import urllib.request
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import mean, median
from typing import Any

import numpy as np
from tests.acceptance.harness import Point, Result
from tests.helpers.server import Server

from lorax_router.simulator.driver import Simulation
from lorax_router.simulator.report import figures
from lorax_router.simulator.server import PRESETS
from lorax_router.simulator.workloads.catalog import make_workload

H200 = replace(PRESETS["llama-3.1-8b-h200"], max_step_tokens=2048)
# Prompts of 2,150 tokens and outputs of 143 in the mean: half of what the server can take.
WORKLOAD = "slora:s1,n=20,rate=8,duration=60,prompt=256-4096,output=32-256"
TARGET_MS = 25.0


@dataclass(slots=True)
class Waits:
    """What clients saw, in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens_per_s: float = 0.0

    def show(self, name: str) -> None:
        """Print a line of the table."""
        first, between = np.array(self.first) * 1e3, np.array(self.between) * 1e3
        print(
            f"    {name:<14} {self.tokens_per_s:>8,.0f} tokens/s; first token mean {first.mean():,.0f}, "
            f"p99 {np.quantile(first, 0.99):,.0f} ms; between tokens p50 {np.median(between):.1f}, "
            f"mean {between.mean():.1f}, p99 {np.quantile(between, 0.99):.1f}, largest {between.max():,.0f} ms",
            flush=True,
        )  # fmt: skip


@cache
def simulated(batching: str, target_itl_ms: float | None = None) -> Waits:
    """Return what clients see over the virtual clock, in order of arrival."""
    trace = make_workload(WORKLOAD)
    server = replace(H200, batching=batching, target_itl_ms=target_itl_ms)  # type: ignore[arg-type]
    run = Simulation(trace, server, "fcfs").run()
    waits = Waits(
        list(run.first_token_at - trace.times), list(run.token_gaps), figures(run)["tokens_per_s"]
    )
    waits.show(f"{batching}{f', {target_itl_ms:.0f} ms' if target_itl_ms else ''}")
    return waits


def point_simulated() -> Result:
    """Prompts first has the first token soonest, decodes first the next one; a target is met."""
    mixed, prefill, decode = (simulated(each) for each in ("mixed", "prefill", "decode"))
    paced = simulated("mixed", TARGET_MS)
    at_most = TARGET_MS / 1e3
    ok = {
        "first token": mean(prefill.first) <= mean(mixed.first) < mean(decode.first),
        "next token": mean(decode.between) < mean(mixed.between) < mean(prefill.between),
        "longest wait": max(prefill.between) > 4 * max(mixed.between),
        "target": float(np.quantile(paced.between, 0.99)) <= 1.02 * at_most,
        "what a target costs": paced.tokens_per_s >= 0.97 * mixed.tokens_per_s,
        "mixed loses nothing": mixed.tokens_per_s >= 0.99 * prefill.tokens_per_s,
    }
    return _judged(ok, mixed=mixed, prefill=prefill, decode=decode, target=paced)


def _judged(ok: dict[str, bool], **seen: Waits) -> Result:
    figure = "; ".join(
        f"{name} {mean(each.first) * 1e3:,.0f} / {float(np.quantile(each.between, 0.99)) * 1e3:.0f} ms"
        for name, each in seen.items()
    )
    short = [name for name, held in ok.items() if not held]
    return Result(
        not short,
        f"mean first token / p99 between: {figure}" + f"; short: {', '.join(short)}" * bool(short),
    )


# --- the server ---------------------------------------------------------------------------

NUM_STREAMS, NUM_TOKENS = 4, 48
NUM_PROMPTS, PAUSE_S = 8, 0.4
STEP_TOKENS = 128
SERVER_TARGET_MS = 200.0


def served(batching: str, *options: str) -> Waits:
    """Return what clients of the embedded model see: streams, beside which prompts come."""
    with Server(
        "--batching", batching, "--max-batch-prefill-tokens", str(STEP_TOKENS), "--prefix-caching", "false",
        "--max-batch-size", "16", *options,
    ) as server:  # fmt: skip
        # The first requests pay for what is compiled, and show what steps cost.
        _stream(server.url, "Tell me of the sea. " * 60, 24, Waits(), None)
        waits, started = Waits(), threading.Barrier(NUM_STREAMS + 1)
        threads = [
            threading.Thread(
                target=_stream,
                args=(server.url, f"Stream {i}: the sea", NUM_TOKENS, waits, started),
            )
            for i in range(NUM_STREAMS)
        ]
        for thread in threads:
            thread.start()
        # All streams have their first token.
        started.wait(timeout=120)
        begun = time.perf_counter()
        askers = []
        for number in range(NUM_PROMPTS):
            text = f"Letter {number}. " + "Of ships and shoes and sealing wax. " * 28
            askers.append(threading.Thread(target=_first_token, args=(server.url, text, waits)))
            askers[-1].start()
            time.sleep(PAUSE_S)
        for thread in (*threads, *askers):
            thread.join()
        waits.tokens_per_s = len(waits.between) / (time.perf_counter() - begun)
    if len(waits.first) != NUM_PROMPTS:
        raise RuntimeError(f"only {len(waits.first)} of {NUM_PROMPTS} prompts were answered")
    waits.show(f"{batching} {' '.join(options)}".strip())
    return waits


def _events(url: str, text: str, num_tokens: int) -> Any:
    """Yield the time of each token of a stream."""
    parameters = {"max_new_tokens": num_tokens, "ignore_eos_token": True}
    body = json.dumps({"inputs": text, "parameters": parameters}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + "/generate_stream", body, headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            if line.startswith(b"data:") and "token" in json.loads(line[5:]):
                yield time.perf_counter()


def _stream(
    url: str, text: str, num_tokens: int, waits: Waits, started: threading.Barrier | None
) -> None:
    times = []
    for each in _events(url, text, num_tokens):
        times.append(each)
        if len(times) == 1 and started is not None:
            started.wait(timeout=120)
    waits.between += [later - earlier for earlier, later in itertools.pairwise(times)]


def _first_token(url: str, text: str, waits: Waits) -> None:
    begun = time.perf_counter()
    waits.first += [each - begun for each in _events(url, text, 2)][:1]


def point_served() -> Result:
    """The same on the server, beside each other on one machine."""
    mixed, prefill, decode = (served(each) for each in ("mixed", "prefill", "decode"))
    paced = served("mixed", "--target-itl-ms", str(SERVER_TARGET_MS))
    ok = {
        "first token": mean(prefill.first) < 1.1 * mean(mixed.first) < mean(decode.first),
        "next token": median(decode.between) < median(mixed.between),
        "longest wait": max(prefill.between) > 1.5 * max(mixed.between),
        "target": float(np.quantile(paced.between, 0.9)) < float(np.quantile(mixed.between, 0.9)),
    }
    return _judged(ok, mixed=mixed, prefill=prefill, decode=decode, target=paced)


POINTS = [
    Point(
        "7s", "batching: first tokens against the time between tokens, simulated", point_simulated
    ),
    Point("7", "batching: the same on the server", point_served),
]
