"""Streamed texts are those of whole answers: lengths of 1 to 12 tokens in five scripts, stops included."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace

from tests.acceptance.clients import answers
from tests.acceptance.clients.answers import Answer, Clients, Json
from tests.acceptance.clients.pairs import Outcome, Pair, ask_all, connected, served
from tests.acceptance.harness import Result

LENGTHS = range(1, 13)
# What the model goes on with is the same again, in the same script.
SCRIPTS = {
    "Latin": "The naïve fox runs. The naïve fox runs. The naïve fox runs. The",
    "Cyrillic": "Солнце светит ярко. Солнце светит ярко. Солнце светит ярко. Солнце",
    "Chinese and Japanese": "我爱东京的春天。ねこが好き。我爱东京的春天。ねこが好き。我爱东京的春天。ねこ",
    "Arabic and Hebrew": "القطة تنام. החתול ישן. القطة تنام. החתול ישן. القطة تنام. החתול",
    "Devanagari and emoji": "बिल्ली सोती है 🐈‍⬛👨‍👩‍👧. बिल्ली सोती है 🐈‍⬛👨‍👩‍👧. बिल्ली सोती है 🐈‍⬛👨‍👩‍👧. बिल्ली",
}
DIALECTS = (
    "completions",
    "chats",
    "responses",
    "messages",
    "lorax",
    "tgi",
    "grpc_generate",
    "grpc_chat",
)
ADAPTER = "hermes"


def _begun(text: str) -> list[Json]:
    """A conversation whose last message the model goes on with."""
    return [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text}]


def body_of(dialect: str, text: str, most: int, model: str) -> Json:
    """Return a question: go on with a text, as the base or as an adapter does."""
    named = "base" if model == "base" else f"local:{model}"
    adapter = {} if model == "base" else {"adapter_id": model, "adapter_source": "local"}
    match dialect:
        case "completions":
            return {"model": named, "prompt": text, "max_tokens": most, "temperature": 0.0}
        case "chats":
            more = {"continue_final_message": True, "max_tokens": most, "temperature": 0.0}
            return {"model": named, "messages": _begun(text), **more}
        case "responses":
            # What is to be said is bound, since nothing can be begun.
            form = {"type": "json_schema", "name": "said", "schema": {"enum": [text]}}
            more = {"text": {"format": form}, "max_output_tokens": most, "temperature": 0.0}
            return {"model": named, "input": text, **more}
        case "messages":
            more = {"max_tokens": most, "temperature": 0.0}
            return {"model": named, "messages": _begun(text), **more}
        case "lorax" | "tgi":
            parameters = {"max_new_tokens": most, "details": True, **adapter}
            return {"inputs": text, "parameters": parameters}
    grpc: Json = {"max_new_tokens": most}
    if model != "base":
        grpc["adapter"] = {"id": model, "source": "local"}
    if dialect == "grpc_generate":
        return {"text": text, "parameters": grpc}
    return {"messages": _begun(text), "continue_final_message": True, "parameters": grpc}


def stops_of(text: str, rng: random.Random) -> list[str]:
    """Return stop strings for an answer that is known: in it, beside it, over its end."""
    if len(text) < 4:
        return [text or "x"]
    at = rng.randrange(1, len(text) - 2)
    kinds = (
        # One sign, which may be several tokens.
        [text[at]],
        # Across where tokens meet, in some place or other.
        [text[at : at + 2]],
        [text[at - 1 : at + 3]],
        # One within another, and one that begins within another.
        [text[at - 1 : at + 1], text[at : at + 2], text[at - 1 : at + 2]],
        [text[at : at + 3], text[at + 1]],
        # Begins as the text does and goes on otherwise: held back for nothing.
        [text[-2:] + "\u2603", text[at : at + 2] + "\u2603"],
        [text[: len(text) // 2 + 1], "\u2603"],
    )
    return list(rng.choice(kinds))


def varied(dialect: str, body: Json, text: str, rng: random.Random) -> Json:
    """Return a question with some of what changes how a text looks."""
    stops = stops_of(text, rng)
    seed = rng.randrange(1000)
    match dialect:
        case "completions" | "chats":
            drawn = {"n": 2, "seed": seed, "temperature": 0.8}
            logprobs = (
                {"logprobs": 2}
                if dialect == "completions"
                else {"logprobs": True, "top_logprobs": 2}
            )
            extras = [
                {"stop": stops}, {"stop": stops, "include_stop_str_in_output": True}, drawn, logprobs,
                {"skip_special_tokens": False, "ignore_eos": True}, {"min_tokens": min(3, body["max_tokens"]), "stop": stops},
            ]  # fmt: skip
            if dialect == "completions":
                extras += [{"echo": True}, {"echo": True, "stop": stops}]
            chosen = rng.sample(extras, 3)
            return body | chosen[0] | chosen[1] | chosen[2]
        case "responses":
            return body | {"temperature": 0.8, "seed": seed}
        case "messages":
            return body | {"stop_sequences": stops}
        case "lorax" | "tgi":
            extras = [
                {"stop": stops}, {"do_sample": True, "seed": seed}, {"return_full_text": True},
                {"ignore_eos_token": True}, {"return_k_alternatives": 2},
            ]  # fmt: skip
            chosen = rng.sample(extras, 2)
            return {
                **body,
                "parameters": body["parameters"] | {"stop": stops} | chosen[0] | chosen[1],
            }
    extras = [
        {"stop": stops}, {"stop": stops, "include_stop": True}, {"skip_special_tokens": False, "ignore_eos_token": True},
        {"n": 2, "temperature": 0.8, "seed": seed}, {"return_tokens": True, "num_alternatives": 2},
    ]  # fmt: skip
    chosen = rng.sample(extras, 3)
    return {**body, "parameters": body["parameters"] | chosen[0] | chosen[1] | chosen[2]}


def plain_pairs() -> Iterator[Pair]:
    """Every script in every length over every dialect."""
    for number, (script, text) in enumerate(SCRIPTS.items()):
        for dialect in DIALECTS:
            for most in LENGTHS:
                model = (ADAPTER, "base")[(number + most) % 2]
                body = body_of(dialect, text, most, model)
                yield Pair(getattr(answers, dialect), body, f"{dialect}, {script}, {most}, {model}")


def varied_pairs(plain: Outcome) -> Iterator[Pair]:
    """The same with stops and the like, which are made from what was answered."""
    rng = random.Random(9)
    for pair, answer in plain.answers:
        dialect = pair.label.partition(",")[0]
        body = varied(dialect, pair.body, answer.choices[0].text, rng)
        yield replace(pair, body=body, label=pair.label + ", varied")


def by_question(plain: Outcome, dialects: tuple[str, ...]) -> dict[str, dict[str, Answer]]:
    """Return answers of dialects that ask the same, by what they ask."""
    found: dict[str, dict[str, Answer]] = {}
    for pair, answer in plain.answers:
        dialect, _, question = pair.label.partition(", ")
        if dialect in dialects:
            found.setdefault(question, {})[dialect] = answer
    return found


async def same_in_all_dialects(clients: Clients, plain: Outcome) -> tuple[int, list[str]]:
    """Return how many questions have one text in all dialects; what differs is asked again alone."""
    num_same, faults = 0, []
    for dialects in (("completions", "grpc_generate"), ("chats", "messages", "grpc_chat")):
        for question, found in by_question(plain, dialects).items():
            texts = {name: answer.choices[0].text for name, answer in found.items()}
            if len(set(texts.values())) > 1:
                again = [
                    p for p, _ in plain.answers if p.label in [f"{d}, {question}" for d in dialects]
                ]
                asked = [(p.label, await p.ask(clients, p.body)) for p in again]
                texts = {label: whole.choices[0].text for label, (whole, _) in asked}
            if len(set(texts.values())) > 1:
                faults.append(f"{question}: {texts}")
            num_same += 1
    return num_same, faults


def point_texts() -> Result:
    """Texts, ends, logprobs and usage, whole and streamed, over all dialects."""

    async def measure(url: str, address: str) -> Result:
        async with connected(url, address) as clients:
            plain = await ask_all(clients, list(plain_pairs()))
            with_more = await ask_all(clients, list(varied_pairs(plain)))
            num_same, differing = await same_in_all_dialects(clients, plain)
        faults = [*plain.faults, *with_more.faults, *differing]
        for fault in faults[:20]:
            print(f"    {fault}", flush=True)
        num_pairs = plain.num_pairs + with_more.num_pairs
        again = plain.num_asked_again + with_more.num_asked_again
        figure = (
            f"{len(SCRIPTS)} scripts, {len(DIALECTS)} dialects, {num_pairs} pairs, {again} the same "
            f"alone, {num_same} questions have one text in all "
            f"dialects, {len(faults)} faults"
        )
        expected = 2 * len(SCRIPTS) * len(DIALECTS) * len(LENGTHS)
        return Result(num_pairs == expected and not faults, figure)

    with served() as (url, address):
        return asyncio.run(measure(url, address))
