"""The limited processes' side: a nursery forks them; each bounds itself, answers, ends.

One holds no model and no socket, gets no token and no key, and ends with the router:
when its input ends, and by the kernel if it computes at that moment.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from lorax_contract import confine
from lorax_contract.process import spare_garbage_collector
from lorax_router.service.processes import frames

Answer = Callable[[dict[str, Any], list[bytes]], dict[str, Any]]

# By which its own end comes after the one that the router gives it.
_SPARE_S = 2.0
# By the clock, whatever it has computed: on cores that are full, who gives way gets little of them.
PATIENCE_S = 60.0
_OPEN_FILES = 32
_READ_BYTES = 1 << 16
# Of orders that are read at once; the system passes on no more than 253.
_MAX_FILES = 64
# What a nursery says first: the word and the number of a process that there is not.
READY = ("forked", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a limited process may use."""

    # On top of what it has mapped before the first question.
    memory_bytes: int
    # Of computing, for one answer.
    deadline_s: float
    # How much it gives way to others from the beginning.
    nice: int = 0


def nurse(answer: Answer) -> NoReturn:
    """Fork a process for each that is asked for, until the router leaves.

    Standard input is a socket; orders are JSON objects, one a line:

        -> {"word": "forked", "number": 0}                    once: all is loaded
        <- {"fork": 1, "bounds": {...}}                       with two pipes: questions, answers
        -> {"word": "forked", "number": 1}
        <- {"end": 1}
        -> {"word": "ended", "number": 1, "code": -9}

    Single-threaded: it forks.
    """
    _be_expendable()
    spare_garbage_collector()
    nursery = _Nursery(answer, socket.socket(fileno=0))
    while nursery.turn():
        pass
    os._exit(0)


class _Nursery:
    """What has been started and has not been asked to end."""

    def __init__(self, answer: Answer, control: socket.socket) -> None:
        self._answer = answer
        self._control = control
        self._pids: dict[int, int] = {}
        self._input = b""
        self._files: list[int] = []
        _print_nowhere()
        self._say(*READY)

    def turn(self) -> bool:
        """Do what it is told next; False at the end."""
        data, files, _, _ = socket.recv_fds(self._control, _READ_BYTES, _MAX_FILES)
        # They come with the first byte of their order, or before.
        self._files += files
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            match json.loads(line):
                case {"fork": number, "bounds": bounds}:
                    self._fork(number, Bounds(**bounds))
                case {"end": number}:
                    self._end(number)
        return bool(data)

    def _fork(self, number: int, bounds: Bounds) -> None:
        questions, answers, *self._files = self._files
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            _be_limited(self._answer, bounds, questions, answers, parent)
        os.close(questions)
        os.close(answers)
        self._pids[number] = pid
        self._say("forked", number)

    def _end(self, number: int) -> None:
        pid = self._pids.pop(number)
        os.kill(pid, signal.SIGKILL)
        # One that had ended keeps the code that it ended with.
        _, status = os.waitpid(pid, 0)
        self._say("ended", number, code=os.waitstatus_to_exitcode(status))

    def _say(self, word: str, number: int, **more: int) -> None:
        said = {"word": word, "number": number, **more}
        self._control.sendall(json.dumps(said).encode() + b"\n")


def _be_limited(
    answer: Answer, bounds: Bounds, questions: int, answers: int, parent: int
) -> NoReturn:
    """Be the process of one number, and end without any clean-up."""
    code = 1
    try:
        os.setsid()
        _be_expendable()
        if os.getppid() == parent:
            # The socket, and what is read from it, are the nursery's.
            os.dup2(questions, 0)
            os.closerange(3, answers)
            os.closerange(answers + 1, _OPEN_FILES)
            _serve(answer, bounds, os.fdopen(answers, "wb"))
        code = 0
    finally:
        os._exit(code)


def _be_expendable() -> None:
    confine.end_with_parent()
    confine.leave_no_core()
    confine.be_first_to_go()


def _serve(answer: Answer, bounds: Bounds, out: BinaryIO) -> None:
    """Answer questions until standard input ends.

    A question that there is no memory for is answered ``memory``, and is the last.
    """
    confine.limit_files(_OPEN_FILES, 0)
    confine.limit_memory(bounds.memory_bytes)
    confine.compute_less(bounds.nice)
    _say(out, {"ready": os.getpid()})
    while (question := _question(out)) is not None:
        confine.limit_cpu(int(bounds.deadline_s + _SPARE_S) + 1)
        confine.limit_time(PATIENCE_S + bounds.deadline_s + _SPARE_S)
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
