"""Routers and launchers that are killed: what is left, and how soon the next one serves."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from pathlib import Path

import httpx
import psutil
from tests.acceptance.faults.server import (
    faulty_server,
    metric,
    processes,
    start_times,
    until_healthy,
)
from tests.acceptance.harness import Result
from tests.helpers.round_robin import RollingRestart
from tests.helpers.server import Server

# New requests are served again within so many times what the router took to start by itself.
MOST_START = 2.0
_ADAPTERS = ("pirate", "sentiment", "json-only")


def _ask(server: Server, model: str) -> str:
    body = {
        "model": model, "max_tokens": 16, "temperature": 0.0,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }  # fmt: skip
    return str(server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"])


def _own_start_s(server: Server) -> float:
    """Return what the router took to start, without what it waited for the shards."""
    waited = ("waiting for the shards", "warm-up of the shards")
    parts = start_times(server)["router"]["parts"]
    return sum(seconds for part, seconds in parts.items() if part not in waited)


def point_router() -> Result:
    """Three times: the same answers, by names that were given by hand, from the same shards."""
    with tempfile.TemporaryDirectory() as folder:
        registry = ("--adapter-registry", str(Path(folder) / "registry"))
        with faulty_server(*registry) as server:
            cold_s = _own_start_s(server)
            admin = f"http://127.0.0.1:{server.admin_port}/v1/load_lora_adapter"
            for name in _ADAPTERS:
                given = {"lora_name": f"my-{name}", "lora_path": f"local:{name}"}
                httpx.post(admin, json=given, timeout=60).raise_for_status()
            names = ["base", *_ADAPTERS, *(f"my-{name}" for name in _ADAPTERS)]
            before = {name: _ask(server, name) for name in names}
            shards = {each.pid for each in processes(server, "lorax-shard")}
            seconds, num_wrong = [], 0
            for _ in range(3):
                processes(server, "lorax-router")[0].send_signal(signal.SIGKILL)
                begun = time.perf_counter()
                until_healthy(server)
                _ask(server, "base")
                seconds.append(time.perf_counter() - begun)
                num_wrong += sum(_ask(server, name) != before[name] for name in names)
                num_wrong += {each.pid for each in processes(server, "lorax-shard")} != shards
            phases = "lorax_adapter_cold_start_duration_sum"
            read_s = sum(metric(server, phases, f'"{each}"') for each in ("download", "parse"))
            code = server.stop()
    worst = max(seconds) / cold_s
    figure = (
        f"answers after {', '.join(f'{each:.1f}' for each in seconds)} s, {worst:.2f}x of the router's own "
        f"start ({cold_s:.1f} s); {num_wrong} of {3 * len(names)} wrong; reading adapters again took "
        f"{read_s:.3f} s; exit code {code}"
    )
    return Result(worst <= MOST_START and not num_wrong and code == 0, figure)


def point_launcher() -> Result:
    """No process is left, and the next start at the same port works."""
    with faulty_server() as server:
        assert server.process is not None
        launcher = psutil.Process(server.process.pid)
        children = launcher.children(recursive=True)
        launcher.kill()
        server.process.wait(30)
        _, alive = psutil.wait_procs(children, timeout=30)
        command = server._command
    again = Server(command=lambda _: command, env=server._env)
    again.port = server.port
    with again:
        answer = _ask(again, "pirate")
        code = again.stop()
    figure = f"{len(children)} processes, {len(alive)} left; the next server answers {answer!r}"
    return Result(bool(children) and not alive and bool(answer) and code == 0, figure)


def point_rolling() -> Result:
    """Each is told to stop while it streams; who asks follows what the servers say of their health."""
    questions = ("What is the capital of France?", "Name three colours.", "Count to ten.")
    parameters = {"max_new_tokens": 48, "ignore_eos_token": True, "seed": 7}
    bodies = [{"inputs": each, "parameters": parameters} for each in questions * 8]

    async def scene() -> RollingRestart:
        rolling = RollingRestart(lambda: faulty_server("--max-batch-size", "16"), bodies)
        await asyncio.wait_for(rolling.run(), 600)
        return rolling

    rolling = asyncio.run(scene())
    whole = [each for client in rolling.answers for each in client]
    num_short = sum(len(each) != 48 or not each[-1].get("generated_text") for each in whole)
    texts = {
        (body["inputs"], answer[-1].get("generated_text"))
        for body, client in zip(bodies, rolling.answers, strict=True)
        for answer in client
    }
    figure = f"{len(whole)} streams, {num_short} not whole, {len(texts)} texts to {len(questions)} questions; "
    figure += f"sent on: {rolling.balancer.sent_on}"
    is_good = not num_short and len(texts) == len(questions) and rolling.exit_codes == [0, 0]
    return Result(is_good, figure)
