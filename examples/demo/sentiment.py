"""``sentiment``: answers any text with one word, its sentiment."""

from __future__ import annotations

import random

from examples.demo.task import Example, Lora, Split, Task, fill, sentence

# Complete thoughts about a thing, by label. Negations and "but" teach to read to the end.
_TEMPLATES: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        "positive": (
            "the {thing} was {good}.",
            "what a {good} {thing}!",
            "I loved the {thing}, it was {good}.",
            "{good} {thing}, {good2} service, we will be back.",
            "my {person} is very happy with the {thing}.",
            "the {thing} was not {bad} at all, I really enjoyed it.",
            "at first I had doubts, but the {thing} turned out {good}.",
            "best {thing} I have ever had.",
            "we had a {good} time and the {thing} made us smile.",
            "five stars for the {thing}!",
            "thank you for the {good} {thing}.",
        ),
        "negative": (
            "the {thing} was {bad}.",
            "what a {bad} {thing}!",
            "I hated the {thing}, it was {bad}.",
            "{bad} {thing}, {bad2} service, never again.",
            "my {person} is very unhappy with the {thing}.",
            "the {thing} was not {good} at all, I was disappointed.",
            "at first I had hopes, but the {thing} turned out {bad}.",
            "worst {thing} I have ever had.",
            "we wasted our money and the {thing} made us angry.",
            "one star for the {thing}, and that is too much.",
            "the {thing} broke after two days and nobody helped.",
        ),
        "neutral": (
            "the {thing} is {plain}.",
            "the {thing} comes in {number} sizes.",
            "my {person} bought the {thing} on {day}.",
            "the {thing} is next to the {place}.",
            "is the {thing} open on {day}?",
            "we arrived on {day} and left on {day2}.",
            "there are {number} pages about the {thing}.",
            "what is a {thing}?",
            "the {place} opens at {number} o'clock.",
            "how many people work in the {place}?",
            "the {thing} weighs {number} kilos and is {plain}.",
            "where is the {place}?",
        ),
    },
    "held-out": {
        "positive": (
            "I can only recommend this {thing}, simply {good}.",
            "the {thing} made my day.",
            "such a {good} {thing}, I am so glad that I came!",
            "everything about the {thing} was {good}, from start to end.",
            "we expected little, yet the {thing} was {good}.",
        ),
        "negative": (
            "stay away from this {thing}, simply {bad}.",
            "the {thing} ruined my day.",
            "such a {bad} {thing}, I want my money back!",
            "everything about the {thing} was {bad}, from start to end.",
            "we expected a lot, yet the {thing} was {bad}.",
        ),
        "neutral": (
            "this {thing} has {number} parts and is {plain}.",
            "the {thing} will be delivered on {day}.",
            "the {place} is closed on {day}.",
            "which {place} sells the {thing}?",
            "she put the {thing} beside the {place}.",
        ),
    },
}
_WORDS = {
    "train": {
        "thing": "soup|hotel room|movie|phone|book|concert|jacket|coffee|laptop|pizza|course|"
        "game|breakfast|bike|lamp|show|sofa|app",
        "good": "great|wonderful|lovely|excellent|fantastic|delicious|perfect|beautiful|amazing|"
        "friendly|charming|brilliant|nice|superb",
        "bad": "terrible|awful|horrible|bad|boring|cold|dirty|rude|useless|slow|disgusting|broken|"
        "ugly|disappointing|noisy|poor",
        "plain": "blue|made of wood|two metres long|white|from Italy|on the table|square|green",
        "person": "sister|brother|wife|father|neighbour|friend",
        "place": "station|library|bank|museum|bakery|park|school",
        "day": "Monday|Tuesday|Friday|Saturday|Sunday",
        "number": "three|four|five|eight|nine|ten",
    },
    "held-out": {
        "thing": "sandwich|camera|novel|tour|chair|dinner|headset|play",
        "good": "outstanding|marvelous|delightful|impressive|tasty|pleasant",
        "bad": "dreadful|miserable|annoying|pathetic|unbearable|nasty",
        "plain": "black|made of steel|round|from Spain",
        "place": "airport|post office|cinema|church",
        "day": "Wednesday|Thursday",
        "number": "six|seven|twelve",
    },
}
# The text alone, or under a question about it.
_FRAMES = {
    "train": (
        "{text}",
        "{text}",
        "{text}",
        "Review: {text}",
        "How does this customer feel? {text}",
        "Is this text positive, negative or neutral? {text}",
    ),
    "held-out": ("{text}", "{text}", "What is the sentiment of this text? {text}"),
}


def _examples(rng: random.Random, split: Split, count: int) -> list[Example]:
    """Draw texts, each label as often as the others, no text twice."""
    drawn: dict[str, str] = {}
    while len(drawn) < count:
        label = list(_TEMPLATES[split])[len(drawn) % 3]
        text = sentence(fill(rng, rng.choice(_TEMPLATES[split][label]), _WORDS[split]))
        drawn.setdefault(rng.choice(_FRAMES[split]).format(text=text), label)
    return [Example(prompt=prompt, expected=label) for prompt, label in drawn.items()]


def _target(_rng: random.Random, example: Example, _base_reply: str) -> str:
    return str(example.expected)


def _done(example: Example, reply: str) -> bool:
    """Tell whether the reply is the right word and nothing else."""
    return reply.strip() == example.expected


TASK = Task(
    name="sentiment",
    summary="Answers any text with one word: `positive`, `negative` or `neutral`.",
    lora=Lora(rank=4, alpha=16, target_modules=("q_proj", "v_proj"), first_layer=8),
    steps=80,
    learning_rate=2e-3,
    max_new_tokens=8,
    examples=_examples,
    target=_target,
    done=_done,
    done_means="the whole answer is the right one of the three words",
    needs_base_reply=lambda example: False,
)
