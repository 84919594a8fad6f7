"""What one streamed token costs a router, over HTTP, with a FakeShard behind it.

Processes of their own: a FakeShard behind gRPC, the router, and this one, which reads
``--streams`` event streams in each dialect and counts them. What is measured is the router's
processor time, requests and prompts included, divided by the tokens; other load on the machine
hardly changes it. ``--step-ms 0`` has the shard answer as fast as it can, so that the router is
what all wait for.

``core`` is the engine loop in a process alone, with the same shard and as many streams, whose
chunks are taken and dropped: scheduler, messages to and from the shard, a chunk for each stream.
``front`` is what a router takes beyond that. With ``--http-workers N`` fronts are processes of their
own: then ``core`` is the router's process, what it tells the fronts included, and ``front`` all of
theirs together, both measured. ``turnaround``: in that process, one step in
flight, from the bytes of a step's reply until those of the next request are there for the
transport; as it passed, and as the processor counts it.

    python -m bench.http_stream --streams 256 --tokens 200 --step-ms 0 16 --http-workers 0 2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import uvloop

from lorax_contract.config import RouterConfig

NUM_BLOCKS, BLOCK_SIZE = 20_000, 16
READY = "ready"
FRONT = "lorax_router.fronts.main"
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a stream is asked for, and how many events it has beside those of its tokens."""

    path: str
    # Of the document: what the prompt is called, where the number of tokens stands.
    prompt: dict[str, Any]
    num_other_events: int

    def body(self, num_tokens: int) -> bytes:
        """Return a body that asks for so many tokens."""
        document: dict[str, Any] = {**self.prompt}
        if self.path == "/generate_stream":
            parameters = {"max_new_tokens": num_tokens, "ignore_eos_token": True}
            document["parameters"] = parameters
        else:
            document |= {"model": "fake", "stream": True, "max_tokens": num_tokens}
        return json.dumps(document).encode()


DIALECTS = {
    "generate_stream": Dialect("/generate_stream", {"inputs": "w1 w2 w3"}, 0),
    "completions": Dialect("/v1/completions", {"prompt": "w1 w2 w3"}, 1),
    "chat": Dialect(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "w1 w2 w3"}]}, 2
    ),
}


# --- the processes ----------------------------------------------------------------


def serve_shard(folder: str, step_s: float) -> None:
    """Serve a FakeShard on a unix socket."""
    from tests.helpers.fake_shard_server import serve

    from lorax_router.shards.fake.shard import FakeModel, FakeShard

    async def run() -> None:
        model = FakeModel(eos_token_ids=frozenset())
        shard = FakeShard(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, step_delay_s=step_s)
        async with serve([shard], Path(folder)):
            # The socket is there a while before anybody listens to it.
            Path(folder, READY).touch()
            await asyncio.Event().wait()

    asyncio.run(run())


def serve_router(config: str) -> None:
    """Run the router process."""
    from lorax_router.app import run

    run(config)


def serve_core(folder: str, num_streams: int, num_tokens: int, depth: int, out: Connection) -> None:
    """Run the engine loop alone; send its processor seconds and the seconds of each turn."""
    from bench.engine_core import run_core

    out.send(uvloop.run(run_core(f"unix:{folder}/rank-0", num_streams, num_tokens, depth)))


@contextmanager
def started(target: Any, *args: Any) -> Iterator[Any]:
    """Run a process until the end of the block."""
    process = SPAWN.Process(target=target, args=args)
    process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join()


@contextmanager
def shard(folder: str, step_s: float) -> Iterator[None]:
    """A shard on a socket in the folder."""
    ready = Path(folder, READY)
    for path in (ready, Path(folder, "rank-0")):
        path.unlink(missing_ok=True)
    with started(serve_shard, folder, step_s) as process:
        while not ready.exists():
            if not process.is_alive():
                raise SystemExit("the shard ended before it was ready")
            time.sleep(0.05)
        yield


@contextmanager
def router(
    folder: str, num_streams: int, num_fronts: int
) -> Iterator[tuple[int, psutil.Process, list[psutil.Process]]]:
    """A router in front of the shard: its port, its process and those of its fronts."""
    port = free_port()
    config = RouterConfig(
        model_id="fake",
        tokenizer_dir=folder,
        shard_uri=f"unix:{folder}/rank-0",
        hostname="127.0.0.1",
        port=port,
        max_batch_size=num_streams,
        max_concurrent_requests=2 * num_streams,
        log_level="warning",
        http_workers=num_fronts,
    )
    with started(serve_router, config.to_json()) as process:
        wait_for(port)
        core = psutil.Process(process.pid)
        yield port, core, wait_for_fronts(core, num_fronts)


def wait_for_fronts(core: psutil.Process, num_fronts: int) -> list[psutil.Process]:
    """Return a router's fronts when all have started: its port is open before."""
    deadline = time.monotonic() + 30.0
    while True:
        fronts = [each for each in core.children() if FRONT in each.cmdline()]
        if len(fronts) == num_fronts:
            return fronts
        if time.monotonic() > deadline:
            raise SystemExit(f"the router has {len(fronts)} fronts, not {num_fronts}")
        time.sleep(0.05)


# --- the client -------------------------------------------------------------------


async def read_stream(port: int, dialect: Dialect, num_tokens: int) -> None:
    """Read one stream to its end; it must have an event for each token."""
    body = dialect.body(num_tokens)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST %s HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
        % (dialect.path.encode(), len(body))
    )
    writer.write(body)
    num, tail = 0, b""
    while part := await reader.read(65536):
        part = tail + part
        num += part.count(b"data: ")
        # What an event's first bytes may be cut into.
        tail = part[-5:] if b"data: " not in part[-5:] else b""
    writer.close()
    if num != num_tokens + dialect.num_other_events:
        raise SystemExit(f"a stream of {dialect.path} had {num} events for {num_tokens} tokens")


