"""Output tokens per second of the whole server, with and without adapters."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench.gpu_check.models import LLAMA_1B, TINY, LlamaShape, device_of, llama_config
from bench.gpu_check.report import Report
from bench.gpu_check.requests import (
    LoadResult,
    RequestLoad,
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
from tests.helpers.tiny_models import make_tokenizer

RANKS = (8, 16, 32, 64)


class ServingSizes(NamedTuple):
    """What the stage serves."""

    shape: LlamaShape
    dtype: str
    num_adapters: int
    num_requests: int
    prompt_tokens: int
    output_tokens: int


FULL = ServingSizes(LLAMA_1B, "bfloat16", 16, 128, 256, 128)
SMALL = ServingSizes(TINY, "float32", 2, 3, 12, 5)


def run(report: Report, *, small: bool) -> None:
    """Serve the same requests by each system in turn."""
    sizes, device = SMALL if small else FULL, device_of(small)
    begin(report, sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_dir = write_model(folder / "model", sizes, device)
        adapters = tuple(
            str(write_formula_adapter(model_dir, folder / f"adapter-{number}",
                                      rank=RANKS[number % len(RANKS)], seed=number))
            for number in range(sizes.num_adapters)
        )  # fmt: skip
        plain = RequestLoad(sizes.num_requests, sizes.prompt_tokens, sizes.output_tokens)
        loads = (plain, plain._replace(adapters=adapters))
        missing = missing_http()
        if missing:
            report.note(f"no HTTP server here ({', '.join(missing)} missing): the router's "
                        "service runs in the measuring process and calls the shard over gRPC")  # fmt: skip
        if missing or small:
            asyncio.run(serve_by_service(report, folder, model_dir, loads, sizes, device))
        else:
            serve_by_launcher(report, folder, model_dir, loads, sizes)


def begin(report: Report, sizes: ServingSizes) -> None:
    """Begin the table of a load."""
    report.table(
        f"{sizes.num_requests} requests at once, {sizes.prompt_tokens} tokens in, "
        f"{sizes.output_tokens} out",
        ("system", "adapters", "seconds", "output tokens/s"),
    )


def write_model(path: Path, sizes: ServingSizes, device: torch.device) -> Path:
    """Save a random model made on the device, with a small tokenizer."""
    from transformers import AutoModelForCausalLM

    path.mkdir(parents=True)
    make_tokenizer(path)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            llama_config(sizes.shape), dtype=getattr(torch, sizes.dtype)
        )
    model.save_pretrained(path)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    config = json.loads((path / "config.json").read_text())
    assert "head_dim" in config, "adapters are written by the config"
    return path


def add(report: Report, system: str, load: RequestLoad, outcome: LoadResult) -> None:
    """Add a line to the table."""
    report.row(system, len(load.adapters), outcome.seconds, outcome.tokens_s)


async def serve_by_service(
    report: Report,
    folder: Path,
    model_dir: Path,
    loads: tuple[RequestLoad, ...],
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
        async with router_service(model_dir, shard.uri) as parts:
            for load in loads:
                # The first brings adapters in and compiles kernels.
                await send_to_service(parts, load._replace(output_tokens=2))
                add(report, "service", load, await send_to_service(parts, load))


def serve_by_launcher(
    report: Report,
    folder: Path,
    model_dir: Path,
    loads: tuple[RequestLoad, ...],
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
    with server:
        for load in loads:
            send_to_server(server.url, load._replace(output_tokens=2))
            add(report, "launcher, router and shard", load, send_to_server(server.url, load))
