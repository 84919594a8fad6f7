"""A limited process that does what tests tell it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from lorax_router.service.processes.limited_process import LimitedProcess
from lorax_router.service.processes.nursery import Nursery
from lorax_router.service.processes.serving import Bounds, nurse

MODULE = "tests.helpers.limited_process"


BOUNDS = Bounds(memory_bytes=64 << 20, deadline_s=60.0)


@asynccontextmanager
async def nursery() -> AsyncIterator[Nursery]:
    """What starts them."""
    made = Nursery(MODULE)
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def limited(deadline_s: float = 60.0) -> AsyncIterator[LimitedProcess]:
    """One that is ready."""
    async with nursery() as made:
        process = await made.start(replace(BOUNDS, deadline_s=deadline_s))
        yield process
        await process.end()


def _open_files() -> list[int]:
    # But for the one that lists them.
    listed = [int(name) for name in os.listdir("/proc/self/fd")]
    return [fd for fd in sorted(listed) if os.path.exists(f"/proc/self/fd/{fd}")]


def play(question: dict[str, Any], blobs: list[bytes]) -> dict[str, Any]:
    """What the process of these tests answers."""
    match question:
        case {"echo": value}:
            return {"value": value, "blobs_seen": [len(blob) for blob in blobs]}
        case {"environment": _}:
            return {"value": sorted(os.environ)}
        case {"files": _}:
            return {"value": [os.readlink(f"/proc/self/fd/{fd}") for fd in _open_files()]}
        case {"print": number}:
            print("x" * number)
            print("x" * number, file=sys.stderr)
            return {}
        case {"sleep": seconds}:
            time.sleep(seconds)
        case {"leave": code}:
            os._exit(code)
        case {"power": number}:
            # One operation of the interpreter: no signal handler would run within it.
            return {"value": 9 ** (9**number)}
    return {}


if __name__ == "__main__":
    nurse(play)
