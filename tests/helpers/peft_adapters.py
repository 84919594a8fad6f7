"""Adapters made by PEFT with random weights, its own logits, and their normal form.

``host_adapter`` reads PEFT's live modules, not its files: it is an oracle of its own for
whoever reads files.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

from lorax_shard.lora.delta import HostAdapter, ModuleDelta


def peft_model(path: Path, seed: int, *, grow: int = 0, **options: Any) -> Any:
    """Wrap the model of a folder with one random adapter, none of whose parts is without effect.

    ``grow`` adds that many tokens to the model first.
    """
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    if grow:
        base.resize_token_embeddings(base.config.vocab_size + grow, mean_resizing=False)
    with warnings.catch_warnings():
        # PEFT warns of tied weights and fan_in_fan_out, which these tests mean.
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    model.eval()
    _randomize(model, torch.Generator().manual_seed(seed))
    return model


def _randomize(model: Any, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * noise)
            elif "lora_" in name:
                parameter.copy_(noise * 0.2)
            else:
                parameter.add_(noise * 0.2)


def peft_logits(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """Return the len x vocab logits that PEFT computes, one row at a time."""
    with torch.inference_mode():
        return [model(torch.tensor([row]), use_cache=False).logits[0] for row in rows]


def host_adapter(model: Any, *, grown: bool = False) -> HostAdapter:
    """Return the normal form of the only adapter of ``model``; ``grown``: it added tokens."""
    parts: dict[str, dict[str, Any]] = {}
    inner = model.base_model.model
    for name, module in inner.named_modules():
        if isinstance(module, LoraLayer):
            parts.setdefault(_plain(name), {}).update(_lora_parts(module))
        elif isinstance(module, ModulesToSaveWrapper):
            for kind, value in module.modules_to_save["default"].named_parameters():
                parts.setdefault(_plain(name), {})[kind] = value
        elif isinstance(module, TrainableTokensWrapper):
            parts.setdefault(_plain(name), {}).update(_token_parts(module))
    if model.peft_config["default"].bias != "none":
        for name, parameter in inner.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parts.setdefault(_plain(name.removesuffix(".bias")), {})["bias"] = parameter
    if grown:
        for module in (inner.get_input_embeddings(), inner.get_output_embeddings()):
            (name,) = {
                _plain(name)
                for name, each in inner.named_modules()
                if each is module or getattr(each, "base_layer", None) is module
            }
            parts.setdefault(name, {})["weight"] = getattr(module, "base_layer", module).weight
    deltas = {name: ModuleDelta(**_detached(values)) for name, values in parts.items()}
    return HostAdapter(digest=f"digest-{id(model)}", modules=deltas)


def _lora_parts(module: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {"scaling": module.scaling["default"]}
    if "default" in module.lora_embedding_A:
        parts["a"], parts["b"] = (
            module.lora_embedding_A["default"],
            module.lora_embedding_B["default"],
        )
    else:
        parts["a"], parts["b"] = module.lora_A["default"].weight, module.lora_B["default"].weight
        if module.lora_B["default"].bias is not None:
            parts["b_bias"] = module.lora_B["default"].bias
    if "default" in module.lora_magnitude_vector:
        parts["magnitude"] = module.lora_magnitude_vector["default"].weight
    return parts


def _token_parts(module: Any) -> dict[str, Any]:
    layer = module.token_adapter
    return {
        "token_ids": torch.tensor(layer.token_indices["default"]),
        "token_rows": layer.trainable_tokens_delta["default"],
    }


def _plain(name: str) -> str:
    """Return a module's name in the model without PEFT's wrappers."""
    wrappers = ("base_layer", "token_adapter", "original_module", "modules_to_save", "default")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _detached(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }
