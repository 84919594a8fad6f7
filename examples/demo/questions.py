"""Everyday questions, for tasks that any question is good for."""

from __future__ import annotations

import random

from examples.demo.task import Example, Split, fill

_TEMPLATES = {
    "train": (
        "What is the capital of {country}?",
        "What is {country} famous for?",
        "Who was {person}?",
        "Why is {person} remembered?",
        "What is {thing}?",
        "How does {thing} work?",
        "Explain {thing} in one sentence.",
        "Why do people like {hobby}?",
        "Give me one tip for {hobby}.",
        "How do I start with {hobby}?",
        "What do {animal} eat?",
        "Where do {animal} live?",
        "Tell me something about {animal}.",
        "What can I cook with {food}?",
        "Is {food} healthy?",
        "Where does {food} come from?",
        "What should I do when I am {mood}?",
        "I am {mood} today.",
        "Hello, how are you?",
        "Good morning!",
        "What is your name?",
        "Can you help me?",
        "What is {number} plus {number2}?",
    ),
    "held-out": (
        "Which city is the capital of {country}?",
        "Name one reason to visit {country}.",
        "What did {person} do?",
        "Describe {thing} for a child.",
        "Why does {thing} matter?",
        "Is {hobby} difficult?",
        "What do I need for {hobby}?",
        "How long do {animal} live?",
        "Are {animal} dangerous?",
        "How do I store {food}?",
        "My friend is {mood}. What can I say?",
        "Thank you for your help.",
    ),
}
_WORDS = {
    "train": {
        "country": "Italy|Spain|Japan|Brazil|Egypt|Norway|Canada|Kenya|Poland|India|Peru|Greece|"
        "Turkey|Mexico|Ireland|Thailand",
        "person": "Albert Einstein|Marie Curie|Napoleon|Leonardo da Vinci|Isaac Newton|Cleopatra|"
        "Mozart|Charles Darwin|Galileo",
        "thing": "gravity|a volcano|electricity|a battery|rain|a rainbow|the internet|a magnet|"
        "photosynthesis|a bicycle|an earthquake|money|a vaccine|the moon",
        "hobby": "cooking|chess|running|gardening|painting|swimming|reading|hiking|singing|dancing",
        "animal": "lions|penguins|bees|horses|elephants|frogs|owls|rabbits|dolphins|camels",
        "food": "rice|tomatoes|cheese|eggs|potatoes|honey|chocolate|bread|apples|beans",
        "mood": "sad|tired|bored|nervous|hungry|angry|happy|late",
        "number": "2|3|4|5|7|8|10|12",
    },
    "held-out": {
        "country": "France|Germany|Portugal|Sweden|Cuba|Vietnam|Austria|Morocco",
        "person": "Nikola Tesla|William Shakespeare|Christopher Columbus|Mahatma Gandhi|Beethoven",
        "thing": "thunder|a telescope|the sun|a compass|a ship|snow|a clock|a bridge",
        "hobby": "fishing|sailing|photography|knitting|skiing|surfing",
        "animal": "sharks|wolves|parrots|turtles|bears|whales",
        "food": "fish|carrots|bananas|butter|coffee|lemons",
        "mood": "lonely|worried|excited|ill|confused",
    },
}


def questions(rng: random.Random, split: Split, count: int) -> list[Example]:
    """Draw questions, no two the same; fewer than ``count`` if there are not so many."""
    drawn: dict[str, None] = {}
    for _ in range(20 * count):
        drawn[fill(rng, rng.choice(_TEMPLATES[split]), _WORDS[split])] = None
    return [Example(prompt=prompt) for prompt in list(drawn)[:count]]