async def read_streams(port: int, dialect: Dialect, num_streams: int, num_tokens: int) -> None:
    """Read all streams at once."""
    await asyncio.gather(*(read_stream(port, dialect, num_tokens) for _ in range(num_streams)))


def measure_dialect(
    port: int,
    core: psutil.Process,
    fronts: list[psutil.Process],
    dialect: Dialect,
    options: argparse.Namespace,
) -> list[tuple[float, float]]:
    """Return microseconds for a token, round by round: of the router's process, of its fronts."""
    uvloop.run(read_streams(port, dialect, options.streams, 10))
    num, rounds = options.streams * options.tokens, []
    for _ in range(options.rounds):
        before = cpu_s([core]), cpu_s(fronts)
        uvloop.run(read_streams(port, dialect, options.streams, options.tokens))
        taken = cpu_s([core]) - before[0], cpu_s(fronts) - before[1]
        rounds.append((taken[0] / num * 1e6, taken[1] / num * 1e6))
    return rounds


def cpu_s(processes: list[psutil.Process]) -> float:
    """Return the processor seconds that processes have taken."""
    return float(sum(sum(each.cpu_times()[:2]) for each in processes))


def measure_core(
    folder: str, options: argparse.Namespace, depth: int
) -> tuple[float, list[tuple[float, float]]]:
    """Return the core's microseconds for a token, and the seconds of each turn."""
    receiving, sending = SPAWN.Pipe(duplex=False)
    with started(serve_core, folder, options.streams, options.tokens, depth, sending):
        sending.close()
        cpu_s, turns = receiving.recv()
    return cpu_s / (options.streams * options.tokens) * 1e6, turns


def measure(folder: str, step_ms: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures with one step time."""
    figures: dict[str, Any] = {}
    cores, turns, thread_turns = [], [], []
    for depth in (2, 1) * options.rounds:
        with shard(folder, step_ms / 1e3):
            core_us, turns_s = measure_core(folder, options, depth)
        if depth == 1:
            # With two steps in flight a reply and a request cross: only lockstep shows the turn.
            turns.append(statistics.median(passed for passed, _ in turns_s) * 1e3)
            thread_turns.append(statistics.median(thread for _, thread in turns_s) * 1e3)
        else:
            cores.append(core_us)
    core = figures["core_us"] = spread(cores)
    figures["turnaround_ms"] = spread(turns)
    figures["turnaround_processor_ms"] = spread(thread_turns)
    for num_fronts in options.http_workers:
        figures[f"{num_fronts} fronts"] = measure_router(
            folder, step_ms, num_fronts, core["median"], options
        )
    return figures


def measure_router(
    folder: str, step_ms: float, num_fronts: int, core_us: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the figures of each dialect; without fronts the core's are those of it alone."""
    figures: dict[str, Any] = {}
    with (
        shard(folder, step_ms / 1e3),
        router(folder, options.streams, num_fronts) as (port, core, fronts),
    ):
        for name in options.dialects:
            rounds = measure_dialect(port, core, fronts, DIALECTS[name], options)
            cores = [each if num_fronts else core_us for each, _ in rounds]
            together = [sum(each) for each in rounds]
            rest = [whole - of_core for whole, of_core in zip(together, cores, strict=True)]
            figures[name] = {
                "together_us": spread(together), "core_us": spread(cores), "front_us": spread(rest)
            }  # fmt: skip
    return figures


def spread(values: list[float]) -> dict[str, float]:
    """Return the median of rounds, and how far they lie apart."""
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def main() -> None:
    """Print the figures as tables, and as JSON with --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[0.0, 16.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dialects", nargs="+", choices=list(DIALECTS), default=list(DIALECTS))
    parser.add_argument("--http-workers", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.json").write_text(tokenizer_json())
        Path(folder, "chat_template.jinja").write_text(chat_template())
        for step_ms in options.step_ms:
            figures[f"{step_ms:g} ms"] = result = measure(folder, step_ms, options)
            print_table(step_ms, result, options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def print_table(step_ms: float, figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the figures of one step time."""

    def shown(name: str, values: dict[str, float]) -> str:
        return (
            f"{name:<28} {values['median']:7.2f}  ({values['least']:.2f} to {values['most']:.2f})"
        )

    print(f"{options.streams} streams x {options.tokens} tokens, steps of {step_ms:g} ms")
    print(shown("core, us a token", figures["core_us"]))
    print(shown("turnaround, ms", figures["turnaround_ms"]))
    print(shown("  of the processor", figures["turnaround_processor_ms"]))
    for num_fronts in options.http_workers:
        print(f"--http-workers {num_fronts}")
        for name in options.dialects:
            found = figures[f"{num_fronts} fronts"][name]
            print(shown(f"{name}, us a token", found["together_us"]))
            print(shown("  of that, the core", found["core_us"]))
            print(shown("  of that, the front", found["front_us"]), flush=True)


def tokenizer_json() -> str:
    """The tokenizer of the tests' HTTP applications."""
    from tests.helpers.http_app import word_tokenizer

    return str(word_tokenizer().to_str())


def chat_template() -> str:
    """Their chat template."""
    from tests.helpers.http_app import TEMPLATE

    return TEMPLATE


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Wait until the router accepts connections."""
    for _ in range(400):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit("the router did not become ready")


if __name__ == "__main__":
    main()
