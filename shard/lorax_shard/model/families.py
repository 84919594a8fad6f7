"""Which model families the tests cover, and which cannot be served, as their classes show."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# As transformers' ``model_type``.
TESTED_FAMILIES = frozenset(
    {
        "cohere",
        "cohere2",
        "deepseek_v2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "llama",
        "llama4_text",
        "mistral",
        "mixtral",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    }
)


def refusal(hf_config: Any) -> str | None:
    """Return in words why a model of this config cannot be served, as its class shows; or None.

    Of a class that transformers does not bring itself nothing is known before it is probed.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type)
    model_class: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if model_class is None:
        return None
    if keeps_state(model_class):
        return f"layers of {name} keep a recurrent state, which is no KV cache"
    takes_others = getattr(model_class, "_can_set_attn_implementation", None)
    if takes_others is not None and not takes_others():
        return f"the attention of {name} does not use transformers' attention interface"
    return None


def keeps_state(model_class: Any) -> bool:
    """Return whether a transformers class has layers whose past is a state, not a KV cache."""
    return bool(getattr(model_class, "_is_stateful", False))
