"""A child of the launcher that does what a scenario says; a program, not a module.

``FAKE_DIR`` holds ``scenario.json``: role (prepare, shard, router) to behaviour. The
program leaves ``<role>.pid`` there, and its command line and environment in ``<role>.json``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_DIR"])


def role_of(arguments: list[str]) -> str:
    if arguments[0] == "prepare":
        return "prepare"
    return "shard" if arguments[0] == "serve" else "router"


def report_descriptor(arguments: list[str]) -> int:
    if "--result-fd" in arguments:
        return int(arguments[arguments.index("--result-fd") + 1])
    config = json.loads(Path(arguments[arguments.index("--config") + 1]).read_text())
    return int(config["ready_fd"])


def log(level: str, message: str, **fields: object) -> None:
    record = {"ts": 0.0, "level": level, "logger": "fake", "message": message, **fields}
    print(json.dumps(record), flush=True)


def facts(role: str) -> dict[str, object]:
    if role == "prepare":
        folder = str(FOLDER)
        model = {"model_id": "tiny", "model_dir": folder, "tokenizer_dir": folder}
        return {**model, "revision": None, "adapter_dir": None}
    own: dict[str, object] = {"rank": 0, "elementwise": "torch"}
    if role == "router":
        own = {"url": "http://0.0.0.0:3000", "ports": {"port": 4567, "metrics_port": 4568}}
    return {**own, "parts": {"imports": 0.0, "listening": 0.25}}


def end_with_the_launcher() -> None:
    while sys.stdin.buffer.raw.read(4096):
        pass
    os._exit(4)


def run(role: str, behaviour: dict[str, object], report_fd: int) -> None:
    kind = behaviour["kind"]
    while role == "router" and not (FOLDER / "shard.pid").exists():
        time.sleep(0.01)
    if kind == "fail":
        log("error", str(behaviour.get("message", "")))
        sys.exit(int(str(behaviour["code"])))
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "abort":
        print(behaviour["words"], file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGABRT)
    if kind == "stuck":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if kind == "grandchild":
        helper = subprocess.Popen(["sleep", "600"])
        (FOLDER / "grandchild.pid").write_text(str(helper.pid))
    if kind == "unready":
        log("info", "loading for ever")
        signal.pause()
    for line in behaviour.get("lines", []):  # type: ignore[attr-defined]
        print(line, flush=True)
        print(line, file=sys.stderr, flush=True)
    answer = "not json" if kind == "garbage" else json.dumps(facts(role))
    with os.fdopen(report_fd, "w") as pipe:
        pipe.write(answer + "\n")
    if role == "prepare" and kind != "garbage":
        return
    while True:
        # Not signal.pause(): a signal that another thread takes would not end it.
        time.sleep(0.02)


def main() -> None:
    arguments = sys.argv[1:]
    role = role_of(arguments)
    threading.Thread(target=end_with_the_launcher, daemon=True).start()
    # A test makes a child die with SIGUSR1 and asks it to end with SIGTERM.
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(7))
    signal.signal(signal.SIGTERM, lambda *_: (log("info", f"{role} drained"), os._exit(0)))
    seen = {"argv": arguments, "environment": dict(os.environ)}
    (FOLDER / f"{role}.json").write_text(json.dumps(seen))
    # Written last, and at once: a test that sees it may send signals, this one killed or not.
    beside = FOLDER / f"{role}.pid.new"
    beside.write_text(str(os.getpid()))
    beside.replace(FOLDER / f"{role}.pid")
    scenario = json.loads((FOLDER / "scenario.json").read_text())
    run(role, scenario.get(role, {"kind": "serve"}), report_descriptor(arguments))


if __name__ == "__main__":
    main()
