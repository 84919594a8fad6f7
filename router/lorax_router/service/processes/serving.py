"""The limited process' side: bound itself, answer one question after another, end.

It holds no model and no socket, gets no token and no key, and ends with the router:
when its input ends, and by the kernel if it computes at that moment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from lorax_contract import confine
from lorax_router.service.processes import frames

Answer = Callable[[dict[str, Any], list[bytes]], dict[str, Any]]

# By which its own end comes after the one that the router gives it.
_SPARE_S = 2.0
_OPEN_FILES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a limited process may use."""

    # On top of what it has mapped before the first question.
    memory_bytes: int
    # For one answer.
    deadline_s: float
    # How much it gives way to others from the beginning.
    nice: int = 0


def serve(answer: Answer, bounds: Bounds) -> None:
    """Answer questions until standard input ends.

    A question that there is no memory for is answered ``memory``, and is the last.
    """
    out = os.fdopen(os.dup(1), "wb")
    confine.end_with_parent()
    confine.leave_no_core()
    confine.be_first_to_go()
    confine.limit_files(_OPEN_FILES, 0)
    confine.limit_memory(bounds.memory_bytes)
    confine.compute_less(bounds.nice)
    _print_nowhere()
    _say(out, {"ready": os.getpid()})
    while (question := _question(out)) is not None:
        confine.limit_cpu(int(bounds.deadline_s + _SPARE_S) + 1)
        confine.limit_time(bounds.deadline_s + _SPARE_S)
        said = answer(*question)
        confine.limit_time(0)
        _say(out, said)


def _question(out: BinaryIO) -> tuple[dict[str, Any], list[bytes]] | None:
    """Wait for a question; None at the end."""
    try:
        return frames.read(sys.stdin.buffer)
    except MemoryError:
        # Where the next one begins is not known.
        _say(out, {"memory": ""})
        return None


def _print_nowhere() -> None:
    """Nobody reads what libraries print, which could fill a pipe or get between the answers."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _say(out: BinaryIO, document: dict[str, Any]) -> None:
    out.writelines(frames.pack(document))
    out.flush()
