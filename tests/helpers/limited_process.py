"""A limited process that does what tests tell it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from lorax_router.service.processes.limited_process import LimitedProcess
from lorax_router.service.processes.serving import Bounds, serve

MODULE = "tests.helpers.limited_process"


async def start(deadline_s: float = 60.0) -> LimitedProcess:
    """Start one."""
    bounds = Bounds(memory_bytes=64 << 20, deadline_s=deadline_s)
    return await LimitedProcess.start(MODULE, json.dumps(asdict(bounds)))


def play(question: dict[str, Any], blobs: list[bytes]) -> dict[str, Any]:
    """What the process of these tests answers."""
    match question:
        case {"echo": value}:
            return {"value": value, "blobs_seen": [len(blob) for blob in blobs]}
        case {"environment": _}:
            return {"value": sorted(os.environ)}
        case {"files": _}:
            return {"value": [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]}
        case {"print": number}:
            print("x" * number)
            print("x" * number, file=sys.stderr)
            return {}
        case {"leave": code}:
            os._exit(code)
        case {"power": number}:
            # One operation of the interpreter: no signal handler would run within it.
            return {"value": 9 ** (9**number)}
    return {}


if __name__ == "__main__":
    serve(play, Bounds(**json.loads(sys.argv[1])))
