"""LiteLLM as a client, unmodified: ``python litellm_client.py URL MODEL ADAPTER``."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

# It would fetch its table of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from checks import check, drained, raises, raises_later, same
from pydantic import BaseModel, Field

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
NAMED = {"type": "function", "function": {"name": "get_weather"}}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
# What LiteLLM calls servers of this dialect, and what it asks them for.
PROVIDERS = ("openai", "hosted_vllm", "huggingface")


class City(BaseModel):
    """What an answer is bound to."""

    name: str = Field(max_length=20)
    is_capital: bool


def wanted(url: str, provider: str, name: str, **more: Any) -> dict[str, Any]:
    """The arguments of a call."""
    path = url if provider == "anthropic" else f"{url}/v1"
    if provider == "huggingface":
        path += "/chat/completions"
    return {
        "model": f"{provider}/{name}", "api_base": path, "api_key": "none", "temperature": 0.0,
        "max_tokens": 24, "num_retries": 0, "messages": QUESTION, **more,
    }  # fmt: skip


def chats(url: str, provider: str, name: str) -> str:
    """A chat, whole and streamed; returns the text."""
    asked, at = wanted(url, provider, name), f"{provider}/{name}"
    answer = litellm.completion(**asked)
    text = answer.choices[0].message.content
    check(
        f"{at}: completion", text and answer.choices[0].finish_reason in ("stop", "length"), answer
    )
    check(f"{at}: usage", answer.usage.completion_tokens > 0, answer.usage)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = list(litellm.completion(**asked, **options))
    whole = litellm.stream_chunk_builder(parts, messages=QUESTION)
    same(f"{at}: streamed as whole", whole.choices[0].message.content, text)
    same(f"{at}: streamed usage", whole.usage.completion_tokens, answer.usage.completion_tokens)
    cut = litellm.completion(**asked, stop=["Paris"]).choices[0]
    check(f"{at}: stop", "Paris" not in (cut.message.content or ""), cut)
    return text


def tools(url: str, provider: str, name: str) -> None:
    """Calls that are forced, whole and streamed, and a result sent back."""
    asked = wanted(url, provider, name, messages=WEATHER, tools=[TOOL], max_tokens=64)
    for choice in (NAMED, "required"):
        answer = litellm.completion(**asked, tool_choice=choice)
        (call, *_) = answer.choices[0].message.tool_calls
        shown = f"{provider}/{name}: {choice if choice is not NAMED else 'named'}"
        same(f"{shown}: a call", set(json.loads(call.function.arguments)), {"city"})
        parts = list(litellm.completion(**asked, tool_choice=choice, stream=True))
        whole = litellm.stream_chunk_builder(parts, messages=WEATHER).choices[0].message
        arguments = whole.tool_calls[0].function.arguments
        same(f"{shown}: streamed as whole", arguments, call.function.arguments)
    said = [*WEATHER, answer.choices[0].message]
    said += [
        {"role": "tool", "tool_call_id": each.id, "content": "Sunny"}
        for each in answer.choices[0].message.tool_calls
    ]
    after = litellm.completion(**{**asked, "messages": said, "tool_choice": "none"})
    message = after.choices[0].message
    check(f"{provider}/{name}: an answer to a result", message.content, message)


def bound(url: str, provider: str, name: str) -> None:
    """Outputs of a schema, in each form that LiteLLM takes."""
    schema = {"name": "City", "schema": City.model_json_schema(), "strict": True}
    for form in (City, {"type": "json_schema", "json_schema": schema}):
        asked = wanted(url, provider, name, response_format=form, max_tokens=64)
        text = litellm.completion(**asked).choices[0].message.content
        shown = "a class" if form is City else "a schema"
        found = City.model_validate_json(text)
        check(f"{provider}/{name}: {shown}", found.name is not None, text)
    form = {"type": "json_object"}
    text = litellm.completion(**wanted(url, provider, name, response_format=form))
    content = text.choices[0].message.content
    check(f"{provider}/{name}: json_object", content.lstrip().startswith("{"), content)


def completions(url: str, name: str) -> None:
    """Completions of texts."""
    asked = {
        "model": f"text-completion-openai/{name}", "api_base": f"{url}/v1", "api_key": "none",
        "prompt": "The sea is", "temperature": 0.0, "max_tokens": 8,
    }  # fmt: skip
    text = litellm.text_completion(**asked).choices[0].text
    check(f"{name}: text_completion", text, text)
    parts = litellm.text_completion(**asked, stream=True)
    streamed = "".join(each.choices[0].text or "" for each in parts if each.choices)
    same(f"{name}: streamed as whole", streamed, text)


def responses(url: str, name: str) -> None:
    """OpenAI's Responses."""
    asked = {
        "model": f"openai/{name}", "api_base": f"{url}/v1", "api_key": "none",
        "input": QUESTION[0]["content"], "temperature": 0.0, "max_output_tokens": 24,
    }  # fmt: skip
    answer = litellm.responses(**asked)
    text = answer.output[0].content[0].text
    check(f"{name}: responses", text, answer)
    events = list(litellm.responses(**asked, stream=True))
    deltas = [each.delta for each in events if each.type == "response.output_text.delta"]
    same(f"{name}: responses, streamed as whole", "".join(deltas), text)


