"""Anthropic's SDK, unmodified: ``python anthropic_sdk.py URL MODEL ADAPTER``."""

from __future__ import annotations

import asyncio
import sys

import anthropic
from checks import check, same, used

TOOL = {
    "name": "get_weather",
    "description": "Tell the weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
# The SDK has no argument for it any more.
GREEDY = {"temperature": 0.0}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def plain(client: anthropic.Anthropic, model: str) -> str:
    """Messages, whole and streamed; returns the text."""
    wanted = {"model": model, "max_tokens": 24, "messages": QUESTION, "extra_body": GREEDY}
    message = client.messages.create(**wanted)
    (block,) = message.content
    check(f"{model}: a message", block.type == "text" and block.text)
    check(f"{model}: its id", message.id.startswith("msg_") and message._request_id)
    with client.messages.stream(**wanted) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    check(f"{model}: streamed as whole", text == block.text == last.content[0].text)
    same(f"{model}: usage", used(last.usage), used(message.usage))
    check(f"{model}: usage is counted", message.usage.output_tokens > 0)
    check(f"{model}: reason", last.stop_reason == message.stop_reason)
    kinds = [each.type for each in client.messages.create(stream=True, **wanted)]
    check(f"{model}: events", kinds[0] == "message_start" and kinds[-1] == "message_stop")
    return text


def stops(client: anthropic.Anthropic, model: str) -> None:
    """What ends an answer."""
    short = client.messages.create(model=model, max_tokens=1, messages=QUESTION)
    check("max_tokens ends it", short.stop_reason == "max_tokens")
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    wanted = {"model": model, "max_tokens": 24, "messages": begun, "extra_body": GREEDY}
    message = client.messages.create(**wanted)
    check("an answer is continued", "Paris" in message.content[0].text)
    stopped = client.messages.create(**wanted, stop_sequences=["Paris"])
    check("a stop sequence ends it", stopped.stop_reason == "stop_sequence")
    check("and is named", stopped.stop_sequence == "Paris")


def counts(client: anthropic.Anthropic, model: str) -> None:
    """Tokens counted are tokens used."""
    counted = client.messages.count_tokens(model=model, messages=QUESTION, system="Be brief.")
    usage = client.messages.create(
        model=model, max_tokens=1, messages=QUESTION, system="Be brief."
    ).usage
    same("count_tokens", counted.input_tokens, used(usage)["input_tokens"])


def tools(client: anthropic.Anthropic, model: str) -> None:
    """A forced call, whole and streamed, and its result sent back."""
    wanted = {
        "model": model,
        "max_tokens": 64,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [TOOL],
        "extra_body": GREEDY,
    }
    for choice in ({"type": "tool", "name": "get_weather"}, {"type": "any"}):
        message = client.messages.create(**wanted, tool_choice=choice)
        call = message.content[0]
        check(f"{choice['type']}: a call", call.type == "tool_use" and "city" in call.input)
        check(f"{choice['type']}: its reason", message.stop_reason == "tool_use")
        with client.messages.stream(**wanted, tool_choice=choice) as stream:
            last = stream.get_final_message()
        check(f"{choice['type']}: streamed as whole", last.content[0].input == call.input)
    results = [
        {"type": "tool_result", "tool_use_id": each.id, "content": "Sunny"}
        for each in message.content
    ]
    said = [
        *wanted["messages"],
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": results},
    ]
    after = client.messages.create(**{**wanted, "messages": said}, tool_choice={"type": "none"})
    check("an answer to a result", after.content and after.content[0].type == "text")


def errors(client: anthropic.Anthropic, model: str) -> None:
    """Each status is the exception that fits."""
    for stream in (False, True):
        wanted = {"max_tokens": 4, "messages": QUESTION, "stream": stream}
        for fields, kind in (
            ({"model": "local:no-such-folder"}, anthropic.NotFoundError),
            ({"model": model, "max_tokens": 0}, anthropic.BadRequestError),
            ({"model": model, "messages": []}, anthropic.BadRequestError),
        ):
            try:
                client.messages.create(**{**wanted, **fields})
            except kind as error:
                check(f"{kind.__name__}, {stream=}", error.body["request_id"] == error.request_id)
            else:
                check(f"{kind.__name__} for {fields}", False)


async def asynchronous(url: str, model: str, expected: str) -> None:
    """The same with the asynchronous client, many at once."""
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none") as client:
        wanted = {"model": model, "max_tokens": 24, "messages": QUESTION, "extra_body": GREEDY}
        messages = await asyncio.gather(*(client.messages.create(**wanted) for _ in range(3)))
        check("async", {each.content[0].text for each in messages} == {expected})
        async with client.messages.stream(**wanted) as stream:
            text = "".join([each async for each in stream.text_stream])
        check("async stream", text == expected)


def main() -> None:
    """Run all checks."""
    url, model, adapter = sys.argv[1:]
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    expected = plain(client, model)
    check("the adapter is another model", plain(client, adapter) != expected)
    stops(client, model)
    counts(client, model)
    counts(client, adapter)
    tools(client, model)
    errors(client, model)
    asyncio.run(asynchronous(url, model, expected))


if __name__ == "__main__":
    main()
