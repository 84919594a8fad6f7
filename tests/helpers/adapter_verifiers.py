"""Verification functions that the fetcher's child process loads in tests, by dotted path."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.helpers.adapter_folders import CONFIG


def verify(folder: Path, target: Path, context: Mapping[str, Any]) -> Mapping[str, Any]:
    """Do what the adapter's configuration says under ``test``; return its rank and id.

    That it began can be seen at ``begun_file``.
    """
    config = json.loads((folder / CONFIG).read_text())
    begun_file(context["gate"], config.get("seed", 0)).touch()
    _ACTIONS[config.get("test", "pass")](context)
    return {
        "rank": config["r"],
        "told": dict(context),
        "pid": os.getpid(),
        "parent": os.getppid(),
        "tokens_around": [
            value for value in (*sys.argv, *os.environ.values()) if "hf_" in value.lower()
        ],
        "nice": os.nice(0),
        "warnings": config.get("warnings", []),
    }


def begun_file(gate: str | Path, seed: int) -> Path:
    """Return the file that appears when the adapter of a seed is verified."""
    return Path(f"{gate} {seed}")


def _refuse(_context: Mapping[str, Any]) -> None:
    raise ValueError("use_magic is not served")


def _fail(_context: Mapping[str, Any]) -> None:
    raise RuntimeError("hf_secret in a bug's text")


def _crash(_context: Mapping[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _leave(_context: Mapping[str, Any]) -> None:
    os._exit(7)


def _hang(_context: Mapping[str, Any]) -> None:
    # As a loop in native code: Python's own signal handlers never run.
    ctypes.CDLL(None).sleep(600)


def _hold(context: Mapping[str, Any]) -> None:
    while not Path(context["gate"]).exists():
        time.sleep(0.01)


def _devour_memory(_context: Mapping[str, Any]) -> None:
    held = []
    while True:
        held.append(bytearray(64 << 20))


def _devour_cpu(_context: Mapping[str, Any]) -> None:
    while True:
        pass


def _fill_disk(context: Mapping[str, Any]) -> None:
    with Path(context["gate"]).open("wb") as file:
        while True:
            file.write(bytes(1 << 20))


def _chatter(_context: Mapping[str, Any]) -> None:
    print("this must not get between the answers")
    os.write(1, b'{"job": 1, "outcome": {}}\n')


def _kill_keeper(context: Mapping[str, Any]) -> None:
    if not Path(context["gate"]).exists():
        Path(context["gate"]).touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)


_ACTIONS = {
    "pass": lambda _context: None,
    "refuse": _refuse,
    "fail": _fail,
    "crash": _crash,
    "leave": _leave,
    "hang": _hang,
    "hold": _hold,
    "memory": _devour_memory,
    "cpu": _devour_cpu,
    "disk": _fill_disk,
    "chatter": _chatter,
    "kill keeper": _kill_keeper,
}
