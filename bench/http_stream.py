"""How many tokens a second one router process streams over HTTP, with a FakeShard behind it.

Three processes: a FakeShard behind gRPC, the router, and this one, which reads
``--streams`` event streams and counts. Besides the rate it prints the router's
processor time, which other load on the machine does not change.

    python -m bench.http_stream --streams 256 --tokens 200
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import tempfile
import time
from pathlib import Path

import psutil

from lorax_contract.config import RouterConfig


def serve_shard(folder: str) -> None:
    """Serve a FakeShard on a unix socket."""
    from tests.helpers.fake_shard_server import serve

    from lorax_router.shards.fake.shard import FakeModel, FakeShard

    async def run() -> None:
        model = FakeModel(eos_token_ids=frozenset())
        shard = FakeShard(model, num_blocks=20_000, block_size=16)
        async with serve([shard], Path(folder)):
            await asyncio.Event().wait()

    asyncio.run(run())


def serve_router(config: str) -> None:
    """Run the router process."""
    from lorax_router.app import run

    run(config)


async def read_stream(port: int, num_tokens: int) -> int:
    """Read one stream to its end and return its number of events."""
    body = json.dumps(
        {
            "inputs": "w1 w2 w3",
            "parameters": {"max_new_tokens": num_tokens, "ignore_eos_token": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /generate_stream HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    )
    writer.write(body)
    num = 0
    while part := await reader.read(65536):
        num += part.count(b"data: ")
    writer.close()
    return num


async def measure(port: int, router: psutil.Process, num_streams: int, num_tokens: int) -> None:
    """Run all streams at once and print what they reached."""
    await asyncio.gather(*(read_stream(port, 10) for _ in range(num_streams)))
    cpu, start = sum(router.cpu_times()[:2]), time.perf_counter()
    counts = await asyncio.gather(*(read_stream(port, num_tokens) for _ in range(num_streams)))
    wall, cpu = time.perf_counter() - start, sum(router.cpu_times()[:2]) - cpu
    total = sum(counts)
    print(f"{num_streams} streams x {num_tokens} tokens: {total} events")
    print(f"wall time   {wall:7.2f} s   {total / wall:9.0f} tokens/s")
    print(
        f"router CPU  {cpu:7.2f} s   {total / cpu:9.0f} tokens/s, {cpu / total * 1e6:.1f} us/token"
    )


def main() -> None:
    """Start the processes, measure, end them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    from tests.helpers.http_app import word_tokenizer

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        word_tokenizer().save(f"{folder}/tokenizer.json")
        shard = context.Process(target=serve_shard, args=(folder,))
        shard.start()
        while not Path(folder, "rank-0").exists():
            time.sleep(0.05)
        port = free_port()
        config = RouterConfig(
            model_id="fake",
            tokenizer_dir=folder,
            shard_uri=f"unix:{folder}/rank-0",
            hostname="127.0.0.1",
            port=port,
            max_batch_size=512,
            log_level="warning",
        )
        router = context.Process(target=serve_router, args=(config.to_json(),))
        router.start()
        try:
            wait_for(port)
            asyncio.run(measure(port, psutil.Process(router.pid), options.streams, options.tokens))
        finally:
            router.terminate()
            router.join()
            shard.terminate()
            shard.join()


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
