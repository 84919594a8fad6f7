"""An adapter of two gigabytes comes to a mixture that is busy with other streams."""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.acceptance.adapter_fleet import Adapter, Stream
from tests.acceptance.harness import Result
from tests.helpers.server import Server
from tests.helpers.tiny_models import make_tiny_model
from tokenizers import Tokenizer

NUM_STREAMS, SETTLE_S, QUIET_S = 8, 5.0, 25.0
# Of each stream: its next one begins anew, so that steps read as much at the end as at the begin.
NUM_TOKENS = 300
MOST_SLOWER = 1.2
RANK = 128
SHAPE: dict[str, int] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 128,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 22,
    "max_position_embeddings": 4096,
}


def write_adapter(folder: Path) -> int:
    """Write an adapter of all experts as PEFT has it; return its bytes."""
    folder.mkdir()
    experts, hidden, width = (
        SHAPE[each] for each in ("num_experts", "hidden_size", "moe_intermediate_size")
    )
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        start = f"base_model.model.model.layers.{layer}.mlp.experts"
        for name, width_in, width_out in (
            (f"{start}.base_layer", hidden, 2 * width),
            (start, width, hidden),
        ):
            tensors[f"{name}.lora_A.weight"] = torch.randn(experts * RANK, width_in) * 0.02
            tensors[f"{name}.lora_B.weight"] = torch.randn(width_out, experts * RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK,
        "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


class Client:
    """One that reads stream after stream, in a thread of its own, until it is told to stop."""

    def __init__(self, text: str, ids: list[int], url: str) -> None:
        self.streams: list[Stream] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(text, ids, url), daemon=True)
        self._thread.start()

    def _read(self, text: str, ids: list[int], url: str) -> None:
        asked = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True}
        while not self._stopped.is_set():
            self.streams.append(Stream(text, ids, asked))
            self.streams[-1].run(url)

    def stop(self) -> None:
        """Read the stream to its end, and no further one."""
        self._stopped.set()
        self._thread.join(60)


def gaps_between(streams: list[Stream], start: float, end: float) -> list[float]:
    """Return the times between tokens of which the later one came within a time."""
    return [
        later - earlier
        for stream in streams
        for earlier, later in zip(stream.times, stream.times[1:], strict=False)
        if start <= later <= end
    ]


def p95(gaps: list[float]) -> float:
    """Return the 95th percentile."""
    return statistics.quantiles(gaps, n=20)[-1]


def adapter_bytes(server: Server) -> float:
    """Return what adapters take on the shard, as the metrics say."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    found = [line for line in lines if line.startswith("lorax_adapter_bytes_held ")]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def point_large() -> Result:
    """The times between tokens of 8 streams while it is read and loaded, by those before."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = make_tiny_model("qwen3_moe", root / "model", **SHAPE)
        size = write_adapter(root / "large")
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        flags = (
            "--model-id", str(model), "--adapter-local-root", str(root), "--adapter-store-dir",
            str(root / "store"), "--adapter-memory-fraction", "0.5", "--num-blocks", "2048",
        )  # fmt: skip
        with Server(*flags) as server:
            texts = [f"the adapter of request {number}" for number in range(NUM_STREAMS)]
            clients = [Client(each, tokenizer.encode(each).ids, server.url) for each in texts]
            time.sleep(SETTLE_S)
            before = time.perf_counter()
            time.sleep(QUIET_S)
            asked = time.perf_counter()
            one = {"max_new_tokens": 1, "ignore_eos_token": True}
            adapter = Adapter(str(root / "large"), "local", root / "large")
            first = Stream("the adapter", tokenizer.encode("the adapter").ids, one, adapter)
            first.run(server.url)
            loaded = time.perf_counter()
            planned = adapter_bytes(server)
            for client in clients:
                client.stop()
    streams = [stream for client in clients for stream in client.streams]
    is_whole = all(not each.error and len(each.times) == NUM_TOKENS for each in streams)
    if first.error:
        return Result(False, f"the adapter was refused: {first.error[:300]}")
    quiet, busy = gaps_between(streams, before, asked), gaps_between(streams, asked, loaded)
    ratio = p95(busy) / p95(quiet)
    is_planned = abs(planned - size) <= 0.02 * size
    figure = (
        f"{size / 1e9:.2f} GB in {loaded - asked:.1f} s; p95 between tokens {p95(quiet) * 1e3:.0f} "
        f"-> {p95(busy) * 1e3:.0f} ms ({ratio:.2f}x, median {statistics.median(quiet) * 1e3:.0f} -> "
        f"{statistics.median(busy) * 1e3:.0f}, longest {max(busy) * 1e3:.0f}); "
        f"{planned / 1e9:.2f} GB counted"
    )
    return Result(ratio <= MOST_SLOWER and is_planned and is_whole, figure)
