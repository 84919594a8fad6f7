"""A gRPC client of generated stubs alone, in an environment that knows nothing of this project."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.acceptance.environments import environment
from tests.acceptance.harness import Point, Result
from tests.helpers.server import Server, free_port

ROOT = Path(__file__).parents[2]
PROGRAMS = ("generate.py", "chat.py", "tools.py", "errors.py")
BOUND_S = 300.0


def run_examples(programs: Path, folder: Path, address: str) -> list[str]:
    """Generate the stubs beside the examples and run these; return what went wrong."""
    shutil.copytree(ROOT / "examples/grpc", folder, dirs_exist_ok=True)
    proto = "lorax_proto/lorax.proto"
    outputs = [f"--{kind}={folder}" for kind in ("python_out", "grpc_python_out")]
    python = str(programs / "python")
    generate = [python, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *outputs, proto]
    subprocess.run(generate, check=True)
    # Stubs and nothing else: no path leads to this project.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    faults = []
    for program in PROGRAMS:
        done = subprocess.run(
            [python, str(folder / program), address],
            capture_output=True, text=True, timeout=BOUND_S, cwd=folder, env=environ,
        )  # fmt: skip
        if done.returncode or not done.stdout.strip():
            faults.append(f"{program}: {done.stderr[-400:]}")
    return faults


def point_generated_client() -> Result:
    """The examples, by stubs that the newest grpcio-tools made, against the embedded model."""
    address = f"127.0.0.1:{free_port()}"
    options = (
        "--grpc-port", address.rpartition(":")[2], "--device", "cpu",
        "--adapter-local-root", str(ROOT / "examples/adapters"),
    )  # fmt: skip
    with (
        environment("grpcio-tools", "grpcio-status") as programs,
        tempfile.TemporaryDirectory() as name,
        Server(*options),
    ):
        faults = run_examples(programs, Path(name), address)
        version = subprocess.run(
            [str(programs / "python"), "-m", "pip", "list", "--format=freeze"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    with_tools = [line for line in version.split() if line.startswith(("grpcio==", "protobuf"))]
    return Result(not faults, "; ".join(faults) or f"{len(PROGRAMS)} programs, {with_tools}")


POINTS = [
    Point("1i", "A generated gRPC client runs the examples", point_generated_client),
]
