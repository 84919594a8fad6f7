"""The README's code, pasted: what it shows of clients, against ``make serve`` in a fresh clone."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import grpc
from tests.acceptance.environments import environment
from tests.acceptance.harness import Result
from tests.acceptance.serve import clean_environment, fresh_clone
from tests.acceptance.suites import ROOT
from tests.helpers.grpc_reflection import call_by_reflection
from tests.helpers.server import Server, free_port

# From the first start to the last client.
SECTIONS = ("## Quick start", "## Adapters")
# What its clients are installed as.
PACKAGES = ("openai", "lorax-client")
HTTP_PORT, GRPC_PORT = "3000", "3002"
BOUND_S = 600.0


def blocks() -> list[tuple[str, str]]:
    """Return language and text of the code that readers are to paste."""
    text = (ROOT / "README.md").read_text()
    first, last = map(text.index, SECTIONS)
    found: list[tuple[str, str]] = re.findall(
        r"^```(sh|python)\n(.*?)^```$", text[first:last], re.MULTILINE | re.DOTALL
    )
    return [(language, code) for language, code in found if not code.startswith("make")]


def pasted(language: str, code: str, programs: Path, clone: Path) -> str | None:
    """Run code as pasted; return what went wrong."""
    # The stubs are in the environment of the server; everything else has one of its own.
    own = clone / ".venv" / "bin" / "python" if "lorax_proto" in code else programs / "python"
    command = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [str(own), "-c"]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*command, code], capture_output=True, text=True, timeout=BOUND_S, cwd=clone, env=environ
    )
    print(f"    {code.splitlines()[0][:60]} -> {done.stdout.strip()[:150]!r}", flush=True)
    # curl prints refusals and ends well.
    if done.returncode or not done.stdout.strip() or '"error"' in done.stdout:
        return f"{code.splitlines()[0]}: {done.stdout[-200:]} {done.stderr[-400:]}"
    return None


def by_reflection(code: str) -> str | None:
    """Make the call of a command of grpcurl, which few machines have; return what went wrong."""
    words = shlex.split(code.replace("\\\n", " "))
    address, method = words[-2:]
    with grpc.insecure_channel(address) as channel:
        answer = call_by_reflection(
            channel, method.rpartition("/")[2], json.loads(words[words.index("-d") + 1])
        )
    print(f"    {method} by reflection -> {str(answer)[:150]}", flush=True)
    return None if answer else f"{method}: nothing came"


def point_readme() -> Result:
    """Every block in turn; of what is pasted only the ports are others."""
    grpc_port = str(free_port())
    faults, num_reflected, num_run = [], 0, 0
    with tempfile.TemporaryDirectory() as name, environment(*PACKAGES) as programs:
        folder = Path(name)
        clone = fresh_clone(folder)
        server = Server(
            command=lambda port: [
                "make", "serve", f"ARGS=--port {port} --grpc-port {grpc_port}"
            ],
            cwd=clone, env=clean_environment(folder / "home"), ready_timeout_s=1200,
        )  # fmt: skip
        with server:
            for language, code in blocks():
                here = code.replace(HTTP_PORT, str(server.port)).replace(GRPC_PORT, grpc_port)
                num_run += 1
                if "grpcurl" in code and shutil.which("grpcurl") is None:
                    num_reflected += 1
                    fault = by_reflection(here)
                else:
                    fault = pasted(language, here, programs, clone)
                if fault is not None:
                    faults.append(fault)
    for fault in faults:
        print(f"    {fault}", flush=True)
    figure = (
        f"{num_run} blocks, {num_reflected} by reflection for want of grpcurl, {len(faults)} faults"
    )
    return Result(num_run >= 5 and not faults, figure)
