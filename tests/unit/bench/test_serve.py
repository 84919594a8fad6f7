"""A server that a benchmark starts: it is waited for, it is ended, and what it said is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lorax_bench import serve
from lorax_bench.memory import PeakMemory, resident_bytes
from lorax_bench.serve import StartError, started

CONFIG = {
    "hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 3, "num_hidden_layers": 1,
    "vocab_size": 500,
}  # fmt: skip
PREPARE = """
import json, os, sys
words = sys.argv[1:]
document = {{"model_id": "a/model", "model_dir": "{folder}", "words": words}}
os.write(int(words[words.index("--result-fd") + 1]), (json.dumps(document) + "\\n").encode())
open("{folder}/prepared", "w").write(" ".join(words))
"""
LISTEN = """
import http.server, os, sys
words = sys.argv[1:]
open("{folder}/launched", "w").write(" ".join(words))
root = words[words.index("--adapter-local-root") + 1]
open("{folder}/adapters", "w").write(" ".join(sorted(os.listdir(root))))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""
FAIL = """
print("there is no option --speed-of-light")
raise SystemExit(2)
"""

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put programs of a test in the places of this project's."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(serve, "program", lambda name: str(tmp_path / name))

    def write(name: str, code: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!{sys.executable}\n{code.format(folder=tmp_path)}")
        path.chmod(0o755)

    write("lorax-shard", PREPARE)
    return write


def test_a_server_is_ready_with_its_adapters_and_ended_afterwards(
    install: Install, tmp_path: Path
) -> None:
    install("lorax-launcher", LISTEN)
    options = ("--model-id", "a/model", "--revision=main", "--max-batch-size", "4")
    with started(options, num_adapters=2) as server:
        with urllib.request.urlopen(f"{server.url}/health", timeout=10) as response:
            assert response.status == 200
        assert server.adapters == ("local:adapter-0", "local:adapter-1")
        assert (server.model, server.model_dir) == ("a/model", tmp_path)
        assert server.ready_s > 0
        pid = server.pid
    assert not psutil.pid_exists(pid)
    assert "adapter-0 adapter-1" in (tmp_path / "adapters").read_text()
    launched = (tmp_path / "launched").read_text()
    assert launched.endswith("--model-id a/model --revision=main --max-batch-size 4")
    prepared = (tmp_path / "prepared").read_text()
    assert prepared.endswith("--model-id a/model --revision=main")


def test_a_server_is_ended_when_the_benchmark_fails(install: Install) -> None:
    install("lorax-launcher", LISTEN)
    pids = []

    def fail() -> None:
        with started() as server:
            pids.append(server.pid)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not psutil.pid_exists(pids[0])


def test_a_server_that_does_not_start_says_why(install: Install) -> None:
    install("lorax-launcher", FAIL)
    with (
        pytest.raises(StartError, match=r"code 2:\nthere is no option --speed-of-light"),
        started(),
    ):
        pass


def test_a_model_that_cannot_be_prepared_is_told(install: Install) -> None:
    install("lorax-shard", FAIL)
    with pytest.raises(StartError, match="could not be prepared"), started():
        pass


def test_a_server_that_will_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_END_TIMEOUT_S", 0.2)
    code = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\ntime.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline()
    serve.end(process)
    assert process.returncode == -signal.SIGKILL


def test_the_peak_is_what_was_taken_at_most_by_all_processes() -> None:
    code = "block = bytearray(64 << 20)\nprint('taken', flush=True)\ninput()"
    with PeakMemory(os.getpid()) as memory:
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline()
        memory.look()
        child.communicate(b"\n")
    assert memory.peak_bytes >= resident_bytes(os.getpid()) * 0.5 + (64 << 20)
    assert resident_bytes(child.pid) == 0
