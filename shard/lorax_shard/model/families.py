"""The model families that the tests cover, as transformers' ``model_type``."""

from __future__ import annotations

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
