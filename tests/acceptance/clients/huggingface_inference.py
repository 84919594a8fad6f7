"""Hugging Face's client, unmodified: ``python huggingface_inference.py URL MODEL ADAPTER``."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from checks import check, drained, raises, raises_later, same
from huggingface_hub import AsyncInferenceClient, InferenceClient, InferenceTimeoutError
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, ValidationError

PROMPT = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "is_capital": {"type": "boolean"}},
    "required": ["name", "is_capital"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
GREEDY: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0}


def texts(client: InferenceClient, adapter: str | None) -> str:
    """A text, with its details and streamed; returns it."""
    asked = {"max_new_tokens": 8, "adapter_id": adapter}
    text = client.text_generation(PROMPT, **asked)
    check(f"{adapter}: a text", text, text)
    told = client.text_generation(PROMPT, details=True, decoder_input_details=True, **asked)
    same(f"{adapter}: with details", told.generated_text, text)
    same(f"{adapter}: tokens", len(told.details.tokens), told.details.generated_tokens)
    check(f"{adapter}: the prompt's", len(told.details.prefill) > 3, told.details.prefill)
    same(f"{adapter}: reason", told.details.finish_reason, "length")
    streamed = "".join(client.text_generation(PROMPT, stream=True, **asked))
    same(f"{adapter}: streamed as whole", streamed, text)
    events = list(client.text_generation(PROMPT, stream=True, details=True, **asked))
    same(f"{adapter}: the last event", events[-1].generated_text, text)
    same(f"{adapter}: its details", events[-1].details.generated_tokens, len(events))
    whole = client.text_generation(PROMPT, return_full_text=True, **asked)
    same(f"{adapter}: the full text", whole, PROMPT + text)
    return text


def bound_texts(client: InferenceClient) -> None:
    """What ends a text, and what binds it."""
    stopped = client.text_generation(PROMPT, stop=["Paris"], max_new_tokens=24, details=True)
    check("stop", stopped.generated_text.endswith("Paris"), stopped)
    same("stop: its reason", stopped.details.finish_reason, "stop_sequence")
    drawn = [
        client.text_generation(PROMPT, do_sample=True, seed=3, max_new_tokens=8) for _ in range(2)
    ]
    same("a seed repeats", *drawn)
    for grammar in ({"type": "json", "value": SCHEMA}, {"type": "regex", "value": "[0-9]{4}"}):
        text = client.text_generation("A city:", grammar=grammar, max_new_tokens=64)
        found = json.loads(text)
        fits = (
            set(found) == set(SCHEMA["required"]) if grammar["type"] == "json" else len(text) == 4
        )
        check(f"grammar {grammar['type']}", fits, text)
    best = client.text_generation(PROMPT, best_of=2, do_sample=True, details=True, max_new_tokens=4)
    same("best_of", len(best.details.best_of_sequences), 1)


def chats(client: InferenceClient, model: str | None) -> str:
    """A chat, whole and streamed; returns the text."""
    asked = {"model": model, **GREEDY}
    answer = client.chat_completion(QUESTION, **asked)
    text = answer.choices[0].message.content
    check(f"{model}: a chat", text and answer.usage.completion_tokens > 0, answer)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *parts, last = client.chat_completion(QUESTION, **options, **asked)
    streamed = "".join(each.choices[0].delta.content or "" for each in parts)
    same(f"{model}: streamed as whole", streamed, text)
    same(f"{model}: usage", last.usage.completion_tokens, answer.usage.completion_tokens)
    again = client.chat.completions.create(messages=QUESTION, **asked)
    same(f"{model}: by OpenAI's name", again.choices[0].message.content, text)
    cut = client.chat_completion(QUESTION, stop=["Paris"], **asked).choices[0]
    check(f"{model}: stop", "Paris" not in cut.message.content, cut)
    scored = client.chat_completion(QUESTION, logprobs=True, top_logprobs=2, **asked)
    content = scored.choices[0].logprobs.content
    same(f"{model}: logprobs", len(content[0].top_logprobs), 2)
    return text


def tools(client: InferenceClient, model: str | None) -> None:
    """Calls that are forced, whole and streamed, and a result sent back."""
    asked = {"model": model, "tools": [TOOL], **GREEDY, "max_tokens": 64}
    for choice in ("required", {"function": {"name": "get_weather"}}):
        message = client.chat_completion(WEATHER, tool_choice=choice, **asked).choices[0].message
        (call, *_) = message.tool_calls
        same(f"{model}: {choice}", set(json.loads(call.function.arguments)), {"city"})
        parts = client.chat_completion(WEATHER, tool_choice=choice, stream=True, **asked)
        deltas = [each for part in parts for each in part.choices[0].delta.tool_calls or []]
        streamed = "".join(each.function.arguments for each in deltas if each.index in (None, 0))
        same(f"{model}: {choice}, streamed as whole", streamed, call.function.arguments)
    said = [
        *WEATHER,
        {"role": "assistant", "tool_calls": message.tool_calls},
        *(
            {"role": "tool", "tool_call_id": each.id, "content": "Sunny"}
            for each in message.tool_calls
        ),
    ]
    after = client.chat_completion(said, tool_choice="none", **asked).choices[0].message
    check(f"{model}: an answer to a result", after.content, after)


def formats(client: InferenceClient, model: str | None) -> None:
    """Outputs of a schema, in the forms that this client sends and that TGI documents."""
    for form in (
        {"type": "json_schema", "json_schema": {"name": "City", "schema": SCHEMA}},
        {"type": "json", "value": SCHEMA},
        {"type": "json_object", "value": SCHEMA},
        {"type": "regex", "value": r'\{"name": "[A-Z][a-z]{2,9}", "is_capital": true\}'},
    ):
        asked = {"model": model, **GREEDY, "max_tokens": 64}
        answer = client.chat_completion(QUESTION, response_format=form, **asked)
        text = answer.choices[0].message.content
        same(f"{model}: {form['type']}", set(json.loads(text)), set(SCHEMA["required"]))


def refusals(client: InferenceClient, model: str) -> None:
    """Each error is the exception that fits."""
    asked = {"prompt": PROMPT, "max_new_tokens": 10**6}
    raises("too long", ValidationError, client.text_generation, **asked)
    streamed = {**asked, "stream": True}
    raises("too long, streamed", ValidationError, drained, client.text_generation, **streamed)
    for fields, kind, status in (
        ({"model": "local:nobody"}, HfHubHTTPError, 404),
        ({"temperature": -1.0}, BadRequestError, 400),
    ):
        for stream in (False, True):
            asked = {"messages": QUESTION, "model": model, **fields, "stream": stream}
            error = raises(f"{fields}, {stream=}", kind, client.chat_completion, **asked)
            same(f"{fields}, {stream=}: status", error.response.status_code, status)


async def asynchronous(url: str, model: str, adapter: str, text: str, said: str) -> None:
    """The asynchronous client, several calls at once."""
    async with AsyncInferenceClient(url, timeout=300) as client:
        asked = {"max_new_tokens": 8, "adapter_id": adapter}
        several = await asyncio.gather(*(client.text_generation(PROMPT, **asked) for _ in "123"))
        same("async texts", several, [text] * 3)
        stream = await client.text_generation(PROMPT, stream=True, **asked)
        same("async stream", "".join([each async for each in stream]), text)
        answer = await client.chat_completion(QUESTION, model=adapter, **GREEDY)
        same("async chat", answer.choices[0].message.content, said)
        stream = await client.chat_completion(QUESTION, model=adapter, stream=True, **GREEDY)
        parts = [each.choices[0].delta.content or "" async for each in stream if each.choices]
        same("async chat, streamed", "".join(parts), said)
        too_long = {"prompt": PROMPT, "max_new_tokens": 10**6}
        await raises_later("async: too long", ValidationError, client.text_generation, **too_long)
    async with AsyncInferenceClient(url, timeout=0.5) as hasty:
        long = {"prompt": PROMPT, "max_new_tokens": 3000}
        long["grammar"] = {"type": "regex", "value": "[a-z ]{6000}"}
        await raises_later("a timeout", InferenceTimeoutError, hasty.text_generation, **long)


def main() -> None:
    """Check all."""
    url, base, adapter = sys.argv[1:]
    client = InferenceClient(url, timeout=300)
    made = {name: texts(client, name) for name in (None, adapter)}
    same("the adapter writes otherwise", len(set(made.values())), 2)
    bound_texts(client)
    said = {name: chats(client, name) for name in (None, base, adapter)}
    same("no model is the base", said[None], said[base])
    check("the adapter answers otherwise", said[adapter] != said[base], said)
    for name in (None, adapter):
        tools(client, name)
        formats(client, name)
    refusals(client, base)
    endpoint = InferenceClient(url, provider="hf-inference")
    check("health_check", endpoint.health_check())
    info = endpoint.get_endpoint_info()
    check("get_endpoint_info", info["max_total_tokens"] > 0, info)
    with InferenceClient(base_url=f"{url}/v1", api_key="none") as by_path:
        answer = by_path.chat_completion(QUESTION, model=adapter, **GREEDY)
        same("by OpenAI's base_url", answer.choices[0].message.content, said[adapter])
    asyncio.run(asynchronous(url, base, adapter, made[adapter], said[adapter]))


if __name__ == "__main__":
    main()
