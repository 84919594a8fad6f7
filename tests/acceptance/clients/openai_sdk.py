"""OpenAI's SDK on chats and completions, unmodified: ``python openai_sdk.py URL MODEL ADAPTER``."""

from __future__ import annotations

import asyncio
import json
import sys

import openai
from pydantic import BaseModel, Field

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]


class City(BaseModel):
    """What an answer is bound to."""

    name: str = Field(max_length=20)
    is_capital: bool


def check(name: str, found: object) -> None:
    """Say what was checked; raises if it is not so."""
    if not found:
        raise SystemExit(f"not ok: {name}")
    print(f"ok: {name}")


def chats(client: openai.OpenAI, model: str) -> str:
    """A chat, whole and streamed; returns the text."""
    wanted = {"model": model, "messages": QUESTION, "max_tokens": 24, "temperature": 0.0}
    answer = client.chat.completions.create(**wanted)
    text = answer.choices[0].message.content
    check(f"{model}: a chat", text and answer.id.startswith("chatcmpl-") and answer.model == model)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *parts, last = client.chat.completions.create(**wanted, **options)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts)
    check(f"{model}: streamed as whole", streamed == text)
    check(f"{model}: usage", last.usage == answer.usage and answer.usage.completion_tokens > 0)
    for stop in (["Paris"], "Paris"):
        cut = client.chat.completions.create(**wanted, stop=stop).choices[0]
        check(f"{model}: stop {stop}", "Paris" not in cut.message.content)
    return text


def completions(client: openai.OpenAI, model: str) -> None:
    """Completions of all kinds."""
    wanted = {"model": model, "temperature": 0.0, "max_tokens": 4}
    both = client.completions.create(prompt=["The sea is", "One, two,"], **wanted)
    check(f"{model}: two prompts", [each.index for each in both.choices] == [0, 1])
    alone = client.completions.create(prompt="One, two,", **wanted)
    check(f"{model}: as alone", alone.choices[0].text == both.choices[1].text)
    echo = client.completions.create(
        model=model, prompt="The sea is", echo=True, logprobs=1, max_tokens=0
    ).choices[0]
    check(f"{model}: echo", echo.text == "The sea is" and echo.logprobs.token_logprobs[0] is None)
    drawn = client.completions.create(
        model=model, prompt="The sea is", n=2, seed=3, logprobs=2, max_tokens=4
    )
    again = client.completions.create(model=model, prompt="The sea is", seed=3, max_tokens=4)
    check(f"{model}: a seed repeats", again.choices[0].text == drawn.choices[0].text)


def tools(client: openai.OpenAI, model: str) -> None:
    """Calls that are forced, whole and streamed."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    wanted = {
        "model": model, "messages": WEATHER, "tools": [TOOL], "tool_choice": named,
        "temperature": 0.0, "max_tokens": 60,
    }  # fmt: skip
    choice = client.chat.completions.create(**wanted).choices[0]
    (call,) = choice.message.tool_calls
    check(f"{model}: a call", set(json.loads(call.function.arguments)) == {"city"})
    check(f"{model}: its reason", choice.finish_reason == "tool_calls")
    parts = client.chat.completions.create(**wanted, stream=True)
    deltas = [d for part in parts for d in part.choices[0].delta.tool_calls or []]
    streamed = "".join(each.function.arguments for each in deltas)
    check(f"{model}: streamed as whole", streamed == call.function.arguments)
    free = client.chat.completions.create(**{**wanted, "tool_choice": "none"}).choices[0]
    check(f"{model}: none is called", not free.message.tool_calls)


def bound(client: openai.OpenAI, model: str) -> None:
    """Outputs of a schema."""
    parsed = client.chat.completions.parse(
        model=model, messages=QUESTION, response_format=City, max_tokens=60, temperature=0.0
    )
    check(f"{model}: parsed", isinstance(parsed.choices[0].message.parsed, City))


def refusals(client: openai.OpenAI, model: str) -> None:
    """Each error raises its exception."""
    cases = (
        (openai.NotFoundError, {"model": "local:nobody"}),
        (openai.BadRequestError, {"messages": []}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"max_tokens": 10**6}),
        (openai.BadRequestError, {"messages": [{"role": "wizard", "content": "x"}]}),
        (openai.BadRequestError, {"response_format": {"type": "json_schema"}, "n": 0}),
    )
    for expected, fields in cases:
        for stream in (False, True):
            wanted = {"model": model, "messages": QUESTION, "stream": stream, **fields}
            try:
                client.chat.completions.create(**wanted)
            except openai.APIStatusError as error:
                check(f"{fields}: {expected.__name__}", type(error) is expected and error.message)
            else:
                check(f"{fields}: is refused", False)


async def asynchronous(url: str, model: str, text: str) -> None:
    """The asynchronous client, several calls at once."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        wanted = {"model": model, "messages": QUESTION, "max_tokens": 24, "temperature": 0.0}
        answers = await asyncio.gather(*(client.chat.completions.create(**wanted) for _ in "123"))
        check("asynchronous", all(each.choices[0].message.content == text for each in answers))
        stream = await client.chat.completions.create(**wanted, stream=True)
        parts = [part.choices[0].delta.content or "" async for part in stream]
        check("asynchronous, streamed", "".join(parts) == text)


def main() -> None:
    """Check all."""
    url, base, adapter = sys.argv[1:]
    url += "/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    listed = [each.id for each in client.models.list()]
    check("models", base in listed and adapter in listed)
    check("a model", client.models.retrieve(adapter).parent == base)
    texts = {chats(client, model) for model in (base, adapter)}
    check("the adapter answers otherwise", len(texts) == 2)
    for model in (base, adapter):
        completions(client, model)
        tools(client, model)
        bound(client, model)
    refusals(client, base)
    asyncio.run(asynchronous(url, adapter, chats(client, adapter)))


if __name__ == "__main__":
    main()
