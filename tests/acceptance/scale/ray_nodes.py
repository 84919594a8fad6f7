"""A Ray cluster of several nodes on this machine, each ended by the ids of its processes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil
from tests.helpers.server import free_port

# Its other requirements are there for tests.
_PACKAGES = ("ray>=2.50", "msgpack")
_NODE = (
    "--block", "--disable-usage-stats", "--include-log-monitor", "false", "--num-cpus", "1",
    "--object-store-memory", str(100 << 20), "--min-worker-port", "0", "--max-worker-port", "0",
)  # fmt: skip


@contextlib.contextmanager
def with_ray() -> Iterator[dict[str, str]]:
    """Give variables with which programs of this environment find Ray, installed if it is not there."""
    own = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    own["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if importlib.util.find_spec("ray") is not None:
        yield own
        return
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        subprocess.run([*pip, *_PACKAGES], check=True, timeout=400)
        yield own | {"PYTHONPATH": os.pathsep.join([own["PYTHONPATH"], folder])}


class LocalNodes:
    """Nodes of one cluster; a context manager that ends all of them.

    Args:
        env: variables with which Ray is found.
    """

    def __init__(self, env: dict[str, str]) -> None:
        # Paths of sockets are short.
        self._folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")
        self.address = f"127.0.0.1:{free_port()}"
        self.env = env | {"RAY_ADDRESS": self.address, "TMPDIR": self._folder.name}
        self._nodes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        port = self.address.rpartition(":")[2]
        self._start("--head", "--port", port, "--include-dashboard", "false",
                    "--temp-dir", self._folder.name)  # fmt: skip
        return self

    def add(self) -> int:
        """Add a node and return its number; the head is 0."""
        return self._start("--address", self.address)

    def _start(self, *options: str) -> int:
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", *_NODE, *options]
        path = Path(self._folder.name, f"node-{len(self._nodes)}.log")
        with path.open("wb") as log:
            node = subprocess.Popen(
                words, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self._nodes.append(node)
        self._until_joined(path)
        return len(self._nodes) - 1

    def _until_joined(self, log: Path, timeout_s: float = 60.0) -> None:
        until = time.monotonic() + timeout_s
        while "Ray runtime started" not in (text := log.read_text(errors="replace")):
            if time.monotonic() > until or self._nodes[-1].poll() is not None:
                raise RuntimeError(f"a node did not start:\n{text[-2000:]}")
            time.sleep(0.2)

    def processes(self, number: int) -> list[psutil.Process]:
        """Return all processes of a node, those of its workers among them."""
        root = psutil.Process(self._nodes[number].pid)
        return [root, *root.children(recursive=True)]

    def number_of(self, pid: int) -> int:
        """Return the node that a process belongs to."""
        return next(
            number for number, each in enumerate(self._nodes)
            if each.poll() is None and pid in {found.pid for found in self.processes(number)}
        )  # fmt: skip

    def kill(self, number: int) -> int:
        """End a node at once, as if its machine lost its power; return how many processes it had."""
        found = self.processes(number)
        for each in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self._nodes[number].wait()
        return len(found)

    def __exit__(self, *_: object) -> None:
        for number, each in reversed([*enumerate(self._nodes)]):
            if each.poll() is None:
                self.kill(number)
        self._folder.cleanup()

    def ask(self, *words: str, timeout_s: float = 300.0) -> str:
        """Run ``lorax-ray`` and return what it prints; what goes wrong is raised."""
        command = [sys.executable, "-m", "lorax_launcher.placing.cli", *words]
        run = subprocess.run(
            command, env=self.env, text=True, capture_output=True, timeout=timeout_s, check=False
        )
        if run.returncode:
            raise RuntimeError(f"lorax-ray {' '.join(words)}: {run.stdout}{run.stderr}"[-3000:])
        return run.stdout

    def status(self) -> dict[str, Any]:
        """Return what ``lorax-ray status`` tells."""
        lines = self.ask("status", "--json", timeout_s=60.0).splitlines()
        # Ray may tell of nodes that died beside it.
        found: dict[str, Any] = json.loads(next(line for line in lines if line.startswith('{"')))
        return found

    def until_ready(self, num: int, without: str, timeout_s: float = 200.0) -> dict[str, Any]:
        """Wait until so many groups serve, and no others are there; one that was lost is none of them."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            found = self.status()
            states = {each["name"]: each["state"] for each in found["groups"]}
            if [*states.values()] == ["ready"] * num and without not in states:
                return found
            time.sleep(1.0)
        raise RuntimeError(f"after {timeout_s:g} s there are not {num} groups: {found}")
