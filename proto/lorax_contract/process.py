"""What a child process does to be ready, tells its launcher then, and notices that it is gone."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# How libraries put it, in lower case: C++, libc and the dynamic loader, torch.
_NO_MEMORY = (
    "bad_alloc", "cannot allocate memory", "can't allocate memory", "out of memory",
    "failed to map segment", "memory allocation still failed",
)  # fmt: skip


def announce_ready(ready_fd: int | None, facts: dict[str, Any]) -> None:
    """Write one JSON line with ``facts`` to ``ready_fd`` and close it; None does nothing."""
    if ready_fd is None:
        return
    with os.fdopen(ready_fd, "w") as pipe:
        pipe.write(json.dumps(facts) + "\n")


@contextmanager
def importing() -> Iterator[None]:
    """Within, a process imports what it is made of, and nobody looks for garbage.

    There is none: modules stay. The collector would visit all that is there every time that much
    more has come, which takes a fifth of the time of importing torch and transformers.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def spare_garbage_collector() -> None:
    """Take all that the start made out of the garbage collector's sight.

    Modules and schemas stay for good, and to visit them costs 50 ms and more: everyone waits
    for that whenever something large sets a full collection off.
    """
    gc.collect()
    gc.freeze()


def watch_lifeline(on_gone: Callable[[], None]) -> None:
    """Call ``on_gone`` from a daemon thread once standard input reaches its end.

    The launcher holds the other end of the pipe and never writes after the
    configuration; the kernel closes it however the launcher ends.
    """

    def wait() -> None:
        stream = sys.stdin.buffer.raw if hasattr(sys.stdin.buffer, "raw") else sys.stdin.buffer
        while stream.read(4096):
            pass
        on_gone()

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def says_out_of_memory(words: str) -> bool:
    """Whether an error's text, of Python or of a library below it, means too little memory."""
    return any(sign in words.lower() for sign in _NO_MEMORY)


def end_process_group() -> None:
    """End this process and all that it started; only for a process that leads its own group.

    A process that shares its group with others, as one started by hand, ends alone.
    """
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGTERM)
    else:
        os.kill(os.getpid(), signal.SIGTERM)
