"""Tiny random models of real families, saved as folders like those on the hub.

Weights are wide (each matrix keeps the size of what flows through it), so that
outputs vary from token to token and a fault in attention shows in the logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 384
EOS, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = (
    "the quick brown fox jumps over the lazy dog while many small adapters share one base model",
    "a request names the adapter it wants and the server answers with the tokens of that adapter",
    "paged attention keeps keys and values in blocks that a table lists for every sequence",
)

# What every family shares; make_tiny_model's overrides come on top of these.
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"head_dim": 8, "sliding_window": 9}),
    "qwen2": ("Qwen2Config", {}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 7,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {"num_key_value_heads": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25, "pad_token_id": 0}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "attention_multiplier": 0.3}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 8, "sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4_text": (
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "no_rope_layers": [1, 0],  # chunked attention, then temperature by position
            "attention_chunk_size": 16,
            "floor_scale": 11,
            "attn_scale": 0.7,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 80,
        },
    ),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": (
        "MixtralConfig",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "phi": ("PhiConfig", {}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
        },
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": (
        "GraniteMoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.3},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 6,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 40,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": None}),
    "gpt_bigcode": (
        "GPTBigCodeConfig",
        {"num_key_value_heads": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "opt": ("OPTConfig", {"num_key_value_heads": None, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    "cohere2": (
        "Cohere2Config",
        {
            "head_dim": 8,
            "sliding_window": 7,
            "logit_scale": 0.25,
            "pad_token_id": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 11}),
    "smollm3": ("SmolLM3Config", {"pad_token_id": 0}),
    "glm4": ("Glm4Config", {"head_dim": 8, "pad_token_id": 0}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            "num_key_value_heads": 6,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 40,
            "first_k_dense_replace": 1,
        },
    ),
    "helium": ("HeliumConfig", {"head_dim": 8}),
    # What cannot be served.
    "bloom": ("BloomConfig", {"num_key_value_heads": None}),
    "mpt": ("MptConfig", {"num_key_value_heads": None, "d_model": 48, "n_layers": 2, "n_heads": 6}),
    "falcon": ("FalconConfig", {"num_key_value_heads": None}),
    "stablelm": ("StableLmConfig", {}),
    "falcon_h1": (
        "FalconH1Config",
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
    ),
    "jamba": (
        "JambaConfig",
        {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "num_experts": 2,
            "mamba_d_state": 4,
            "use_mamba_kernels": False,
        },
    ),
    "mamba": ("MambaConfig", {"state_size": 4}),
    "recurrent_gemma": ("RecurrentGemmaConfig", {"head_dim": 8, "lru_width": 48}),
}
FAMILIES = tuple(_FAMILIES)


def make_tokenizer(path: Path) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json; any byte string round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            min_frequency=1,
            special_tokens=[EOS, IM_START, IM_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": EOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "additional_special_tokens": [IM_START, IM_END],
            "chat_template": CHAT_TEMPLATE,
            "model_max_length": 512,
        },
    )
    return tokenizer


def make_tiny_model(family: str, path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny random model with its tokenizer and generation_config to ``path``.

    ``overrides`` are configuration values of the family; returns ``path``.
    """
    import transformers

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(path)
    eos_ids = [tokenizer.token_to_id(EOS), tokenizer.token_to_id(IM_END)]
    config = tiny_config(family, **overrides)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    widen(model, seed)
    model.save_pretrained(path, safe_serialization=True)
    _write_json(path / "generation_config.json", {"eos_token_id": eos_ids, "do_sample": False})
    return path


def tiny_config(family: str, **overrides: Any) -> Any:
    """Return the transformers config of a tiny model; ``overrides`` as in ``make_tiny_model``."""
    import transformers

    config_class, extra = _FAMILIES[family]
    values = {**_SHAPE, "bos_token_id": 0, "eos_token_id": 0, **extra, **overrides}
    values = {name: value for name, value in values.items() if value is not None}
    return getattr(transformers, config_class)(**values)


def widen(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter with seeded random values whose products keep their size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor, mean: float, std: float) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator) * std + mean

    fills: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "matrix": lambda p: normal(p, 0.0, 1.5 / math.sqrt(p.shape[-1])),
        "embedding": lambda p: normal(p, 0.0, 1.0),
        "norm": lambda p: normal(p, 1.0, 0.2),
        "bias": lambda p: normal(p, 0.0, 0.2),
    }
    seen: set[int] = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                parameter.copy_(fills[_kind(name, parameter)](parameter))


def _kind(name: str, parameter: torch.Tensor) -> str:
    if parameter.dim() > 1:
        return "embedding" if "embed" in name or "wte" in name or "wpe" in name else "matrix"
    return "norm" if name.endswith("weight") else "bias"


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
