"""How long a warm start takes, from the command to the ready line, and what of it takes how long."""

from __future__ import annotations

import time
from statistics import median

from tests.acceptance.harness import Point, Result
from tests.helpers.server import Server

STARTS = 3
MOST_S = 8.0
_TABLE_S = 10.0


def point_warm_start() -> Result:
    """The median of some starts, after one that leaves behind what a first start makes."""
    with Server() as server:
        print(f"    a start before: {server.ready_s:.1f} s", flush=True)
    seconds = []
    for _ in range(STARTS):
        with Server() as server:
            seconds.append(server.ready_s)
            table = _table_of(server)
        print(f"    ready after {server.ready_s:.1f} s", *table, sep="\n      ")
    figure = f"median {median(seconds):.1f} s of {', '.join(f'{each:.1f}' for each in seconds)}"
    return Result(median(seconds) <= MOST_S, f"{figure}; at most {MOST_S:g}")


def _table_of(server: Server) -> list[str]:
    """Return the table of a start: the launcher tells it right behind the router's ready line."""
    deadline = time.monotonic() + _TABLE_S
    while len(table := _table(server.lines)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    return table


def _table(lines: list[str]) -> list[str]:
    """Return the table of a start's parts, as it stands in the log."""
    heads = [n for n, line in enumerate(lines) if line.split()[:2] == ["process", "from"]]
    return [line.strip() for line in lines[heads[0] : heads[0] + 4]] if heads else []


POINTS = [Point("10", "a warm start of the default model takes at most 8 s", point_warm_start)]