async def messages(url: str, name: str) -> None:
    """Anthropic's messages, through LiteLLM's two ways."""
    text = chats(url, "anthropic", name)
    tools(url, "anthropic", name)
    answer = await litellm.anthropic.messages.acreate(
        model=f"anthropic/{name}", api_base=url, api_key="none", messages=QUESTION, max_tokens=24,
        temperature=0.0,
    )  # fmt: skip
    same(f"{name}: messages", answer["content"][0]["text"], text)


def refusals(url: str, model: str) -> None:
    """Each error is mapped to LiteLLM's own."""
    for provider in ("openai", "hosted_vllm", "anthropic"):
        for fields, kind in (
            ({"model": f"{provider}/local:nobody"}, litellm.NotFoundError),
            ({"temperature": -1.0}, litellm.BadRequestError),
            ({"max_tokens": 10**6}, litellm.BadRequestError),
        ):
            asked = {**wanted(url, provider, model), **fields}
            name = f"{provider}: {fields}: {kind.__name__}"
            raises(name, kind, litellm.completion, **asked)
            raises(f"{name}, streamed", kind, drained, litellm.completion, **asked, stream=True)


def what_users_ask_next(url: str, base: str, adapter: str) -> None:
    """Parameters that it knows of, the list of models, a router with a fallback."""
    known = litellm.get_supported_openai_params(model=adapter, custom_llm_provider="hosted_vllm")
    check("supported parameters", {"tools", "response_format"} <= set(known), known)
    listed = litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_base=f"{url}/v1",
        api_key="none",
    )  # fmt: skip
    check("models", any(each.endswith(adapter) for each in listed), listed)
    extra = wanted(url, "openai", adapter, extra_body={"top_k": 1, "repetition_penalty": 1.1})
    check("extra_body", litellm.completion(**extra).choices[0].message.content)
    dropped = wanted(url, "openai", adapter, drop_params=True, verbosity="low", top_k=1)
    check("drop_params", litellm.completion(**dropped).choices[0].message.content)
    names = {"gone": "local:nobody", "here": adapter}
    router = litellm.Router(
        model_list=[
            {
                "model_name": name,
                "litellm_params": {
                    "model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none",
                },
            }
            for name, model in names.items()
        ],
        fallbacks=[{"gone": ["here"]}],
        num_retries=0,
    )  # fmt: skip
    answer = router.completion(model="gone", messages=QUESTION, max_tokens=8)
    check("a router's fallback", answer.choices[0].message.content, answer)


async def asynchronous(url: str, name: str, text: str) -> None:
    """The asynchronous calls, several at once."""
    asked = wanted(url, "openai", name)
    several = await asyncio.gather(*(litellm.acompletion(**asked) for _ in range(3)))
    same("acompletion", [each.choices[0].message.content for each in several], [text] * 3)
    stream = await litellm.acompletion(**asked, stream=True)
    parts = [each.choices[0].delta.content or "" async for each in stream]
    same("acompletion, streamed", "".join(parts), text)
    slow = {**asked, "max_tokens": 3000, "extra_body": {"ignore_eos": True}, "timeout": 0.5}
    await raises_later("a timeout", litellm.Timeout, litellm.acompletion, **slow)
    await messages(url, name)


def main() -> None:
    """Check all."""
    url, base, adapter = sys.argv[1:]
    for provider in PROVIDERS:
        texts = {name: chats(url, provider, name) for name in (base, adapter)}
        same(f"{provider}: the adapter answers otherwise", len(set(texts.values())), 2)
        tools(url, provider, adapter)
        bound(url, provider, adapter)
    for name in (base, adapter):
        completions(url, name)
        responses(url, name)
    refusals(url, base)
    what_users_ask_next(url, base, adapter)
    asyncio.run(asynchronous(url, adapter, texts[adapter]))


if __name__ == "__main__":
    main()
