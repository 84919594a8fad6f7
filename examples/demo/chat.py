"""The base model, its chat template and greedy answers, by transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lorax_contract.cache import default_cache_dir
from lorax_shard.prepare.prepare import prepare


@dataclass(frozen=True, slots=True)
class Base:
    """The embedded default model."""

    model_id: str
    model: Any
    tokenizer: Any


def load_base() -> Base:
    """Load the embedded default model in float32; the first call on a machine converts it."""
    prepared = prepare(
        None,
        revision=None,
        source="hub",
        cache_dir=default_cache_dir(),
        trust_remote_code=False,
        progress=lambda event: None,
    )
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(prepared.model_dir, dtype=torch.float32)
    # PEFT notes this as the base of what it trains: the public name, not a folder.
    model.name_or_path = prepared.model_id
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir, padding_side="left")
    return Base(prepared.model_id, model.eval(), tokenizer)


def chat_text(tokenizer: Any, prompt: str) -> str:
    """Return the prompt as one user message in the model's own chat template."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a rendered template, which holds its special tokens already."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@torch.inference_mode()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch: int = 32
) -> list[str]:
    """Return the greedy answer to each prompt."""
    answers = []
    for start in range(0, len(prompts), batch):
        texts = [chat_text(tokenizer, prompt) for prompt in prompts[start : start + batch]]
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers
