"""A server of ours, started for a benchmark: on a free port, with adapters made for it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorax_bench.adapters import RANKS, write_adapters

_READY_TIMEOUT_S = 900.0
_END_TIMEOUT_S = 60.0
# Of the launcher's words, where it did not become ready.
_LAST_LINES = 20
# Options of the launcher that say which model it is, as `lorax-shard prepare` knows them too.
_MODEL_OPTIONS = ("--model-id", "--revision", "--source")


class StartError(Exception):
    """The server did not start; the text says what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedServer:
    """A server that is ready."""

    url: str
    pid: int
    model: str
    """The base model's name."""
    model_dir: Path
    adapters: tuple[str, ...]
    """The names by which OpenAI's API has them."""
    ready_s: float
    """Seconds from its start until it was ready."""


@contextlib.contextmanager
def started(
    options: Sequence[str] = (), *, num_adapters: int = 0, ranks: tuple[int, ...] = RANKS,
    dtype: str = "float32",
) -> Iterator[StartedServer]:  # fmt: skip
    """Start the launcher with these options, wait until it is ready, and end it afterwards."""
    model, model_dir = prepare_model(options)
    with tempfile.TemporaryDirectory(prefix="lorax-bench-") as folder:
        root = Path(folder)
        paths = write_adapters(model_dir, root, num_adapters, ranks=ranks, dtype=dtype)
        port = free_port()
        command = [
            program("lorax-launcher"), "--hostname", "127.0.0.1", "--port", str(port),
            "--adapter-local-root", str(root), *options,
        ]  # fmt: skip
        log = root / "launcher.log"
        with log.open("w") as output:
            start = time.perf_counter()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_ready(url, process, log)
            yield StartedServer(
                url=url, pid=process.pid, model=model, model_dir=model_dir,
                adapters=tuple(f"local:{path.name}" for path in paths),
                ready_s=time.perf_counter() - start,
            )  # fmt: skip
        finally:
            end(process)


def program(name: str) -> str:
    """Return the path of one of this project's programs."""
    folders = (Path(sys.executable).parent, Path(sysconfig.get_path("scripts")))
    for folder in folders:
        if (folder / name).exists():
            return str(folder / name)
    return name


def free_port() -> int:
    """Return a port of the loopback interface on which nobody listened a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare_model(options: Sequence[str]) -> tuple[str, Path]:
    """Make the model of these launcher options a local folder; return its name and the folder."""
    chosen: list[str] = []
    for place, option in enumerate(options):
        name, sign, _ = option.partition("=")
        if name in _MODEL_OPTIONS:
            chosen += options[place : place + (1 if sign else 2)]
    reader, writer = os.pipe()
    command = [program("lorax-shard"), "prepare", "--result-fd", str(writer), *chosen]
    with os.fdopen(reader) as result:
        try:
            done = subprocess.run(
                command, pass_fds=[writer], check=False, stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
            )  # fmt: skip
        finally:
            os.close(writer)
        line = result.readline()
    if done.returncode or not line:
        raise StartError("the model could not be prepared; what it said is above")
    found = json.loads(line)
    return found["model_id"], Path(found["model_dir"])


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers that it is well; raises StartError if it ends before that."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StartError(f"the server ended with code {process.returncode}:\n{_tail(log)}")
        if _is_well(url):
            return
        time.sleep(0.1)
    raise StartError(f"the server was not ready after {_READY_TIMEOUT_S:g} s:\n{_tail(log)}")


def _is_well(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server in good order, and if it takes too long with all that it started."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
