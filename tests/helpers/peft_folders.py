"""Adapters made by PEFT itself, with random weights, saved as its users save them."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

# What PEFT makes trainable, beside what has lora_ in its name.
_TRAINED = ("lora_", "modules_to_save", "trainable_tokens_delta")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PEFT and transformers warn and print about much that is wanted here."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return the model in a folder, as transformers makes it."""
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.eval()


def save_adapter(
    model_path: Path, folder: Path, *, seed: int = 1, rows: int | None = None, **options: Any
) -> Path:
    """Make an adapter with these LoraConfig options, random weights, and save it; its folder.

    ``rows`` resizes the vocabulary first, as for added tokens.
    """
    torch.manual_seed(seed)
    model = load_model(model_path)
    with quiet():
        if rows is not None:
            model.resize_token_embeddings(rows)
        tuned = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **options}))
        randomise(tuned, options.get("bias", "none"), seed)
        tuned.save_pretrained(folder)
    return folder


@torch.no_grad()
def randomise(tuned: torch.nn.Module, bias: str, seed: int) -> None:
    """Give everything that the adapter trains values that show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        trained = any(part in name for part in _TRAINED)
        if name.endswith(".bias") and (bias == "all" or "base_layer.bias" in name):
            trained = bias != "none"
        if not trained:
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if "lora_magnitude_vector" in name:
            parameter.mul_(1 + 0.2 * noise)
        elif "lora_" in name:
            parameter.copy_(noise * 0.3)
        else:
            parameter.add_(noise * 0.3)


def load_adapter(
    model_path: Path,
    folder: Path,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Module:
    """Return PEFT's own model of base and adapter."""
    model = load_model(model_path, dtype)
    with quiet():
        if rows is not None:
            # What the new rows hold is not in question: the adapter brings them.
            model.resize_token_embeddings(rows, mean_resizing=False)
        return PeftModel.from_pretrained(model, folder).eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Return the logits after each of the tokens."""
    return model(input_ids=torch.tensor([ids])).logits[0].float()


def greedy_tokens(model: torch.nn.Module, ids: list[int], num_tokens: int) -> list[int]:
    """Return what follows when the likeliest token is taken each time."""
    known = list(ids)
    for _ in range(num_tokens):
        known.append(int(logits_of(model, known)[-1].argmax()))
    return known[len(ids) :]
