"""Bounds and examples of LoRAX's parameters, as LoRAX publishes them, for the OpenAPI document.

The service enforces them, in its own words. Where LoRAX's document and its code differ, what holds
here is told: the bounds of penalties belong to them, `typical_p` is below 1.
"""

from __future__ import annotations

from typing import Any

from lorax_contract.adapters import SOURCES
from lorax_router.service.info import ServerInfo

Keywords = dict[str, dict[str, Any]]

PARAMETERS: Keywords = {
    "adapter_id": {"examples": ["org/adapter"]},
    "adapter_source": {"enum": [*SOURCES, None], "examples": ["hub"]},
    "api_token": {"examples": ["<token for private adapters>"]},
    "best_of": {"minimum": 0, "examples": [1]},
    "temperature": {"minimum": 0.0, "examples": [0.5]},
    "repetition_penalty": {"exclusiveMinimum": 0.0, "examples": [1.03]},
    "frequency_penalty": {"minimum": -2.0, "maximum": 2.0, "examples": [0.1]},
    "presence_penalty": {"minimum": -2.0, "maximum": 2.0, "examples": [0.1]},
    "top_k": {"exclusiveMinimum": 0, "maximum": 2**31 - 1, "examples": [10]},
    "top_p": {"exclusiveMinimum": 0.0, "maximum": 1.0, "examples": [0.95]},
    "typical_p": {"exclusiveMinimum": 0.0, "exclusiveMaximum": 1.0, "examples": [0.95]},
    "min_p": {"minimum": 0.0, "maximum": 1.0, "examples": [0.05]},
    "do_sample": {"examples": [True]},
    "max_new_tokens": {"exclusiveMinimum": 0, "examples": [20]},
    "ignore_eos_token": {"examples": [True]},
    "return_full_text": {"examples": [False]},
    "stop": {"examples": [["photographer"]]},
    "truncate": {"minimum": 1},
    "return_k_alternatives": {"exclusiveMinimum": 0, "examples": [10]},
    "seed": {"minimum": 0, "examples": [42]},
    "schema": {"examples": ['{"type": "string", "title": "response"}']},
    "grammar": {"examples": [{"type": "regex", "value": "[0-9]{4}"}]},
}
MERGED: Keywords = {
    "ids": {"minItems": 1, "examples": [["org/adapter", "org/other"]]},
    "weights": {"examples": [[0.25, 0.75]]},
    "merge_strategy": {
        "enum": ["linear", "ties", "dare_linear", "dare_ties", None],
        "examples": ["linear"],
    },
    "density": {"minimum": 0.0, "maximum": 1.0, "examples": [0.5]},
    "majority_sign_method": {"enum": ["total", "frequency", None], "examples": ["total"]},
}
PROMPT: Keywords = {"inputs": {"minLength": 1, "examples": ["My name is Olivier and I"]}}


def keywords_of(info: ServerInfo) -> dict[str, Keywords]:
    """Return the keywords by model and field, this server's limits among them."""
    limits: Keywords = {
        "best_of": {"maximum": info.max_best_of},
        "max_new_tokens": {"maximum": info.max_total_tokens},
        "stop": {"maxItems": info.max_stop_sequences},
        "truncate": {"maximum": info.max_input_length},
    }
    parameters = {name: {**told, **limits.get(name, {})} for name, told in PARAMETERS.items()}
    return {
        "ParametersBody": parameters,
        "MergedAdaptersBody": MERGED,
        "GenerateBody": PROMPT,
        "CompatGenerateBody": PROMPT,
    }


# Headers of answers that are not streams. Times are whole milliseconds.
HEADERS = {
    "x-compute-type": "`cpu+optimized` or `gpu+optimized`.",
    "x-model-id": "The base model.",
    "x-adapter-id": "The adapter that the request named.",
    "x-adapter-source": "Where it comes from.",
    "x-adapter-warning": "Why it did nothing, if the prompt kept it from acting.",
    "x-compute-characters": "Characters of the prompt.",
    "x-prompt-tokens": "Tokens of the prompt.",
    "x-cached-tokens": "Of these, those that were in the cache.",
    "x-generated-tokens": "Tokens of the output.",
    "x-skipped-tokens": "Tokens gained by speculation.",
    "x-total-tokens": "Tokens of prompt and output.",
    "x-total-time": "From receipt to the last token.",
    "x-compute-time": "The same.",
    "x-validation-time": "Until the request was valid and tokenized.",
    "x-queue-time": "From there to the first step.",
    "x-inference-time": "From the first step to the last token.",
    "x-time-per-token": "Inference time of a token.",
    "x-time-to-first-token": "From receipt to the first token.",
    "x-time-per-output-token": "Between tokens after the first one.",
}
