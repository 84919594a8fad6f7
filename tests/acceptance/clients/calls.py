"""Fifty questions with tools: streamed calls put together are those of the whole answer."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tests.acceptance.clients import answers
from tests.acceptance.clients.answers import Json
from tests.acceptance.clients.pairs import OWN_TEMPLATES, Pair, ask_all, connected, served
from tests.acceptance.harness import Result

NUM_QUESTIONS = 50
MOST_TOKENS = 56
MODES = ("free", "written", "required", "named", "strict")
_PLACES = (
    "Paris", "Köln", "東京", "Санкт-Петербург", "القاهرة", "दिल्ली", "São Paulo", "Oslo", "Łódź", "🏝️ Bali",
)  # fmt: skip
_WISHES = (
    "What is the weather like in {}?", "Set an alarm for seven when I am in {}.", "Find a train to {}.",
    "Tell my mother that I am in {}.", "Is {} a capital? If you do not know it, look it up.",
)  # fmt: skip

_OBJECT = {"type": "object", "additionalProperties": False}
SCHEMAS: dict[str, Json] = {
    "get_weather": {
        **_OBJECT,
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city"],
    },
    "set_alarm": {
        **_OBJECT,
        "properties": {
            "at": {**_OBJECT, "properties": {"hour": {"type": "integer", "minimum": 0, "maximum": 23}}},
            "days": {"type": "array", "items": {"enum": ["mo", "tu"]}, "maxItems": 2},
            "loud": {"type": ["boolean", "null"]},
        },
        "required": ["at", "loud"],
    },
    "look_up": _OBJECT | {"properties": {"q": {"type": "string", "maxLength": 8}}, "required": ["q"]},
}  # fmt: skip

_NAME = "[A-Z][a-zéü]{2,8}"
# Answers as models write them, with a call or two among other text.
WRITTEN = {
    "base": (
        r"<think>\n[a-z]{3,12} [a-z]{3,8}\n</think>\n\nWell,? <tool_call>\n"
        rf'\{{"name": "get_weather", "arguments": \{{"city": "{_NAME}", "days": [1-9]\}}\}}\n</tool_call>\n'
        r'<tool_call>\n\{"name": "look_up", "arguments": \{"q": "[a-zй東]{1,5}"\}\}\n</tool_call>'
    ),
    "hermes": rf'<tool_call>\n\[\{{"name": "look_up", "arguments": \{{"q": "{_NAME}"\}}\}}\]\n</tool_call> So',
    "llama3_json": (
        rf'\{{"name": "get_weather", "parameters": \{{"city": "{_NAME}"\}}\}}; '
        r'\{"name": "look_up", "parameters": \{"q": "[a-z\\]{1,4}\\""\}\}'
    ),
    "mistral": (
        rf'\[TOOL_CALLS\] \[\{{"name": "get_weather", "arguments": \{{"city": "{_NAME}"\}}, '
        r'"id": "[a-z0-9]{9}"\}, \{"name": "look_up", "arguments": \{"q": "[a-zд]{1,3}"\}\}\]'
    ),
    "pythonic": rf'\[get_weather\(city="{_NAME}", days=[1-9]\), set_alarm\(at=\{{"hour": 1[0-9]\}}, loud=None\)\]',
    "qwen3_coder": (
        rf"I[a-z ]{{2,9}}\.\n<tool_call>\n<function=get_weather>\n<parameter=city>\n{_NAME}\n</parameter>\n"
        r"<parameter=days>\n[1-9]\n</parameter>\n</function>\n</tool_call>"
    ),
}  # fmt: skip
MODELS = tuple(WRITTEN)


# Calls before the question: with these before it the model calls of itself.
HISTORY = (("Rome", "abcdefgh0"), ("Oslo", "abcdefgh1"), ("Lima", "abcdefgh2"))
OWN_CHOICE = ("free", "strict")
LEAST_OWN_CHOICE = 5


def said_before(mode: str, form: Callable[[str, str, str], list[Json]]) -> list[Json]:
    """Return what stands before the question where calls are the model's own choice.

    ``form`` makes messages of an earlier question, the call's id and its city.
    """
    earlier = HISTORY if mode in OWN_CHOICE else ()
    made = (
        form(f"What is the weather like in {city}?", call_id, city) for city, call_id in earlier
    )
    return [message for messages in made for message in messages]


def _of_chats(question: str, call_id: str, city: str) -> list[Json]:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city, "days": 1})}
    call = {"id": call_id, "type": "function", "function": function}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ]


def _of_grpc(question: str, call_id: str, city: str) -> list[Json]:
    messages = _of_chats(question, call_id, city)
    (call,) = messages[1]["tool_calls"]
    return [
        messages[0],
        messages[1] | {"tool_calls": [{"id": call_id, **call["function"]}]},
        *messages[2:],
    ]


def _of_responses(question: str, call_id: str, city: str) -> list[Json]:
    first, calls, result, last = _of_chats(question, call_id, city)
    return [
        first,
        {"type": "function_call", "call_id": call_id, **calls["tool_calls"][0]["function"]},
        {"type": "function_call_output", "call_id": call_id, "output": result["content"]},
        last,
    ]


def _of_messages(question: str, call_id: str, city: str) -> list[Json]:
    first, _, _, last = _of_chats(question, call_id, city)
    use = {
        "type": "tool_use",
        "id": call_id,
        "name": "get_weather",
        "input": {"city": city, "days": 1},
    }
    result = {"type": "tool_result", "tool_use_id": call_id, "content": "sunny"}
    return [
        first,
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
        last,
    ]


def questions() -> list[str]:
    """Fifty, in ten scripts."""
    return [wish.format(place) for wish in _WISHES for place in _PLACES]


def pairs() -> Iterator[Pair]:
    """Each question over each dialect, in one mode after the other, of one model after the other."""
    dialects = (chats_pair, responses_pair, messages_pair, grpc_pair)
    for number, question in enumerate(questions()):
        for place, make in enumerate(dialects):
            mode, model = (
                MODES[(number + place) % len(MODES)],
                MODELS[(number + 2 * place) % len(MODELS)],
            )
            yield make(model, mode, question)


def named(model: str) -> str:
    """Return what a request calls a model."""
    return model if model == "base" else f"local:{model}"


def _function(name: str, mode: str) -> Json:
    return {"name": name, "parameters": SCHEMAS[name], "strict": mode == "strict"}


def chats_pair(model: str, mode: str, question: str) -> Pair:
    """A question over chat completions."""
    choice: Any = {
        "required": "required",
        "named": {"type": "function", "function": {"name": "set_alarm"}},
    }
    body = {
        "model": named(model), "messages": [*said_before(mode, _of_chats), {"role": "user", "content": question}], "temperature": 0.0,
        "tools": [{"type": "function", "function": _function(name, mode)} for name in SCHEMAS],
        "tool_choice": choice.get(mode, "auto"), "max_tokens": MOST_TOKENS,
    }  # fmt: skip
    if mode == "written":
        body |= {"structured_outputs": {"regex": WRITTEN[model]}, "max_tokens": 2 * MOST_TOKENS}
    return Pair(answers.chats, body, f"chats, {model}, {mode}")


def responses_pair(model: str, mode: str, question: str) -> Pair:
    """A question over Responses, which cannot be bound to what is written."""
    choice: Any = {
        "required": "required",
        "written": "required",
        "named": {"type": "function", "name": "look_up"},
    }
    body = {
        "model": named(model), "input": [*said_before(mode, _of_responses), {"role": "user", "content": question}], "temperature": 0.0, "max_output_tokens": MOST_TOKENS,
        "tools": [{"type": "function", **_function(name, mode)} for name in SCHEMAS],
        "tool_choice": choice.get(mode, "auto"), "parallel_tool_calls": mode != "written",
    }  # fmt: skip
    return Pair(answers.responses, body, f"responses, {model}, {mode}")


def messages_pair(model: str, mode: str, question: str) -> Pair:
    """A question over Anthropic's messages."""
    choice: Any = {
        "required": {"type": "any"},
        "written": {"type": "any", "disable_parallel_tool_use": True},
        "named": {"type": "tool", "name": "get_weather"},
    }
    tools = [
        {"name": name, "input_schema": schema, "strict": mode == "strict"}
        for name, schema in SCHEMAS.items()
    ]
    body = {
        "model": named(model), "messages": [*said_before(mode, _of_messages), {"role": "user", "content": question}], "temperature": 0.0,
        "tools": tools, "tool_choice": choice.get(mode, {"type": "auto"}), "max_tokens": MOST_TOKENS,
    }  # fmt: skip
    return Pair(answers.messages, body, f"messages, {model}, {mode}")


