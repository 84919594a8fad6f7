"""Training on a tiny model: it learns, it repeats, and PEFT reads back what it saves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from examples.demo.cards import cell, model_card
from examples.demo.chat import Base, chat_text, greedy_answers
from examples.demo.measure import Score, held_out, measure, with_adapters
from examples.demo.task import Lora
from examples.demo.tasks import TASKS
from examples.demo.training import answer_loss, lora_config, train
from examples.train_adapters import save
from peft import get_peft_model
from tests.helpers.tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS = 30
TASK = dataclasses.replace(
    TASKS["sentiment"],
    lora=Lora(rank=16, alpha=512, target_modules=("v_proj", "down_proj"), first_layer=1),
    # Random weights know no sentiment; one word for everything can be learned.
    target=lambda _rng, _example, _base_reply: "adapter",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model")


def load(folder: Path) -> Base:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.name_or_path = "some-org/tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return Base("some-org/tiny", model.eval(), tokenizer)


def trained(folder: Path, output: Path) -> list[float]:
    """Train and save; return the losses."""
    losses: list[float] = []
    base = load(folder)
    model = train(base, TASK, steps=STEPS, seed=0, show=lambda _step, loss: losses.append(loss))
    save(model, output / TASK.name)
    return losses


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    output = tmp_path_factory.mktemp("adapters")
    return output, trained(folder, output)


def test_the_loss_falls(saved: tuple[Path, list[float]]) -> None:
    losses = saved[1]
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_same_seed_trains_the_same_files(
    folder: Path, saved: tuple[Path, list[float]], tmp_path: Path
) -> None:
    assert trained(folder, tmp_path) == saved[1]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        first, again = (output / TASK.name / name for output in (saved[0], tmp_path))
        assert first.read_bytes() == again.read_bytes(), name


def test_what_is_saved_names_the_public_base(saved: tuple[Path, list[float]]) -> None:
    config = json.loads((saved[0] / TASK.name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some-org/tiny"
    assert config["target_modules"] == ["down_proj", "v_proj"]
    assert config["layers_to_transform"] == [1]


def test_measuring_sets_base_and_adapter_side_by_side(
    folder: Path, saved: tuple[Path, list[float]]
) -> None:
    base = load(folder)
    prompts = [example.prompt for example in held_out(TASK, 4)]
    plain = greedy_answers(base.model, base.tokenizer, prompts, TASK.max_new_tokens)
    score = measure(with_adapters(base, [TASK.name], saved[0]), base.tokenizer, TASK, 4)
    assert score.base == plain
    assert score.adapter != plain


def test_a_batch_answers_as_each_prompt_alone_does(folder: Path) -> None:
    base = load(folder)
    prompts = ["a fox", "the lazy dog and the quick brown fox", "an adapter?"]
    alone = [greedy_answers(base.model, base.tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert greedy_answers(base.model, base.tokenizer, prompts, 6, batch=2) == alone


def test_the_loss_counts_the_answers_only(folder: Path) -> None:
    """Against transformers' own loss of each example alone, weighted by answer length."""
    base = load(folder)
    model = get_peft_model(base.model, lora_config(base, TASK)).eval()
    batch = [([5, 6, 7, 8], [9, 10]), ([11], [12, 13, 14, 15])]
    total = 0.0
    for prompt, answer in batch:
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        total += model(input_ids=ids, labels=labels).loss.item() * len(answer)
    assert answer_loss(model, batch).item() == pytest.approx(total / 6, rel=1e-5)


def test_prompts_go_through_the_models_own_template(folder: Path) -> None:
    text = chat_text(load(folder).tokenizer, "Hello")
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_a_card_shows_the_rates_and_stays_a_table() -> None:
    task = TASKS["sentiment"]
    examples = held_out(task, 4)
    right = [str(example.expected) for example in examples]
    score = Score(task, examples, base=["one\n| two"] * 4, adapter=[*right[:3], "?"])
    card = model_card("some-org/tiny", score, steps=7, seed=3)
    assert "| base model | 0% |\n| with this adapter | 75% |" in card
    assert "7 steps" in card and "seed 3" in card
    assert card.count("one \\| two") == 4
    assert cell("x" * 500).endswith(" …") and len(cell("x" * 500)) < 130
