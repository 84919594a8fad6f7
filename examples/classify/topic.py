"""``topic``: which of five topics a text is about."""

from __future__ import annotations

import random

from examples.classify.classifier import Classifier, Labelled
from examples.demo.task import Split, fill, sentence

_TEMPLATES: dict[str, dict[Split, tuple[str, ...]]] = {
    "food": {
        "train": (
            "how long do I have to cook {thing}?",
            "my grandmother's recipe for {thing} takes {little}.",
            "this {thing} tastes {taste}.",
            "we had {thing} and {thing2} for dinner.",
            "add the {thing} and stir for ten minutes.",
        ),
        "held-out": (
            "is it better to fry or to bake {thing}?",
            "the {thing} needs some salt, it is too {taste}.",
            "for lunch I will have {thing}.",
        ),
    },
    "sport": {
        "train": (
            "who won the {thing} last night?",
            "she trains for the {thing} every morning.",
            "the coach was not happy with our {thing} team.",
            "they scored twice in the last minutes of the {thing}.",
            "the {thing} ended with a new record.",
        ),
        "held-out": (
            "he was injured during the {thing}.",
            "when does the {thing} season start?",
            "our side lost the {thing} by one point.",
        ),
    },
    "travel": {
        "train": (
            "is there a direct {thing} to {city}?",
            "we stayed two weeks in a {bed} near {city}.",
            "the {thing} to {city} was late again.",
            "do I need a visa for {city}?",
            "our guide showed us the old town of {city}.",
            "we had to change to another {thing} on our way to {city}.",
        ),
        "held-out": (
            "what should one see in {city} in three days?",
            "I booked a {bed} with a view of {city}.",
            "we missed the {thing} and spent the night in {city}.",
        ),
    },
    "technology": {
        "train": (
            "my {thing} does not start after the update.",
            "how do I install the driver of this {thing}?",
            "the new {thing} has twice the memory of the old one.",
            "the {thing} crashes when I open the file.",
            "which {thing} do programmers use?",
        ),
        "held-out": (
            "the screen of the {thing} stays black.",
            "is this {thing} compatible with older software?",
            "please restart the {thing} and try again.",
        ),
    },
    "money": {
        "train": (
            "how do I open a {thing}?",
            "the bank raised the fee of my {thing}.",
            "she put half of her salary into a {thing}.",
            "is the interest on a {thing} taxed?",
            "the {thing} lost a tenth of its value this year.",
        ),
        "held-out": (
            "what does a {thing} cost me each month?",
            "can I cancel the {thing} before the end of the year?",
            "he could not pay back the {thing}.",
        ),
    },
}
_WORDS: dict[str, dict[Split, dict[str, str]]] = {
    "food": {
        "train": {
            "thing": "lentil soup|roast chicken|potatoes|apple pie|rice|tomato salad|pasta|bread|beans",
            "little": "one hour|two onions|a lot of butter|five eggs",
            "taste": "sweet|bitter|spicy|salty|delicious",
        },
        "held-out": {"thing": "salmon|carrots|pancakes|mushroom risotto|cheese", "taste": "sour|bland"},
    },
    "sport": {
        "train": {"thing": "football match|marathon|tennis final|basketball game|cycling race|swimming cup"},
        "held-out": {"thing": "hockey game|rowing regatta|volleyball match|ski race"},
    },
    "travel": {
        "train": {
            "thing": "train|flight|bus|ferry",
            "city": "Lisbon|Vienna|Cairo|Kyoto|Oslo|Lima|Prague|Athens",
            "bed": "hotel|hostel|guesthouse",
        },
        "held-out": {"thing": "coach|plane", "city": "Seville|Hanoi|Dublin|Krakow", "bed": "room|cabin"},
    },
    "technology": {
        "train": {"thing": "laptop|printer|phone|router|graphics card|tablet|server|editor"},
        "held-out": {"thing": "keyboard|monitor|operating system|database"},
    },
    "money": {
        "train": {"thing": "savings account|credit card|pension fund|share portfolio|bond"},
        "held-out": {"thing": "mortgage|loan|life insurance|bank account"},
    },
}  # fmt: skip


def _texts(rng: random.Random, split: Split, count: int) -> list[Labelled]:
    """Draw texts, each topic as often as the others."""
    topics = list(_TEMPLATES)
    drawn = []
    for number in range(count):
        topic = topics[number % len(topics)]
        template = rng.choice(_TEMPLATES[topic][split])
        drawn.append(Labelled(sentence(fill(rng, template, _WORDS[topic][split])), topic))
    return drawn


TOPIC = Classifier(
    name="topic",
    summary="Says which topic a text is about: `food`, `sport`, `travel`, `technology` or `money`.",
    task_type="SEQ_CLS",
    labels=tuple(_TEMPLATES),
    steps=150,
    texts=_texts,
    right_means="the label with the highest score is the right one",
)
