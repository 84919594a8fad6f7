"""The attack suite, and attackers on a running server beside whom others are served."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx
from tests.acceptance.faults.bombs import Assault, assaults, write_bombs
from tests.acceptance.faults.honest import streaming
from tests.acceptance.faults.server import faulty_server
from tests.acceptance.harness import Result
from tests.acceptance.memory import MemoryWatch
from tests.acceptance.named_tests import rows_of
from tests.acceptance.tables import run_table
from tests.helpers.default_model import default_model_dir
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.server import Server

# Others' 95th percentile of the time between tokens, beside attacks and without.
MOST_RATIO = 2.0
LEAST_INTERVALS = 300
# What router, renderers and fetchers may take beyond what they have when idle: each attacker can
# have a fetch of its own, a process with torch in it.
MOST_GROWN_MIB = 2048
NUM_STREAMS = 4
NUM_ATTACKERS = 4
# Together about a minute of attacks, and as long without.
NUM_TURNS = 15
TURN_S = 4.0
_WARM_S, _SETTLED_S = 5.0, 1.0
# Refusals come at once: who asks again at once would be a load test of its own.
_PAUSE_S = 0.2
_ATTACKER, _OTHERS = "sk-of-the-attacker", "sk-of-the-others"
_GUESSER, _GUESSED = "sk-of-the-guesser", ("pirate", "no-such-adapter")
_KEYS = {
    "attacker": {"keys": [_ATTACKER]},
    "others": {"keys": [_OTHERS]},
    "guesser": {"keys": [_GUESSER], "adapters": ["guesses-*"]},
}


def point_suite() -> Result:
    """Run every test that the table of ``docs/security.md`` names."""
    table = rows_of("security.md", "Attacks")
    run = run_table(table)
    missing = [attack for attack in table if attack not in run.shown]
    counts = run.suite.counts
    figure = (
        f"{len(table) - len(missing)} of {len(table)} attacks shown to be refused; {counts['passed']} "
        f"tests passed, {counts['skipped']} skipped, {counts['failed']} failed"
    )
    return Result(not missing and run.suite.is_clean, figure + f"; not: {missing}" * bool(missing))


@dataclass(slots=True)
class Refusals:
    """What attackers were answered."""

    # By kind: how many answers, and what was wrong with some.
    counts: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def take(self, assault: Assault, status: int, text: str) -> None:
        """Judge one answer."""
        self.counts[assault.title] = self.counts.get(assault.title, 0) + 1
        is_right = status in assault.statuses and re.search(assault.words, text)
        if not is_right and len(self.wrong) < 100:
            self.wrong.append(f"{assault.title}: {status} {text[:240]}")


class Assailants:
    """Several clients that send one attack after another until they are told that it is enough."""

    def __init__(self, url: str, kinds: list[Assault], refusals: Refusals, first: int) -> None:
        self._url, self._kinds, self._refusals = url, kinds, refusals
        # The n-th attack of all: which kind, and which of its kind.
        self.next = first
        self._enough = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()))

    async def _work(self) -> None:
        headers = {"Authorization": f"Bearer {_ATTACKER}"}
        async with httpx.AsyncClient(base_url=self._url, headers=headers, timeout=60) as http:
            await asyncio.gather(*(self._attack(http) for _ in range(NUM_ATTACKERS)))

    async def _attack(self, http: httpx.AsyncClient) -> None:
        while not self._enough.is_set():
            number, which = divmod(self.next, len(self._kinds))
            self.next += 1
            assault = self._kinds[which]
            answer = await http.post(assault.path, json=assault.body(number))
            self._refusals.take(assault, answer.status_code, answer.text)
            await asyncio.sleep(_PAUSE_S)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()


def _guess(server: Server) -> bool:
    """Whether another's adapter and one that is nobody's are answered alike, in the same words."""
    texts = []
    for name in _GUESSED:
        parameters = {"adapter_id": name, "adapter_source": "local", "max_new_tokens": 2}
        answer = httpx.post(
            server.url + "/generate", json={"inputs": "Hello", "parameters": parameters},
            headers={"Authorization": f"Bearer {_GUESSER}"}, timeout=60,
        )  # fmt: skip
        texts.append(f"{answer.status_code} {answer.text.replace(name, '')}")
    return texts[0] == texts[1] and texts[0].startswith("422")


@contextmanager
def _stage() -> Iterator[tuple[Server, list[Assault], socket.socket, Path]]:
    """A server, what is sent to it, a port that it may not call, a file that it may not make."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as port:
        root, mark = Path(folder, "adapters"), Path(folder, "mark")
        write_bombs(default_model_dir(), root, mark)
        write_formula_adapter(default_model_dir(), Path(folder, "outside"), rank=1, seed=6)
        keys = Path(folder, "keys.json")
        keys.write_text(json.dumps({"tenants": _KEYS}))
        options = ("--adapter-local-root", str(root), "--api-keys-file", str(keys))
        store = ("--adapter-store-dir", str(Path(folder, "store")))
        with faulty_server(*options, *store) as server:
            yield server, assaults(root, port.getsockname()[1]), port, mark


