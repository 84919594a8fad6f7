"""What the processes of a server hold over the time, and what is left when nobody asks any more."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import psutil
from tests.acceptance.faults.server import processes
from tests.helpers.server import Server
from tests.soak.requests import ADMIN_KEY

MIB = 1 << 20
_EVERY_S = 2.0
PROGRAMS = ("lorax-router", "lorax-shard")
_ADAPTERS = "/v1/adapters?limit=500"
# What a server says that waits for its shards, and seconds for which it may.
_NOT_NOW = (424, 503)
_RESTARTED_S = 60.0


@dataclass(slots=True)
class Series:
    """Samples of one program's memory and open files."""

    seconds: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def slope(self) -> float:
        """Return MiB a minute, by least squares over the samples; 0 of fewer than three."""
        num = len(self.seconds)
        if num < 3:
            return 0.0
        mean_s, mean = sum(self.seconds) / num, sum(self.mib) / num
        up = sum((s - mean_s) * (m - mean) for s, m in zip(self.seconds, self.mib, strict=True))
        return 60 * up / sum((s - mean_s) ** 2 for s in self.seconds)


def sampled(server: Server, program: str) -> tuple[float, int]:
    """Return resident MiB and open files of a program, of all its processes together."""
    mib, files = 0.0, 0
    for each in processes(server, program):
        try:
            mib += each.memory_info().rss / MIB
            files += each.num_fds()
        except psutil.NoSuchProcess:
            continue
    return mib, files


async def watch(server: Server, seconds: float) -> dict[str, Series]:
    """Sample for so long."""
    found = {program: Series() for program in PROGRAMS}
    begun = time.perf_counter()
    while (now := time.perf_counter() - begun) < seconds:
        for program, series in found.items():
            mib, files = sampled(server, program)
            series.seconds.append(now)
            series.mib.append(mib)
            series.files.append(files)
        await asyncio.sleep(_EVERY_S)
    return found


def _get(server: Server, path: str) -> str:
    request = urllib.request.Request(
        f"{server.url}{path}", headers={"authorization": f"Bearer {ADMIN_KEY}"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(response.read().decode())


def metrics(server: Server) -> dict[str, float]:
    """Return all metrics by name, those of all labels together."""
    found: dict[str, float] = {}
    for name, value in re.findall(
        r"^([a-z_:]+)(?:\{[^}]*\})? (\S+)$", _get(server, "/metrics"), re.MULTILINE
    ):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def left_behind(server: Server) -> list[str]:
    """Return what should not be there when nobody asks any more, in words."""
    now = metrics(server)
    faults = [
        f"{name} is {now[name]:g}"
        for name in ("lorax_requests_running", "lorax_requests_waiting", "lorax_queue_length")
        if now[name]
    ]
    if now["lorax_kv_blocks_free"] != now["lorax_kv_blocks"]:
        faults.append(f"{now['lorax_kv_blocks'] - now['lorax_kv_blocks_free']:g} blocks are held")
    ended = now["lorax_request_success"] + now.get("lorax_request_failure", 0.0)
    if now["lorax_request_count"] != ended:
        faults.append(f"{now['lorax_request_count']:g} requests came, {ended:g} ended")
    return faults + [
        f"adapter {each['adapter_id']} is still used"
        for each in _adapters(server)
        if each["running"] or each["waiting"]
    ]


def _adapters(server: Server) -> list[dict[str, Any]]:
    """Return the list of adapters; while other shards take the place of some, there is none."""
    until = time.monotonic() + _RESTARTED_S
    while True:
        try:
            listed: list[dict[str, Any]] = json.loads(_get(server, _ADAPTERS))["adapters"]
            return listed
        except urllib.error.HTTPError as error:
            if error.code not in _NOT_NOW or time.monotonic() > until:
                raise
        time.sleep(0.5)
