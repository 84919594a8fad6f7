"""Generates the gRPC stubs of ``lorax_proto``, or checks that they are fresh.

    python proto/generate.py            write the stubs and their digests
    python proto/generate.py --check    fail if a .proto or a stub changed since then

The generator lives in an environment of its own, ``.venv-proto``: its protobuf is
older than the one that serves, so that runtimes from 6.30 to 7 accept the stubs.
The check needs no generator and no network: it compares digests.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import venv
from pathlib import Path

GRPC_TOOLS = "grpcio-tools==1.72.2"
HOUSE = Path(__file__).resolve().parent
PACKAGE = "lorax_proto"
DIGESTS = HOUSE / "stubs.sha256"
# Generated code follows its generator's style, not ours.
HEADER = "# ruff: noqa\n# mypy: ignore-errors\n"


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare digests")
    options = parser.parse_args()
    if not options.check:
        generate(HOUSE)
        return 0
    stale = stale_files(HOUSE)
    for problem in stale:
        print(problem, file=sys.stderr)
    if stale:
        print("run: python proto/generate.py, and commit what it writes", file=sys.stderr)
    return 1 if stale else 0


def generate(house: Path) -> None:
    """Write the stubs of every .proto in ``house`` and record all digests."""
    python = _generator(house.parent / ".venv-proto")
    for proto in _protos(house):
        name = proto.relative_to(house).as_posix()
        outputs = [f"--{kind}=." for kind in ("python_out", "pyi_out", "grpc_python_out")]
        # Proto path = import path: the stubs import each other without rewriting.
        command = [str(python), "-m", "grpc_tools.protoc", "-I.", *outputs, name]
        subprocess.run(command, cwd=house, check=True)
        for stub in _stubs(proto):
            stub.write_text(HEADER + stub.read_text())
        print(f"generated the stubs of {name}")
    lines = [f"{_digest(file)}  {_name(house, file)}\n" for file in _recorded(house)]
    (house / DIGESTS.name).write_text("".join(lines))


def stale_files(house: Path) -> list[str]:
    """Return one sentence for each file that is not what the last generation left."""
    digests = house / DIGESTS.name
    if not digests.exists():
        return [f"{digests.name} is missing: the stubs were never generated"]
    lines = [line.split() for line in digests.read_text().splitlines()]
    recorded = {name: digest for digest, name in lines}
    present = {_name(house, file): file for file in _recorded(house)}
    problems = [f"{name} is not in {digests.name}" for name in present.keys() - recorded.keys()]
    for name, digest in recorded.items():
        if not (house / name).exists():
            problems.append(f"{name} is missing")
        elif _digest(house / name) != digest:
            problems.append(f"{name} changed since the stubs were generated")
    return sorted(problems)


def _generator(folder: Path) -> Path:
    """Return the Python of the generator's environment; makes it when it is not there."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    marker = folder / "installed"
    if not marker.exists() or marker.read_text() != GRPC_TOOLS:
        venv.create(folder, clear=True, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", GRPC_TOOLS]
        subprocess.run(install, check=True)
        marker.write_text(GRPC_TOOLS)
    return python


def _protos(house: Path) -> list[Path]:
    return sorted((house / PACKAGE).glob("*.proto"))


def _stubs(proto: Path) -> list[Path]:
    return [
        proto.with_name(f"{proto.stem}{end}") for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
    ]


def _recorded(house: Path) -> list[Path]:
    """Return every .proto with its stubs."""
    return [file for proto in _protos(house) for file in (proto, *_stubs(proto))]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def _name(house: Path, file: Path) -> str:
    return file.relative_to(house).as_posix()


if __name__ == "__main__":
    sys.exit(main())
