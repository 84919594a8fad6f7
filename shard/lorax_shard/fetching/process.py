"""The fetcher's child process: starts one limited process per fetch and watches it.

It reads commands from standard input and answers on standard output, one JSON object a
line. It holds no model and reads no foreign byte itself: each fetch is a fork of it that
ends with the fetch, so a crash, a hang or a leak stays with one adapter.

    <- {"setup": {...}}                               once, first
    -> {"ready": pid}
    <- {"job": 1, "ref": {...}, "token": "..."}       fetch
    <- {"cancel": 1}
    -> {"job": 1, "phase": "download"}
    -> {"job": 1, "outcome": {...}}     {"job": 1, "error": {...}, "access": "public"}

Tokens come through this pipe only. The end of standard input ends everything.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lorax_contract import confine
from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_contract.process import spare_garbage_collector
from lorax_shard.fetching import limits as process_limits
from lorax_shard.fetching.job import FetchJob, Verifier, VerifySettings, make_source
from lorax_shard.fetching.limits import ProcessLimits
from lorax_shard.fetching.redact import without_secrets
from lorax_shard.fetching.sources.interface import FetchContext, FetchLimits, SourceSettings
from lorax_shard.fetching.sources.stream import disk_errors
from lorax_shard.store.store import AdapterStore

_READ_BYTES = 1 << 16
# A fetch gets this long to say itself that its time is over.
_GRACE_S = 2.0
# An answer longer than this comes from a process that is out of order.
_MAX_LINE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the child process is told at its start."""

    store_dir: str
    store_max_bytes: int
    sources: SourceSettings = field(default_factory=SourceSettings)
    limits: FetchLimits = field(default_factory=FetchLimits)
    process: ProcessLimits = field(default_factory=ProcessLimits)
    verify: VerifySettings = field(default_factory=VerifySettings)

    def to_json(self) -> dict[str, Any]:
        """Return what crosses the pipe."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Setup:
        """Read what ``to_json`` wrote."""
        return cls(
            store_dir=document["store_dir"],
            store_max_bytes=document["store_max_bytes"],
            sources=SourceSettings.from_json(document["sources"]),
            limits=FetchLimits(**document["limits"]),
            process=ProcessLimits(**document["process"]),
            verify=VerifySettings(**document["verify"]),
        )

    def open_store(self, **options: Any) -> AdapterStore:
        """Open the store; ``options`` are AdapterStore's."""
        return AdapterStore(Path(self.store_dir), max_bytes=self.store_max_bytes, **options)


@dataclass(slots=True)
class _Running:
    """One fetch: its process, its pipe, what it has said so far."""

    job: int
    pid: int
    deadline: float
    buffer: bytes = b""
    answered: bool = False
    overdue: bool = False


class FetchWatcher:
    """Starts, watches and ends the processes of fetches. Single-threaded: it forks."""

    def __init__(self, setup: Setup, commands: int, answers: int) -> None:
        self._setup = setup
        self._commands = commands
        self._answers = answers
        self._verifier = setup.verify.load()
        self._running: dict[int, _Running] = {}
        self._selector = selectors.DefaultSelector()
        self._input = b""

    def serve(self) -> None:
        """Work until standard input ends; then end every fetch."""
        store = self._setup.open_store()
        store.sweep()
        # SQLite's connections must not get into forks.
        store.index.close()
        # Nor is there anything to collect in them, and looking for it would copy all of it.
        spare_garbage_collector()
        self._say({"ready": os.getpid()})
        self._selector.register(self._commands, selectors.EVENT_READ)
        try:
            while self._turn():
                pass
        finally:
            for running in self._running.values():
                os.kill(running.pid, signal.SIGKILL)

    def _turn(self) -> bool:
        """Wait for something to happen and deal with it; False at the end of input."""
        for key, _ in self._selector.select(self._until_next_deadline()):
            if key.fd == self._commands:
                if not self._read_commands():
                    return False
            elif key.fd in self._running:
                self._read_answers(key.fd)
        now = time.monotonic()
        for running in self._running.values():
            if now > running.deadline and not running.overdue:
                running.overdue = True
                os.kill(running.pid, signal.SIGKILL)
        return True

    def _until_next_deadline(self) -> float | None:
        waiting = [each.deadline for each in self._running.values() if not each.overdue]
        return max(0.0, min(waiting) - time.monotonic()) + 0.01 if waiting else None

    def _read_commands(self) -> bool:
        data = os.read(self._commands, _READ_BYTES)
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if "cancel" in command:
                self._cancel(command["cancel"])
            else:
                self._start(command)
        return bool(data)

    def _cancel(self, job: int) -> None:
        for running in self._running.values():
            if running.job == job:
                running.answered = True
                os.kill(running.pid, signal.SIGKILL)

    def _start(self, command: Mapping[str, Any]) -> None:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            os.close(self._commands)
            os.close(self._answers)
            for other in self._running:
                os.close(other)
            self._selector.close()
            _fetch_and_leave(self._setup, self._verifier, command, writer)
        os.close(writer)
        deadline = time.monotonic() + self._setup.process.deadline_s + _GRACE_S
        self._running[reader] = _Running(command["job"], pid, deadline)
        self._selector.register(reader, selectors.EVENT_READ)

    def _read_answers(self, reader: int) -> None:
        running = self._running[reader]
        data = os.read(reader, _READ_BYTES)
        if not data:
            self._ended(reader)
            return
        *lines, running.buffer = (running.buffer + data).split(b"\n")
        for line in lines:
            # Its words are passed on under its own number only.
            message = {**json.loads(line), "job": running.job}
            running.answered = running.answered or "outcome" in message or "error" in message
            self._say(message)
        if len(running.buffer) > _MAX_LINE_BYTES:
            os.kill(running.pid, signal.SIGKILL)

    def _ended(self, reader: int) -> None:
        running = self._running.pop(reader)
        self._selector.unregister(reader)
        os.close(reader)
        _, status = os.waitpid(running.pid, 0)
        if not running.answered:
            error = _obituary(running, status, self._setup.process)
            self._say({"job": running.job, "error": error.to_json()})

    def _say(self, message: Mapping[str, Any]) -> None:
        _write(self._answers, message)


