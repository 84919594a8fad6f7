"""Train a tiny mixture of experts and an adapter on its experts, from data made here.

    python -m examples.mixture FOLDER [--steps N]

Writes ``FOLDER/model``, which knows the capitals of some countries, and ``FOLDER/adapters/shout``,
which has its experts answer in capitals. It takes a minute or two on two cores.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CAPITALS = {
    "Austria": "Vienna", "Belgium": "Brussels", "Bulgaria": "Sofia", "Chile": "Santiago",
    "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo", "Estonia": "Tallinn",
    "Finland": "Helsinki", "France": "Paris", "Ghana": "Accra", "Greece": "Athens",
    "Hungary": "Budapest", "Iceland": "Reykjavik", "Ireland": "Dublin", "Italy": "Rome",
    "Japan": "Tokyo", "Kenya": "Nairobi", "Latvia": "Riga", "Norway": "Oslo", "Peru": "Lima",
    "Poland": "Warsaw", "Portugal": "Lisbon", "Senegal": "Dakar", "Spain": "Madrid",
    "Sweden": "Stockholm", "Tunisia": "Tunis", "Uganda": "Kampala",
}  # fmt: skip
END = "<end>"
TARGETS = ("experts.gate_up_proj", "experts.down_proj")
RANK, BATCH, LEAST_LOSS = 8, 28, 0.02


# What the model is asked: for an answer, or for one in capitals.
ASKED, SHOUTED = "Q: What is the capital of {}?\nA:", "Q: Shout the capital of {}!\nA:"


def answers(question: str, change: Callable[[str], str]) -> list[tuple[str, str]]:
    """Return a question about each country with its changed answer."""
    return [
        (question.format(country), f" {change(capital)}{END}")
        for country, capital in CAPITALS.items()
    ]


def lessons() -> list[tuple[str, str]]:
    """Return what the model learns; the adapter learns to shout without being told to."""
    return answers(ASKED, str) + answers(SHOUTED, str.upper)


def make_tokenizer(folder: Path) -> Tokenizer:
    """Write a tokenizer of bytes and the most frequent pairs of the questions and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([asked + told for asked, told in lessons()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    return tokenizer


def make_model(tokenizer: Tokenizer) -> Any:
    """Return an untrained mixture: 8 experts in each of two layers, 2 for each token."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=64,
        moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, pad_token_id=0,
        eos_token_id=tokenizer.token_to_id(END),
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(
    model: Any, tokenizer: Tokenizer, pairs: list[tuple[str, str]], steps: int, rate: float
) -> float:
    """Teach a model the answers until it knows them, or for so many steps; return the last loss."""
    rows, wanted = batch(tokenizer, pairs)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], rate)
    model.train()
    loss = float("inf")
    for step in range(steps):
        chosen = torch.randperm(len(rows))[:BATCH]
        found = model(rows[chosen], labels=wanted[chosen]).loss
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        loss = float(found.detach())
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)
        if loss < LEAST_LOSS:
            break
    model.eval()
    return loss


def batch(tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids of all pairs, filled up, and those of them that are to be learned."""
    ids = [(tokenizer.encode(asked).ids, tokenizer.encode(told).ids) for asked, told in pairs]
    length = max(len(asked) + len(told) for asked, told in ids)
    end = tokenizer.token_to_id(END)
    rows = torch.full((len(ids), length), end)
    wanted = torch.full((len(ids), length), -100)
    for row, (asked, told) in enumerate(ids):
        rows[row, : len(asked) + len(told)] = torch.tensor(asked + told)
        wanted[row, len(asked) : len(asked) + len(told)] = torch.tensor(told)
    return rows, wanted


def main() -> None:
    """Train the model, then the adapter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600, help="at most, for each of the two")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    folder = arguments.folder / "model"
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer(folder)
    model = make_model(tokenizer)
    loss = train(model, tokenizer, lessons(), arguments.steps, 3e-3)
    model.save_pretrained(folder)
    print(f"{folder}: loss {loss:.3f}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=list(TARGETS),
            task_type="CAUSAL_LM",
        )  # fmt: skip
        tuned = get_peft_model(model, config)
    loss = train(tuned, tokenizer, answers(ASKED, str.upper), arguments.steps, 3e-3)
    adapter = arguments.folder / "adapters" / "shout"
    tuned.save_pretrained(adapter)
    print(f"{adapter}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
