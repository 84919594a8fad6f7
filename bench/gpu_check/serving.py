"""Output tokens per second of the whole server: greedy, sampled, with adapters.

Every load is sent twice and the second counts: the first brings adapters in, fills caches and
compiles what is left to compile.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench.gpu_check.loads import (
    FULL,
    SMALL,
    RequestLoad,
    ServingSizes,
    add,
    begin,
    read_tokenizer,
    write_model,
)
from bench.gpu_check.models import device_of
from bench.gpu_check.report import Report
from bench.gpu_check.requests import (
    launcher_command,
    launcher_environment,
    missing_http,
    router_service,
    send_to_server,
    send_to_service,
)
from tests.helpers.formula_adapters import write_formula_adapter
from tests.helpers.server import Server
from tests.helpers.shard_process import ShardProcess

RANKS = (8, 16, 32, 64)


def run(report: Report, *, small: bool) -> None:
    """Serve the same requests by each system in turn."""
    sizes, device = SMALL if small else FULL, device_of(small)
    begin(report)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_dir = write_model(folder / "model", sizes, device)
        adapters = tuple(
            str(write_formula_adapter(model_dir, folder / f"adapter-{number}",
                                      rank=RANKS[number % len(RANKS)], seed=number))
            for number in range(sizes.num_adapters)
        )  # fmt: skip
        loads = (
            sizes.load,
            sizes.load._replace(adapters=adapters),
            sizes.sampled._replace(is_sampled=False),
            sizes.sampled,
        )
        missing = missing_http()
        if missing:
            report.note(f"no HTTP server here ({', '.join(missing)} missing): the router's "
                        "service runs in the measuring process and calls the shard over gRPC")  # fmt: skip
        if missing or small:
            asyncio.run(serve_by_service(report, folder, model_dir, loads, sizes, device))
        else:
            serve_by_launcher(report, folder, model_dir, loads, sizes)


async def serve_by_service(
    report: Report,
    folder: Path,
    model_dir: Path,
    loads: Sequence[RequestLoad],
    sizes: ServingSizes,
    device: torch.device,
) -> None:
    """Serve by a shard process and the router's service."""
    settings: dict[str, Any] = {
        "device": device.type, "dtype": sizes.dtype, "linear_backend": "auto",
        "adapter_store_dir": str(folder / "store"), "adapter_local_roots": [str(folder)],
        "kv_memory_fraction": 0.5,
    }  # fmt: skip
    if device.type == "cpu":
        settings |= {"num_blocks": 64, "linear_backend": "torch"}
    with ShardProcess(folder, model_dir, **settings) as shard:
        async with router_service(model_dir, shard.uri) as timed:
            for load in loads:
                await send_to_service(timed, load)
                add(report, "service", load, await send_to_service(timed, load))


def serve_by_launcher(
    report: Report,
    folder: Path,
    model_dir: Path,
    loads: Sequence[RequestLoad],
    sizes: ServingSizes,
) -> None:
    """Serve by launcher, router and shard over HTTP."""
    options = ["--model-id", str(model_dir), "--dtype", sizes.dtype, "--max-total-tokens", "512",
               "--max-batch-prefill-tokens", "2048", "--adapter-local-root", str(folder),
               "--default-adapter-source", "local",
               "--cache-dir", str(folder / "cache")]  # fmt: skip
    server = Server(
        command=lambda port: launcher_command(port, options),
        env=launcher_environment(folder), ready_timeout_s=90.0,
    )  # fmt: skip
    tokenizer = read_tokenizer(model_dir)
    with server:
        for load in loads:
            send_to_server(server.url, load, tokenizer)
            result = send_to_server(server.url, load, tokenizer)
            add(report, "launcher, router and shard", load, result)
