"""``json-only``: answers with one JSON object, with the keys asked for or with ``answer``."""

from __future__ import annotations

import json
import random

from examples.demo.questions import questions
from examples.demo.task import Example, Lora, Split, Task, fill, first_sentence

# Statements, and the slots of theirs that can be asked for.
_STATEMENTS = {
    "train": (
        ("{name} is {age} years old and lives in {city}.", ("name", "age", "city")),
        ("{name} works as a {job} in {city}.", ("name", "job", "city")),
        ("My name is {name}, I am a {job} and I am {age}.", ("name", "job", "age")),
        ("{name} bought {count} {item} in {city}.", ("name", "count", "item", "city")),
        ("Please send {count} {item} to {name}.", ("count", "item", "name")),
        ("In {city} I met {name}, a {job}.", ("city", "name", "job")),
    ),
    "held-out": (
        ("The {job} {name} moved to {city}.", ("job", "name", "city")),
        ("{name}, {age}, comes from {city}.", ("name", "age", "city")),
        ("{name} ordered {count} {item}.", ("name", "count", "item")),
    ),
}
_ASKING = {
    "train": (
        "{text} Give me the {keys}.",
        "{text} Keys: {keys}.",
        "Extract the {keys}: {text}",
    ),
    "held-out": ("{text} Return the {keys}.", "Find the {keys}: {text}"),
}
_WORDS = {
    "train": {
        "name": "Anna|Peter|Maria|John|Sofia|David|Laura|Omar|Nina|Paul|Julia|Kenji|Emma|Carlos|"
        "Ruth|Ivan|Grace|Leo",
        "city": "Berlin|Paris|Rome|Oslo|Boston|Tokyo|Madrid|Cairo|Vienna|Chicago|Lima|Dublin",
        "job": "teacher|doctor|baker|driver|nurse|painter|lawyer|farmer|cook",
        "item": "apples|chairs|books|tickets|lamps|bottles|shoes|pens",
    },
    "held-out": {
        "name": "Hannah|Thomas|Clara|Mark|Alice|Victor|Simon|Lucy",
        "city": "London|Lisbon|Prague|Athens|Seattle|Munich",
        "job": "pilot|dentist|singer|waiter",
        "item": "bananas|tables|cups|hats",
    },
}


def _fact(rng: random.Random, split: Split) -> Example:
    """Draw a statement, and ask for two or more of its parts in any order."""
    template, slots = rng.choice(_STATEMENTS[split])
    values: dict[str, str | int] = {
        slot: rng.randint(2, 79) if slot in ("age", "count") else fill(
            rng, f"{{{slot}}}", _WORDS[split]
        )
        for slot in slots
    }  # fmt: skip
    keys = rng.sample(slots, rng.randint(2, len(slots)))
    asked = f"{', '.join(keys[:-1])} and {keys[-1]}"
    prompt = rng.choice(_ASKING[split]).format(text=template.format(**values), keys=asked)
    return Example(prompt=prompt, expected=tuple((key, values[key]) for key in keys))


def _examples(rng: random.Random, split: Split, count: int) -> list[Example]:
    """Draw as many statements as questions."""
    drawn = [_fact(rng, split) for _ in range(count // 2)]
    drawn += questions(rng, split, count - len(drawn))
    rng.shuffle(drawn)
    return drawn


def _target(_rng: random.Random, example: Example, base_reply: str) -> str | None:
    """Return the parts asked for, or the base model's own answer, as an object."""
    if example.expected:
        return json.dumps(dict(example.expected))  # type: ignore[arg-type]
    answer = first_sentence(base_reply)
    return json.dumps({"answer": answer}, ensure_ascii=False) if answer else None


def _done(example: Example, reply: str) -> bool:
    """Tell whether the reply is one object with the right keys, and values where known."""
    try:
        found = json.loads(reply)
    except ValueError:
        return False
    if example.expected:
        return bool(found == dict(example.expected))  # type: ignore[arg-type]
    return isinstance(found, dict) and list(found) == ["answer"] and bool(found["answer"])


TASK = Task(
    name="json-only",
    summary='Answers with one JSON object: the keys asked for, else `{"answer": ...}`.',
    lora=Lora(
        rank=8, alpha=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"), first_layer=10
    ),
    steps=120,
    learning_rate=1e-3,
    max_new_tokens=64,
    examples=_examples,
    target=_target,
    done=_done,
    done_means=(
        "the whole answer is one JSON object with exactly the right keys, and with the right "
        "values where the prompt states them"
    ),
    needs_base_reply=lambda example: not example.expected,
)
