"""Somebody who reads a page and pastes its commands one after the other, in a folder of a fresh clone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import httpx
from tests.helpers.documented_blocks import Block, Kind, kind, statements
from tests.helpers.server import Server, free_port

ROOT = Path(__file__).parents[3]
# What readers start who are not told otherwise: as the README has it.
USUAL = 'make serve ARGS="--grpc-port 3002 --admin-port 3001"'
HTTP_PORT = "3000"
BOUND_S = 600.0
# What people type into a conversation.
TALK = "What is the capital of France?\n/quit\n"
_PORT = re.compile(
    r"(?<=127\.0\.0\.1:)\d{4}\b|(?<=localhost:)\d{4}\b|(?<=-port )\d{4}\b|(?<=-p )\d{4}\b"
)
_ASKS = re.compile(r"\b(curl|grpcurl|lorax-cli|lorax-bench|lorax-simulate|print)\b")
_SILENT = re.compile(r"curl [^\n]*(-o |--output )|> ")
_FAULTS = ("Traceback (most recent call last)", '"error"')
_SOCKET = re.compile(r"(/\S+/admin)\b")


class Fault(Exception):
    """A command did not do what a reader expects."""


class Started:
    """A server that a page told to start, at ports of its own.

    Args:
        statement: as the page has it.
        folder: where the reader is.
        environ: what the reader has set.
    """

    def __init__(self, statement: str, folder: Path, environ: dict[str, str]) -> None:
        self.statement = statement
        self._ports: dict[str, str] = {}
        self._server = Server(
            command=self._command, cwd=folder, env=environ, ready_timeout_s=BOUND_S
        )
        self._server.__enter__()

    def _command(self, port: int) -> list[str]:
        named = re.search(r"--port (\d{4})", self.statement)
        self._ports[named[1] if named else HTTP_PORT] = str(port)
        return ["env", f"PORT={port}", "bash", "-c", self.ported(self.statement)]

    def ported(self, code: str) -> str:
        """Return code with the ports of this server for those of the page."""
        return _PORT.sub(self._port, code)

    def _port(self, found: re.Match[str]) -> str:
        return self._ports.setdefault(found[0], str(free_port()))

    def check(self) -> None:
        """See that it says it is well; raises Fault."""
        scheme = "https" if "--ssl-certfile" in self.statement else "http"
        answer = httpx.get(
            f"{scheme}://127.0.0.1:{self._server.port}/health", verify=False, timeout=60
        )
        if answer.status_code != 200:
            raise Fault(f"/health: {answer.status_code} {answer.text[:200]}")

    def variables(self) -> dict[str, str]:
        """Return what tells lorax-cli that the server is not at the usual place."""
        sockets = [found[1] for line in self._server.lines if (found := _SOCKET.search(line))]
        admin = {"LORAX_ADMIN": sockets[-1]} if sockets else {}
        return admin | {"LORAX_URL": f"http://127.0.0.1:{self._server.port}"}

    def stop(self) -> None:
        """End it; raises Fault if it does not end well."""
        code = self._server.stop()
        # make ends by the signal, after what it runs.
        if code != 0 and not (code == -signal.SIGTERM and "make" in self.statement):
            raise Fault(f"{self.statement} ended with {code}: {self._server.lines[-5:]}")


class Reader:
    """Reads one page.

    Args:
        folder: of the page: a checkout, with the server's environment.
        environ: variables of commands.
        usual: returns the server of pages that start none.
    """

    def __init__(self, folder: Path, environ: dict[str, str], usual: Callable[[], Started]) -> None:
        self._folder, self._usual = folder, usual
        self._environ = environ | {"PATH": f"{folder / 'own' / 'bin'}:{environ['PATH']}"}
        self._own: Started | None = None
        self._state = folder / ".state"
        _environment_of_its_own(folder)

    def read(self, block: Block) -> None:
        """Do what a block says; raises Fault."""
        if block.language == "python":
            self._run(
                [str(self._folder / "own/bin/python"), "-c", self._ported(block.code)], block.code
            )
            return
        for statement in statements(block):
            self._do(statement)

    def _do(self, statement: str) -> None:
        if kind(statement) is Kind.SERVER:
            self._start(statement)
            return
        keep = f"\n{{ env -0 > {self._state}; }} 2>/dev/null"
        code = self._ported(statement)
        typed = TALK if kind(statement) is Kind.TALK else ""
        self._run(["bash", "-euo", "pipefail", "-c", code + keep], code, typed)
        kept = self._state.read_bytes().decode().split("\0")
        self._environ = dict(line.split("=", 1) for line in kept if "=" in line)

    def _start(self, statement: str) -> None:
        self.leave()
        if statement.partition("  #")[0].strip() == USUAL:
            self._usual().check()
            return
        self._own = Started(statement, self._folder, self._environ)
        self._own.check()

    def _ported(self, code: str) -> str:
        if not re.search(r"127\.0\.0\.1:\d|localhost:\d|lorax-cli|LORAX_URL", code):
            return code
        server = self._own or self._usual()
        self._environ |= server.variables()
        return server.ported(code)

    def _run(self, command: list[str], code: str, typed: str = "") -> None:
        done = subprocess.run(
            command, input=typed, capture_output=True, text=True, timeout=BOUND_S, cwd=self._folder,
            env=self._environ,
        )  # fmt: skip
        told = done.stdout.strip()
        if done.returncode or any(each in told + done.stderr for each in _FAULTS):
            raise Fault(
                f"{code[:90]!r}: exit {done.returncode}: {told[-300:]} {done.stderr[-500:]}"
            )
        if not told and _ASKS.search(code) and not _SILENT.search(code):
            raise Fault(f"{code[:90]!r} says nothing: {done.stderr[-300:]}")

    def leave(self) -> None:
        """End the server that the page started, if it did; raises Fault."""
        if self._own is not None:
            started, self._own = self._own, None
            started.stop()


def _environment_of_its_own(folder: Path) -> None:
    """Make an environment that has all of the server's and takes what a page installs."""
    own, servers = folder / "own", folder / ".venv"
    venv.create(own, with_pip=False, symlinks=True)
    (packages,) = (own / "lib").glob("python3*/site-packages")
    (theirs,) = (servers / "lib").glob("python3*/site-packages")
    (packages / "servers.pth").write_text(f"import site; site.addsitedir({str(theirs)!r})\n")
    pip = own / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec {own}/bin/python -m pip "$@"\n')
    pip.chmod(0o755)


def write_stand_ins(folder: Path) -> None:
    """Write programs that few machines have and that tests can do without: grpcurl."""
    folder.mkdir()
    if shutil.which("grpcurl") is None:
        path = folder / "grpcurl"
        path.write_text(
            f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/acceptance/look/grpcurl.py "$@"\n'
        )
        path.chmod(0o755)


def fresh_folder(clone: Path, folder: Path) -> Path:
    """Copy a clone, but for its environment, which is the clone's."""
    shutil.copytree(
        clone, folder, symlinks=True, ignore=shutil.ignore_patterns(".venv", ".git", "own")
    )
    os.symlink((clone / ".venv").resolve(), folder / ".venv")
    return folder
