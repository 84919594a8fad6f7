"""``lorax-cli`` as a person has it: in a terminal, beside a server that runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Self

import pytest
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.server import Server

PROGRAM = str(Path(sys.executable).with_name("lorax-cli"))
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


def _take_terminal(theirs: int) -> None:
    """What is typed reaches the program as signals, too, even if these tests run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [PROGRAM, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=partial(_take_terminal, theirs),
            env=os.environ | {"TERM": "xterm", "COLUMNS": "200"},
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""
        self._taken = 0

    def until(self, words: str, timeout_s: float = 120.0) -> str:
        """Read until words have come, and return what came up to them since the last time."""
        deadline, begun = time.monotonic() + timeout_s, self._taken
        while (found := self.seen.find(words, begun)) < 0:
            left = deadline - time.monotonic()
            assert left > 0, f"{words!r} did not come; this did: {self.seen[begun:]!r}"
            if select.select([self._ours], [], [], left)[0]:
                self._read()
        self._taken = found + len(words)
        return self.seen[begun : self._taken]

    def any(self) -> None:
        """Wait for anything more."""
        if len(self.seen) == self._taken:
            self._read()

    def _read(self) -> None:
        self.seen += _CONTROL.sub("", os.read(self._ours, 65536).decode(errors="replace"))

    def type(self, text: str) -> None:
        """Type a line, or a control character."""
        os.write(self._ours, text.encode())

    def interrupt(self, prompt: str) -> None:
        """Type Ctrl-C until the prompt comes: one that comes just before a line is read is not seen."""
        for _ in range(20):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.until(prompt, timeout_s=3.0)
                return
        self.until(prompt, timeout_s=3.0)

    def end(self) -> int:
        """Return the program's exit code."""
        return self._process.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


@pytest.fixture(scope="module")
def server(
    launch: Callable[..., Server], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("poet", "clerk")):
        write_formula_adapter(tiny_model, root / name, rank=4, seed=number)
    options = ("--adapter-source", "local", "--adapter-local-root", str(root))
    with launch(*options, "--served-model-name", "tiny") as running:
        yield running


def run(server: Server, *words: str) -> subprocess.CompletedProcess[str]:
    admin = f"http://127.0.0.1:{server.admin_port}"
    return subprocess.run(
        [PROGRAM, "--url", server.url, "--admin", admin, *words],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def test_a_conversation_in_a_terminal(server: Server) -> None:
    """The adapter changes in the middle, Ctrl-C ends a line, Ctrl-D the chat."""
    words = ("chat", "--max-tokens", "6", "--temperature", "0")
    with Terminal("--url", server.url, *words) as terminal:
        terminal.until("base> ")
        terminal.type("the quick brown fox\n")
        assert "+ 6 tokens" in terminal.until("base> ")
        terminal.type("/adapter poet\n")
        terminal.until("poet> ")
        terminal.type("/again\n")
        assert "+ 6 tokens" in terminal.until("poet> ")
        terminal.type("/adapter nobody\n")
        terminal.until("nobody> ")
        terminal.type("hello\n")
        assert "there is no model 'nobody'" in terminal.until("nobody> ")
        terminal.interrupt("nobody> ")
        terminal.type("\x04")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.seen


def test_an_answer_is_stopped_by_an_interrupt(server: Server) -> None:
    words = ("chat", "--max-tokens", "400", "--temperature", "1", "--seed", "1")
    with Terminal("--url", server.url, *words) as terminal:
        terminal.until("base> ")
        # An answer may have ended by itself before it is stopped: then another one is asked for.
        for _ in range(20):
            terminal.type("go on and on\n")
            terminal.until("go on and on\n")
            terminal.any()
            terminal.type("\x03")
            if "; stopped" in terminal.until("base> "):
                break
        else:
            pytest.fail("no answer was stopped")
        terminal.type("/quit\n")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.seen


def test_a_text_in_a_pipe(server: Server) -> None:
    words = ("generate", "the quick brown", "--max-tokens", "5", "--temperature", "0")
    one, again = (run(server, *words, "--adapter", "poet") for _ in range(2))
    assert (one.returncode, one.stdout) == (0, again.stdout)
    assert run(server, *words).stdout != one.stdout
    lost = run(server, *words, "--adapter", "nobody")
    assert lost.returncode == 1
    assert lost.stderr.startswith("Error: ")
    assert "nobody" in lost.stderr


def test_adapters_come_stay_and_go(server: Server) -> None:
    for words, said in (
        (("load", "clerk"), "clerk is loaded"),
        (("pin", "clerk"), "clerk stays on the shards"),
        (("reload", "clerk"), "clerk was asked for anew"),
        (("unpin", "clerk"), "clerk may leave the shards"),
    ):
        done = run(server, "adapters", *words)
        assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr
    listed = run(server, "adapters", "list", "--state", "resident").stdout
    assert re.search(r"^clerk\s+local\s+resident\s+4", listed, re.MULTILINE)
    assert run(server, "adapters", "unload", "clerk").stdout.strip() == "clerk is unloaded"
    unknown = run(server, "adapters", "unload", "nobody")
    assert unknown.returncode == 1
    assert "nobody" in unknown.stderr