@dataclass(slots=True)
class _Windows:
    """From when to when nobody attacked, and from when to when somebody did."""

    quiet: list[tuple[float, float]] = field(default_factory=list)
    attacked: list[tuple[float, float]] = field(default_factory=list)


def _take_turns(server: Server, kinds: list[Assault], refusals: Refusals) -> _Windows:
    """Attack and leave alone by turns, a few seconds each: what else the machine does meets both."""
    windows, first = _Windows(), 0
    for _ in range(NUM_TURNS):
        begun = time.perf_counter()
        time.sleep(TURN_S)
        windows.quiet.append((begun, time.perf_counter()))
        with Assailants(server.url, kinds, refusals, first) as attackers:
            begun = time.perf_counter()
            time.sleep(TURN_S)
            windows.attacked.append((begun, time.perf_counter()))
        first = attackers.next
        # What the last ones left behind is not the next turn's.
        time.sleep(_SETTLED_S)
    return windows


def point_beside() -> Result:
    """A minute of attacks in turns, each after as long without; four streams all the while."""
    refusals = Refusals()
    with _stage() as (server, kinds, port, mark):
        with (
            MemoryWatch(server) as memory,
            streaming(server.url, _OTHERS, NUM_STREAMS) as streams,
        ):
            time.sleep(_WARM_S)
            windows = _take_turns(server, kinds, refusals)
        is_hidden = _guess(server)
        port.settimeout(0.0)
        was_called = _was_called(port)
        code = server.stop()
    for each in refusals.wrong[:12]:
        print(f"    not right: {each}", flush=True)
    quiet, attacked = streams.intervals(windows.quiet), streams.intervals(windows.attacked)
    ratio = _p95(attacked) / _p95(quiet)
    missed = [each.title for each in kinds if each.title not in refusals.counts]
    enough = min(len(quiet), len(attacked)) >= LEAST_INTERVALS
    ok = (
        ratio < MOST_RATIO and enough and is_hidden and not mark.exists() and code == 0
        and not (refusals.wrong or missed or streams.failures or was_called)
        and memory.grown <= MOST_GROWN_MIB
    )  # fmt: skip
    figure = (
        f"{_figures(quiet)} -> {_figures(attacked)}, {ratio:.2f}x; "
        f"{sum(refusals.counts.values())} attacks of {len(refusals.counts)} kinds, "
        f"{len(refusals.wrong)} not refused as they should, {len(missed)} kinds not sent; calls "
        f"elsewhere: {was_called}; guesses tell nothing: {is_hidden}; +{memory.grown} MiB; failures: "
        f"{'; '.join(streams.failures[:3]) or 'none'}; exit code {code}"
    )
    return Result(ok, figure)


def _p95(intervals: list[float]) -> float:
    return statistics.quantiles(intervals, n=20)[-1]


def _figures(intervals: list[float]) -> str:
    median = statistics.median(intervals) * 1e3
    return f"p95 {_p95(intervals) * 1e3:.0f} ms (median {median:.0f}, {len(intervals)} intervals)"


def _was_called(port: socket.socket) -> bool:
    try:
        port.accept()
    except BlockingIOError:
        return False
    return True
