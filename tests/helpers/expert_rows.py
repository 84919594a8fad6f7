"""Eight adapters of a tiny mixture, on its experts and elsewhere, as PEFT computes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.helpers.family_rows import FamilyRows

ATTENTION = {
    "deepseek_v2": ["q_b_proj", "kv_b_proj", "o_proj"],
    "deepseek_v3": ["q_b_proj", "kv_b_proj", "o_proj"],
}
_USUAL = ["q_proj", "v_proj", "o_proj"]
# By family: the linears of experts that see every token, and the names of routers' weights. PEFT
# takes such linears for the experts' own where it is told of modules, so it is told of weights.
SHARED = {
    "deepseek_v2": "shared_experts",
    "deepseek_v3": "shared_experts",
    "llama4_text": "shared_expert",
    "qwen2_moe": "shared_expert",
}
ROUTERS = {"gpt_oss": "router", "granitemoe": "router", "llama4_text": "router"}
# What the linears of one expert were once called, in whose place: gate, up and down.
OLDER = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v2": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v3": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}
FAMILIES = (
    "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text", "mixtral", "olmoe",
    "qwen2_moe", "qwen3_moe",
)  # fmt: skip
_BOTH = ["experts.gate_up_proj", "experts.down_proj"]
# Eight adapters and four rows of the base model, some adapters twice.
SLOTS = (0, 1, None, 2, 3, None, 4, 5, 0, 6, 7, None, 2, None)
# The adapter that is saved as older releases of transformers had its modules.
OLDER_SLOT = 6


def options(family: str) -> list[dict[str, Any]]:
    """Return the options of each slot's adapter."""
    attention = ATTENTION.get(family, _USUAL)
    router = f"{ROUTERS.get(family, 'gate')}.weight"
    name = SHARED.get(family)
    shared = [f"{name}.{each}.weight" for each in ("gate_proj", "down_proj")] if name else []
    experts_only: dict[str, Any] = {"target_modules": []}
    return [
        {"r": 2, "lora_alpha": 5, "target_parameters": _BOTH, **experts_only},
        {"r": 8, "lora_alpha": 11, "target_modules": attention},
        {"r": 5, "lora_alpha": 4, "target_modules": attention, "target_parameters": _BOTH},
        {
            "r": 4, "lora_alpha": 3, "use_rslora": True, "target_parameters": [*_BOTH, router],
            **experts_only,
        },
        {
            "r": 3, "lora_alpha": 6, "target_modules": attention,
            "target_parameters": ["experts.down_proj", *shared],
        },
        {"r": 64, "lora_alpha": 16, "target_parameters": _BOTH, **experts_only},
        {
            # As PEFT has what was made with a rank of 2 for each of gate, up and down.
            "r": 2, "lora_alpha": 3, "target_parameters": _BOTH, **experts_only,
            "rank_pattern": {"experts.gate_up_proj": 4}, "alpha_pattern": {"experts.gate_up_proj": 6},
        },
        {
            "r": 6, "lora_alpha": 6, "target_parameters": _BOTH, **experts_only,
            "rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {"experts.gate_up_proj": 9},
        },
    ]  # fmt: skip


class ExpertRows(FamilyRows):
    """Rows of eight adapters and of the base, see ``FamilyRows``."""

    def __init__(self, family: str, root: Path, **overrides: Any) -> None:
        self._family = family
        super().__init__(family, root, options=options(family), slots=SLOTS, **overrides)

    def tune(self, slot: int, folder: Path, options: Mapping[str, Any]) -> Any:
        """Save an adapter, one of them by an expert's own linears; return PEFT's model of it."""
        tuned = super().tune(slot, folder, options)
        if slot == OLDER_SLOT and self._family in OLDER:
            make_older(tuned, folder, *OLDER[self._family])
        return tuned


def make_older(tuned: PeftModel, folder: Path, name: str, linears: tuple[str, str, str]) -> None:
    """Save an adapter on experts as one on linears of each expert, computing the same.

    What gate and up get together in PEFT becomes two parts, each with A of its own. Its A must be
    the gate's ranks, then the up's; the model is changed so that its B has nothing elsewhere.
    """
    rank = tuned.peft_config["default"].r
    with torch.no_grad():
        for each, parameter in tuned.named_parameters():
            if each.endswith("experts.base_layer.lora_B.default.weight"):
                _apart(parameter, rank)
    tuned.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    found: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(weights).items():
        layer, inner = key.split(".mlp.experts.")
        prefix, is_a = f"{layer}.{name}", "lora_A" in inner
        of_experts = _by_expert(tensor, tuned, is_a=is_a)
        part = "lora_A" if is_a else "lora_B"
        for expert, matrix in enumerate(of_experts):
            start = f"{prefix}.{expert}"
            if "base_layer" not in inner:
                found[f"{start}.{linears[2]}.{part}.weight"] = matrix
                continue
            halves = matrix.split(rank) if is_a else _halves(matrix, rank)
            for linear, half in zip(linears, halves, strict=False):
                found[f"{start}.{linear}.{part}.weight"] = half
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, weights)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    # PEFT itself knows names only; where linears of others have the same, a pattern is needed.
    is_alone = not any(
        each.endswith(f".{linears[0]}")
        for each, _ in tuned.named_modules()
        if "experts" not in each
    )
    pattern = rf".*\.experts\.\d+\.({'|'.join(linears)})"
    config |= {
        "target_parameters": None, "target_modules": list(linears) if is_alone else pattern,
        "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    path.write_text(json.dumps(config))


def _num_experts(tuned: Any) -> int:
    modules = (each for each in tuned.modules() if hasattr(each, "num_experts"))
    return next(int(each.num_experts) for each in modules if each.num_experts > 1)


def _by_expert(tensor: torch.Tensor, tuned: Any, *, is_a: bool) -> torch.Tensor:
    """Return experts x r x in, or experts x out x r, of what PEFT keeps as one matrix."""
    num = _num_experts(tuned)
    if is_a:
        return tensor.view(num, -1, tensor.shape[1])
    return tensor.view(len(tensor), -1, num).permute(2, 0, 1)


def _apart(b: torch.Tensor, rank: int) -> None:
    """Leave the gate its first ranks alone, and the up its last (out x (2 ranks * experts))."""
    parts = b.view(len(b), 2 * rank, -1)
    half = len(b) // 2
    parts[:half, rank:] = 0
    parts[half:, :rank] = 0


def _halves(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = len(matrix) // 2
    return matrix[:half, :rank], matrix[half:, rank:]
