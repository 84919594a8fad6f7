"""Adapters to measure with, made by a formula: any rank, all linears of every block.

Written as PEFT writes them, for models that name their linears as Llama does. What an adapter
adds is a third of the size of what flows in, whatever its rank.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

ALPHA = 16
RANKS = (8, 16)
"""Of even and of odd adapters."""
DTYPES = ("float32", "float16")
_SIZE = 0.3


def linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of every linear of every block, by the module's name."""
    try:
        width, inner = config["hidden_size"], config["intermediate_size"]
        heads, num_layers = config["num_attention_heads"], config["num_hidden_layers"]
    except KeyError as error:
        raise ValueError(
            f"adapters can be made for models like Llama only: config.json has no {error}"
        ) from None
    head_dim = config.get("head_dim") or width // heads
    queries = heads * head_dim
    keys = (config.get("num_key_value_heads") or heads) * head_dim
    block = {
        "self_attn.q_proj": (width, queries),
        "self_attn.k_proj": (width, keys),
        "self_attn.v_proj": (width, keys),
        "self_attn.o_proj": (queries, width),
        "mlp.gate_proj": (width, inner),
        "mlp.up_proj": (width, inner),
        "mlp.down_proj": (inner, width),
    }
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(num_layers)
        for name, shape in block.items()
    }


def write_adapter(
    model_dir: Path, folder: Path, *, rank: int, seed: int, dtype: str = "float32"
) -> Path:
    """Write one adapter's folder and return it."""
    modules = linears(json.loads((model_dir / "config.json").read_text()))
    rng = np.random.default_rng(seed)
    spread = _SIZE * math.sqrt(rank) / ALPHA
    tensors = {}
    for name, (num_in, num_out) in modules.items():
        a = rng.standard_normal((rank, num_in), np.float32) / np.float32(math.sqrt(num_in))
        b = rng.standard_normal((num_out, rank), np.float32) * np.float32(spread)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.astype(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.astype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_adapters(
    model_dir: Path, folder: Path, num: int, *, ranks: tuple[int, ...] = RANKS,
    dtype: str = "float32",
) -> list[Path]:  # fmt: skip
    """Write ``adapter-0`` and so on, their ranks in turns; return their folders."""
    return [
        write_adapter(
            model_dir, folder / f"adapter-{number}", rank=ranks[number % len(ranks)], seed=number,
            dtype=dtype,
        )
        for number in range(num)
    ]  # fmt: skip
