"""The server that is done harm to, and its processes."""

from __future__ import annotations

import json
import re
import time
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from tests.helpers.server import Server

ROOT = Path(__file__).parents[3]
# With these a token's numbers do not depend on who shares its steps: streams are equal bit for bit.
ALONE = ("--linear-backend", "panel", "--attention-backend", "cpp")
ADAPTERS = (
    "--served-model-name", "base", "--adapter-source", "local",
    "--adapter-local-root", str(ROOT / "examples/adapters"),
)  # fmt: skip


def faulty_server(
    *options: str, env: dict[str, str] | None = None, prefix: Sequence[str] = ()
) -> Server:
    """Return a server of the default model with its demo adapters, not started yet."""
    return Server(
        "--device", "cpu", *ADAPTERS, *ALONE, "--json-output", *options, env=env, prefix=prefix
    )


def processes(server: Server, program: str) -> list[psutil.Process]:
    """Return the launcher's children that run ``lorax-shard`` or ``lorax-router``."""
    assert server.process is not None
    children = psutil.Process(server.process.pid).children()
    return [each for each in children if program in " ".join(each.cmdline()[:3])]


def events(server: Server, name: str) -> list[dict[str, Any]]:
    """Return the records in the log of one kind of event."""
    found = []
    for line in list(server.lines):
        if line.startswith("{") and f'"{name}"' in line:
            record = json.loads(line)
            if record.get("event") == name:
                found.append(record)
    return found


def start_times(server: Server) -> dict[str, dict[str, Any]]:
    """Return how long each process took to start, by its name; the line is the last of a start."""
    for _ in range(100):
        if told := events(server, "start_times"):
            return {each["process"]: each for each in told[0]["start"]["processes"]}
        time.sleep(0.05)
    raise AssertionError("the server did not tell how long its start took")


def until_healthy(server: Server, timeout_s: float = 180.0) -> float:
    """Wait until the server says that it is healthy; return the seconds that took."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < timeout_s:
        try:
            server.get("/health", timeout_s=2.0)
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
        else:
            return time.perf_counter() - begun
    raise AssertionError(f"the server is not healthy after {timeout_s:g} s")


def metric(server: Server, name: str, label: str = "") -> float:
    """Return a metric, of all its labels together, or of one as the text has it; 0: there is none."""
    lines = re.findall(rf"^{name}({{[^}}]*}})? ([0-9.e+-]+)$", server.get("/metrics"), re.MULTILINE)
    return sum(float(value) for labels, value in lines if label in labels)
