"""``names``: finds the names of persons and places in a text."""

from __future__ import annotations

import random
import re

from examples.classify.classifier import Classifier, Labelled, NamedPart
from examples.demo.task import Split

_TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": (
        "{person} lives in {place}.",
        "{person} and {person} met in {place} last year.",
        "Yesterday {person} flew from {place} to {place}.",
        "The letter from {person} was sent to {place}.",
        "Is {person} coming to dinner?",
        "The museum in {place} is closed on Mondays.",
        "Our teacher, {person}, was born near {place}.",
        "Please call {person} about the contract.",
        "I have never been to {place}, but {person} has.",
        "The train to {place} leaves at nine.",
        "{place} is colder than {place} in winter.",
        "My doctor is called {person}.",
        "She said that {person} moved away from {place} in May.",
        "The book by {person} is about a village in {place}.",
        "In {place} we were met by {person} and her brother.",
        "The meeting was moved to Tuesday because nobody had time.",
        "A new bakery has opened beside the post office.",
        "Bread, milk and two apples, please.",
        "Thank you, {person}!",
        "The king of {place} sent a gift to {person}.",
        "The people of {place} remember {person}.",
        "They walked from {place} to the sea.",
        "{person} called {person} from {place}.",
        "The dog lay under the table and slept.",
        "Our cat likes the sofa more than the chair.",
        "It was a long day and everybody was tired.",
        "The new song by {person} is number one in {place}.",
        "{person} works as a nurse in a hospital in {place}.",
    ),
    "held-out": (
        "After the concert {person} drove home to {place}.",
        "Did {person} tell you about the trip to {place}?",
        "The mayor of {place} welcomed {person}.",
        "{person} has a sister in {place} and a cousin in {place}.",
        "Nobody knew where {person} had gone.",
        "There is a famous bridge in {place}.",
        "The children played in the garden until it rained.",
    ),
}
_FIRST: dict[Split, str] = {
    "train": "Anna|Peter|Maria|James|Fatima|Omar|Chen|Yuki|Carlos|Elena|David|Sofia|Ivan|Priya|Ahmed|Laura|"
    "Thomas|Ingrid|Paulo|Grace|Samuel|Nina|Hassan|Julia|Marco|Ruth|Kofi|Leila|Henry|Olga",
    "held-out": "Martin|Clara|Ravi|Emma|Jorge|Hannah|Viktor|Amina|Robert|Mei",
}
_LAST: dict[Split, str] = {
    "train": "Smith|Garcia|Novak|Tanaka|Okafor|Rossi|Keller|Dubois|Haddad|Larsen|Patel|Kowalski|Brown|Silva|"
    "Nguyen|Fischer|Moreau|Johnson|Petrov|Costa|Lindgren|Murphy|Wang|Kim|Ferrari|Jansen",
    "held-out": "Taylor|Lopez|Schmidt|Ivanova|Suzuki|Mensah|Wilson|Bianchi|Andersen|Khan",
}
_PLACES: dict[Split, str] = {
    "train": "Lisbon|Vienna|Cairo|Kyoto|Oslo|Lima|Prague|Athens|New York|Buenos Aires|Nairobi|Toronto|Mumbai|"
    "Cape Town|Berlin|Norway|Peru|Egypt|Canada|Japan|San Diego|Lyon|Geneva|Istanbul|Scotland|Manila|Brazil|Hamburg|"
    "Salt Lake City|Rio Grande do Sul|Santa Cruz de Tenerife|Ho Chi Minh City|San Juan de la Cruz|Sao Paulo",
    "held-out": "Paris|Dublin|Hanoi|Los Angeles|Madrid|Kenya|Chile|Sydney|Warsaw|Rio de Janeiro",
}


def _texts(rng: random.Random, split: Split, count: int) -> list[Labelled]:
    return [_text(rng, rng.choice(_TEMPLATES[split]), split) for _ in range(count)]


def _text(rng: random.Random, template: str, split: Split) -> Labelled:
    """Fill a template, and remember where its names are."""
    text, names = "", []
    for part in re.split(r"(\{\w+\})", template):
        filled = {"{person}": _person, "{place}": _place}.get(part)
        if filled is None:
            text += part
            continue
        name = filled(rng, split)
        kind = "PER" if part == "{person}" else "LOC"
        names.append(NamedPart(len(text), len(text) + len(name), kind))
        text += name
    return Labelled(text, names=tuple(names))


def _person(rng: random.Random, split: Split) -> str:
    first, last = (rng.choice(names[split].split("|")) for names in (_FIRST, _LAST))
    return rng.choice((first, f"{first} {last}", f"{first} {last}", f"Mrs {last}"))


def _place(rng: random.Random, split: Split) -> str:
    return rng.choice(_PLACES[split].split("|"))


NAMES = Classifier(
    name="names",
    summary="Finds the names of persons (`PER`) and places (`LOC`) in a text.",
    task_type="TOKEN_CLS",
    labels=("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
    steps=250,
    texts=_texts,
    right_means="every token of the text has the right label",
)
