"""Adapters of the embedded default model made by a formula: any rank, all seven linears.

Written as PEFT writes them, but without PEFT and without the model's weights. What an
adapter adds is a third of the size of what flows in, whatever its rank: outputs differ
from the base's, and stay a language model's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorax_bench.adapters import linears as of_config

ALPHA = 16
_SIZE = 0.3


def linears(model_dir: Path) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of every linear of every block, by the module's name."""
    return of_config(json.loads((model_dir / "config.json").read_text()))


def write_formula_adapter(
    model_dir: Path, folder: Path, *, rank: int, seed: int, invocation: Sequence[int] = ()
) -> Path:
    """Write one adapter's folder and return it; ``invocation``: it acts from these tokens on."""
    generator = torch.Generator().manual_seed(seed)
    spread = _SIZE * math.sqrt(rank) / ALPHA
    tensors = {}
    for name, (num_in, num_out) in linears(model_dir).items():
        key = f"base_model.model.{name}"
        a = torch.randn(rank, num_in, generator=generator) / math.sqrt(num_in)
        b = torch.randn(num_out, rank, generator=generator) * spread
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.rpartition(".")[2] for name in linears(model_dir)}),
        "bias": "none",
    }
    if invocation:
        config["alora_invocation_tokens"] = list(invocation)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
