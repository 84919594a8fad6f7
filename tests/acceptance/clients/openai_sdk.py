"""OpenAI's SDK on chats and completions, unmodified: ``python openai_sdk.py URL MODEL ADAPTER``."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.request

import openai
from checks import check, raises, raises_later, same, used
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
    same(f"{model}: usage", used(last.usage), used(answer.usage))
    check(f"{model}: usage is counted", answer.usage.completion_tokens > 0)
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


def bound(client: openai.OpenAI, model: str) -> City:
    """Outputs of a schema, whole and streamed; returns one."""
    wanted = {"model": model, "messages": QUESTION, "max_tokens": 60, "temperature": 0.0}
    parsed = client.chat.completions.parse(**wanted, response_format=City).choices[0].message
    check(f"{model}: parsed", isinstance(parsed.parsed, City), parsed)
    with client.chat.completions.stream(**wanted, response_format=City) as stream:
        events = [each.type for each in stream]
        last = stream.get_final_completion().choices[0].message
    same(f"{model}: streamed and parsed", last.parsed, parsed.parsed)
    check(
        f"{model}: as it forms", {"chunk", "content.delta", "content.done"} <= set(events), events
    )
    mode = client.chat.completions.create(**wanted, response_format={"type": "json_object"})
    content = mode.choices[0].message.content
    check(f"{model}: json_object", content.lstrip().startswith("{"), content)
    tool = openai.pydantic_function_tool(City)
    asked = {**wanted, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    (call,) = client.chat.completions.parse(**asked).choices[0].message.tool_calls
    check(f"{model}: parsed arguments", isinstance(call.function.parsed_arguments, City), call)
    with client.chat.completions.stream(**asked) as stream:
        kinds = {each.type for each in stream}
        last = stream.get_final_completion().choices[0].message
    check(f"{model}: arguments as they form", "tool_calls.function.arguments.done" in kinds, kinds)
    arguments = last.tool_calls[0].function.parsed_arguments
    same(f"{model}: arguments streamed", arguments, call.function.parsed_arguments)
    short = {**wanted, "max_tokens": 2, "response_format": City}
    raises(
        f"{model}: cut off", openai.LengthFinishReasonError, client.chat.completions.parse, **short
    )
    return parsed.parsed


def both(client: openai.OpenAI, model: str) -> None:
    """A schema beside tools binds the text; what is a call is bound by its tool."""
    wanted = {
        "model": model, "max_tokens": 96, "temperature": 0.0, "response_format": City,
        "tools": [openai.pydantic_function_tool(City, name="tell")], "messages": QUESTION,
        "parallel_tool_calls": False,
    }  # fmt: skip
    parse = client.chat.completions.parse
    (call,) = parse(**wanted, tool_choice="required").choices[0].message.tool_calls
    arguments = call.function.parsed_arguments
    check(f"{model}: a call beside a schema", isinstance(arguments, City), call)
    message = parse(**wanted).choices[0].message
    calls = [each.function.parsed_arguments for each in message.tool_calls or []]
    said = calls or [message.parsed]
    check(f"{model}: the one or the other", all(isinstance(each, City) for each in said), message)


def streams(client: openai.OpenAI, model: str) -> None:
    """Several answers in one stream, logprobs, completions, and a stream that is left early."""
    # The SDK's helper takes an answer that was cut off for an error.
    wanted = {"model": model, "messages": QUESTION, "max_tokens": 400, "seed": 5, "stop": ["."]}
    whole = client.chat.completions.create(**wanted, n=2, logprobs=True, top_logprobs=2)
    with client.chat.completions.stream(**wanted, n=2, logprobs=True, top_logprobs=2) as stream:
        kinds = {each.type for each in stream}
        last = stream.get_final_completion()
    texts = [each.message.content for each in last.choices]
    same(f"{model}: two in one stream", texts, [each.message.content for each in whole.choices])
    check(f"{model}: their logprobs", "logprobs.content.delta" in kinds, kinds)
    scored = [len(each.logprobs.content) for each in last.choices]
    same(f"{model}: of each token", scored, [len(each.logprobs.content) for each in whole.choices])
    asked = {"model": model, "prompt": "The sea is", "max_tokens": 6, "temperature": 0.0}
    text = client.completions.create(**asked).choices[0].text
    parts = [each.choices[0].text for each in client.completions.create(**asked, stream=True)]
    same(f"{model}: a completion streamed", "".join(parts), text)


def around(client: openai.OpenAI, url: str, model: str) -> None:
    """What users reach for next: heads, raw answers, other fields, deadlines, streams left early."""
    wanted = {"model": model, "messages": QUESTION, "max_tokens": 8, "temperature": 0.0}
    raw = client.chat.completions.with_raw_response.create(**wanted)
    answer = raw.parse()
    check("a request id", answer._request_id and answer._request_id == raw.request_id, raw.headers)
    same("no retry", raw.retries_taken, 0)
    with client.chat.completions.with_streaming_response.create(**wanted) as response:
        text = json.loads(response.read())["choices"][0]["message"]["content"]
    same("a streamed body", text, answer.choices[0].message.content)
    greedy = {**wanted, "extra_body": {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}}
    greedy.pop("temperature")
    same("extra_body", client.chat.completions.create(**greedy).choices[0].message.content, text)
    other = client.chat.completions.create(**wanted, extra_body={"guided_regex": "[0-9]{4}"})
    check("a pattern of vLLM's", other.choices[0].message.content.isdecimal(), other)
    long = {**wanted, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    hasty = client.with_options(timeout=0.5)
    raises("a timeout", openai.APITimeoutError, hasty.chat.completions.create, **long)
    becomes_idle(url, "what timed out is ended")
    with client.chat.completions.create(**long, stream=True) as stream:
        next(iter(stream))
    becomes_idle(url, "a stream that is left is ended")


def becomes_idle(url: str, name: str) -> None:
    """Check that the server computes nothing before long."""
    for _ in range(200):
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        running = [line for line in lines if line.startswith("vllm:num_requests_running{")]
        if running and all(line.split()[-1] in ("0", "0.0") for line in running):
            break
        time.sleep(0.1)
    else:
        check(name, False, running)
    check(name, True)


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
            error = raises(
                f"{fields}: {expected.__name__}", expected, client.chat.completions.create, **wanted
            )
            check(f"{fields}: in words", error.message and error.request_id, error.body)
    raises("an unknown model's card", openai.NotFoundError, client.models.retrieve, "local:nobody")
    raises("no such route", openai.NotFoundError, client.images.generate, prompt="a sea")


async def asynchronous(url: str, model: str, text: str, city: City) -> None:
    """The asynchronous client, several calls at once."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        wanted = {"model": model, "messages": QUESTION, "max_tokens": 24, "temperature": 0.0}
        answers = await asyncio.gather(*(client.chat.completions.create(**wanted) for _ in "123"))
        check("asynchronous", all(each.choices[0].message.content == text for each in answers))
        stream = await client.chat.completions.create(**wanted, stream=True)
        parts = [part.choices[0].delta.content or "" async for part in stream]
        same("asynchronous, streamed", "".join(parts), text)
        bound_to = {**wanted, "max_tokens": 60, "response_format": City}
        parsed = await client.chat.completions.parse(**bound_to)
        same("asynchronous, parsed", parsed.choices[0].message.parsed, city)
        async with client.chat.completions.stream(**bound_to) as stream:
            last = await stream.get_final_completion()
        same("asynchronous, streamed and parsed", last.choices[0].message.parsed, city)
        listed = [each.id async for each in client.models.list()]
        check("asynchronous, models", model in listed, listed)
        asked = {"model": model, "prompt": "The sea is", "max_tokens": 4}
        check("asynchronous, a completion", (await client.completions.create(**asked)).choices)
        await raises_later(
            "asynchronous, an unknown model", openai.NotFoundError, client.chat.completions.create,
            model="local:nobody", messages=QUESTION,
        )  # fmt: skip
        task = asyncio.create_task(client.chat.completions.create(**{**wanted, "max_tokens": 4000}))
        await asyncio.sleep(0.2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


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
        city = bound(client, model)
        both(client, model)
        streams(client, model)
    refusals(client, base)
    around(client, url, adapter)
    asyncio.run(asynchronous(url, adapter, chats(client, adapter), city))
    becomes_idle(url, "what was cancelled is ended")


if __name__ == "__main__":
    main()