def grpc_pair(model: str, mode: str, question: str) -> Pair:
    """A question over gRPC."""
    choice = {"required": {"mode": "MODE_REQUIRED"}, "named": {"name": "set_alarm"}}
    tools = [
        {"name": name, "parameters_schema": json.dumps(schema), "strict": mode == "strict"}
        for name, schema in SCHEMAS.items()
    ]
    parameters: Json = {"max_new_tokens": MOST_TOKENS}
    if model != "base":
        parameters["adapter"] = {"id": model, "source": "local"}
    if mode == "written":
        parameters |= {"constraint": {"regex": WRITTEN[model]}, "max_new_tokens": 2 * MOST_TOKENS}
    body = {
        "messages": [*said_before(mode, _of_grpc), {"role": "user", "content": question}], "tools": tools,
        "tool_choice": choice.get(mode, {"mode": "MODE_AUTO"}), "parameters": parameters,
    }  # fmt: skip
    return Pair(answers.grpc_chat, body, f"gRPC, {model}, {mode}")


def point_calls() -> Result:
    """Calls whole and streamed, of every form and in every mode; those that must be there are."""

    async def measure(url: str, address: str) -> Result:
        async with connected(url, address) as clients:
            outcome = await ask_all(clients, list(pairs()))
        calling: Counter[str] = Counter()
        for pair, answer in outcome.answers:
            form, mode = pair.label.split(", ")[1:]
            (choice,) = answer.choices
            calling[f"{form} {mode}"] += bool(choice.calls)
            if not choice.calls and mode in ("written", "required", "named"):
                outcome.faults.append(f"{pair.label}: no call in {answer}")
        num_own = sum(n for key, n in calling.items() if key.split()[1] in OWN_CHOICE)
        if num_own < LEAST_OWN_CHOICE:
            outcome.faults.append(f"{num_own} calls of the model's own choice")
        for fault in outcome.faults[:20]:
            print(f"    {fault}", flush=True)
        print("    with calls: " + ", ".join(f"{key} {n}" for key, n in sorted(calling.items())))
        figure = (
            f"{NUM_QUESTIONS} questions, {outcome.num_pairs} pairs, {calling.total()} with calls "
            f"({num_own} of the model's own choice), "
            f"{outcome.num_asked_again} the same alone, {len(outcome.faults)} faults"
        )
        is_all = outcome.num_pairs == 4 * NUM_QUESTIONS
        return Result(is_all and not outcome.faults, figure)

    assert len(questions()) == NUM_QUESTIONS
    assert set(OWN_TEMPLATES) < set(MODELS)
    with served() as (url, address):
        return asyncio.run(measure(url, address))
