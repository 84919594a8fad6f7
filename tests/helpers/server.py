"""Start the whole server as a user does, talk to it, and end it by its process id."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_given: set[int] = set()


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    return free_ports(1)[0]


def free_ports(num: int) -> list[int]:
    """Return so many of them; none twice in one process, though nobody listens on it yet."""
    found: list[int] = []
    while len(found) < num:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = int(sock.getsockname()[1])
        if port not in _given:
            _given.add(port)
            found.append(port)
    return found


class Server:
    """A launcher with its children; a context manager that always ends them.

    ``command`` makes another command line from the port, e.g. one that calls make; ``prefix`` are
    words before it, of a program that becomes it.
    """

    def __init__(
        self,
        *options: str,
        command: Callable[[int], list[str]] | None = None,
        prefix: Sequence[str] = (),
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        ready_timeout_s: float = 300.0,
    ) -> None:
        self.port, self.admin_port = free_ports(2)
        bind = ["--hostname", "127.0.0.1", "--port", str(self.port)]
        bind += ["--admin-port", str(self.admin_port)]
        launcher = [str(Path(sys.executable).parent / "lorax-launcher"), *bind, *options]
        self._command = [*prefix, *(command(self.port) if command else launcher)]
        # What was named at a port before must not be known at it.
        self._env = {"ADAPTER_REGISTRY": "none"} | (dict(os.environ) if env is None else env)
        self._cwd = cwd
        self._ready_timeout_s = ready_timeout_s
        self.lines: list[str] = []
        self.ready_s = 0.0
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        start = time.perf_counter()
        self.process = subprocess.Popen(
            self._command, cwd=self._cwd, env=self._env, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        ready: queue.Queue[bool] = queue.Queue()
        threading.Thread(target=self._read, args=(ready,), daemon=True).start()
        try:
            is_ready = ready.get(timeout=self._ready_timeout_s)
        except queue.Empty:
            is_ready = False
        self.ready_s = time.perf_counter() - start
        if not is_ready:
            self.stop()
            raise RuntimeError("the server did not become ready:\n" + "\n".join(self.lines[-30:]))
        return self

    def _read(self, ready: queue.Queue[bool]) -> None:
        assert self.process is not None and self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line.rstrip())
                if f":{self.port}" in line and "ready" in line.lower():
                    ready.put(True)
        ready.put(False)

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout_s: float = 100.0) -> int:
        """Signal the launcher and wait for it; returns its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            os.kill(self.process.pid, how)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 300.0) -> Any:
        """POST JSON and return the decoded answer; HTTP errors raise urllib's HTTPError."""
        return self._post(self.url + path, body, timeout_s)

    def _post(self, url: str, body: dict[str, Any], timeout_s: float) -> Any:
        request = urllib.request.Request(
            url,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.loads(response.read())

    def manage(self, verb: str, body: dict[str, Any], timeout_s: float = 300.0) -> Any:
        """Load, unload, pin, unpin or reload an adapter, as the operator does."""
        url = f"http://127.0.0.1:{self.admin_port}/v1/adapters/{verb}"
        return self._post(url, body, timeout_s)

    def get(self, path: str, timeout_s: float = 30.0) -> str:
        """GET and return the body as text."""
        with urllib.request.urlopen(self.url + path, timeout=timeout_s) as response:
            return str(response.read().decode())
