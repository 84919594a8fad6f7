"""Which model families the tests cover, and which cannot be served, as their classes show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from lorax_shard.model import relative_positions

# As transformers' ``model_type``.
TESTED_FAMILIES = frozenset(
    {
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granitemoe",
        "llama",
        "llama4_text",
        "mistral",
        "mixtral",
        "olmo2",
        "olmoe",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    }
)
# Of encoders.
ENCODER_FAMILIES = frozenset(
    {
        "albert",
        "bert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "modernbert",
        "mpnet",
        "roberta",
        "xlm-roberta",
    }
)
_CAUSAL_NAMES = ("CausalLM", "LMHead", "ConditionalGeneration")


def is_encoder(hf_config: Any) -> bool:
    """Return whether a model of this config is an encoder, by its family and its architecture."""
    architectures = getattr(hf_config, "architectures", None) or []
    return hf_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_causal(
        architectures
    )


def generates(hf_config: Any) -> bool:
    """Return whether a model of this config generates: it is a language model with its own head."""
    architectures = getattr(hf_config, "architectures", None) or []
    return not is_encoder(hf_config) and (not architectures or is_causal(architectures))


def is_served(model_type: str, architecture: str) -> bool:
    """Return whether a decoder's class is served: with its head, another one that is known, or none."""
    heads = (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    )
    known = [backbone_name(model_type), *(each.get(model_type) for each in heads)]
    return architecture in known or is_causal([architecture])


def backbone_name(model_type: str) -> str:
    """Return the class of a family's models without a head; "": transformers has none."""
    found = MODEL_MAPPING_NAMES.get(model_type, "")
    return found if isinstance(found, str) else found[0]


def is_causal(architectures: Sequence[str]) -> bool:
    """Return whether the classes that a config names are those of causal language models."""
    return any(name in each for each in architectures for name in _CAUSAL_NAMES)


def refusal(hf_config: Any) -> str | None:
    """Return in words why a model of this config cannot be served, as its class shows; or None.

    Of a class that transformers does not bring itself nothing is known before it is probed.
    """
    name: Any = backbone_name(hf_config.model_type)
    if generates(hf_config):
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type)
    model_class: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if model_class is None:
        return None
    if keeps_state(model_class):
        return f"layers of {name} keep a recurrent state, which is no KV cache"
    if relative_positions.has_relative_positions(hf_config.model_type):
        return relative_positions.refusal(hf_config)
    takes_others = getattr(model_class, "_can_set_attn_implementation", None)
    if takes_others is not None and not takes_others():
        return f"the attention of {name} does not use transformers' attention interface"
    return None


def keeps_state(model_class: Any) -> bool:
    """Return whether a transformers class has layers whose past is a state, not a KV cache."""
    return bool(getattr(model_class, "_is_stateful", False))
