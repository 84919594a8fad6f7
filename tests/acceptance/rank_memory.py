"""What each rank of a large model keeps in memory, beside one process that has it whole."""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.acceptance.harness import Result
from tests.helpers.shard_process import ShardProcess
from tests.helpers.tiny_models import make_tiny_model, make_tokenizer

from lorax_contract.step import WarmupSpec
from lorax_router.shards.group import ShardGroup
from lorax_shard.linear.backends import OneDnnBackend

# About 600 million parameters; float32, as they are computed with on CPUs.
_LAYERS, _WIDTH, _INNER, _VOCABULARY, _HEADS, _KEY_HEADS = 12, 2048, 5632, 16384, 32, 8
LEAST_BYTES = 2e9
MAX_SHARE = 0.6
_WARM_UP = WarmupSpec(max_input_length=24, max_total_tokens=32, max_step_tokens=32, max_rows=4)


def make_large_model(folder: Path) -> int:
    """Write a random Llama layer by layer; returns the bytes of its weights."""
    import transformers

    folder.mkdir()
    make_tokenizer(folder)
    config = transformers.LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=_WIDTH, intermediate_size=_INNER,
        num_hidden_layers=_LAYERS, num_attention_heads=_HEADS, num_key_value_heads=_KEY_HEADS,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(5)
    by_file: dict[str, list[str]] = {}
    for key in shapes:
        words = key.split(".")
        place = words[2] if "layers" in words else "rest"
        by_file.setdefault(f"model-{place}.safetensors", []).append(key)
    for file, keys in by_file.items():
        tensors = {
            key: torch.randn(shapes[key].shape, generator=generator).mul_(0.02) for key in keys
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    num_bytes = sum(tensor.numel() * 4 for tensor in shapes.values())
    weight_map = {key: file for file, keys in by_file.items() for key in keys}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return num_bytes


def proportional_bytes(pid: int) -> dict[str, int]:
    """Return the memory of a process by kind; pages that several share count in parts."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.startswith("Pss"):
            found[name] = int(value.split()[0]) * 1024
    return found


def measure_group(
    model_dir: Path, num_ranks: int, folder: Path, linears: str
) -> list[dict[str, int]]:
    """Start ranks, have them warm up, and return the memory of each."""
    folders = [folder / f"rank-{rank}" for rank in range(num_ranks)]
    for each in folders:
        each.mkdir(parents=True)
    uris = [f"unix:{each}/socket" for each in folders]

    def start(rank: int) -> ShardProcess:
        return ShardProcess(
            folders[rank], model_dir, rank=rank, world_size=num_ranks, shard_uris=uris,
            rendezvous=f"file://{folder}/meeting", num_blocks=16, linear_backend=linears,
            adapter_store_dir=str(folder / "store"), group_timeout_s=600.0,
        )  # fmt: skip

    with ThreadPoolExecutor(num_ranks) as pool, ExitStack() as held:
        shards = list(pool.map(start, range(num_ranks)))
        for shard in shards:
            held.push(shard.__exit__)
        for shard in shards:
            if shard.facts is None:
                raise RuntimeError(shard.log_path.read_text()[-2000:])
        asyncio.run(_warm_up(uris[0]))
        return [proportional_bytes(shard.process.pid) for shard in shards]


async def _warm_up(uri: str) -> None:
    group = await ShardGroup.connect(uri)
    try:
        await group.warmup(_WARM_UP)
    finally:
        await group.close()


def point_memory() -> Result:
    """Memory of one process and of two ranks, less that of shards with a tiny model."""
    # A fetcher that is ending may still write below it.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        root = Path(name)
        tiny = make_tiny_model("llama", root / "tiny")
        large = root / "large"
        model_bytes = make_large_model(large)
        idle = {n: measure_group(tiny, n, root / f"idle-{n}", "torch") for n in (1, 2)}
        parts, shares = [], []
        for linears in _linears():
            own = {}
            for n in (1, 2):
                busy = measure_group(large, n, root / f"{linears}-{n}", linears)
                own[n] = _beyond(busy, idle[n])
            (one,) = own[1]
            shares.append(max(own[2]) / one if one >= LEAST_BYTES else math.nan)
            ranks = " and ".join(f"{each / 1e9:.2f}" for each in own[2])
            parts.append(f"linears {linears}: {one / 1e9:.2f} GB, ranks {ranks}: {shares[-1]:.2f}")
    ok = model_bytes >= LEAST_BYTES and all(share < MAX_SHARE for share in shares)
    beyond = f"{model_bytes / 1e9:.2f} GB of weights, memory beyond an idle shard's"
    return Result(ok, f"{beyond}: {'; '.join(parts)}")


def _linears() -> list[str]:
    """Return the ways to compute linears: ``auto`` may choose another one in each process."""
    packed = OneDnnBackend.probe(torch.device("cpu"), torch.float32) is None
    return ["torch", "onednn"] if packed else ["torch"]


def _beyond(busy: Sequence[dict[str, int]], idle: Sequence[dict[str, int]]) -> list[int]:
    for rank, (mine, without) in enumerate(zip(busy, idle, strict=True)):
        kinds = ", ".join(
            f"{kind} {(mine[kind] - without.get(kind, 0)) / 1e9:.2f}"
            for kind in ("Pss", "Pss_Anon", "Pss_File") if kind in mine
        )  # fmt: skip
        print(f"    rank {rank} of {len(busy)}: {kinds} GB beyond idle", flush=True)
    return [mine["Pss"] - without["Pss"] for mine, without in zip(busy, idle, strict=True)]
