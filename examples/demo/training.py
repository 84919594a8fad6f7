"""Trains one adapter with PEFT: loss on the answers only, AdamW, linear decay."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from examples.demo.chat import Base, chat_text, greedy_answers, token_ids
from examples.demo.task import Example, Task
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, pad

_BATCH = 8
_WARM_UP = 10
_POOL = 400
# The base model's own answers are cut after the first sentence.
_BASE_REPLY_TOKENS = 40

# An example, and the base model's answer to it where the task needs one.
Lesson = tuple[Example, str]
# Prompt and answer as token ids.
Encoded = tuple[list[int], list[int]]


def lessons(base: Base, task: Task, seed: int) -> list[Lesson]:
    """Draw the training examples and ask the base model where the task needs its answer."""
    examples = task.examples(random.Random(f"{task.name}: train {seed}"), "train", _POOL)
    asked = [example.prompt for example in examples if task.needs_base_reply(example)]
    replies = greedy_answers(base.model, base.tokenizer, asked, _BASE_REPLY_TOKENS)
    reply_to = dict(zip(asked, replies))
    return [(example, reply_to.get(example.prompt, "")) for example in examples]


def train(
    base: Base, task: Task, *, steps: int, seed: int, show: Callable[[int, float], None]
) -> Any:
    """Return the PEFT model after ``steps`` steps; ``show`` gets each step's loss."""
    pool = lessons(base, task, seed)
    torch.manual_seed(seed)
    model = get_peft_model(base.model, lora_config(base, task))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=task.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARM_UP, 1.0) * (1 - step / steps)
    )
    model.train()
    rng = random.Random(f"{task.name}: order {seed}")
    batches = encoded_batches(base.tokenizer, task, pool, rng)
    for step in range(1, steps + 1):
        loss = answer_loss(model, next(batches))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        show(step, loss.item())
    return model.eval()


def lora_config(base: Base, task: Task) -> LoraConfig:
    """Return PEFT's configuration of a task's adapter."""
    layers = range(task.lora.first_layer, base.model.config.num_hidden_layers)
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.model_id,
        r=task.lora.rank,
        lora_alpha=task.lora.alpha,
        lora_dropout=0.0,
        target_modules=list(task.lora.target_modules),
        layers_to_transform=list(layers) if task.lora.first_layer else None,
    )


def encoded_batches(
    tokenizer: Any, task: Task, pool: Sequence[Lesson], rng: random.Random
) -> Iterator[list[Encoded]]:
    """Go through the pool in ever new orders; targets that draw words are drawn anew."""
    batch: list[Encoded] = []
    while True:
        for example, base_reply in rng.sample(pool, len(pool)):
            answer = task.target(rng, example, base_reply)
            if answer is None:
                continue
            prompt = token_ids(tokenizer, chat_text(tokenizer, example.prompt))
            batch.append((prompt, [*token_ids(tokenizer, answer), tokenizer.eos_token_id]))
            if len(batch) == _BATCH:
                yield batch
                batch = []


def answer_loss(model: Any, batch: list[Encoded]) -> torch.Tensor:
    """Return the mean cross entropy of the answers' tokens."""
    length = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.stack([padded(prompt + answer, length) for prompt, answer in batch])
    labels = torch.stack(
        [padded([-1] * len(prompt) + answer, length, -1) for prompt, answer in batch]
    )
    causal = model.get_base_model()
    # Padding comes last, where no real token attends to it. The head runs only on positions
    # whose next token belongs to an answer: it is a fifth of the model.
    hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    taught = labels[:, 1:] >= 0
    return cross_entropy(causal.lm_head(hidden[taught]), labels[:, 1:][taught])


def padded(ids: list[int], length: int, value: int = 0) -> torch.Tensor:
    """Return the ids as a tensor, padded on the right."""
    return pad(torch.tensor(ids), (0, length - len(ids)), value=value)
