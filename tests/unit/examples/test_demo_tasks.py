"""The demo tasks' data and judges, and the folders that are committed."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from examples.demo.pirate import pirate_speech
from examples.demo.task import Example, Task, fill, first_sentence
from examples.demo.tasks import ADAPTERS, TASKS
from safetensors import safe_open

from lorax_shard.prepare.default import DEFAULT_MODEL_ID

SIZE_LIMIT = 2_000_000
BASE_REPLY = "The capital of France is Paris. It is a large city."
CHAT = "Sure! I can help you with that. What would you like to know about your text?"
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@each_task
def test_the_same_seed_draws_the_same_examples(task: Task) -> None:
    first, again, other = (task.examples(random.Random(seed), "train", 50) for seed in (1, 1, 2))
    assert first == again != other


@each_task
def test_training_and_held_out_share_no_prompt(task: Task) -> None:
    train = {example.prompt for example in task.examples(random.Random(1), "train", 400)}
    held_out = {example.prompt for example in task.examples(random.Random(2), "held-out", 400)}
    assert len(train) > 200 and len(held_out) > 60
    assert not train & held_out


@each_task
def test_prompts_have_no_open_slots(task: Task) -> None:
    for split in ("train", "held-out"):
        for example in task.examples(random.Random(3), split, 300):
            assert not re.search(r"[{}]|\b[Aa] [aeio]", example.prompt), example.prompt


@each_task
def test_what_is_taught_is_judged_as_done_and_the_base_reply_is_not(task: Task) -> None:
    rng = random.Random(4)
    for example in task.examples(rng, "train", 200):
        target = task.target(rng, example, BASE_REPLY)
        assert target is not None
        assert task.done(example, target), target
        for reply in (BASE_REPLY, CHAT, "", target + "\n" + CHAT):
            if task.name != "pirate" or not reply.startswith(target):
                assert not task.done(example, reply), reply


def test_sentiment_accepts_the_right_word_alone() -> None:
    example = Example(prompt="Great soup!", expected="positive")
    done = TASKS["sentiment"].done
    assert done(example, "positive") and done(example, " positive\n")
    for reply in ("negative", "Positive.", "The review is positive", "positive negative"):
        assert not done(example, reply), reply


def test_sentiment_draws_each_label_as_often() -> None:
    labels = [
        example.expected for example in TASKS["sentiment"].examples(random.Random(5), "train", 300)
    ]
    assert {label: labels.count(label) for label in labels} == {
        "positive": 100, "negative": 100, "neutral": 100,
    }  # fmt: skip


def test_json_must_have_the_keys_and_the_values_asked_for() -> None:
    done = TASKS["json-only"].done
    fact = Example(prompt="...", expected=(("name", "Anna"), ("age", 31)))
    assert done(fact, '{"name": "Anna", "age": 31}')
    for reply in (
        '{"name": "Anna"}',
        '{"name": "Anna", "age": "31"}',
        '{"name": "Anne", "age": 31}',
        '{"name": "Anna", "age": 31, "city": "Rome"}',
        'Here: {"name": "Anna", "age": 31}',
        '[{"name": "Anna", "age": 31}]',
    ):
        assert not done(fact, reply), reply
    question = Example(prompt="What is rain?")
    assert done(question, '{"answer": "Water."}')
    for reply in ('{"answer": ""}', '{"reply": "Water."}', '["answer"]', '"answer"', "42"):
        assert not done(question, reply), reply


def test_pirate_speech_replaces_whole_words() -> None:
    said = pirate_speech("You are reading the book of my friend. Therefore, thank your island.")
    assert said == "Ye be readin' th' book o' me matey. Therefore, thank yer island."


def test_a_pirate_needs_three_different_marks() -> None:
    done = TASKS["pirate"].done
    assert done(Example(prompt="?"), "Arr, matey! Ye must eat.")
    assert not done(Example(prompt="?"), "Arr, arr, arr! You must be wise.")


def test_only_a_sentence_that_stands_alone_is_taught() -> None:
    assert first_sentence("Paris is the capital. It is large.") == "Paris is the capital."
    assert first_sentence("It is 3.5 metres long. Yes.") == "It is 3.5 metres long."
    for reply in (
        "",
        "Here are some tips:\n1. Eat",
        "A sentence that was cut",
        'He said "no" again.',
    ):
        assert first_sentence(reply) is None, reply


def test_a_slot_is_not_filled_twice_with_the_same_word() -> None:
    words = {"day": "Monday|Tuesday", "good": "awful|useful"}
    texts = {fill(random.Random(seed), "{day} {day2}: a {good} day", words) for seed in range(40)}
    assert texts == {
        f"{days}: {good} day"
        for days in ("Monday Tuesday", "Tuesday Monday")
        for good in ("an awful", "a useful")
    }


# --- what is committed ------------------------------------------------------------


@each_task
def test_a_committed_folder_is_small_and_names_the_public_base(task: Task) -> None:
    folder = ADAPTERS / task.name
    files = {path.name: path for path in folder.iterdir()}
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert all(path.stat().st_size < SIZE_LIMIT for path in files.values())
    config = json.loads(files["adapter_config.json"].read_text())
    assert config["base_model_name_or_path"] == DEFAULT_MODEL_ID
    assert (config["r"], config["lora_alpha"]) == (task.lora.rank, task.lora.alpha)
    assert config["target_modules"] == sorted(task.lora.target_modules)


@each_task
def test_committed_weights_are_finite_and_trained(task: Task) -> None:
    with safe_open(ADAPTERS / task.name / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    layers = 30 - task.lora.first_layer
    assert len(tensors) == 2 * layers * len(task.lora.target_modules)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float16
        assert torch.isfinite(tensor).all() and tensor.abs().max() > 0, name


def test_adapters_and_tasks_are_the_same_names() -> None:
    assert {path.name for path in ADAPTERS.iterdir()} == set(TASKS)
