"""Milliseconds that adapters on experts add to a decode step, next to the floor.

The floor is the bytes of the routed experts' factors over bandwidth: those of each pair of an
expert and an adapter that some row of the step goes to, once. The model is a random mixture of
Qwen3's form, of 64 experts of which each token goes to 8; steps with and without adapters and the
reading of memory take turns, as in ``bench.lora``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench.lora import DTYPES, AdaptersOfStep, Decode, Turns, figures, load_model, show, show_head
from tests.helpers.tiny_models import make_tiny_model

from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.lora.model import LoraModel
from lorax_shard.lora.sites import Kind
from lorax_shard.model.hf_model import HFPagedModel

# Rows of a step, and distinct adapters among them.
CASES = ((1, 1), (8, 8), (16, 8), (32, 8), (32, 32))
RANK = 16
SHAPE: dict[str, int] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 4,
}


def make_adapter(lora: LoraModel, rank: int, seed: int, dtype: torch.dtype) -> HostAdapter:
    """Return a random adapter of all experts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.01).to(dtype)

    modules = {
        name: ModuleDelta(
            a=draw(site.num_experts, rank, site.in_features),
            b=draw(site.num_experts, site.out_features, rank),
        )
        for name, site in lora.sites.items()
        if site.kind is Kind.EXPERTS
    }
    return HostAdapter(digest=f"random-{seed}", modules=modules)


def routed_bytes(model: HFPagedModel, decode: Decode, slots: list[int], of_expert: int) -> int:
    """Return the bytes of what a step reads: ``of_expert`` for each pair of expert and adapter."""
    assert model.lora is not None
    pairs: list[int] = []

    def count(_module: Any, inputs: Any) -> None:
        chosen = inputs[1].tolist()
        of_row = (slots[row % len(slots)] for row in range(len(chosen)))
        pairs.append(len({(s, e) for s, row in zip(of_row, chosen, strict=True) for e in row}))

    modules = {id(s.module): s.module for s in model.lora.sites.values() if s.kind is Kind.EXPERTS}
    hooks = [module.register_forward_pre_hook(count) for module in modules.values()]
    decode.run(slots)
    for hook in hooks:
        hook.remove()
    return sum(pairs) * of_expert


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--stored-dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    num_slots = max(adapters for _, adapters in CASES)
    dtype = DTYPES[arguments.stored_dtype]
    with tempfile.TemporaryDirectory() as name:
        folder = make_tiny_model("qwen3_moe", Path(name), **SHAPE)
        model = load_model(max(rows for rows, _ in CASES), num_slots, folder=str(folder))
    assert model.lora is not None
    for slot in range(num_slots):
        prepared = model.lora.prepare(make_adapter(model.lora, arguments.rank, slot, dtype))
        model.lora.load(slot, prepared)
    of_expert = prepared.nbytes // SHAPE["num_experts"] // SHAPE["num_hidden_layers"]
    print(f"LoRA backend {model.lora.backend}, {prepared.nbytes / 1e6:.0f} MB an adapter")
    show_head()
    turns, found = Turns(time.perf_counter, arguments.rounds), []
    for rows, adapters in CASES:
        decode, slots = Decode(model, rows), list(range(adapters))
        num_bytes = routed_bytes(model, decode, slots, of_expert)
        found.append(
            figures(turns, decode, slots, AdaptersOfStep(dtype, arguments.rank, num_bytes))
        )
        show(found[-1])
    if arguments.json:
        cases = {"cases": [each._asdict() for each in found]}
        arguments.json.write_text(json.dumps(cases) + "\n")


if __name__ == "__main__":
    main()
