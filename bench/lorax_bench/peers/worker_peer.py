"""A peer that is a library: a worker process in its environment, which answers JSON lines."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from lorax_bench.peers.environments import WORKERS
from lorax_bench.peers.process_tree import ProcessTree
from lorax_bench.records import Record
from lorax_bench.requests import Workload


class PeerFailed(Exception):
    """A peer that was installed did not do its work; the text has its last words."""


class WorkerPeer:
    """Runs a worker of ``workers/``; its processes hold still while it has no turn."""

    def __init__(
        self,
        python: Path,
        worker: str,
        work: Mapping[str, Any],
        *,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._python, self._worker, self._work = python, worker, dict(work)
        self._env = dict(env or {})
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None
        self._tree: ProcessTree | None = None

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        command = [str(self._python), "-P", str(WORKERS / "main.py"), str(WORKERS / self._worker)]
        self._process = subprocess.Popen(
            command, env=os.environ | {"HF_HUB_OFFLINE": "1"} | self._env, text=True,
            start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log,
        )  # fmt: skip
        self._tree = ProcessTree(self._process.pid)
        try:
            self._ask(self._work)
        except BaseException:
            self._end()
            raise
        self._tree.pause()
        return self

    def run(self, workload: Workload) -> list[Record]:
        """Answer a workload's requests, all handed over at once."""
        check_at_once(workload)
        requests = [
            {"prompt_ids": each.prompt_ids, "max_tokens": each.max_tokens, "adapter": each.adapter}
            for each in workload.requests
        ]
        return records_of(workload, self.ask(requests))

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Let the worker answer requests of its own form, and hold it still again."""
        assert self._tree is not None
        self._tree.go_on()
        answers: list[dict[str, Any]] = self._ask({"requests": requests})["answers"]
        self._tree.pause()
        return answers

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerFailed(f"the worker {self._worker} ended. Its last words:\n{self._words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _words(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-12:])

    def _end(self) -> None:
        if self._tree is not None:
            self._tree.kill()
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process.wait()
        if self._log is not None:
            self._log.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()


def check_at_once(workload: Workload) -> None:
    """Refuse a workload that a library cannot be given: workers get all requests at once."""
    closed = workload.concurrency is not None and workload.concurrency < len(workload.requests)
    if closed or any(request.at_s for request in workload.requests):
        raise ValueError(
            f"the workload {workload.name!r} sends its requests over time, but peers that are "
            "libraries are given all at once: compare servers alone, or take another workload"
        )
    if any(request.temperature for request in workload.requests):
        raise ValueError(
            f"the workload {workload.name!r} draws tokens, but peers that are libraries are "
            "compared greedily alone"
        )


def records_of(workload: Workload, answers: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Return what a client would have seen, and errors where tokens are missing."""
    if len(answers) != len(workload.requests):
        raise PeerFailed(f"{len(answers)} answers came to {len(workload.requests)} requests")
    records = []
    for number, (request, answer) in enumerate(zip(workload.requests, answers)):
        num = len(answer["token_ids"])
        short = None if num == request.max_tokens else f"{num} of {request.max_tokens} tokens came"
        records.append(
            Record(
                request=number, adapter=request.adapter, sent_s=0.0,
                token_times_s=list(answer["times_s"]), token_ids=list(answer["token_ids"]),
                prompt_tokens=len(request.prompt_ids), error=short,
            )
        )  # fmt: skip
    return records
