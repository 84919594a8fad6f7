"""How a group of ranks ends when one of them is lost: what is done to it, and what is said."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import httpx
import psutil
from tests.helpers.server import Server


def lose_under_load(
    server: Server, victim: psutil.Process, how: signal.Signals, body: dict[str, Any]
) -> str:
    """Send a rank a signal in the middle of a stream; return the stream's last event.

    "" where the connection ended before an event of its own said that the stream is over.
    """
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=100) as stream:
        lines = stream.iter_lines()
        next(lines)
        victim.send_signal(how)
        try:
            return [line for line in lines if line][-1]
        except httpx.TransportError:
            return ""


def line_with(server: Server, *words: str) -> str:
    """Return the line of the launcher's output that has these words, once it is there."""
    deadline = time.monotonic() + 20
    while True:
        for line in list(server.lines):
            if all(word in line for word in words):
                return line
        if time.monotonic() > deadline:
            raise AssertionError(f"no line with {words}: {server.lines[-15:]}")
        # The output is read by a thread of the server's.
        threading.Event().wait(0.05)
