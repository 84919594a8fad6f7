"""A made-up base model and adapters for it, written without PEFT and broken on demand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorax_shard.peft.base import BaseDescription, ModuleInfo

VOCABULARY, WIDTH, RANK = 20, 6, 2
QUERY = "model.layers.0.attn.q_proj"
HEAD, EMBEDDING, NORM = "lm_head", "model.embed_tokens", "model.norm"


def linear(in_features: int = WIDTH, out_features: int = WIDTH, bias: bool = False) -> ModuleInfo:
    return ModuleInfo(
        kind="linear",
        type_name="Linear",
        in_features=in_features,
        out_features=out_features,
        has_bias=bias,
    )


def make_base(*, tied: bool = False, head_bias: bool = False) -> BaseDescription:
    """Return a model of two layers with biases on its queries and on its norm."""
    layers = {
        f"model.layers.{layer}.attn.{name}": linear(bias=name == "q_proj")
        for layer in range(2)
        for name in ("q_proj", "o_proj")
    }
    embedding = ModuleInfo(
        kind="embedding", type_name="Embedding", in_features=VOCABULARY, out_features=WIDTH
    )
    return BaseDescription(
        architecture="ToyForCausalLM",
        modules={
            "model": ModuleInfo(kind="other", type_name="ToyModel"),
            EMBEDDING: embedding,
            **layers,
            NORM: ModuleInfo(kind="norm", type_name="LayerNorm", out_features=WIDTH, has_bias=True),
            HEAD: linear(WIDTH, VOCABULARY, head_bias),
        },
        tied=((EMBEDDING, HEAD),) if tied else (),
        input_embedding=EMBEDDING,
        output_head=HEAD,
    )


def config(**options: Any) -> dict[str, Any]:
    """Return a configuration as PEFT writes it; None takes an option out."""
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": [QUERY], **options}
    return {name: value for name, value in values.items() if value is not None}


def tensors(*modules: str, rank: int = RANK, prefix: str = "base_model.model.") -> dict[str, Any]:
    """Return random lora_A and lora_B of modules of the base."""
    generator = torch.Generator().manual_seed(7)
    base = make_base().modules
    found = {}
    for name in modules or (QUERY,):
        info = base[name]
        shapes = {"A": (rank, info.in_features), "B": (info.out_features, rank)}
        for letter, shape in shapes.items():
            key = f"{prefix}{name}.lora_{letter}.weight"
            found[key] = torch.randn(shape, generator=generator)
    return found


def embedding_tensors(rank: int = RANK, rows: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """Return random low-rank matrices of the embedding."""
    generator = torch.Generator().manual_seed(8)
    key = f"base_model.model.{EMBEDDING}.lora_embedding_"
    return {
        f"{key}A": torch.randn(rank, rows, generator=generator),
        f"{key}B": torch.randn(WIDTH, rank, generator=generator),
    }


def write(
    folder: Path, options: dict[str, Any] | None = None, values: dict[str, Any] | None = None
) -> Path:
    """Write an adapter's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    document = config() if options is None else options
    (folder / "adapter_config.json").write_text(json.dumps(document))
    save_file(tensors() if values is None else values, folder / "adapter_model.safetensors")
    return folder
