"""OpenAI's SDK on Responses, unmodified: ``python openai_responses.py URL MODEL ADAPTER``."""

from __future__ import annotations

import asyncio
import json
import sys

import openai
from checks import check, same, used
from pydantic import BaseModel, Field

TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Tell the weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
QUESTION = "What is the capital of France?"


class City(BaseModel):
    """What an answer is bound to."""

    name: str = Field(max_length=20)
    is_capital: bool


def plain(client: openai.OpenAI, model: str) -> str:
    """Responses, whole and streamed; returns the text."""
    wanted = {"model": model, "input": QUESTION, "max_output_tokens": 24, "temperature": 0.0}
    response = client.responses.create(**wanted)
    text = response.output_text
    check(f"{model}: a response", text and response.id.startswith("resp_"))
    check(f"{model}: not kept", response.store is False)
    with client.responses.stream(**wanted) as stream:
        events = list(stream)
        last = stream.get_final_response()
    deltas = [each.delta for each in events if each.type == "response.output_text.delta"]
    check(f"{model}: streamed as whole", "".join(deltas) == text == last.output_text)
    same(f"{model}: usage", used(last.usage), used(response.usage))
    check(f"{model}: usage is counted", response.usage.output_tokens > 0)
    check(f"{model}: status", last.status == response.status)
    return text


def conversations(client: openai.OpenAI, model: str) -> None:
    """Items in, statuses out."""
    short = client.responses.create(model=model, input=QUESTION, max_output_tokens=1)
    check("max_output_tokens ends it", short.status == "incomplete")
    check("and says so", short.incomplete_details.reason == "max_output_tokens")
    items = [
        {"role": "user", "content": QUESTION},
        *client.responses.create(model=model, input=QUESTION, max_output_tokens=16).output,
        {"role": "user", "content": [{"type": "input_text", "text": "And of Italy?"}]},
    ]
    response = client.responses.create(
        model=model, input=items, instructions="Be brief.", max_output_tokens=16
    )
    check("a conversation goes on", response.output_text)


def tools(client: openai.OpenAI, model: str) -> None:
    """A forced call, whole and streamed, and its result sent back."""
    said = [{"role": "user", "content": "What is the weather in Paris?"}]
    wanted = {
        "model": model,
        "input": said,
        "max_output_tokens": 64,
        "tools": [TOOL],
        "tool_choice": "required",
        "temperature": 0.0,
        "parallel_tool_calls": False,
    }
    (call,) = client.responses.create(**wanted).output
    check("a call", call.type == "function_call" and "city" in json.loads(call.arguments))
    with client.responses.stream(**wanted) as stream:
        last = stream.get_final_response()
    check("streamed as whole", last.output[0].arguments == call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}
    after = client.responses.create(
        **{**wanted, "input": [*said, call, result], "tool_choice": "none"}
    )
    check("an answer to a result", after.output_text)


def parsed(client: openai.OpenAI, model: str) -> None:
    """A schema made of a class binds the output."""
    response = client.responses.parse(
        model=model, input=QUESTION, text_format=City, max_output_tokens=64, temperature=0.0
    )
    check("parsed", isinstance(response.output_parsed, City))


def errors(client: openai.OpenAI, model: str) -> None:
    """Each status is the exception that fits."""
    for stream in (False, True):
        for fields, kind in (
            ({"model": "local:no-such-folder"}, openai.NotFoundError),
            ({"store": True}, openai.BadRequestError),
            ({"previous_response_id": "resp_1"}, openai.BadRequestError),
            ({"tools": [{"type": "web_search"}]}, openai.BadRequestError),
            ({"input": []}, openai.BadRequestError),
        ):
            try:
                client.responses.create(
                    **{"model": model, "input": QUESTION, "stream": stream, **fields}
                )
            except kind as error:
                check(f"{kind.__name__} for {[*fields]}, {stream=}", error.body["message"])
            else:
                check(f"{kind.__name__} for {fields}", False)


async def asynchronous(url: str, model: str, expected: str) -> None:
    """The same with the asynchronous client, many at once."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        wanted = {"model": model, "input": QUESTION, "max_output_tokens": 24, "temperature": 0.0}
        answers = await asyncio.gather(*(client.responses.create(**wanted) for _ in range(3)))
        check("async", {each.output_text for each in answers} == {expected})
        async with client.responses.stream(**wanted) as stream:
            last = await stream.get_final_response()
        check("async stream", last.output_text == expected)


def main() -> None:
    """Run all checks."""
    url, model, adapter = sys.argv[1:]
    url = f"{url}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    expected = plain(client, model)
    check("the adapter is another model", plain(client, adapter) != expected)
    conversations(client, model)
    tools(client, model)
    parsed(client, model)
    errors(client, model)
    asyncio.run(asynchronous(url, model, expected))


if __name__ == "__main__":
    main()