def _obituary(running: _Running, status: int, limits: ProcessLimits) -> AdapterUnavailableError:
    """Say in words how a fetch ended that did not answer."""
    code = os.waitstatus_to_exitcode(status)
    if running.overdue or code == -signal.SIGALRM:
        text = f"the adapter was not ready after {limits.deadline_s:g} s; its fetch was ended"
    elif code == -signal.SIGXCPU:
        text = f"the adapter took more than {limits.cpu_s} s of computing; its fetch was ended"
    elif code < 0:
        text = f"the process that fetched the adapter ended by {signal.Signals(-code).name}"
    else:
        text = f"the process that fetched the adapter ended with code {code}"
    return AdapterUnavailableError(Reason.CRASHED, text)


def _write(descriptor: int, message: Mapping[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def _fetch_and_leave(
    setup: Setup, verifier: Verifier | None, command: Mapping[str, Any], writer: int
) -> NoReturn:
    """Be the process of one fetch: limit itself, fetch, answer, end without any clean-up."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        process_limits.apply(setup.process, setup.limits.max_file_bytes)
        if verifier is not None:
            allow = functools.partial(process_limits.allow_files, setup.process)
            verifier = dataclasses.replace(verifier, before=allow)
        _write(writer, answer(setup, verifier, command, lambda said: _write(writer, said)))
        code = 0
    finally:
        os._exit(code)


def answer(
    setup: Setup,
    verifier: Verifier | None,
    command: Mapping[str, Any],
    tell: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Carry out one fetch and return its last message; errors become messages too."""
    ref, token = AdapterRef(**command["ref"]), command.get("token")
    secrets = (token, setup.sources.server_token)
    job = None
    try:
        context = FetchContext(
            limits=setup.limits,
            deadline=time.monotonic() + setup.process.deadline_s,
        )
        source = make_source(ref.source, setup.sources)
        store = setup.open_store(
            on_evict=lambda digest, nbytes: tell({"evicted": digest, "bytes": nbytes})
        )
        job = FetchJob(
            store, source, context, verifier, on_phase=lambda phase: tell({"phase": phase})
        )
        with disk_errors(f"adapter {ref}", "what is read from it", setup.limits.max_file_bytes):
            return {"outcome": dataclasses.asdict(job.run(ref, token))}
    except AdapterUnavailableError as error:
        failure = error
    except MemoryError:
        text = f"adapter {ref} takes more memory than a fetch may use"
        failure = AdapterUnavailableError(Reason.TOO_LARGE, text)
    except Exception as error:  # noqa: BLE001 — whatever it is, it fails this adapter alone
        failure = AdapterUnavailableError(
            Reason.CRASHED,
            f"adapter {ref} could not be fetched: {type(error).__name__}",
            detail=without_secrets(traceback.format_exc(limit=-6), secrets),
        )
    document = failure.to_json()
    document["text"] = without_secrets(document["text"], secrets)
    return {"error": document, "access": job.access if job else None}


def _read_setup(descriptor: int) -> Setup | None:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            return None
        line += byte
    return Setup.from_json(json.loads(line)["setup"])


def main() -> int:
    """Serve until standard input ends."""
    # What libraries print must not get between the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    setup = _read_setup(0)
    if setup is None:
        return 0
    if setup.sources.hub_enabled:
        # Before the first fork, so that no fetch pays for it.
        from lorax_shard.fetching.sources import hub  # noqa: F401
    confine.compute_less(setup.process.nice)
    FetchWatcher(setup, 0, answers).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
