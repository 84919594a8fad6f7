"""LangChain's package for OpenAI, unmodified: ``python langchain_chat.py URL MODEL ADAPTER``."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import openai
from checks import check, drained, raises, raises_later, same, used
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

QUESTION = "What is the capital of France?"
WEATHER = "What is the weather in Paris?"


class City(BaseModel):
    """What an answer is bound to."""

    name: str = Field(max_length=20)
    is_capital: bool


class GetWeather(BaseModel):
    """Tell the weather of a city."""

    city: str = Field(max_length=20)


def look(place: str) -> str:
    """Look at a place."""
    return place


def added(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    """What LangChain makes of a stream."""
    whole = chunks[0]
    for each in chunks[1:]:
        whole += each
    return whole


def chats(chat: ChatOpenAI, name: str) -> str:
    """A chat, whole, streamed and in batches; returns the text."""
    answer = chat.invoke(QUESTION)
    check(f"{name}: invoke", isinstance(answer, AIMessage) and answer.text, answer)
    usage = answer.usage_metadata
    check(f"{name}: usage", usage and usage["output_tokens"] > 0, usage)
    reason = answer.response_metadata["finish_reason"]
    check(f"{name}: reason", reason in ("stop", "length"), reason)
    same(f"{name}: model", answer.response_metadata["model_name"], name)
    check(f"{name}: a request id", answer.id, answer)
    streamed = added(list(chat.stream(QUESTION, stream_usage=True)))
    same(f"{name}: streamed as whole", streamed.text, answer.text)
    same(f"{name}: streamed usage", used(streamed.usage_metadata), used(usage))
    messages = [("system", "Be brief."), ("human", "Hi"), ("ai", "Hello"), ("human", QUESTION)]
    several = chat.batch([QUESTION, messages, [HumanMessage(QUESTION)]])
    same(f"{name}: batch", [each.text for each in several][::2], [answer.text] * 2)
    check(f"{name}: a conversation", several[1].text, several[1])
    cut = chat.invoke(QUESTION, stop=["Paris"])
    check(f"{name}: stop", "Paris" not in cut.text, cut)
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    content = scored.response_metadata["logprobs"]["content"]
    check(f"{name}: logprobs", content and len(content[0]["top_logprobs"]) == 2, content)
    return answer.text


def tools(chat: ChatOpenAI, name: str) -> None:
    """Calls that are forced, whole and streamed, and their results sent back."""
    for choice in ("GetWeather", "any", "required", True):
        bound = chat.bind_tools([GetWeather], tool_choice=choice)
        answer = bound.invoke(WEATHER)
        (call, *_) = answer.tool_calls
        same(f"{name}: {choice!r}: called", call["name"], "GetWeather")
        same(f"{name}: {choice!r}: arguments", set(call["args"]), {"city"})
        check(f"{name}: {choice!r}: valid", not answer.invalid_tool_calls, answer)
        streamed = added(list(bound.stream(WEATHER)))
        shown = [each["args"] for each in streamed.tool_calls]
        same(f"{name}: {choice!r}: as whole", shown, [each["args"] for each in answer.tool_calls])
    strict = chat.bind_tools([GetWeather, look], strict=True, parallel_tool_calls=False)
    check(f"{name}: strict tools", strict.invoke(WEATHER).response_metadata["finish_reason"])
    said: list[Any] = [HumanMessage(WEATHER), answer]
    said += [ToolMessage("Sunny", tool_call_id=each["id"]) for each in answer.tool_calls]
    none = chat.bind_tools([GetWeather, look], tool_choice="none").invoke(said)
    check(f"{name}: an answer to a result", not none.tool_calls and none.text, none)


def structured(chat: ChatOpenAI, name: str) -> None:
    """Outputs of a schema, in each of LangChain's methods."""
    for method in ("json_schema", "function_calling"):
        bound = chat.with_structured_output(City, method=method)
        found = bound.invoke(QUESTION)
        check(f"{name}: {method}", isinstance(found, City), found)
        last = list(bound.stream(QUESTION))[-1]
        same(f"{name}: {method}: streamed as whole", last, found)
        raw = chat.with_structured_output(City, method=method, include_raw=True).invoke(QUESTION)
        same(f"{name}: {method}: with the message", raw["parsed"], found)
        strict = chat.with_structured_output(City, method=method, strict=True).invoke(QUESTION)
        check(f"{name}: {method}: strict", isinstance(strict, City), strict)
        schema = {"title": "City", "description": "A city", **City.model_json_schema()}
        plain = chat.with_structured_output(schema, method=method).invoke(QUESTION)
        same(f"{name}: {method}: a dictionary", set(plain), {"name", "is_capital"})
    mode = chat.with_structured_output(City, method="json_mode", include_raw=True)
    raw = mode.invoke(f"{QUESTION} Answer in JSON.")
    check(f"{name}: json_mode", raw["raw"].text.lstrip().startswith("{"), raw)


