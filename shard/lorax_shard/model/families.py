"""The model families that the tests cover, as transformers' ``model_type``."""

from __future__ import annotations

TESTED_FAMILIES = frozenset({"gemma2", "gpt2", "llama", "mistral", "qwen2"})
