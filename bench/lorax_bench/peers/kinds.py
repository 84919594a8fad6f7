"""The systems that can be compared, by name, and how each is started.

All are given the same work on the same cores: float32 weights and cache, greedy, no prefix cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorax_bench.apis import OpenAI
from lorax_bench.drive import Target, drive
from lorax_bench.peers.environments import Environments
from lorax_bench.peers.process_tree import ProcessTree
from lorax_bench.peers.worker_peer import WorkerPeer
from lorax_bench.records import Record
from lorax_bench.requests import Workload
from lorax_bench.serve import end, free_port, started, wait_until_ready

OURS = "ours"
STATIC_BATCH = 8
_CACHE_GIB, _CACHE_TOKENS = 2, 40_000
_BASE = "base"

Answer = Callable[[Workload], list[Record]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all systems of a comparison have in common."""

    model_dir: Path
    adapters: Sequence[Path] = ()
    max_requests: int
    """Of a workload, so that each system may run all of them at once."""
    options: Sequence[str] = ()
    """Of this server's launcher."""
    environments: Environments = field(default_factory=Environments.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerKind:
    """A system: what it can do, and how it is started."""

    title: str
    start: Callable[[Setting], AbstractContextManager[Answer]]
    environment: str | None = None
    """Which it runs in; None: this project's."""
    with_base: bool = True
    with_adapters: bool = False
    is_server: bool = False
    is_fast: bool = True
    """One that is not is warmed up with a few tokens, and has one turn with adapters."""

    def can_serve(self, num_adapters: int) -> bool:
        """Whether it answers requests for so many adapters in one batch, and rightly."""
        return self.with_adapters if num_adapters else self.with_base


@contextlib.contextmanager
def _ours(setting: Setting) -> Iterator[Answer]:
    # Adapters of equal numbers are equal: both are made by one formula.
    options = ["--prefix-caching", "false", *setting.options]
    if setting.adapters:
        options += ["--max-active-adapters", str(len(setting.adapters))]
    with started(options, num_adapters=len(setting.adapters)) as server:
        yield _over_http(server.url, server.model, server.adapters)


@contextlib.contextmanager
def _ours_with_two_ranks(setting: Setting) -> Iterator[Answer]:
    with _ours(dataclasses.replace(setting, options=[*setting.options, "--num-shard", "2"])) as run:
        yield run


def vllm_command(python: Path, port: int, setting: Setting) -> list[str]:
    """Return the command line of vLLM's server."""
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1",
        "--port", str(port), "--model", str(setting.model_dir), "--served-model-name", _BASE,
        "--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching",
        "--max-num-seqs", str(setting.max_requests), "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if num := len(setting.adapters):
        command += [
            "--enable-lora", "--max-loras", str(num), "--max-cpu-loras", str(num),
            "--max-lora-rank", "16", "--lora-modules",
            *(f"{folder.name}={folder}" for folder in setting.adapters),
        ]  # fmt: skip
    return command


@contextlib.contextmanager
def _vllm(setting: Setting) -> Iterator[Answer]:
    python, port = setting.environments.python("vllm"), free_port()
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": str(_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory(prefix="lorax-bench-") as folder:
        log = Path(folder) / "vllm.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                vllm_command(python, port, setting), env=os.environ | variables, cwd=folder,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        tree = ProcessTree(process.pid)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, process, log)
            yield _in_turn(
                tree, _over_http(url, _BASE, [folder.name for folder in setting.adapters])
            )
        finally:
            tree.go_on()
            tree.kill()
            end(process)


def _in_turn(tree: ProcessTree, answer: Answer) -> Answer:
    """Hold processes still but for their turn."""

    def run(workload: Workload) -> list[Record]:
        tree.go_on()
        try:
            return answer(workload)
        finally:
            tree.pause()

    tree.pause()
    return run


def _over_http(url: str, model: str, adapters: Sequence[str]) -> Answer:
    target = Target(url=url, api=OpenAI(model=model, adapters=adapters), timeout_s=3600.0)
    return lambda workload: asyncio.run(drive(target, workload))


def _worker(
    worker: str, work: Callable[[Setting], Mapping[str, Any]], environment: str | None = None
) -> Callable[[Setting], AbstractContextManager[Answer]]:
    """Return how a worker is started, in its environment or in this project's."""

    @contextlib.contextmanager
    def start(setting: Setting) -> Iterator[Answer]:
        python, model = Path(sys.executable), setting.model_dir
        if environment is not None:
            python = setting.environments.python(environment)
            model = setting.environments.model(environment, model)
        all_work: dict[str, Any] = {
            "model": str(model), "adapters": [str(folder) for folder in setting.adapters],
            **work(setting),
        }  # fmt: skip
        with WorkerPeer(python, worker, all_work) as peer:
            yield peer.run

    return start


PEERS: dict[str, PeerKind] = {
    OURS: PeerKind(title="this server", start=_ours, with_adapters=True, is_server=True),
    "ranks": PeerKind(
        title="this server, two ranks of it", start=_ours_with_two_ranks, with_adapters=True,
        is_server=True,
    ),
    "vllm": PeerKind(
        title="vLLM for CPU", start=_vllm, environment="vllm", with_adapters=True, is_server=True
    ),
    # Its adapters of one batch all get the first one's answers, so that it has no turn with them.
    "openvino": PeerKind(
        title="OpenVINO GenAI",
        start=_worker(
            "openvino.py",
            lambda setting: {"cache_gib": _CACHE_GIB, "max_requests": setting.max_requests},
            "openvino",
        ),
        environment="openvino",
    ),
    "llama-cpp": PeerKind(
        title="llama.cpp",
        start=_worker(
            "llama_cpp.py",
            lambda setting: {
                "cache_tokens": _CACHE_TOKENS, "max_requests": setting.max_requests,
                "threads": len(os.sched_getaffinity(0)),
            },
            "llama-cpp",
        ),
        environment="llama-cpp",
        is_fast=False,
    ),
    "static": PeerKind(
        title=f"transformers, static batches of {STATIC_BATCH}",
        start=_worker("static.py", lambda setting: {"batch_size": STATIC_BATCH}),
        is_fast=False,
    ),
    "continuous": PeerKind(
        title="transformers, continuous batching",
        start=_worker("continuous.py", lambda setting: {}),
        is_fast=False,
    ),
    "peft": PeerKind(
        title=f"PEFT, mixed batches of {STATIC_BATCH}",
        start=_worker("static.py", lambda setting: {"batch_size": STATIC_BATCH}),
        with_base=False, with_adapters=True, is_fast=False,
    ),
}  # fmt: skip