def responses(url: str, name: str) -> None:
    """The same class on Responses."""
    chat = ChatOpenAI(
        base_url=url, api_key="none", model=name, temperature=0, max_tokens=64,
        use_responses_api=True, max_retries=0,
    )  # fmt: skip
    answer = chat.invoke(QUESTION)
    check(f"{name}: responses", answer.text and answer.usage_metadata["output_tokens"] > 0, answer)
    same(f"{name}: streamed as whole", added(list(chat.stream(QUESTION))).text, answer.text)
    bound = chat.bind_tools([GetWeather], tool_choice="GetWeather").invoke(WEATHER)
    same(f"{name}: responses: a call", set(bound.tool_calls[0]["args"]), {"city"})
    result = ToolMessage("Sunny", tool_call_id=bound.tool_calls[0]["id"])
    after = chat.invoke([HumanMessage(WEATHER), bound, result])
    check(f"{name}: responses: an answer to a result", after.text, after)
    found = chat.with_structured_output(City).invoke(QUESTION)
    check(f"{name}: responses: a schema", isinstance(found, City), found)


def completions(url: str, name: str) -> None:
    """LangChain's class of completions."""
    model = OpenAI(
        base_url=url, api_key="none", model=name, temperature=0, max_tokens=8, max_retries=0
    )
    text = model.invoke("The sea is")
    check(f"{name}: a completion", text, text)
    same(f"{name}: streamed as whole", "".join(model.stream("The sea is")), text)
    same(f"{name}: in batches", model.batch(["The sea is", "One, two,"])[0], text)
    result = model.generate(["The sea is"])
    check(f"{name}: usage", result.llm_output["token_usage"]["completion_tokens"], result)


def refusals(url: str, model: str) -> None:
    """Each error raises the exception of the SDK below."""
    for fields, kind in (
        ({"model": "local:nobody"}, openai.NotFoundError),
        ({"model": model, "temperature": -1}, openai.BadRequestError),
        ({"model": model, "max_tokens": 10**6}, openai.BadRequestError),
    ):
        chat = ChatOpenAI(base_url=url, api_key="none", max_retries=0, **fields)
        error = raises(f"{fields}: {kind.__name__}", kind, chat.invoke, QUESTION)
        check(f"{fields}: in words", error.body["message"], error.body)
        raises(f"{fields}: {kind.__name__}, streamed", kind, drained, chat.stream, QUESTION)


async def asynchronous(chat: ChatOpenAI, text: str) -> None:
    """The asynchronous methods, several calls at once."""
    answer = await chat.ainvoke(QUESTION)
    same("ainvoke", answer.text, text)
    several = await chat.abatch([QUESTION] * 3)
    same("abatch", [each.text for each in several], [text] * 3)
    same("astream", added([each async for each in chat.astream(QUESTION)]).text, text)
    kinds = {each["event"] async for each in chat.astream_events(QUESTION, version="v2")}
    check("astream_events", "on_chat_model_stream" in kinds, kinds)
    found = await chat.with_structured_output(City).ainvoke(QUESTION)
    check("a schema", isinstance(found, City), found)
    call = await chat.bind_tools([GetWeather], tool_choice="any").ainvoke(WEATHER)
    same("a call", set(call.tool_calls[0]["args"]), {"city"})
    chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | chat
    same("a chain", (await chain.ainvoke({"question": QUESTION})).text, text)
    short = chat.bind(max_tokens=3000, extra_body={"ignore_eos": True}, timeout=0.5)
    await raises_later("a timeout", openai.APITimeoutError, short.ainvoke, QUESTION)


def main() -> None:
    """Check all."""
    url, *models = sys.argv[1:]
    url += "/v1"
    made = {
        name: ChatOpenAI(
            base_url=url, api_key="none", model=name, temperature=0, max_tokens=64, max_retries=0
        )
        for name in models
    }
    texts = {name: chats(chat, name) for name, chat in made.items()}
    same("the adapter answers otherwise", len(set(texts.values())), 2)
    for name, chat in made.items():
        tools(chat, name)
        structured(chat, name)
        responses(url, name)
        completions(url, name)
    refusals(url, models[0])
    asyncio.run(asynchronous(made[models[1]], texts[models[1]]))


if __name__ == "__main__":
    main()
